"""TensorRT on the GPU of this machine: right, how fast, and what each of the executor's means gains, in one run.

    python -m benchmarks.gpu [--profile NAME] [--precisions fp32 fp16 int8] [--batches 1 2 4 8 16 32] [--json FILE]

A network with the layers of ResNet-50 and seeded weights is built by `build_engine` in each precision, compiled for the
GPU at hand, and loaded by the TensorRT backend. Its answers are compared with onnxruntime's on the CPU, same graph.
Then batches go through the engine as the daemon sends them, through slots: with two lanes and CUDA graphs, with one
lane, and without graphs, in turn. Milliseconds of the device are events', beside those of the wall. At the end the
engine is closed, and the memory that the device has again is compared with what it had before.

ONNX Runtime's CUDA provider runs the FP32 graph in the same run where it is installed. What is printed is Markdown;
`--json` has every sample. Without a GPU it says so and exits 2; with wrong answers it exits 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from edge_sdk.backends import cuda
from edge_sdk.backends.base import installed_version, no_progress
from edge_sdk.backends.onnxruntime import OnnxRuntimeBackend
from edge_sdk.backends.registry import rebuild
from edge_sdk.backends.tensorrt import api
from edge_sdk.backends.tensorrt.backend import TensorRTBackend, open_with_executor
from edge_sdk.backends.tensorrt.executor import Options, TensorRTEngine
from edge_sdk.compile.pipeline import build_engine
from edge_sdk.errors import BackendUnavailable, EdgeSdkError
from edge_sdk.package import GRAPH, EnginePackage
from edge_sdk.profiles import Precision
from edge_sdk.spec import Batching, Calibration, EngineSpec
from edge_sdk.tensors import Array, Outputs
from tests.compile.nets import photos, resnet50

WAYS = {"2 lanes, graphs": Options(), "1 lane, graphs": Options(lanes=1), "2 lanes, no graphs": Options(graphs=False)}
"""How batches go through the engine; the first is how the daemon has it."""
MAX_RELATIVE_ERROR = {"fp32": 1e-3, "fp16": 2e-2, "int8": 5e-2}
"""Of the largest value of an output. TensorRT may compute FP32 with TF32, whose fractions have 10 bits; an INT8 graph
is the same graph on both sides, but a rounding that tips over costs a step of an activation."""


@dataclass(frozen=True)
class Sample:
    """Batches through an engine for some seconds."""

    precision: str
    way: str
    batch: int
    per_second: float
    wall_ms: float
    """From one batch's end to the next one's: less than a batch takes where they overlap."""
    device_ms: float | None
    """From a batch's first copy to its last, waiting included; median."""
    compute_ms: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes that the device has free."""

    precision: str
    before: int
    loaded: int
    after: int

    @property
    def given_back_percent(self) -> float:
        taken = self.before - self.loaded
        return 100.0 * (self.after - self.loaded) / taken if taken > 0 else 100.0


@dataclass(frozen=True)
class Report:
    device: Mapping[str, str]
    errors: Mapping[str, float]
    """Precision -> the largest difference from onnxruntime on the CPU, relative to the output's largest value."""
    samples: Sequence[Sample]
    memory: Sequence[Memory]
    notes: Sequence[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--profile", default="desktop-rtx-portable", help="how the packages are built")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "int8"], choices=sorted(MAX_RELATIVE_ERROR))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every sample here")
    options = parser.parse_args()
    if (lacking := cuda.lacking()) is not None:
        print(f"There is nothing to measure: {lacking}", file=sys.stderr)
        sys.exit(2)
    report = measured(options.profile, options.precisions, options.batches, options.seconds, options.rounds)
    print(markdown(report))
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=1))
    if wrong := [name for name, error in report.errors.items() if error > MAX_RELATIVE_ERROR[name]]:
        sys.exit(f"The answers of {', '.join(wrong)} are not the CPU's.")


def measured(
    profile: str, precisions: Sequence[Precision], batches: Sequence[int], seconds: float, rounds: int
) -> Report:
    errors: dict[str, float] = {}
    samples: list[Sample] = []
    memory: list[Memory] = []
    notes: list[str] = []
    pictures = photos(max(batches), 224)
    graph = resnet50().SerializeToString()
    # Open for the whole run: a context takes memory of its own, which is not the engines'.
    with tempfile.TemporaryDirectory(prefix="edge-sdk-gpu-") as folder, closing(cuda.Device.open()) as device:
        for precision in precisions:
            try:
                package = build(Path(folder), graph, pictures, profile, precision)
                rebuild(package, store=Path(folder) / "store", progress=no_progress)
                opened = opener_of(package, Path(folder) / "store")
                opened(Options()).close()  # what CUDA loads once for all engines is not this one's
                memory.append(memory_of(opened, device, precision, max(batches)))
                errors[precision] = relative_error(opened, cpu_answers(package, pictures), pictures)
                samples += samples_of(opened, precision, batches, seconds, rounds)
            except (EdgeSdkError, RuntimeError) as exc:
                notes.append(f"{precision}: {exc}")
        samples += samples_of_cuda_provider(graph, pictures, batches, seconds, notes)
        return Report(described(device, profile), errors, samples, memory, notes)


def build(folder: Path, graph: bytes, pictures: Array, profile: str, precision: Precision) -> EnginePackage:
    """The package of the network, in one precision."""
    (folder / "resnet50.onnx").write_bytes(graph)
    np.savez(folder / "calibration.npz", image=pictures)
    spec = EngineSpec(
        name="resnet50",
        model=folder / "resnet50.onnx",
        calibration=Calibration(data=str(folder / "calibration.npz"), samples=len(pictures), method="minmax"),
        batching=Batching(max_batch=len(pictures)),
    )
    return build_engine(spec, profile=profile, precision=precision, output=folder / precision)


Opened = Callable[[Options], TensorRTEngine]
"""The engine, loaded to be run in some way."""


def opener_of(package: EnginePackage, store: Path) -> Opened:
    """What loads a package's engine by the backend, with everything that checks."""

    def opened(options: Options) -> TensorRTEngine:
        backend = TensorRTBackend(store, opener=partial(open_with_executor, options=options))
        return cast("TensorRTEngine", backend.load(package, package.profile()))

    return opened


def cpu_answers(package: EnginePackage, pictures: Array) -> Outputs:
    with closing(OnnxRuntimeBackend().load_graph(package.read(GRAPH), package.profile())) as engine:
        return engine.infer({engine.inputs[0].name: pictures})


def relative_error(opened: Opened, wanted: Outputs, given: Array) -> float:
    """The largest difference of `infer` and of every slot from what is wanted, relative to the largest value."""
    with closing(opened(Options())) as engine:
        name = engine.inputs[0].name
        found = [engine.infer({name: given})]
        for slot in engine.slots(len(given)):
            feeds, outputs = slot.at(len(given))
            feeds[name][...] = given
            slot.start(len(given))
            slot.finish()
            found.append({output: array.copy() for output, array in outputs.items()})
    return max(
        float(np.abs(answer[output] - array).max() / max(np.abs(array).max(), 1e-12))
        for answer in found
        for output, array in wanted.items()
    )


def memory_of(opened: Opened, device: cuda.Device, precision: str, batch: int) -> Memory:
    with device:
        before = device.free_bytes()
        engine = opened(Options())
        for slot in (*engine.slots(batch), *engine.slots(batch)):
            slot.start(batch)
            slot.finish()
        loaded = device.free_bytes()
        engine.close()
        return Memory(precision, before, loaded, device.free_bytes())


def samples_of(opened: Opened, precision: str, batches: Sequence[int], seconds: float, rounds: int) -> list[Sample]:
    """Every way at every batch size, `rounds` times in turn; of each the round with the median throughput."""
    samples = []
    engines = {way: opened(options) for way, options in WAYS.items()}
    try:
        for batch in batches:
            found: dict[str, list[Sample]] = {way: [] for way in engines}
            for _ in range(rounds):
                for way, engine in engines.items():
                    found[way].append(sample_of(engine, precision, way, batch, seconds))
            samples += [sorted(of_way, key=lambda one: one.per_second)[rounds // 2] for of_way in found.values()]
    finally:
        for engine in engines.values():
            engine.close()
    return samples


def sample_of(engine: TensorRTEngine, precision: str, way: str, batch: int, seconds: float) -> Sample:
    """Start a batch in one slot as soon as the one that was there is finished."""
    slots = deque(engine.slots(batch))
    times = []
    for slot in slots:
        for array in slot.at(batch)[0].values():
            array.fill(1)
        for _ in range(5):  # two are enqueued and captured, the rest warm the clocks
            slot.start(batch)
            slot.finish()
    for slot in slots:
        slot.start(batch)
    done = 0
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        slots[0].finish()
        done += 1
        if done % 8 == 0 and (taken := engine.device_time()) is not None:
            times.append(taken)
        slots[0].start(batch)
        slots.rotate(-1)
    for slot in slots:
        slot.finish()
    return Sample(
        precision,
        way,
        batch,
        per_second=done * batch / (now - began),
        wall_ms=(now - began) / done * 1e3,
        device_ms=statistics.median(taken.total_ms for taken in times) if times else None,
        compute_ms=statistics.median(taken.compute_ms for taken in times) if times else None,
    )


def samples_of_cuda_provider(
    graph: bytes, pictures: Array, batches: Sequence[int], seconds: float, notes: list[str]
) -> list[Sample]:
    """The naive way, where it can be had: `run` with arrays, one batch after the other."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        notes.append("onnxruntime's CUDA provider is not installed (onnxruntime-gpu): nothing to compare with")
        return []
    session = onnxruntime.InferenceSession(graph, providers=["CUDAExecutionProvider"])
    if "CUDAExecutionProvider" not in session.get_providers():
        notes.append("onnxruntime's CUDA provider is installed and does not load; onnxruntime says why on stderr")
        return []
    samples = []
    for batch in batches:
        feeds = {session.get_inputs()[0].name: pictures[:batch]}
        for _ in range(5):
            session.run(None, feeds)
        done = 0
        began = time.perf_counter()
        while (now := time.perf_counter()) - began < seconds:
            session.run(None, feeds)
            done += 1
        rate = done / (now - began)
        samples.append(Sample("fp32", "onnxruntime CUDA", batch, rate * batch, 1e3 / rate, None, None))
    return samples


def described(device: cuda.Device, profile: str) -> dict[str, str]:
    facts = device.facts
    versions = {flavour: version for flavour in ("tensorrt_rtx", "tensorrt") if (version := api.find(flavour))}
    return {
        "GPU": facts.name,
        "compute capability": facts.compute_capability,
        "memory": f"{facts.total_bytes / 2**30:.1f} GiB{', integrated' if facts.integrated else ''}",
        "CUDA of the driver": facts.cuda_version,
        "binding": device.binding.name + ("" if device.can_capture else " (no CUDA graphs)"),
        **versions,
        "onnxruntime": installed_version("onnxruntime", "onnxruntime", "onnxruntime-gpu"),
        "profile": profile,
    }


def markdown(report: Report) -> str:
    parts = [table(("what", "which"), list(report.device.items()))]
    parts.append(
        table(
            ("precision", "relative error", "allowed"),
            [(name, f"{error:.2e}", f"{MAX_RELATIVE_ERROR[name]:.0e}") for name, error in report.errors.items()],
        )
    )
    parts.append(
        table(
            ("precision", "way", "batch", "images/s", "wall ms", "device ms", "compute ms", "of the daemon's way"),
            [
                (
                    sample.precision,
                    sample.way,
                    str(sample.batch),
                    f"{sample.per_second:,.0f}",
                    f"{sample.wall_ms:.3f}",
                    *("-" if value is None else f"{value:.3f}" for value in (sample.device_ms, sample.compute_ms)),
                    _share(sample, report.samples),
                )
                for sample in report.samples
            ],
        )
    )
    parts.append(
        table(
            ("precision", "taken MB", "left after closing MB", "given back"),
            [
                (
                    one.precision,
                    f"{(one.before - one.loaded) / 1e6:.1f}",
                    f"{(one.before - one.after) / 1e6:.1f}",
                    f"{one.given_back_percent:.1f} %",
                )
                for one in report.memory
            ],
        )
    )
    parts += [f"Note: {note}" for note in report.notes]
    return "\n\n".join(parts)


def _share(sample: Sample, samples: Sequence[Sample]) -> str:
    """Its throughput, as a share of two lanes with graphs at the same batch and precision."""
    for other in samples:
        if (other.precision, other.batch, other.way) == (sample.precision, sample.batch, next(iter(WAYS))):
            return f"{sample.per_second / other.per_second:.2f}"
    return "-"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    try:
        main()
    except BackendUnavailable as exc:
        print(f"There is nothing to measure: {exc}", file=sys.stderr)
        sys.exit(2)
