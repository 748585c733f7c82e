"""Statistics of activations: collected once, in one walk over the samples, in memory that does not grow with them.

The graph is given the tensors in question as further outputs; each sample is run alone, its tensors are added to one
histogram each, and let go. What is kept is 8192 counters a tensor, however many samples there are: onnxruntime's own
calibrators keep every tensor of every sample.

A histogram is symmetric about zero and doubles its reach whenever a value falls outside, two bins becoming one; so
nothing needs to be known in advance and no second walk is needed. Ranges are read from it later, by any method and for
any scheme, without touching the data again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto

from edge_sdk.backends.base import Backend
from edge_sdk.compile.datasets import Sample
from edge_sdk.errors import DataError
from edge_sdk.profiles import DeviceProfile
from edge_sdk.tensors import Array

Method = Literal["minmax", "percentile", "mse"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse")

BINS = 8192
"""The largest value seen lies in the outer half, so a range is known to 1/2048 of itself or better."""
PERCENTILE = 99.999
"""How much of a tensor's values `percentile` keeps inside the range."""
_SMALLEST_REACH = 1e-30
"""Below it the width of a bin is no normal FP32 number, and the values are zero to any purpose."""
_CLIPS = np.linspace(1.0, 0.2, 81)
"""The fractions of the full range that `mse` tries."""


@dataclass(frozen=True)
class Range:
    """The interval of a tensor's values that 8 bits are spent on; values outside saturate."""

    low: float
    high: float

    def union(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high))

    @property
    def reach(self) -> float:
        return max(abs(self.low), abs(self.high))


class Histogram:
    """How often each value occurred, in `BINS` equal bins over -reach to reach; the exact extremes beside it."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.reach = 0.0
        self.low = math.inf
        self.high = -math.inf

    def add(self, values: Array) -> None:
        """Count `values`, which must be finite."""
        if values.size == 0:
            return
        flat = values.ravel().astype(np.float32, copy=False)
        low, high = float(flat.min()), float(flat.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._reach_for(max(-low, high))
        if self.reach == 0.0:
            self.counts[BINS // 2] += flat.size
            return
        bins = ((flat + np.float32(self.reach)) * np.float32(BINS / 2 / self.reach)).astype(np.int32)
        np.minimum(bins, BINS - 1, out=bins)
        self.counts += np.bincount(bins, minlength=BINS)

    def range(self, method: Method, *, symmetric: bool) -> Range:
        """The range that `method` finds best, for levels that are symmetric about zero or not."""
        if method == "minmax" or self.reach == 0.0:
            return Range(self.low, self.high) if self.low <= self.high else Range(0.0, 0.0)
        if method == "percentile":
            return self._percentile_range()
        return self._least_error_range(symmetric)

    def _reach_for(self, magnitude: float) -> None:
        if magnitude <= self.reach:
            return
        if self.reach == 0.0:
            # All that was counted so far is zeros, and they stay in the bin where zero is.
            self.reach = max(magnitude, _SMALLEST_REACH)
            return
        while self.reach < magnitude:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([np.zeros(BINS // 4, np.int64), merged, np.zeros(BINS // 4, np.int64)])
            self.reach *= 2

    def _percentile_range(self) -> Range:
        cumulative = np.cumsum(self.counts)
        left_out = cumulative[-1] * (1 - PERCENTILE / 100) / 2
        edges = np.linspace(-self.reach, self.reach, BINS + 1)
        low = edges[np.searchsorted(cumulative, left_out, side="right")]
        high = edges[np.searchsorted(cumulative, cumulative[-1] - left_out) + 1]
        return Range(max(self.low, float(low)), min(self.high, float(high)))

    def _least_error_range(self, symmetric: bool) -> Range:
        """The range with the least expected squared error: clipping outside it, rounding to 255 steps inside."""
        filled = np.flatnonzero(self.counts)
        centres = (filled + 0.5) * (2 * self.reach / BINS) - self.reach
        weights = self.counts[filled]
        low, high = (-max(-self.low, self.high), max(-self.low, self.high)) if symmetric else (self.low, self.high)
        low, high = min(low, 0.0), max(high, 0.0)
        errors = []
        for clip in _CLIPS:
            outside = np.maximum(centres - high * clip, 0) + np.maximum(low * clip - centres, 0)
            step = (high - low) * clip / 255
            errors.append(float(weights @ (outside**2)) + step**2 / 12 * float(weights[outside == 0].sum()))
        best = float(_CLIPS[int(np.argmin(errors))])
        return Range(max(self.low, low * best), min(self.high, high * best))


@dataclass(frozen=True)
class Statistics:
    """What was seen: a histogram for each tensor, over so many samples."""

    histograms: Mapping[str, Histogram]
    samples: int

    def ranges(self, method: Method, *, symmetric: bool) -> dict[str, Range]:
        return {name: histogram.range(method, symmetric=symmetric) for name, histogram in self.histograms.items()}


def observe(
    model: ModelProto,
    tensors: Sequence[str],
    samples: Iterable[Sample],
    backend: Backend,
    profile: DeviceProfile,
    *,
    each: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """Run `model` over `samples` and count the values of `tensors`. `each` is told how many samples are done.

    Raises DataError if there is no sample, or one of them makes a tensor infinite.
    """
    histograms = {name: Histogram() for name in tensors}
    inputs = {value.name for value in model.graph.input}
    engine = backend.load_graph(_exposing(model, tensors).SerializeToString(), profile)
    done = 0
    try:
        for sample in samples:
            values = engine.infer(sample.feeds)
            for name, histogram in histograms.items():
                tensor = sample.feeds[name] if name in inputs else values[name]
                if not np.isfinite(tensor).all():
                    raise DataError(
                        f"The sample {sample.name} makes the tensor {name!r} infinite or NaN in FP32.",
                        fix="Check the sample, and that the preprocessing is the one the model was trained with.",
                    )
                histogram.add(tensor)
            done += 1
            each(done)
    finally:
        engine.close()
    if not done:
        raise DataError("There is no sample to calibrate with.", fix="Give some with [calibration] or --calibration.")
    return Statistics(histograms, done)


def _exposing(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """`model` with `tensors` among its outputs."""
    exposing = ModelProto()
    exposing.CopyFrom(model)
    there = {value.name for value in (*exposing.graph.output, *exposing.graph.input)}
    exposing.graph.output.extend(ValueInfoProto(name=name) for name in tensors if name not in there)
    return exposing
