"""A loaded model: its engine, its task, and the batches that are on their way through it.

`start` decodes requests and begins to compute them, `finish` waits for the batch that was started first and phrases its
answers; `run_batch` is both. How many batches may be on their way at a time is the engine's to say (see `lanes`): with
more than one, the next is decoded and the last one phrased while the engine computes.

A model may leave more than the batch open: the length of a text, the size of a picture. Requests of equal sizes are
then computed together, the others behind them in the same turn, and all are answered in the order in which they came.

Whatever goes wrong with one request is the answer to that request; a batch that fails is computed again one by one, so
that only the request at fault gets an error. A lost device is nobody's answer: it ends the process.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from edge_sdk.backends.aligned import AlignedEngine
from edge_sdk.backends.base import Distant
from edge_sdk.backends.registry import Loaded, load_engine
from edge_sdk.errors import (
    DeadlineExceeded,
    DeviceLost,
    EdgeSdkError,
    InferenceFailed,
    PackageError,
    RequestError,
    TooLarge,
)
from edge_sdk.package import EnginePackage
from edge_sdk.profiles import Machine
from edge_sdk.runtime.batching import pack, pack_alike
from edge_sdk.runtime.lanes import Lane, Load, LooseLane, ThreadLane, lanes_of, turnstile_for
from edge_sdk.runtime.messages import Answer, Request, Timing
from edge_sdk.runtime.sequences import Sequences, rounds
from edge_sdk.seldom import Seldom
from edge_sdk.tasks.base import Body, Decoded, Task
from edge_sdk.tasks.oip import encode_response
from edge_sdk.tasks.registry import task_of
from edge_sdk.tensors import Feeds, Outputs, sizes_vary

log = logging.getLogger(__name__)

_WORTH_TELLING_S = 50e-6
"""What took less is not told of: to write it down would take as long."""

_NONE: Mapping[int, Decoded | RequestError] = {}

Group = Sequence[tuple[Request, Decoded]]
"""Requests that are computed together: their rows fit one batch of the engine, and they differ in nothing else."""

_CLOSES = object()
"""The `reply` of a request that ends a sequence and brings nothing: there is nothing to compute."""


class _Flight:
    """A batch on its way. Its first group is being computed; the others follow in the same lane as it is finished."""

    __slots__ = ("answers", "error", "feeds", "group", "groups", "lane", "late", "launched", "requests", "under_way")

    def __init__(self, lane: Lane, requests: Sequence[Request], started: float) -> None:
        self.lane = lane
        self.requests = requests
        self.groups: list[Group] = []
        self.answers: list[Answer] = []
        """Those that are there already: to requests that could not be decoded, or came too late."""
        self.group: Group = ()
        """What is being computed."""
        self.feeds: list[Feeds] = []
        """What the model is fed for each of the group."""
        self.launched = started
        """When the group that is being computed began: its turn had come."""
        self.late = False
        """Whether the deadline of any passed before its turn came."""
        self.under_way = False
        """Whether the lane was given the group."""
        self.error: Exception | None = None
        """What went wrong with it then."""


class Worker:
    """An engine at work. One thread at a time may use it."""

    def __init__(
        self, package: EnginePackage, loaded: Loaded, task: Task, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises OutOfMemory where the engine's lanes do not fit beside it."""
        self.package = package
        self.loaded = loaded
        self.task = task
        self.max_rows = package.manifest.batching.max_batch
        self.batch_s = float("inf")
        """What a best batch takes once it is warm, in seconds; unknown before `warm_up`."""
        self._sizes_vary = sizes_vary(package.manifest.asked)
        rules = package.manifest.sequence
        self.sequences = Sequences(rules, loaded.engine.inputs) if rules is not None else None
        """Of a stateful model: what is kept between requests. A worker that takes over may take this over, too."""
        self._engine = loaded.engine
        self._clock = clock
        serving = package.manifest.serving
        instances = serving.instances if self.sequences is None else 1  # what follows needs the state that was before
        self.in_background = instances > 1 or serving.isolation == "process"
        """Whether it computes on another thread, or may wait for another process: it is never quick."""
        self.turnstile = turnstile_for(loaded.engine)
        """Which its batches pass before they compute on the processor; open unless somebody closes it."""
        self._lanes = lanes_of(loaded.engine, self.max_rows, instances=instances, turnstile=self.turnstile)
        """The free ones; the last is taken first."""
        self._flights: deque[_Flight] = deque()  # those in use, in the order in which they were started
        self._failures = Seldom()
        self._defects = Seldom()

    @classmethod
    def load(
        cls,
        package: EnginePackage,
        machine: Machine | None = None,
        *,
        store: Path | None = None,
        why_not_preferred: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> Worker:
        """The worker of a package; takes and raises what `load_engine` does.

        A build may put a new package in the place of this one while it is being read, whose files then do not match
        the manifest that was opened. So it is looked at once more, and the new one is loaded.
        """
        try:
            found, task = package, task_of(package)
            loaded = _load(found, machine, store, why_not_preferred)
        except PackageError:
            found = EnginePackage.open(package.path)
            if found.digest == package.digest:
                raise
            task = task_of(found)
            loaded = _load(found, machine, store, why_not_preferred)
        try:
            return cls(found, loaded, task, clock=clock)
        except Exception:
            loaded.engine.close()
            raise

    @property
    def in_flight(self) -> int:
        """How many batches are on their way."""
        return len(self._flights)

    @property
    def has_room(self) -> bool:
        """Whether another batch may be started before one is finished."""
        return bool(self._lanes)

    def warm_up(self) -> float:
        """Compute a best batch of zeros in every lane, and give back the seconds that it takes once it is warm.

        Raises EngineFailed. A model whose sizes are known only at run time counts as slow.
        """
        seconds = []
        for lane in self._lanes:
            for _ in range(3 if lane.measurable else 1):
                started = self._clock()
                lane.warm(self.package.manifest.batching.best_batch)
                seconds.append(self._clock() - started if lane.measurable else float("inf"))
        self.batch_s = min(seconds)
        return self.batch_s

    @property
    def elsewhere_bytes(self) -> int:
        """Memory that its engines hold in other processes; while nothing is on its way."""
        twins = [lane.engine for lane in self._lanes if isinstance(lane, ThreadLane) and lane.engine is not None]
        return sum(engine.elsewhere_bytes() for engine in (self._engine, *twins) if isinstance(engine, Distant))

    def ask(self, feeds: Feeds) -> Outputs:
        """What the engine gives for one request, without a task and while nothing is on its way."""
        return self._engine.infer(feeds)

    def decode_s(self, request: Request) -> float:
        """About how long `decode` takes; any thread may ask."""
        return self.task.decode_s(request.payload)

    def decode(self, request: Request) -> Decoded | RequestError:
        """A request understood, or what is wrong with it; any thread may call it, at any time."""
        began = self._clock()
        try:
            if self.sequences is None:
                decoded = self.task.decode(request.payload)
            else:
                decoded = self._decode_part(request, self.sequences)
        except RequestError as exc:
            return exc
        except Exception:
            if self._defects.happened(self._clock()):
                log.exception(
                    "A defect of edge-sdk: decoding %r failed (%d so far).",
                    request, self._defects.count, extra=self._about(request),
                )  # fmt: skip
            return InferenceFailed("The request could not be decoded; the device's log has the reason.")
        if (took_s := self._clock() - began) > _WORTH_TELLING_S:
            decoded = decoded._replace(took_s=took_s)
        if self._sizes_vary and self.max_rows == 1:
            return decoded._replace(rows=0)  # its first axis may be no batch at all, only of a size that varies too
        if decoded.rows > self.max_rows:
            return TooLarge(f"The request has a batch of {decoded.rows}; the model takes at most {self.max_rows}.")
        return decoded

    def run_batch(self, requests: Sequence[Request]) -> list[Answer]:
        """Exactly one answer for each of `requests`."""
        self.start(requests)
        return self.finish()

    def start(self, requests: Sequence[Request], decoded: Mapping[int, Decoded | RequestError] = _NONE) -> None:
        """Decode `requests`, but for those that are `decoded` (by ticket), and begin to compute them.

        There must be room.
        """
        flight = _Flight(self._lanes.pop(), requests, self._clock())
        self._flights.append(flight)
        accepted: list[tuple[Request, Decoded]] = []
        for request in requests:
            one = decoded.get(request.ticket) or self.decode(request)
            if isinstance(one, RequestError):
                flight.answers.append(self._answer(request, one))
            else:
                accepted.append((request, one))
        rows = [one.rows for _, one in accepted]
        if self.sequences is not None:
            keys = [self.sequences.key(*each) for each in accepted]
            groups = rounds(keys, [_sizes(one.feeds) for _, one in accepted], rows, self.max_rows)
        elif self._sizes_vary:
            groups = pack_alike([_sizes(one.feeds) for _, one in accepted], rows, self.max_rows)
        else:
            groups = pack(rows, self.max_rows)
        flight.groups = [[accepted[index] for index in group] for group in groups]
        if flight.groups:
            self._launch(flight, flight.groups[0])

    def finish(self) -> list[Answer]:
        """Exactly one answer for each request of the batch that was started first; waits until they are computed."""
        flight = self._flights[0]
        in_order = not flight.answers and (
            len(flight.groups) < 2 or not (self._sizes_vary or self.sequences is not None)
        )
        for group in flight.groups:
            if group is not flight.groups[0]:
                self._launch(flight, group)
            flight.answers += self._land(flight)
        self._flights.popleft()
        self._lanes.append(flight.lane)
        if flight.late or not in_order:
            places = {request.ticket: place for place, request in enumerate(flight.requests)}
            flight.answers.sort(key=lambda answer: places[answer.ticket])
        return flight.answers

    def close(self) -> None:
        """Give the engine's memory back. Nothing may be on its way."""
        for lane in self._lanes:
            lane.close()
        self._lanes = [LooseLane(self._engine)]  # which holds no memory, and lets the engine say that it is closed
        self._engine.close()

    def _decode_part(self, request: Request, sequences: Sequences) -> Decoded:
        """As the task does; Malformed if the request does not say of which sequence it is."""
        part = request.payload.sequence
        if part is not None and part.end and not request.payload.data:
            return Decoded({}, 0, _CLOSES)
        decoded = self.task.decode(request.payload)
        sequences.key(request, decoded)
        return decoded

    def _launch(self, flight: _Flight, group: Group) -> None:
        """Begin to compute a group. What goes wrong is for `_land` to deal with, in its turn; DeviceLost is raised."""
        flight.error = None
        flight.group, flight.feeds = group, [decoded.feeds for _, decoded in group]
        if self.sequences is not None:
            self._resume(flight, self.sequences)
        flight.under_way = bool(flight.group)
        try:
            if flight.under_way:
                flight.lane.start(partial(self._board, flight))
        except DeviceLost:
            raise
        except Exception as exc:
            flight.error = exc

    def _board(self, flight: _Flight) -> Load:
        """The turn of a group has come: those that can still wait for an answer are computed.

        The lane asks, perhaps on another thread, while nobody looks at the flight.
        """
        now = flight.launched = self._clock()
        if min([request.deadline for request, _ in flight.group]) <= now:
            self._leave_late(flight, now)
        return flight.feeds, sum([decoded.rows for _, decoded in flight.group])

    def _leave_late(self, flight: _Flight, now: float) -> None:
        """Answer those whose deadline passed, and compute the others of the group without them."""
        going, feeds = [], []
        for one, brought in zip(flight.group, flight.feeds):
            request = one[0]
            if request.deadline > now:
                going.append(one)
                feeds.append(brought)
                continue
            if self.sequences is not None:
                self.sequences.let_go(*one)
            late = DeadlineExceeded(
                f"The request waited {(now - request.received) * 1000:.0f} ms for its turn; its deadline passed."
            )
            flight.answers.append(self._answer(request, late))
        flight.group, flight.feeds, flight.late = going, feeds, True

    def _land(self, flight: _Flight) -> list[Answer]:
        """The answers to the group that was launched last; if it failed, each of it is computed again alone."""
        if not flight.under_way:
            return []
        try:
            if flight.error is not None:
                raise flight.error
            outputs = flight.lane.finish()
        except DeviceLost:
            raise
        except Exception as exc:
            group = flight.group
            if len(group) > 1:
                return [answer for one in group for answer in self._alone(flight, one)]
            self._tell(exc, group[0][0])
            if self.sequences is not None:
                self.sequences.let_go(*group[0])
            return [self._answer(request, _as_request_error(exc)) for request, _ in group]
        now, group = self._clock(), flight.group
        infer_ms = (now - flight.launched) * 1000
        together = tuple([request.ticket for request, _ in group]) if len(group) > 1 else ()
        answers = []
        first = 0
        for (request, decoded), feeds in zip(group, flight.feeds):
            rows = _rows_of(outputs, first, decoded.rows)
            first += decoded.rows
            result = (
                self._encode(rows, decoded)
                if self.sequences is None
                else self._advance(self.sequences, request, decoded, feeds, rows)
            )
            waited_ms = (flight.launched - request.received - decoded.took_s) * 1000
            phrased, now = now, self._clock()
            timing = Timing(
                waited_ms, infer_ms, len(group), (), decoded.took_s * 1000, (now - phrased) * 1000, together
            )
            answers.append(self._answer(request, result, timing))
        return answers

    def _resume(self, flight: _Flight, sequences: Sequences) -> None:
        """Give each of the group the state of its sequence; who gets none is answered, and leaves the group."""
        now = self._clock()
        going, feeds = [], []
        for request, decoded in flight.group:
            try:
                if decoded.reply is _CLOSES:
                    sequences.close(request, decoded, now)
                    closed = encode_response({}, model_name=self.package.name, model_version=self.package.version)
                    flight.answers.append(self._answer(request, closed))
                    continue
                feeds.append(sequences.resume(request, decoded, now))
            except RequestError as exc:
                flight.answers.append(self._answer(request, exc))
            else:
                going.append((request, decoded))
        flight.group, flight.feeds = going, feeds

    def _advance(
        self, sequences: Sequences, request: Request, decoded: Decoded, feeds: Feeds, outputs: Outputs
    ) -> Body | RequestError:
        """The answer to a request of a sequence. Only with an answer does the sequence go on: who is told that his
        request failed, or came too late, may ask again."""
        now = self._clock()
        if request.deadline <= now:
            result: Body | RequestError = DeadlineExceeded("The deadline passed before the answer was there.")
        else:
            result = self._encode(sequences.answered(outputs), decoded)
        if isinstance(result, RequestError):
            sequences.let_go(request, decoded)
        else:
            sequences.keep(request, decoded, feeds, outputs, now)
        return result

    def _alone(self, flight: _Flight, one: tuple[Request, Decoded]) -> list[Answer]:
        self._launch(flight, [one])
        return self._land(flight)

    def _encode(self, outputs: Outputs, decoded: Decoded) -> Body | RequestError:
        try:
            return self.task.encode(outputs, decoded)
        except RequestError as exc:
            return exc
        except Exception:
            if self._defects.happened(self._clock()):
                log.exception(
                    "A defect of edge-sdk: an answer of %s could not be phrased (%d so far).",
                    self.package.name, self._defects.count, extra=self._about(),
                )  # fmt: skip
            return InferenceFailed("The answer could not be phrased; the device's log has the reason.")

    def _tell(self, exc: Exception, request: Request) -> None:
        """Log a failure, and others like it within a minute as a number: they come at the rate a client sends."""
        if not self._failures.happened(self._clock()):
            return
        name, count = self.package.name, self._failures.count
        about = {**self._about(request), "code": _as_request_error(exc).code}
        if isinstance(exc, EdgeSdkError):
            log.warning("%s failed on a request: %s (%d so far.)", name, exc, count, extra=about)
        else:
            log.error(
                "A defect of edge-sdk: %s could not be asked (%d times so far).", name, count, exc_info=exc, extra=about
            )

    def _about(self, request: Request | None = None) -> dict[str, object]:
        """What a line of the log is about, for those who search it."""
        about: dict[str, object] = {"model": self.package.name, "version": self.package.version}
        return about if request is None else {**about, "ticket": request.ticket, "client": request.client or None}

    def _answer(self, request: Request, result: Body | RequestError, timing: Timing | None = None) -> Answer:
        return Answer(request.ticket, result, self.package.version, timing)


def _sizes(feeds: Feeds) -> tuple[tuple[int, ...], ...]:
    """Of every axis but the first, in the order of the inputs' names: a client may send them in any."""
    return tuple([feeds[name].shape[1:] for name in sorted(feeds)])


def _load(package: EnginePackage, machine: Machine | None, store: Path | None, why_not_preferred: str) -> Loaded:
    loaded = load_engine(package, machine, store=store, why_not_preferred=why_not_preferred)
    if (rules := package.manifest.sequence) is None:
        return loaded
    return replace(loaded, engine=AlignedEngine(loaded.engine, rules, package.manifest.sizes))


def _rows_of(outputs: Outputs, first: int, rows: int) -> Outputs:
    return {name: array[first : first + rows] for name, array in outputs.items()} if rows else outputs


def _as_request_error(exc: Exception) -> RequestError:
    """What a stranger is told: a runtime's own text may hold paths and names that are not his."""
    return exc if isinstance(exc, RequestError) else InferenceFailed("The model failed while it computed this request.")
