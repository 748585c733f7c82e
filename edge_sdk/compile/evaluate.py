"""How good is a package, and how fast, on data of your own? What `edge-sdk evaluate` prints.

found = evaluate(EnginePackage.open("build/cpu-x86"), "heldout/", against=EnginePackage.open("build/fp32"))
print(found.agreement_percent)
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_sdk.backends.registry import load_engine
from edge_sdk.compile.datasets import Reader, open_samples
from edge_sdk.compile.verify import Progress, decoder_for, judge, no_progress, time_engines
from edge_sdk.package import EnginePackage


@dataclass(frozen=True)
class PackageFigures:
    """One package on the data it was evaluated on."""

    package: str
    precision: str
    bytes: int
    top1_percent: float | None
    latency_ms: float


@dataclass(frozen=True)
class Evaluation:
    """What `edge-sdk evaluate` found. With another package to compare to, `agreement_percent` and `snr_db` are
    against that one."""

    data: str
    samples: int
    package: PackageFigures
    against: PackageFigures | None = None
    agreement_percent: float | None = None
    snr_db: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    package: EnginePackage,
    data: str,
    *,
    against: EnginePackage | None = None,
    samples: int | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Accuracy and latency of a package on `data`, beside those of another one if `against` is given.

    `data` is what validation data may be; a callable is imported from `folder` (default: here). `samples` takes that
    many, evenly spread. Raises DataError for the data; PackageError, PackageMismatch or BackendError for a package.
    """
    report = progress or no_progress
    manifest = package.manifest
    with ExitStack() as stack:
        engine = stack.enter_context(closing(load_engine(package).engine))
        other = stack.enter_context(closing(load_engine(against).engine)) if against is not None else None
        decode = decoder_for(manifest.preprocess, engine.inputs)
        reader = Reader(engine.inputs, decode, package.labels(), folder or Path.cwd())
        chosen = open_samples(data, reader, limit=samples)
        chosen = chosen.spread(samples) if samples is not None else chosen
        classes = manifest.task == "image-classification" or chosen.is_labelled
        first = next(iter(chosen)).feeds
        judgement = judge(
            other or engine,
            [engine] if other else [],
            chosen,
            classes=classes,
            each=lambda done: report("evaluating", done, len(chosen)),
        )
        latencies = time_engines([engine, other] if other else [engine], first)
    accuracy = judgement.candidates[0] if other else None
    top1 = accuracy.top1_percent if accuracy else judgement.reference_top1_percent
    return Evaluation(
        data=data,
        samples=judgement.samples,
        package=_figures(package, top1, latencies[0]),
        against=_figures(against, judgement.reference_top1_percent, latencies[1]) if against else None,
        agreement_percent=accuracy.agreement_percent if accuracy else None,
        snr_db=accuracy.snr_db if accuracy else None,
    )


def _figures(package: EnginePackage, top1: float | None, latency_ms: float) -> PackageFigures:
    size = sum(record.bytes for name, record in package.manifest.files.items() if name.endswith(".onnx"))
    return PackageFigures(str(package), package.manifest.precision, size, top1, latency_ms)
