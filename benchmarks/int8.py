"""INT8 on real photos: our engine against FP32, and against onnxruntime's own static quantiser, in one run.

    python -m benchmarks.int8 [--shared DIR]

SqueezeNet 1.1, calibrated on every fourth photo (125), judged on the other 375: top-1, agreement with FP32's first
label, and latency at batch 1, all three engines interleaved, with as many threads as the profile says. What the package
was measured at when it was built is in its report.md; this is the second opinion. It fails if ours agrees with FP32 on
less than 94 % of the photos, loses more than 2 points of top-1, or is less than 1.5 times as fast.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from edge_sdk import console
from edge_sdk.backends.onnxruntime import OnnxRuntimeBackend
from edge_sdk.compile.datasets import Reader, Samples, open_samples
from edge_sdk.compile.pipeline import build_engine
from edge_sdk.compile.verify import decoder_for, judge, time_engines
from edge_sdk.package import GRAPH
from edge_sdk.profiles import Machine, detect, load_profiles
from edge_sdk.spec import EngineSpec, load_spec

MIN_AGREEMENT_PERCENT = 94.0
MAX_DROP = 2.0
"""Points of top-1 against FP32."""
MIN_SPEED_UP = 1.5

SPEC = """
name = "squeezenet"
model = "{models}/squeezenet.onnx"
task = "image-classification"
[preprocess]
resize_short_side = 256
center_crop = 224
color = "BGR"
mean = [104.0, 117.0, 123.0]
[postprocess]
labels = "{images}/imagenet-labels.txt"
[calibration]
data = "calibration"
samples = 125
[validation]
data = "validation"
max_drop = 2.0
"""


class _Photos(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Calibration samples as onnxruntime's quantiser takes them."""

    def __init__(self, samples: Samples) -> None:
        self._samples = iter(samples)

    def get_next(self) -> dict[str, Any] | None:
        sample = next(self._samples, None)
        return dict(sample.feeds) if sample is not None else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    shared = parser.parse_args().shared
    profile, _ = detect(Machine.read(), load_profiles())
    with tempfile.TemporaryDirectory(prefix="edge-sdk-int8-") as folder:
        spec = write_spec(Path(folder), shared)
        ours = build_engine(spec, profile=profile, precision="int8")
        fp32 = build_engine(spec, profile=profile, precision="fp32", output=Path(folder) / "fp32")
        calibration, validation = samples_of(spec)
        naive = quantized_by_onnxruntime(Path(folder), spec.model, calibration)
        graphs = {"FP32": fp32.read(GRAPH), "edge-sdk INT8": ours.read(GRAPH), "onnxruntime INT8": naive}
        broken = report(graphs, profile, validation)
    if broken:
        sys.exit(f"edge-sdk INT8 is not what it should be: {'; '.join(broken)}.")


def write_spec(folder: Path, shared: Path) -> EngineSpec:
    for index, photo in enumerate(sorted((shared / "images" / "imagenet-500").glob("*.jpg"))):
        place = folder / ("validation" if index % 4 else "calibration")
        place.mkdir(exist_ok=True)
        (place / photo.name).symlink_to(photo)
    (folder / "engine.toml").write_text(SPEC.format(models=shared / "models", images=shared / "images"))
    return load_spec(folder)


def samples_of(spec: EngineSpec) -> Iterator[Samples]:
    """Calibration and validation samples, read as a build reads them."""
    profile, _ = detect(Machine.read(), load_profiles())
    with closing(OnnxRuntimeBackend().load_graph(spec.model.read_bytes(), profile)) as engine:
        reader = Reader(engine.inputs, decoder_for(spec.preprocess, engine.inputs), (), spec.model.parent)
    for section in (spec.calibration, spec.validation):
        assert section is not None
        yield open_samples(section.data, reader)


def quantized_by_onnxruntime(folder: Path, model: Path, calibration: Samples) -> bytes:
    """The naive way: its pre-processing, its MinMax calibration, u8 activations, per-channel s8 weights."""
    prepared, quantized = folder / "prepared.onnx", folder / "naive.onnx"
    quant_pre_process(str(model), str(prepared))
    quantize_static(
        str(prepared),
        str(quantized),
        _Photos(calibration),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return quantized.read_bytes()


def report(graphs: dict[str, bytes], profile: Any, validation: Samples) -> list[str]:
    """Print the table; give back the promises that our INT8 (the second graph) breaks."""
    engines = {name: OnnxRuntimeBackend().load_graph(graph, profile) for name, graph in graphs.items()}
    reference, *candidates = engines.values()
    judgement = judge(reference, candidates, validation, classes=True)
    latencies = time_engines(list(engines.values()), next(iter(validation)).feeds, seconds=15)
    rows = [("engine", "top-1", "agreement", "size", "latency", "x FP32")]
    rows.append(("FP32", console.percent(judgement.reference_top1_percent), "-", console.size(len(graphs["FP32"])), console.milliseconds(latencies[0]), "1.00"))  # fmt: skip  # noqa: E501
    for (name, graph), accuracy, latency in zip(list(graphs.items())[1:], judgement.candidates, latencies[1:]):
        rows.append(
            (
                name,
                console.percent(accuracy.top1_percent),
                console.percent(accuracy.agreement_percent),
                console.size(len(graph)),
                console.milliseconds(latency),
                f"{latencies[0] / latency:.2f}",
            )
        )
    print(console.table(rows))
    print(f"({judgement.samples} photos)")
    ours = judgement.candidates[0]
    return broken_promises(
        agreement_percent=ours.agreement_percent or 0.0,
        drop=(judgement.reference_top1_percent or 0.0) - (ours.top1_percent or 0.0),
        speed_up=latencies[0] / latencies[1],
    )


def broken_promises(*, agreement_percent: float, drop: float, speed_up: float) -> list[str]:
    found = []
    if agreement_percent < MIN_AGREEMENT_PERCENT:
        found.append(
            f"its first label is FP32's on {agreement_percent:.1f} % of the photos, not {MIN_AGREEMENT_PERCENT} %"
        )
    if drop > MAX_DROP:
        found.append(f"it loses {drop:.1f} points of top-1, more than {MAX_DROP}")
    if speed_up < MIN_SPEED_UP:
        found.append(f"it is {speed_up:.2f} times as fast as FP32, not {MIN_SPEED_UP}")
    return found


if __name__ == "__main__":
    main()
