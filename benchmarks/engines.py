"""Engines for RTX cards, compiled on this machine without a GPU: how large, how long, how much memory.

    python -m benchmarks.engines [--profile NAME ...]

A network of ResNet-50's shape (25.5 million parameters, random weights) and a small transformer encoder of dynamic
length, in FP32, FP16 and INT8, through the pipeline and the real builder of TensorRT for RTX. It prints Markdown. It
fails if the ResNet's INT8 plan is more than 0.40 of its FP32 plan.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from edge_sdk import console
from edge_sdk.compile.pipeline import build_engine
from edge_sdk.errors import ProfileError
from edge_sdk.profiles import Precision, load_profile
from edge_sdk.spec import Axis, Calibration, EngineSpec
from tests.compile.nets import LENGTH, encoder, photos, resnet50, sentences

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
MOST_INT8 = 0.40
"""Of the FP32 plan's size. A quarter is what the weights need; the rest is kernels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--profile", nargs="+", default=["desktop-rtx-30", "desktop-rtx-40", "desktop-rtx-50"])
    profiles = parser.parse_args().profile
    rows = [("model", "profile", "precision", "plan", "of FP32's", "compiled in", "memory")]
    ratios = []
    with tempfile.TemporaryDirectory(prefix="edge-sdk-engines-") as folder:
        for spec in specs(Path(folder)):
            for profile in profiles:
                sizes: dict[Precision, int] = {}
                for precision in PRECISIONS:
                    try:
                        package = build_engine(
                            spec, profile=profile, precision=precision, output=Path(folder) / "built", force=True
                        )
                    except ProfileError:  # a profile without FP32
                        continue
                    engine = package.manifest.backend.engine
                    if engine is None:
                        sys.exit(f"Nothing was compiled: {package.manifest.backend.missing}")
                    sizes[precision] = engine.bytes
                    share = engine.bytes / sizes["fp32"] if "fp32" in sizes else None
                    rows.append(
                        (
                            spec.name, load_profile(profile).name, precision.upper(), console.size(engine.bytes),
                            f"{share:.2f}" if share is not None else "-", f"{engine.seconds:.1f} s",
                            console.size(engine.peak_bytes),
                        )
                    )  # fmt: skip
                    if spec.name == "resnet50" and precision == "int8" and share is not None:
                        ratios.append(share)
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    print("\n".join([head, "|---" * len(rows[0]) + "|", *body]))
    if any(ratio > MOST_INT8 for ratio in ratios):
        sys.exit(
            f"An INT8 plan of the ResNet is {max(ratios):.2f} of its FP32 plan; at most {MOST_INT8} were expected."
        )


def specs(folder: Path) -> list[EngineSpec]:
    (folder / "resnet50.onnx").write_bytes(resnet50().SerializeToString())
    np.savez(folder / "resnet50.npz", image=photos(20, 224))
    (folder / "encoder.onnx").write_bytes(encoder().SerializeToString())
    np.savez(folder / "encoder.npz", tokens=sentences(48, 40))
    ranges = {"L": Axis(min=1, best=40, max=LENGTH), "N": Axis(min=1, best=4, max=8)}
    return [
        EngineSpec(
            name=name,
            model=folder / f"{name}.onnx",
            calibration=Calibration(data=str(folder / f"{name}.npz"), samples=12, method="minmax"),
            axes=axes,
        )
        for name, axes in (("resnet50", {}), ("encoder", ranges))
    ]


if __name__ == "__main__":
    main()
