"""Which requests are computed together, and when: pure decisions, the time passed in.

A batch is whatever waited while the engine was busy. Nothing is held back in the hope of company unless `max_wait_s`
says so: on a message transport an artificial delay is paid by every lone request, and a busy engine gathers a batch by
itself. Requests wait undecoded, so the queue costs the bytes that came and a decoder runs only for work that is done.

    planner.offer(request, now)         # QueueFull if it may not wait here
    plan = planner.take(now)            # a batch, and those that expired while they waited
    planner.wake_at(now)                # when to ask again; None: only when something is offered
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_sdk.errors import QueueFull
from edge_sdk.runtime.messages import Request


@dataclass(frozen=True)
class QueueLimits:
    """How much may wait for one model."""

    max_requests: int = 256
    max_bytes: int = 64 * 1024 * 1024


@dataclass(frozen=True)
class Plan:
    """What to do now. `expired` passed their deadline while they waited and must not be computed."""

    batch: tuple[Request, ...] = ()
    expired: tuple[Request, ...] = ()


@dataclass
class BatchPlanner:
    """The queue of one model. `batch` is the number of requests it computes best together."""

    batch: int
    max_wait_s: float = 0.0
    limits: QueueLimits = QueueLimits()
    _waiting: deque[Request] = field(default_factory=deque)
    _bytes: int = 0
    _seconds_per_request: float = 0.01

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, request: Request, now: float) -> None:
        """Queue `request`; QueueFull, with an honest moment to come back, if the queue is at a limit."""
        size = len(request.payload.data)
        if len(self._waiting) >= self.limits.max_requests or self._bytes + size > self.limits.max_bytes:
            raise QueueFull(
                f"The model {request.model} has {len(self._waiting)} requests waiting.",
                fix="Try again later.",
                retry_after_ms=self.backlog_ms(),
            )
        self._waiting.append(request)
        self._bytes += size

    def take(self, now: float) -> Plan:
        """The next batch, oldest first; empty while it is worth waiting for company."""
        if (wake_at := self.wake_at(now)) is None or wake_at > now:
            return Plan()
        batch: list[Request] = []
        expired: list[Request] = []
        while self._waiting and len(batch) < self.batch:
            request = self._waiting.popleft()
            self._bytes -= len(request.payload.data)
            (batch if request.deadline > now else expired).append(request)
        return Plan(tuple(batch), tuple(expired))

    def expire(self, now: float) -> Plan:
        """Only those that passed their deadline, while nothing can be computed."""
        expired = tuple(request for request in self._waiting if request.deadline <= now)
        if expired:
            kept = [request for request in self._waiting if request.deadline > now]
            self.clear()
            self._waiting.extend(kept)
            self._bytes = sum(len(request.payload.data) for request in kept)
        return Plan((), expired)

    def wake_at(self, now: float) -> float | None:
        """When `take` will give something; None while nothing waits."""
        if not self._waiting:
            return None
        if len(self._waiting) >= self.batch:
            return now
        oldest = self._waiting[0]
        return max(now, min(oldest.received + self.max_wait_s, oldest.deadline))

    def computed(self, requests: int, seconds: float) -> None:
        """Learn how long requests take, for `backlog_ms`."""
        self._seconds_per_request += 0.1 * (seconds / max(1, requests) - self._seconds_per_request)

    def backlog_ms(self) -> int:
        """How long what waits now will take."""
        return max(1, round(len(self._waiting) * self._seconds_per_request * 1000))

    def clear(self) -> tuple[Request, ...]:
        """Take everything that waits, for a model that goes away."""
        waiting = tuple(self._waiting)
        self._waiting.clear()
        self._bytes = 0
        return waiting


def pack(rows: Sequence[int], max_rows: int) -> list[list[int]]:
    """Group the indices of `rows` so that each group's rows fit a batch, in order.

    A request of 0 rows cannot share a batch, and one of more rows than `max_rows` is left to the caller to refuse.
    """
    groups: list[list[int]] = []
    room = 0
    for index, wanted in enumerate(rows):
        if wanted == 0 or wanted > room:
            groups.append([])
            room = max_rows if wanted else 0
        groups[-1].append(index)
        room -= wanted
    return groups
