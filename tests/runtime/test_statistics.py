"""What the runtime counts."""

from __future__ import annotations

import json
from collections import deque

import pytest

from edge_sdk.errors import QueueFull
from edge_sdk.runtime.messages import Answer, Timing
from edge_sdk.runtime.statistics import Statistics, percentiles
from edge_sdk.tasks.base import Body


def test_answers_are_counted_by_status() -> None:
    """Good ones with their timing, errors by their status, and the whole as JSON."""
    statistics = Statistics()
    for milliseconds in range(1, 101):
        statistics.count(Answer(1, Body(b""), "1", Timing(float(milliseconds), 2.0)))
    statistics.count(Answer(1, QueueFull("full")))
    statistics.count_batch(3)
    statistics.count_batch(4)
    snapshot = json.loads(json.dumps(statistics.snapshot()))

    assert {"200": 100, "429": 1} == snapshot["answers"]
    assert {"p50": 51.0, "p99": 100.0} == snapshot["queue_ms"]
    assert {"p50": 2.0, "p99": 2.0} == snapshot["infer_ms"]
    assert (2, 3.5) == (snapshot["batches"], snapshot["mean_batch"])


def test_an_empty_snapshot_has_no_holes() -> None:
    """Before the first request there are zeros, not errors."""
    snapshot = Statistics().snapshot()

    assert ({}, 0, 0.0, {"p50": 0.0, "p99": 0.0}) == tuple(
        snapshot[k] for k in ("answers", "batches", "mean_batch", "queue_ms")
    )


def test_memory_is_bounded_and_now_is_what_counts() -> None:
    """After a million requests the percentiles are those of the last thousand."""
    statistics = Statistics()
    for n in range(3000):
        statistics.count(Answer(1, Body(b""), "1", Timing(1000.0 if n < 2000 else 1.0, 1.0)))

    assert {"p50": 1.0, "p99": 1.0} == statistics.snapshot()["queue_ms"]


@pytest.mark.parametrize(("values", "expected"), [([], (0.0, 0.0)), ([7.0], (7.0, 7.0)), ([1.0, 2.0], (2.0, 2.0))])
def test_percentiles_of_few_values(values: list[float], expected: tuple[float, float]) -> None:
    """No interpolation: a percentile is a value that was measured."""
    found = percentiles(deque(values))

    assert expected == (found["p50"], found["p99"])
