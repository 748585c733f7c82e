"""Pictures decoded beside the thread that computes: a few threads for all models, and a stage before each.

A photo takes longer to decode than a small model computes, and the network thread, which computes those, must not
stand still for it. So a batch that is expected to take more than `WORTH_S` is decoded by the `Decoders`, while the
thread that took it does something else, and comes back when it is whole; a batch of any less is decoded where it is
computed, as handing it over would cost more. What follows a batch is decoded while that one is computed.

    plan, decoded = stage.take(worker, now)     # as `planner.take`: what can be computed now
    stage.due_at(now)                           # when to ask again; None: `on_ready` tells

A stage holds a batch or two, in the order in which the planner gave them, so nobody overtakes. It takes no more while
what it holds, decoded or not, is half of what may wait for the model in bytes; and all of it counts as waiting there.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Union

from edge_sdk.errors import RequestError
from edge_sdk.profiles import physical_cores
from edge_sdk.runtime.batching import BatchPlanner, Plan
from edge_sdk.runtime.messages import Request
from edge_sdk.runtime.worker import Worker
from edge_sdk.tasks.base import Decoded

WORTH_S = 0.003
"""The time to decode a batch from which on it is handed to another thread. Handing over takes a tenth of a millisecond
or so; three are about what a network thread may stand still without anybody noticing."""

_MOST_THREADS = 4

Result = Union[Decoded, RequestError]
"""A payload understood, or what is wrong with it."""


class Decoders:
    """The threads that decode, for all models; each begins when there is something for it to do."""

    def __init__(self, threads: int = 0) -> None:
        """0 threads: one for each physical core but the first, which has the network; at most four."""
        self.threads = threads or max(1, min(_MOST_THREADS, physical_cores() - 1))
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = 0

    def put(self, job: Callable[[], None]) -> None:
        """Have `job` done, which raises nothing, behind those that were put before."""
        self._jobs.put(job)
        with self._lock:
            if self._started < self.threads:
                self._started += 1
                threading.Thread(target=self._work, name="edge-sdk-decoder", daemon=True).start()

    def stop(self) -> None:
        """End the threads when they have done what was put."""
        with self._lock:
            for _ in range(self._started):
                self._jobs.put(None)
            self._started = self.threads  # and none begins any more

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class _Batch:
    """Requests that are decoded together, for one worker."""

    __slots__ = ("bytes", "cancelled", "decoded", "handed_over", "pending", "requests", "worker")

    def __init__(self, requests: Sequence[Request], worker: Worker) -> None:
        self.requests = requests
        self.worker = worker
        self.handed_over = sum([worker.decode_s(request) for request in requests]) > WORTH_S
        self.pending = len(requests) if self.handed_over else 0
        self.decoded: dict[int, Result] = {}
        """By ticket, those that are."""
        self.bytes = sum([len(request.payload.data) for request in requests])
        self.cancelled = False


class Stage:
    """What of one model is being decoded. The methods are called with `lock` held, which the decoders take, too."""

    def __init__(
        self,
        planner: BatchPlanner,
        decoders: Decoders,
        lock: threading.Condition,
        *,
        on_ready: Callable[[], None],
        clock: Callable[[], float],
        decode: Callable[[Worker, Request], Result] = Worker.decode,
    ) -> None:
        """When a batch is whole, `lock` is notified and `on_ready` called without it, on a thread of the decoders."""
        self._planner = planner
        self._decoders = decoders
        self._lock = lock
        self._on_ready = on_ready
        self._clock = clock
        self._decode_with = decode
        self._batches: deque[_Batch] = deque()
        self.waiting = 0
        """How many requests are in it."""

    def take(self, worker: Worker, now: float) -> tuple[Plan, Mapping[int, Result]]:
        """The next batch that can be computed, and what of it is decoded, by ticket; begins with those that follow."""
        expired: list[Request] = []
        while self._has_room:
            plan = self._planner.take(now)
            expired += plan.expired
            if not plan.batch:
                break
            self._enter(_Batch(plan.batch, worker))
        if not self._is_whole:
            return Plan((), tuple(expired)), {}
        batch = self._batches.popleft()
        self.waiting -= len(batch.requests)
        self._planner.held_bytes -= batch.bytes
        expired += [request for request in batch.requests if request.deadline <= now]
        timely = tuple([request for request in batch.requests if request.deadline > now])
        return Plan(timely, tuple(expired)), batch.decoded if batch.worker is worker else {}

    def due_at(self, now: float) -> float | None:
        """When `take` has something to do."""
        if self._is_whole:
            return now
        return self._planner.wake_at(now) if self._has_room else None

    def expire(self, now: float) -> list[Request]:
        """Take out those that passed their deadline, while nothing can be computed."""
        late: list[Request] = []
        for batch in self._batches:
            late += [request for request in batch.requests if request.deadline <= now]
            batch.requests = [request for request in batch.requests if request.deadline > now]
        while late and (empty := next((batch for batch in self._batches if not batch.requests), None)) is not None:
            empty.cancelled = True
            self._batches.remove(empty)
            self._planner.held_bytes -= empty.bytes
        self.waiting -= len(late)
        return late

    def clear(self) -> list[Request]:
        """Take everything out, for a model that goes away."""
        requests = [request for batch in self._batches for request in batch.requests]
        for batch in self._batches:
            batch.cancelled = True
        self._batches.clear()
        self.waiting = self._planner.held_bytes = 0
        return requests

    @property
    def _is_whole(self) -> bool:
        """Whether the first batch can be computed."""
        return bool(self._batches) and not self._batches[0].pending

    @property
    def _has_room(self) -> bool:
        """Whether the next batch may leave the queue, where a more urgent one would still come before it."""
        if not self._batches:
            return True
        enough = max(2 * self._planner.batch, self._decoders.threads + 1)
        half_full = 2 * self._planner.held_bytes >= self._planner.limits.max_bytes
        return self._batches[-1].handed_over and self.waiting < enough and not half_full

    def _enter(self, batch: _Batch) -> None:
        self._batches.append(batch)
        self.waiting += len(batch.requests)
        self._planner.held_bytes += batch.bytes
        if batch.handed_over:
            for request in batch.requests:
                self._decoders.put(partial(self._decode, batch, request))

    def _decode(self, batch: _Batch, request: Request) -> None:
        """On a decoder's thread. What nobody waits for any more is left as it is."""
        result = None
        if not batch.cancelled and request.deadline > self._clock():
            result = self._decode_with(batch.worker, request)
        with self._lock:
            if result is not None:
                batch.decoded[request.ticket] = result
            if isinstance(result, Decoded) and not batch.cancelled:
                decoded_bytes = sum([array.nbytes for array in result.feeds.values()])
                batch.bytes += decoded_bytes
                self._planner.held_bytes += decoded_bytes
            batch.pending -= 1
            if whole := not batch.pending:
                self._lock.notify()
        if whole:
            self._on_ready()
