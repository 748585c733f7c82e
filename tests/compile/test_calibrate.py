"""Statistics are collected in one walk, in memory that does not grow, and give the ranges they should."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.backends.onnxruntime import OnnxRuntimeBackend
from edge_sdk.compile.calibrate import BINS, METHODS, Histogram, observe
from edge_sdk.compile.datasets import Sample
from edge_sdk.errors import DataError
from edge_sdk.profiles import DeviceProfile
from tests.compile.graphs import conv_net, pictures

BACKEND = OnnxRuntimeBackend()


def _samples(count: int) -> Iterator[Sample]:
    for index in range(count):
        yield Sample(str(index), {"image": pictures(1, seed=index)})


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50), min_size=1, max_size=6))
def test_histogram_counts_everything_once(chunks: list[list[float]]) -> None:
    """However its reach had to grow, no value is lost and the extremes are exact."""
    histogram = Histogram()
    for chunk in chunks:
        histogram.add(np.array(chunk, np.float32))
    values = np.array([value for chunk in chunks for value in chunk], np.float32)

    assert values.size == histogram.counts.sum()
    assert float(values.min()) == histogram.low
    assert float(values.max()) == histogram.high
    assert BINS == histogram.counts.size


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60), st.sampled_from(METHODS), st.booleans())
def test_ranges_stay_inside_what_was_seen(values: list[float], method: str, symmetric: bool) -> None:
    """No method invents room that no value needs."""
    histogram = Histogram()
    histogram.add(np.array(values, np.float32))
    span = histogram.range(method, symmetric=symmetric)  # type: ignore[arg-type]  # drawn from the literal's values

    assert histogram.low <= span.high
    assert span.low >= histogram.low or span.low == 0
    assert span.high <= histogram.high or span.high == 0


def test_outliers_are_clipped_by_all_but_minmax() -> None:
    """One value in a million should not cost every other one half its precision."""
    histogram = Histogram()
    histogram.add(np.random.default_rng(0).normal(size=1_000_000).astype(np.float32))
    histogram.add(np.array([500.0], np.float32))

    assert 500.0 == histogram.range("minmax", symmetric=False).high
    assert histogram.range("percentile", symmetric=False).high < 6
    assert histogram.range("mse", symmetric=False).high < 250


def test_observed_ranges_are_the_tensors_own(cpu: DeviceProfile) -> None:
    """Inputs, inner tensors and outputs: what is observed is what the graph computes."""
    net = conv_net()
    images = np.concatenate([sample.feeds["image"] for sample in _samples(8)])
    statistics = observe(net, ["image", "r5", "scores"], _samples(8), BACKEND, cpu)
    engine = BACKEND.load_graph(net.SerializeToString(), cpu)
    scores = engine.infer({"image": images})["scores"]
    ranges = statistics.ranges("minmax", symmetric=False)

    assert 8 == statistics.samples
    assert (images.min(), images.max()) == (ranges["image"].low, ranges["image"].high)
    assert ranges["r5"].low >= 0
    np.testing.assert_allclose([scores.min(), scores.max()], [ranges["scores"].low, ranges["scores"].high], rtol=1e-4)


def test_memory_does_not_grow_with_samples(cpu: DeviceProfile) -> None:
    """256 samples take no more memory than 16."""

    def peak(count: int) -> int:
        tracemalloc.start()
        observe(conv_net(), ["image", "r1", "r2", "j", "a", "r5"], _samples(count), BACKEND, cpu)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)  # what is imported and cached on the way is not what is measured

    assert peak(256) < peak(16) * 1.2


def test_infinite_tensors_are_refused(cpu: DeviceProfile) -> None:
    """A range of infinity helps nobody; the error names the sample."""
    bad = Sample("bad-one", {"image": np.full((1, 3, 16, 16), np.inf, np.float32)})

    with pytest.raises(DataError) as caught:
        observe(conv_net(), ["r1"], [bad], BACKEND, cpu)

    assert "bad-one" in caught.value.problem


def test_no_samples_are_refused(cpu: DeviceProfile) -> None:
    """There is no calibration without data."""
    with pytest.raises(DataError):
        observe(conv_net(), ["r1"], [], BACKEND, cpu)
