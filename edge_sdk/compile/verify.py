"""Is the built engine right, and is it faster? Measured, side by side, on this machine.

`judge` asks a reference and any number of candidates the same samples, streaming; `time_engines` times them
interleaved in one run, because two runs minutes apart compare the weather as much as the engines. Nothing here
decides: what the figures mean for the build is said in `pipeline`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_sdk.backends.base import Engine
from edge_sdk.compile.datasets import Sample
from edge_sdk.errors import DataError, EngineFailed, OutOfMemory
from edge_sdk.spec import Preprocess
from edge_sdk.tasks.images import decode_image
from edge_sdk.tensors import Array, Feeds, Outputs, SignalToNoise, TensorSpec, is_batchable

_WARM_UP_SECONDS = 0.05
"""Untimed, at the start of an engine's turn, while the other engine's threads stop spinning."""
_TURN_SECONDS = 0.1
_SAME_SPEED = 0.02
"""Throughputs this close are equal; the smaller batch, which answers sooner, is then the better one."""

Progress = Callable[[str, int, int], None]
"""Told of each long step: its name, how much of it is done, out of how much."""


def no_progress(step: str, done: int, total: int) -> None:
    """A progress that nobody watches."""


@dataclass(frozen=True)
class Accuracy:
    """How one engine did on the samples. What does not apply is None."""

    top1_percent: float | None
    """How often the first label was the right one, where samples are labelled."""
    agreement_percent: float | None
    """How often the first label was the reference's, where outputs are classes."""
    snr_db: float | None
    """Outputs against the reference's, over all samples; of several outputs the worst. None without float outputs."""
    finite: bool
    """False as soon as one output held NaN or infinity."""


@dataclass(frozen=True)
class Judgement:
    """A reference and its candidates on the same samples."""

    samples: int
    reference_top1_percent: float | None
    candidates: tuple[Accuracy, ...]


def judge(
    reference: Engine,
    candidates: Sequence[Engine],
    samples: Iterable[Sample],
    *,
    classes: bool,
    each: Callable[[int], None] = lambda done: None,
) -> Judgement:
    """Ask all engines all samples. `classes` says that the first output is one score for each class.

    Raises DataError where the reference itself answers NaN or infinity, or a label is not a class of the model.
    """
    tallies = [_Tally() for _ in candidates]
    asked = right = labelled = 0
    for sample in samples:
        truth = reference.infer(sample.feeds)
        if not _is_finite(truth):
            raise DataError(
                f"The model answers NaN or infinity to the sample {sample.name}, before any quantisation.",
                fix="Check the sample, and that the preprocessing is the one the model was trained with.",
            )
        first = _first_label(truth, reference.outputs) if classes else None
        if sample.label is not None and first is not None:
            _check_label(sample, truth[reference.outputs[0].name])
            labelled += 1
            right += first == sample.label
        for tally, candidate in zip(tallies, candidates):
            tally.add(truth, candidate.infer(sample.feeds), candidate.outputs, first, sample.label)
        asked += 1
        each(asked)
    if not asked:
        raise DataError("There is no sample to judge the engine on.")
    return Judgement(
        asked,
        _percent(right, labelled),
        tuple(tally.accuracy(asked if classes else 0, labelled) for tally in tallies),
    )


class _Tally:
    """Sums over the samples for one candidate."""

    def __init__(self) -> None:
        self.right = 0
        self.agreed = 0
        self.finite = True
        self.outputs: dict[str, SignalToNoise] = {}

    def add(
        self, truth: Outputs, answer: Outputs, outputs: Sequence[TensorSpec], first: int | None, label: int | None
    ) -> None:
        self.finite = self.finite and _is_finite(answer)
        if first is not None:
            found = _first_label(answer, outputs)
            self.agreed += found == first
            self.right += found == label
        for name, wanted in truth.items():
            if wanted.dtype.kind == "f":
                self.outputs.setdefault(name, SignalToNoise()).add(wanted, answer[name])

    def accuracy(self, asked: int, labelled: int) -> Accuracy:
        snr_db = min((output.db for output in self.outputs.values()), default=None)
        return Accuracy(_percent(self.right, labelled), _percent(self.agreed, asked), snr_db, self.finite)


def same_answers(
    wanted: Sequence[Outputs], found: Sequence[Outputs], *, min_snr_db: float, integers: bool = True
) -> bool:
    """Whether what a graph answered is what another one did, to the same feeds in the same order.

    Floats count as the same down to `min_snr_db`, over all answers; everything else must be equal, unless `integers` is
    False. Where NaN or infinity was wanted, anything goes.
    """
    outputs: dict[str, SignalToNoise] = {}
    for one, other in zip(wanted, found):
        for name, value in one.items():
            if name not in other or other[name].dtype != value.dtype:
                return False
            if value.dtype.kind != "f":
                if integers and not np.array_equal(value, other[name]):
                    return False
            elif other[name].shape != value.shape:
                return False
            elif np.isfinite(value).all():
                outputs.setdefault(name, SignalToNoise()).add(value, other[name])
    return all(output.db >= min_snr_db for output in outputs.values())


def time_engines(engines: Sequence[Engine], feeds: Feeds, *, seconds: float = 1.5) -> list[float]:
    """The median latency of each engine in milliseconds, in turns of a few runs each, over `seconds` altogether."""
    times: list[list[float]] = [[] for _ in engines]
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or not times[0]:
        for engine, timed in zip(engines, times):
            _run_for(engine, feeds, _WARM_UP_SECONDS)
            timed += _run_for(engine, feeds, _TURN_SECONDS)
    return [round(statistics.median(timed) * 1e3, 4) for timed in times]


def _run_for(engine: Engine, feeds: Feeds, seconds: float) -> list[float]:
    """How long each run took, in seconds; there is at least one."""
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while not times or time.perf_counter() < deadline:
        started = time.perf_counter()
        engine.infer(feeds)
        times.append(time.perf_counter() - started)
    return times


def throughput(engine: Engine, feeds: Feeds, max_batch: int, *, seconds: float = 0.15) -> dict[int, float]:
    """Inferences a second for batches of 1, 2, 4... and `max_batch`; `feeds` are those of one.

    Only batch 1 where requests cannot be stacked: the model's axes do not allow it, or stacked requests would not get
    the answers they get alone. Stops at the first batch that does not fit into memory.
    """
    per_second = {1: _rate(engine, feeds, 1, seconds)}
    if not can_stack(engine, feeds):
        return per_second
    batch = 1
    while batch < max_batch:
        batch = min(batch * 2, max_batch)
        try:
            per_second[batch] = _rate(engine, _stacked(feeds, batch), batch, seconds)
        except (EngineFailed, OutOfMemory):
            break
    return per_second


def can_stack(engine: Engine, feeds: Feeds) -> bool:
    """Whether a request gets the same answer alone and beside another: some models mix rows, or fix a size inside."""
    if not is_batchable(engine.inputs, engine.outputs):
        return False
    beside = {name: np.concatenate([array, _another(array)]) for name, array in feeds.items()}
    try:
        alone, stacked = engine.infer(feeds), engine.infer(beside)
    except (EngineFailed, OutOfMemory):
        return False
    return all(
        stacked[name].shape == (2, *value.shape[1:]) and _close(stacked[name][:1], value)
        for name, value in alone.items()
    )


def _another(array: Array) -> Array:
    """A request like `array` and not equal to it, also where that is all zeros: beside its like, nothing is mixed."""
    return np.zeros_like(array) if array.dtype == object or np.any(array) else np.ones_like(array)


def best_batch(per_second: Mapping[int, float]) -> int:
    """The smallest batch that is as fast as any."""
    fastest = max(per_second.values())
    return min(batch for batch, rate in per_second.items() if rate >= fastest * (1 - _SAME_SPEED))


def decoder_for(preprocess: Preprocess | None, inputs: tuple[TensorSpec, ...]) -> Callable[[bytes], Feeds] | None:
    """How the bytes of an image become feeds: the very code that prepares requests when the engine serves."""
    if preprocess is None or len(inputs) != 1:
        return None
    spec = inputs[0]
    return lambda data: {spec.name: decode_image(data, preprocess).astype(spec.dtype, copy=False)}


def _rate(engine: Engine, feeds: Feeds, batch: int, seconds: float) -> float:
    """Inferences a second; `feeds` hold `batch` requests."""
    _run_for(engine, feeds, min(_WARM_UP_SECONDS, seconds))
    times = _run_for(engine, feeds, seconds)
    return round(batch * len(times) / sum(times), 1)


def _stacked(feeds: Feeds, batch: int) -> Feeds:
    return {name: np.ascontiguousarray(np.repeat(array, batch, axis=0)) for name, array in feeds.items()}


def _close(one: Array, other: Array) -> bool:
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    # Kernels for other sizes add up in another order; a mixed row is wrong by far more than that.
    reach = float(np.abs(other[np.isfinite(other)]).max(initial=0.0))
    return bool(np.allclose(one, other, rtol=1e-2, atol=1e-2 * reach + 1e-12, equal_nan=True))


def _first_label(outputs: Outputs, specs: Sequence[TensorSpec]) -> int:
    """The best class of the first row of the first output."""
    scores = outputs[specs[0].name]
    row = scores[0] if scores.ndim > 1 else scores
    return int(np.argmax(row)) if row.size else -1


def _check_label(sample: Sample, scores: Array) -> None:
    classes = int(scores[0].size) if scores.ndim > 1 else int(scores.size)
    if sample.label is not None and not 0 <= sample.label < classes:
        raise DataError(
            f"The sample {sample.name} is labelled {sample.label}; the model has {classes} classes, numbered from 0.",
            fix="Label files by subfolders, by a number before the name, or in labels.csv.",
        )


def _is_finite(outputs: Outputs) -> bool:
    return all(bool(np.isfinite(array).all()) for array in outputs.values() if array.dtype.kind == "f")


def _percent(count: int, total: int) -> float | None:
    return round(100 * count / total, 2) if total else None
