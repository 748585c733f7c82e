"""One model and version in service: its queue, its state, and the worker that may be swapped under it.

The queue belongs to the place, not to the worker, so a new worker takes over between two batches: nothing moves and
nothing is lost. A model is *quick* while its warm-up batch was short enough to compute on the caller's thread; any
other has a thread of its own, started when it is first needed, which keeps as many batches on their way as the worker
has room for.

A model that nobody asks may be sent out of memory to make room for others. It stays READY, keeps its queue, and calls
for its worker when a request comes, which waits for it if it can.

A model that is BUILDING answers like a READY one, with another backend than it will have: an engine is being compiled
for it meanwhile.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edge_sdk.errors import DeadlineExceeded, DeviceLost, RequestError, Unavailable
from edge_sdk.package import EnginePackage
from edge_sdk.runtime.batching import BatchPlanner, Plan, QueueLimits
from edge_sdk.runtime.decoding import Decoders, Result, Stage
from edge_sdk.runtime.messages import SELF_TEST, Answer, Request
from edge_sdk.runtime.recorder import Flight, FlightRecorder
from edge_sdk.runtime.sequences import Sequences
from edge_sdk.runtime.statistics import Statistics
from edge_sdk.runtime.worker import Worker

if TYPE_CHECKING:  # only a daemon that starts after a crash has one
    from edge_sdk.runtime.solitary import Gate

_ALONE_S, _ALONE_BATCHES = 5.0, 10.0
"""What a suspect may take that is computed alone, while everybody waits: so many seconds, and times a warm batch."""

State = Literal["LOADING", "READY", "BUILDING", "UNAVAILABLE"]

UNLOADED = "It was unloaded; the command `load` brings it back."

_NOTHING: Mapping[int, Result] = {}


def ignore_loss(loss: DeviceLost) -> None:
    """For those who have nobody to tell: the model stays silent from then on."""


def never_called(model: ServedModel) -> float:
    """For models that are never sent away."""
    return 0.0


@dataclass(frozen=True)
class _Known:
    """What is to be said of a model also while its worker is out of memory."""

    package: EnginePackage
    backend: str
    content_types: tuple[str, ...]
    second_best: str

    @classmethod
    def of(cls, worker: Worker) -> _Known:
        return cls(worker.package, worker.loaded.backend, tuple(worker.task.content_types), worker.loaded.second_best)


class ServedModel:
    """Where the requests for one model and version wait, and what computes them. Safe to use from any thread."""

    def __init__(
        self,
        model: str,
        version: str,
        *,
        limits: QueueLimits,
        newest_wins: bool = False,
        stateful: bool = False,
        on_answer: Callable[[Answer], None],
        on_lost: Callable[[DeviceLost], None] = ignore_loss,
        decoders: Decoders | None = None,
        on_due: Callable[[], None] = lambda: None,
        on_called: Callable[[ServedModel], float] = never_called,
        clock: Callable[[], float],
        recorder: FlightRecorder | None = None,
        gate: Gate | None = None,
    ) -> None:
        """`on_lost` is told on the computing thread. The requests that were being computed then get no answer.

        Big pictures are left to the `decoders`; when they are done, `on_due` is called there: a quick model may have
        something to compute.

        `stateful` is what the package says that is to be loaded: requests that wait for it keep their order, and none
        drops out of the middle. A worker knows it better.

        `on_called` is to bring back the worker of a model that is out of memory, and says in how many seconds it will
        be there. It must only take note.

        `recorder` is told of what is being computed; `gate` is passed by whoever computes.
        """
        self.model = model
        self.version = version
        self.key = (model, version)
        self.state: State = "LOADING"
        self.reason = ""
        self.progress_percent: int | None = None
        """How much of the engine is built; None unless one is being built."""
        self.digest = ""
        self.quick = False
        self.last_used = self.since = clock()
        """When a batch was last begun, and when the worker came."""
        self.called_in_vain = 0
        """Requests that could not wait for the worker to come back."""
        self.statistics = Statistics()
        self._on_answer = on_answer
        self._on_lost = on_lost
        self._on_called = on_called
        self._clock = clock
        self._recorder = recorder or FlightRecorder()
        self._gate = gate
        self._flights: deque[Flight] = deque()  # of the worker in use, in the order in which they were started
        self._lock = threading.RLock()  # guards everything below
        self._changed = threading.Condition(self._lock)  # to enter the lock itself costs a third of entering this
        self._newest_wins = newest_wins
        self._planner = BatchPlanner(1, limits=limits, newest_wins=newest_wins and not stateful, in_order=stateful)
        self._decoders = decoders
        self._on_due = on_due
        self._stage: Stage | None = None
        """Between the queue and the worker, once there was one that takes pictures."""
        self._worker: Worker | None = None
        """What takes the next batch."""
        self._using: Worker | None = None
        """What has batches on their way, on whichever thread."""
        self._sequences: Sequences | None = None
        self._sequences_of = ""
        """The digest of the package whose they are."""
        self._known: _Known | None = None
        """Of the worker that is in service, or was and is to come back."""
        self._retired = False
        self._lost = False
        self._thread: threading.Thread | None = None

    @property
    def worker(self) -> Worker | None:
        """What is in service. Only the thread that computes may ask it anything."""
        return self._worker

    @property
    def package(self) -> EnginePackage | None:
        """What is being served; None while nothing has loaded."""
        known = self._known
        return known.package if known is not None else None

    @property
    def backend(self) -> str:
        """What computes the answers; empty while nothing has loaded."""
        known = self._known
        return known.backend if known is not None else ""

    @property
    def content_types(self) -> tuple[str, ...]:
        """What requests may bring; empty while nothing has loaded."""
        known = self._known
        return known.content_types if known is not None else ()

    @property
    def is_absent(self) -> bool:
        """Whether it was sent out of memory; it answers all the same."""
        return self._known is not None and self._worker is None

    @property
    def is_leaving(self) -> bool:
        """Whether a worker that was sent away still computes."""
        using = self._using
        return using is not None and using is not self._worker

    @property
    def is_retired(self) -> bool:
        """Whether it was taken out of service, for good."""
        return self._retired

    @property
    def calls(self) -> bool:
        """Whether requests wait for a worker that is out of memory."""
        with self._lock:
            return self.is_absent and self._has_any_waiting

    @property
    def answers(self) -> bool:
        """Whether it answers requests: it is READY, or BUILDING."""
        return self.state in ("READY", "BUILDING")

    @property
    def is_at_its_best(self) -> bool:
        """Whether it answers on the backend that its package prefers, or is on the way there."""
        known = self._known
        return self.state == "BUILDING" or (self.state == "READY" and known is not None and not known.second_best)

    @property
    def waiting(self) -> int:
        """How many requests wait; one more if any are being computed."""
        stage = self._stage
        return len(self._planner) + (stage.waiting if stage is not None else 0) + (self._using is not None)

    @property
    def sequences(self) -> int | None:
        """How many sequences are open; None for a model that has none."""
        kept = self._sequences
        return len(kept) if kept is not None else None

    @property
    def waiting_bytes(self) -> int:
        """What the requests that wait hold, in bytes."""
        return self._planner.waiting_bytes

    def submit(self, request: Request) -> None:
        """Queue a request, also while the model is still loading; raises QueueFull or Unavailable."""
        with self._lock:
            if self._worker is None:
                self._call_worker(request)
            displaced = self._planner.offer(request, self._clock())
            if self._thread is not None and not self.quick:
                self._changed.notify()
        for answer in displaced:
            self._finish(answer._replace(model_version=self.version))

    def _everything_waiting(self) -> list[Request]:
        """Taken out, to be answered otherwise."""
        return [*(self._stage.clear() if self._stage is not None else ()), *self._planner.clear()]

    @property
    def _has_any_waiting(self) -> bool:
        return bool(len(self._planner) or (self._stage is not None and self._stage.waiting))

    def _call_worker(self, request: Request) -> None:
        """There is none: is it worth while for `request` to wait? Raises Unavailable."""
        if self._known is not None and not self._retired:
            expected_s = self._on_called(self)
            if self._clock() + expected_s > request.deadline:
                raise self._out_of_memory(expected_s)
        elif self.state != "LOADING" or self._retired:
            raise self._unavailable()

    def sleep(self, *, even_if_wanted: bool = False) -> Literal["gone", "leaving", "stays"]:
        """Send the worker out of memory, where nobody waits for it, or `even_if_wanted`.

        Whether it is gone, goes when what is being computed is done, or stays. Those that wait call for it again.
        """
        with self._lock:
            worker = self._worker
            if worker is None or self._retired or self.state != "READY":
                return "stays"
            if self.waiting and not even_if_wanted:
                return "stays"
            self._worker = None
            at_rest = self._using is not worker  # otherwise whoever uses it closes it
            called = self._has_any_waiting
        if at_rest:
            worker.close()
        if called:
            self._on_called(self)
        return "gone" if at_rest else "leaving"

    def give_up_hopeless(self, expected_s: float) -> bool:
        """Answer 503 to those that cannot wait so long for the worker; whether any is left that can."""
        with self._lock:
            hopeless = self._expired(self._clock() + expected_s) if self._worker is None else ()
            left = self._has_any_waiting
        for request in hopeless:
            self._finish(Answer(request.ticket, self._out_of_memory(expected_s), self.version))
        return left

    def put_in_service(self, worker: Worker, *, quick: bool, reason: str = "") -> None:
        """Let `worker` compute from the next batch on. `reason` is why it is not as good as it might be."""
        with self._lock:
            leaving: Worker | None = worker  # unless the service stopped while it loaded
            if not self._retired:
                leaving, self._worker, self._known = self._worker, worker, _Known.of(worker)
                self.last_used = self.since = self._clock()
                batching = worker.package.manifest.batching
                self._planner.batch = batching.best_batch
                self._planner.max_wait_s = batching.max_wait_ms / 1000
                stateful = worker.sequences is not None
                self._planner.newest_wins = (batching.newest_wins or self._newest_wins) and not stateful
                self._planner.keep_order(stateful)
                self._take_over_sequences(worker)
                if self._stage is None and self._decoders is not None and worker.task.takes_pictures:
                    self._stage = Stage(
                        self._planner,
                        self._decoders,
                        self._changed,
                        on_ready=self._on_due,
                        clock=self._clock,
                        decode=self._decode,
                    )
                self.quick = quick
                self.state, self.reason, self.progress_percent = "READY", reason, None
                if not quick and self._thread is None:
                    name = f"edge-sdk-{self.model}"[:32]
                    self._thread = threading.Thread(target=self._work, name=name, daemon=True)
                    self._thread.start()
                self._changed.notify()
            at_rest = leaving is not self._using  # otherwise whoever uses it closes it
        if leaving is not None and at_rest:
            leaving.close()

    def _take_over_sequences(self, worker: Worker) -> None:
        """Sequences go on in another engine of the same package. Another package makes another state of them."""
        if worker.package.digest == self._sequences_of:
            worker.sequences = self._sequences
        self._sequences, self._sequences_of = worker.sequences, worker.package.digest

    def note_building(self, worker: Worker, percent: int) -> None:
        """Say that a better engine than `worker`'s is being built, and how much of it is done."""
        with self._lock:
            if self._worker is worker:
                self.state, self.progress_percent = "BUILDING", percent
                self.reason = (
                    f"BUILDING {percent} %: an engine for this machine is being built; "
                    f"{worker.loaded.backend} answers meanwhile."
                )

    def note_not_built(self, worker: Worker, reason: str) -> None:
        """Say why there is no better engine than `worker`'s, which goes on."""
        with self._lock:
            if self._worker is worker:
                self.state, self.reason, self.progress_percent = "READY", reason, None

    def fail(self, reason: str) -> None:
        """Note that a package did not load. An older one that serves goes on serving, unless it is out of memory: its
        files are what did not load, or are in their place."""
        with self._lock:
            self.reason, self.progress_percent = reason, None
            self.state = "READY" if self._worker is not None else "UNAVAILABLE"
            self._known = self._known if self._worker is not None else None
            orphans = self._everything_waiting() if self._worker is None else []
        for request in orphans:
            self._finish(Answer(request.ticket, self._unavailable(), self.version))

    def retire(self) -> None:
        """Take the model out of service: what waits is answered 503, what is being computed is finished."""
        with self._lock:
            self._retired = True
            orphans = self._everything_waiting()
            leaving, self._worker, self._known = self._worker, None, None
            at_rest = leaving is not self._using
            self._changed.notify()
        if leaving is not None and at_rest:
            leaving.close()
        for request in orphans:
            self._finish(Answer(request.ticket, self._unavailable(), self.version))

    def join(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)

    def wake_at(self) -> float | None:
        """When the next batch is due; None while nothing waits."""
        if self._gate is not None and self._gate.closed:
            return None
        with self._lock:
            return self._due_at(self._clock()) if self._worker is not None else None

    def run_once(self) -> bool:
        """Compute the next batch, on this thread, if one is due; whether there was anything to do."""
        return self._enter(more=False)

    def has_worker_for(self, request: Request) -> bool:
        """Whether `request` could be computed now; if its worker is out of memory, it is called.

        Raises DeadlineExceeded or Unavailable where it is not worth waiting for.
        """
        with self._lock:
            if (now := self._clock()) >= request.deadline:
                raise self._late(request, now)
            if self._lost:
                raise self._unavailable()
            if self._worker is None:
                self._call_worker(request)
            return self._worker is not None

    def run_alone(self, request: Request) -> bool:
        """Compute `request`, which is not queued, on this thread, while the gate is closed; False if it has no worker.

        Raises as `has_worker_for` does.
        """
        with self._lock:
            if not self.has_worker_for(request) or (worker := self._worker) is None:
                return False
            self._using = worker
        limit_s = _ALONE_S + _ALONE_BATCHES * worker.batch_s
        self._compute(worker, [request], _NOTHING, self._clock(), more=False, limit_s=limit_s)
        with self._lock:
            self._changed.notify()  # our thread has waited for this one to be done
        return not self._lost

    def _enter(self, *, more: bool) -> bool:
        """As `_run`, past the gate where there is one."""
        if (gate := self._gate) is None:
            return self._run(more=more)
        if not gate.enter(wait=more):
            return False
        try:
            return self._run(more=more)
        finally:
            gate.leave()

    def _run(self, *, more: bool) -> bool:
        """As `run_once`; with `more`, go on as long as another batch is due before the last one is computed."""
        with self._lock:
            if self._using is not None:
                return False
            worker, now = self._worker, self._clock()
            plan, decoded = self._take(worker, now)
            if plan.batch:
                self._using = worker
        self._turn_away(plan.expired, now)
        if worker is not None and plan.batch:
            self._compute(worker, plan.batch, decoded, now, more=more)
        return bool(plan.batch or plan.expired)

    def _take(self, worker: Worker | None, now: float) -> tuple[Plan, Mapping[int, Result]]:
        """What to compute and to turn away now, and what of it is decoded already, by ticket."""
        if worker is None:
            return Plan((), self._expired(now)), _NOTHING
        if self._stage is None:
            return self._planner.take(now), _NOTHING
        return self._stage.take(worker, now)

    def _expired(self, now: float) -> tuple[Request, ...]:
        """Those that passed their deadline, taken out."""
        decoding = self._stage.expire(now) if self._stage is not None else ()
        return (*decoding, *self._planner.expire(now).expired)

    def _due_at(self, now: float) -> float | None:
        """When `_take` has something to do for the worker; None: not before something changes."""
        return self._planner.wake_at(now) if self._stage is None else self._stage.due_at(now)

    def _compute(
        self,
        worker: Worker,
        batch: Sequence[Request],
        decoded: Mapping[int, Result],
        now: float,
        *,
        more: bool,
        limit_s: float = math.inf,
    ) -> None:
        if batch[0].ticket != SELF_TEST:
            self.last_used = now
        try:
            self._start(worker, batch, decoded, limit_s)
            while worker.in_flight:
                if more and worker.has_room:
                    following, decoded = self._following(worker)
                    if following:
                        self._start(worker, following, decoded)
                        continue
                answers = worker.finish()
                self._recorder.end(self._flights.popleft())
                began, now = now, self._clock()
                if answers[0].ticket != SELF_TEST:
                    self.last_used = now
                self._planner.computed(len(answers), now - began)
                for answer in answers:
                    self._finish(answer)
        except DeviceLost as exc:
            self._lost = True
            self._on_lost(exc)
        finally:
            if not self._lost:  # otherwise it stays in use: nobody computes with it or closes it any more
                while self._flights:  # none, unless a defect of ours left some on their way
                    self._recorder.end(self._flights.popleft())
                self._release(worker)

    def _decode(self, worker: Worker, request: Request) -> Result:
        """Decode `request` beside everything else: that can end the process, too."""
        if (gate := self._gate) is not None:
            gate.enter(wait=True)
        flight = self._recorder.begin(self.model, (request,))
        try:
            return worker.decode(request)
        finally:
            self._recorder.end(flight)
            if gate is not None:
                gate.leave()

    def _start(
        self, worker: Worker, batch: Sequence[Request], decoded: Mapping[int, Result], limit_s: float = math.inf
    ) -> None:
        if batch[0].ticket != SELF_TEST:
            self.statistics.count_batch(len(batch))
        flight = self._recorder.begin(self.model, batch, limit_s)
        flight.waits = worker.turnstile.is_crowded
        self._flights.append(flight)
        worker.start(batch, decoded)

    def _following(self, worker: Worker) -> tuple[Sequence[Request], Mapping[int, Result]]:
        """The next batch for a worker that has one on its way; none once it was swapped or retired."""
        if self._gate is not None and self._gate.closed:
            return (), _NOTHING
        with self._lock:
            if self._worker is not worker:
                return (), _NOTHING
            now = self._clock()
            plan, decoded = self._take(worker, now)
        self._turn_away(plan.expired, now)
        return plan.batch, decoded

    def _release(self, worker: Worker) -> None:
        with self._lock:
            self._using = None
            leaves = self._worker is not worker  # swapped or retired meanwhile: ours to close
            if leaves:
                self._changed.notify()  # our thread may wait for this one to be done
        if leaves:
            worker.close()

    def _turn_away(self, expired: Sequence[Request], now: float) -> None:
        for request in expired:
            self._finish(Answer(request.ticket, self._late(request, now), self.version))

    def _work(self) -> None:
        """The life of the thread of a model that is not quick."""
        while True:
            with self._lock:
                while not self._ended and (pause := self._pause_s()) != 0.0:
                    self._changed.wait(pause)
                if self._ended:
                    return
            self._enter(more=True)

    @property
    def _ended(self) -> bool:
        return self._retired or self._lost

    def _pause_s(self) -> float | None:
        """How long until a batch is due for our thread; None: until something changes."""
        if self.quick or self._worker is None or self._using is not None:
            return None
        now = self._clock()
        due = self._due_at(now)
        return None if due is None else max(0.0, due - now)

    def _late(self, request: Request, now: float) -> DeadlineExceeded:
        waited_ms = (now - request.received) * 1000
        return DeadlineExceeded(f"The request waited {waited_ms:.0f} ms for {self.model}; its deadline passed.")

    def _out_of_memory(self, expected_s: float) -> RequestError:
        self.called_in_vain += 1
        return Unavailable(
            f"The model {self.model!r} made room for others, and is back later than this request can wait.",
            retry_after_ms=max(1, math.ceil(expected_s * 1000)),
        )

    def _unavailable(self) -> RequestError:
        if self._retired:
            return Unavailable(f"The model {self.model!r} was taken out of service.", retry_after_ms=1000)
        return Unavailable(
            f"The model {self.model!r} did not load.",
            fix="Its state topic and the log have the reason.",
            retryable=False,
        )

    def _finish(self, answer: Answer) -> None:
        if answer.ticket != SELF_TEST:
            self.statistics.count(answer)
        self._on_answer(answer)
