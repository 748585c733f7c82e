"""Is the built engine right, and is it faster? Measured, side by side, on this machine.

`judge` asks a reference and any number of candidates the same samples, streaming; `time_engines` times them
interleaved in one run, because two runs minutes apart compare the weather as much as the engines. Nothing here
decides: what the figures mean for the build is said in `pipeline`.
"""

from __future__ import annotations

import math
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
from edge_sdk.tensors import Array, Feeds, Outputs, TensorSpec, is_batchable

EXACT_DB = 150.0
"""Stands for outputs without any difference: more than FP32 itself can tell apart."""

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
        self.signal: dict[str, float] = {}
        self.noise: dict[str, float] = {}

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
                signal, noise = _powers(wanted, answer[name])
                self.signal[name] = self.signal.get(name, 0.0) + signal
                self.noise[name] = self.noise.get(name, 0.0) + noise

    def accuracy(self, asked: int, labelled: int) -> Accuracy:
        ratios = [_decibels(self.signal[name], self.noise[name]) for name in self.signal]
        return Accuracy(
            _percent(self.right, labelled), _percent(self.agreed, asked), min(ratios, default=None), self.finite
        )


def same_answers(
    wanted: Sequence[Outputs], found: Sequence[Outputs], *, min_snr_db: float, integers: bool = True
) -> bool:
    """Whether what a graph answered is what another one did, to the same feeds in the same order.

    Floats count as the same down to `min_snr_db`, over all answers; everything else must be equal, unless `integers` is
    False. Where NaN or infinity was wanted, anything goes.
    """
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
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
                powers = _powers(value, other[name])
                signal[name] = signal.get(name, 0.0) + powers[0]
                noise[name] = noise.get(name, 0.0) + powers[1]
    return all(_decibels(signal[name], noise[name]) >= min_snr_db for name in signal)


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
    beside = {name: np.concatenate([array, np.zeros_like(array)]) for name, array in feeds.items()}
    try:
        alone, stacked = engine.infer(feeds), engine.infer(beside)
    except (EngineFailed, OutOfMemory):
        return False
    return all(
        stacked[name].shape == (2, *value.shape[1:]) and _close(stacked[name][:1], value)
        for name, value in alone.items()
    )


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
    return bool(np.allclose(one, other, rtol=1e-2, atol=1e-2 * float(np.abs(other).max(initial=0.0)) + 1e-12))


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


def _powers(wanted: Array, found: Array) -> tuple[float, float]:
    """Of the signal and of the noise. Outputs of different shapes have nothing in common: infinite noise."""
    exact = wanted.astype(np.float64)
    alike = found.shape == wanted.shape
    noise = float(np.square(exact - found.astype(np.float64)).sum()) if alike else math.inf
    return float(np.square(exact).sum()), noise


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return EXACT_DB
    if not math.isfinite(noise) or signal == 0.0:
        return -EXACT_DB
    return round(max(-EXACT_DB, min(EXACT_DB, 10 * math.log10(signal / noise))), 2)
