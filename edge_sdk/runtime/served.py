"""One model and version in service: its queue, its state, and the worker that may be swapped under it.

The queue belongs to the place, not to the worker, so a new package takes over between two batches: nothing moves and
nothing is lost. A model is *quick* while its warm-up batch was short enough to compute on the caller's thread; any
other has a thread of its own, started when it is first needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

from edge_sdk.errors import DeadlineExceeded, RequestError, Unavailable
from edge_sdk.package import EnginePackage
from edge_sdk.runtime.batching import BatchPlanner, QueueLimits
from edge_sdk.runtime.messages import Answer, Request
from edge_sdk.runtime.statistics import Statistics
from edge_sdk.runtime.worker import Worker

State = Literal["LOADING", "READY", "UNAVAILABLE"]


class ServedModel:
    """Where the requests for one model and version wait, and what computes them. Safe to use from any thread."""

    def __init__(
        self,
        model: str,
        version: str,
        *,
        limits: QueueLimits,
        on_answer: Callable[[Answer], None],
        clock: Callable[[], float],
    ) -> None:
        self.model = model
        self.version = version
        self.state: State = "LOADING"
        self.reason = ""
        self.digest = ""
        self.quick = False
        self.statistics = Statistics()
        self._on_answer = on_answer
        self._clock = clock
        self._changed = threading.Condition()  # guards everything below
        self._planner = BatchPlanner(batch=1, limits=limits)
        self._worker: Worker | None = None
        self._busy = False
        self._retired = False
        self._thread: threading.Thread | None = None

    @property
    def package(self) -> EnginePackage | None:
        """What is being served; None while nothing has loaded."""
        worker = self._worker
        return worker.package if worker is not None else None

    @property
    def content_types(self) -> tuple[str, ...]:
        """What requests may bring; empty while nothing has loaded."""
        worker = self._worker
        return worker.task.content_types if worker is not None else ()

    @property
    def waiting(self) -> int:
        """How many requests wait or are being computed."""
        return len(self._planner) + self._busy

    def submit(self, request: Request) -> None:
        """Queue a request, also while the model is still loading; raises QueueFull or Unavailable."""
        with self._changed:
            if self._worker is None and (self.state != "LOADING" or self._retired):
                raise self._unavailable()
            self._planner.offer(request, self._clock())
            if self._thread is not None and not self.quick:
                self._changed.notify()

    def put_in_service(self, worker: Worker, *, quick: bool) -> None:
        """Let `worker` compute from the next batch on."""
        with self._changed:
            if self._retired:  # the service stopped while this one loaded
                worker.close()
                return
            former, self._worker = self._worker, worker
            batching = worker.package.manifest.batching
            self._planner.batch = batching.best_batch
            self._planner.max_wait_s = batching.max_wait_ms / 1000
            self.quick = quick
            self.state, self.reason = "READY", ""
            if not quick and self._thread is None:
                name = f"edge-sdk-{self.model}"[:32]
                self._thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._thread.start()
            self._changed.notify()
            if former is not None and not self._busy:
                former.close()

    def fail(self, reason: str) -> None:
        """Note that a package did not load. An older one that serves goes on serving."""
        with self._changed:
            self.reason = reason
            self.state = "READY" if self._worker is not None else "UNAVAILABLE"
            orphans = self._planner.clear() if self._worker is None else ()
        for request in orphans:
            self._finish(Answer(request.ticket, self._unavailable(), self.version))

    def retire(self) -> None:
        """Take the model out of service: what waits is answered 503, what is being computed is finished."""
        with self._changed:
            self._retired = True
            orphans = self._planner.clear()
            worker, self._worker = self._worker, None
            if worker is not None and not self._busy:
                worker.close()
            self._changed.notify()
        for request in orphans:
            self._finish(Answer(request.ticket, self._unavailable(), self.version))

    def join(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)

    def wake_at(self) -> float | None:
        """When the next batch is due; None while nothing waits."""
        with self._changed:
            return self._planner.wake_at(self._clock()) if self._worker is not None else None

    def run_once(self) -> bool:
        """Compute the next batch, on this thread, if one is due; whether there was anything to do."""
        with self._changed:
            worker, now = self._worker, self._clock()
            if self._busy:
                return False
            plan = self._planner.take(now) if worker is not None else self._planner.expire(now)
            self._busy = bool(plan.batch)
        for request in plan.expired:
            waited_ms = (now - request.received) * 1000
            error = DeadlineExceeded(f"The request waited {waited_ms:.0f} ms for {self.model}; its deadline passed.")
            self._finish(Answer(request.ticket, error, self.version))
        if worker is not None and plan.batch:
            self._compute(worker, plan.batch, now)
        return bool(plan.batch or plan.expired)

    def _compute(self, worker: Worker, batch: tuple[Request, ...], started: float) -> None:
        try:
            answers = worker.run_batch(batch)
            self._planner.computed(len(batch), self._clock() - started)
            self.statistics.count_batch(len(batch))
            for answer in answers:
                self._finish(answer)
        finally:
            with self._changed:
                self._busy = False
                if self._worker is not worker:  # swapped or retired meanwhile: ours to close
                    worker.close()

    def _work(self) -> None:
        """The life of the thread of a model that is not quick."""
        while True:
            with self._changed:
                while not self._retired and (pause := self._pause_s()) != 0.0:
                    self._changed.wait(pause)
                if self._retired:
                    return
            self.run_once()

    def _pause_s(self) -> float | None:
        """How long until a batch is due for our thread; None: until something changes."""
        if self.quick or self._worker is None:
            return None
        now = self._clock()
        due = self._planner.wake_at(now)
        return None if due is None else max(0.0, due - now)

    def _unavailable(self) -> RequestError:
        if self._retired:
            return Unavailable(f"The model {self.model!r} was taken out of service.", retry_after_ms=1000)
        return Unavailable(
            f"The model {self.model!r} did not load.",
            fix="Its state topic and the log have the reason.",
            retryable=False,
        )

    def _finish(self, answer: Answer) -> None:
        self.statistics.count(answer)
        self._on_answer(answer)
