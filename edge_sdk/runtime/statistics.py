"""What the runtime counts: answers by status, and how long requests waited and computed.

Percentiles are over the last thousand requests: bounded memory, and what an operator wants to see is now.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from edge_sdk.runtime.messages import Answer

_KEPT = 1000


@dataclass
class Statistics:
    """Counts and timings of one model, or of the whole service."""

    answers: Counter[int] = field(default_factory=Counter)
    batches: int = 0
    batched: int = 0
    """Requests that were computed, in however many batches."""
    _queue_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    _infer_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def count(self, answer: Answer) -> None:
        self.answers[answer.status] += 1
        if answer.timing is not None:
            self._queue_ms.append(answer.timing.queue_ms)
            self._infer_ms.append(answer.timing.infer_ms)

    def count_batch(self, requests: int) -> None:
        self.batches += 1
        self.batched += requests

    def snapshot(self) -> dict[str, Any]:
        """The counts as JSON-ready values; times in milliseconds."""
        return {
            "answers": {str(status): count for status, count in sorted(self.answers.items())},
            "batches": self.batches,
            "mean_batch": round(self.batched / self.batches, 2) if self.batches else 0.0,
            "queue_ms": percentiles(self._queue_ms),
            "infer_ms": percentiles(self._infer_ms),
        }


def percentiles(values: deque[float]) -> dict[str, float]:
    """The median and the 99th percentile of `values`; 0 where there are none."""
    ordered = sorted(values)
    if not ordered:
        return {"p50": 0.0, "p99": 0.0}
    return {
        "p50": round(ordered[len(ordered) // 2], 3),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 3),
    }
