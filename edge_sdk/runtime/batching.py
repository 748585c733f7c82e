"""Which requests are computed together, and when: pure decisions, the time passed in.

A batch is whatever waited while the engine was busy. Nothing is held back in the hope of company unless `max_wait_s`
says so: on a message transport an artificial delay is paid by every lone request, and a busy engine gathers a batch by
itself. Requests wait undecoded, so the queue costs the bytes that came and a decoder runs only for work that is done.

    planner.offer(request, now)         # QueueFull if it may not wait here; answers to those it displaced
    plan = planner.take(now)            # a batch, and those that expired while they waited
    planner.wake_at(now)                # when to ask again; None: only when something is offered

Who comes first: the higher priority, and a request gains one level for each second it has waited, so nothing waits for
ever behind a stream of urgent ones. Among equals the clients take turns, so one that sends a thousand requests delays
another's only one by a single place. Each client's own requests of one priority keep their order.

Who may wait: anybody while there is room, and time. In a full queue whoever holds the most of it gives up its newest
request to one that holds less, and only the one that holds the most is told to come back later. So is, at once, whose
turn will not come before most of its life is over: a queue that is longer than its requests live would compute each for
nobody, or a moment too late.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from edge_sdk.errors import QueueFull
from edge_sdk.runtime.messages import Answer, Request

_SECONDS_A_LEVEL = 1.0
"""How long a request waits for one more level of priority: from the lowest to the highest is within most deadlines."""

_OF_ITS_LIFE = 0.8
"""How much of the time that is left a request may spend waiting, as far as that can be told: it is to be computed and
answered, too, and a broker counts in whole seconds."""

_ANY = -1
"""In place of a priority: where order is kept among all of them."""

_Flow = tuple[str, int]
"""Client and priority: requests among which the order of arrival is kept."""


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
    newest_wins: bool = False
    """Of each client only the latest request waits: for streams, where an answer to an old frame helps nobody."""
    in_order: bool = False
    """All of a client's requests keep their order, whatever their priorities; each counts with its own when it is the
    next one. For stateful models."""
    held_bytes: int = 0
    """Of requests that were taken and wait elsewhere, on their way to be computed: they count as waiting."""
    _flows: OrderedDict[_Flow, deque[Request]] = field(default_factory=OrderedDict)
    """The one that was served longest ago first; none is empty."""
    _requests: Counter[str] = field(default_factory=Counter)
    _bytes: Counter[str] = field(default_factory=Counter)
    """By client, and only those that have any."""
    _waiting: int = 0
    _waiting_bytes: int = 0
    _seconds_per_request: float = 0.01
    _knows_pace: bool = False
    """Whether the line above was measured."""

    def __len__(self) -> int:
        return self._waiting

    @property
    def waiting_bytes(self) -> int:
        """What the requests that wait hold, in the queue and beside it."""
        return self._waiting_bytes + self.held_bytes

    def offer(self, request: Request, now: float) -> list[Answer]:
        """Queue `request`; the answers to those that had to leave for it.

        Raises QueueFull, with an honest moment to come back, if the queue is full and its client holds the most of it,
        or if its turn would come too late.
        """
        # Of one frame a pipeline asks for several parts (tickets below 0), and none of them takes another's place.
        superseded = self._of_client(request.client) if self.newest_wins and request.ticket >= 0 else []
        if not superseded and (late_s := self._too_late_s(request, now)) > 0:
            raise QueueFull(
                f"The model {request.model} has {self._waiting} requests waiting, more than this one has time for.",
                fix="Try again later, or give it more time.",
                retry_after_ms=math.ceil(late_s * 1000),
            )
        victims = self._in_the_way(request, superseded)  # before anybody has to leave: it may be refused
        displaced: list[Answer] = []
        if superseded:
            displaced += [Answer(older.ticket, _superseded(older)) for older in self._leave(superseded)]
        if victims:
            displaced += [Answer(victim.ticket, self._full(victim)) for victim in self._leave(victims)]
        self._flow_of(request).append(request)
        self._count(request, 1)
        return displaced

    def keep_order(self, in_order: bool) -> None:
        """Let `in_order` be so from now on, also for those that wait: of each client in the order of arrival."""
        if in_order == self.in_order:
            return
        self.in_order = in_order
        waiting = [request for flow in self._flows.values() for request in flow]
        self._flows.clear()
        for request in sorted(waiting, key=lambda request: request.received):
            self._flow_of(request).append(request)

    def take(self, now: float) -> Plan:
        """The next batch, the most deserving first; empty while it is worth waiting for company."""
        if (wake_at := self.wake_at(now)) is None or wake_at > now:
            return Plan()
        batch: list[Request] = []
        expired: list[Request] = []
        while self._flows and len(batch) < self.batch:
            request = self._next(now)
            (batch if request.deadline > now else expired).append(request)
        return Plan(tuple(batch), tuple(expired))

    def expire(self, now: float) -> Plan:
        """Only those that passed their deadline, while nothing can be computed."""
        late = [request for waiting in self._flows.values() for request in waiting if request.deadline <= now]
        return Plan((), tuple(self._leave(late)))

    def wake_at(self, now: float) -> float | None:
        """When `take` will give something; None while nothing waits."""
        if not self._waiting:
            return None
        if self._waiting >= self.batch or not self.max_wait_s:
            return now
        heads = [waiting[0] for waiting in self._flows.values()]
        return max(now, min(min(head.received + self.max_wait_s, head.deadline) for head in heads))

    def computed(self, requests: int, seconds: float) -> None:
        """Learn how long requests take."""
        self._knows_pace = True
        self._seconds_per_request += 0.1 * (seconds / max(1, requests) - self._seconds_per_request)

    def backlog_ms(self) -> int:
        """How long what waits now will take."""
        return max(1, round(self._waiting * self._seconds_per_request * 1000))

    def clear(self) -> tuple[Request, ...]:
        """Take everything that waits, for a model that goes away."""
        everything = [request for waiting in self._flows.values() for request in waiting]
        return tuple(sorted(self._leave(everything), key=lambda request: request.received))

    def _flow_of(self, request: Request) -> deque[Request]:
        """Where `request` waits, behind others of its kind."""
        flow = (request.client, _ANY if self.in_order else request.priority)
        if (waiting := self._flows.get(flow)) is None:
            waiting = self._flows[flow] = deque()
        return waiting

    def _next(self, now: float) -> Request:
        """Take out the request whose turn it is; its flow goes behind the others."""
        flow = next(iter(self._flows))
        if len(self._flows) > 1:
            flow = max(self._flows, key=lambda one: self._level(self._flows[one][0], now))
        waiting = self._flows[flow]
        request = waiting.popleft()
        if waiting:
            self._flows.move_to_end(flow)
        else:
            del self._flows[flow]
        self._count(request, -1)
        return request

    def _level(self, request: Request, now: float) -> float:
        return request.priority + (now - request.received) // _SECONDS_A_LEVEL

    def _too_late_s(self, request: Request, now: float) -> float:
        """How much too long `request` would wait, in seconds; 0 or less: it may, or nobody knows."""
        if not self._knows_pace or request.deadline <= now:
            return 0.0
        patience_s = _OF_ITS_LIFE * (request.deadline - now)
        if (wait_s := self._waiting * self._seconds_per_request) <= patience_s:
            return wait_s - patience_s  # however many of them come first
        priority = _ANY if self.in_order else request.priority
        mine = len(self._flows.get((request.client, priority), ()))
        ahead = sum(
            len(waiting) if other > priority else min(len(waiting), mine + 1)
            for (_, other), waiting in self._flows.items()
            if other >= priority
        )
        return ahead * self._seconds_per_request - patience_s

    def _in_the_way(self, request: Request, leaving: Sequence[Request]) -> list[Request]:
        """Who has to leave for `request`, beside those that are `leaving` anyway; QueueFull if it holds the most."""
        size = len(request.payload.data)
        count = self._waiting - len(leaving)
        total = self.held_bytes + self._waiting_bytes - sum(len(each.payload.data) for each in leaving)
        victims: list[Request] = []
        if count < self.limits.max_requests and total + size <= self.limits.max_bytes:
            return victims
        requests, sizes = Counter(self._requests), Counter(self._bytes)
        for each in leaving:
            requests[each.client] -= 1
            sizes[each.client] -= len(each.payload.data)
        staying: dict[str, list[Request]] = {}
        while (many := count >= self.limits.max_requests) or total + size > self.limits.max_bytes:
            held, mine = (requests, 1) if many else (sizes, size)
            largest = max(held, key=held.__getitem__, default=request.client)
            if held[largest] <= held[request.client] + mine:
                raise self._full(request)
            victim = staying.setdefault(largest, self._of_client(largest)).pop()
            victims.append(victim)
            count -= 1
            total -= len(victim.payload.data)
            requests[largest] -= 1
            sizes[largest] -= len(victim.payload.data)
        return victims

    def _of_client(self, client: str) -> list[Request]:
        """What waits of one client; the one it can do without soonest (lowest priority, newest) last."""
        priorities = sorted((priority for owner, priority in self._flows if owner == client), reverse=True)
        return [request for priority in priorities for request in self._flows[client, priority]]

    def _leave(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Take `requests` out, wherever they wait."""
        leaving = {id(request) for request in requests}
        flows = {(request.client, priority) for request in requests for priority in (request.priority, _ANY)}
        for flow in flows & self._flows.keys():
            kept = deque(request for request in self._flows[flow] if id(request) not in leaving)
            if kept:
                self._flows[flow] = kept
            else:
                del self._flows[flow]
        for request in requests:
            self._count(request, -1)
        return requests

    def _count(self, request: Request, change: int) -> None:
        size = len(request.payload.data)
        self._waiting += change
        self._waiting_bytes += change * size
        self._requests[request.client] += change
        self._bytes[request.client] += change * size
        if not self._requests[request.client]:
            del self._requests[request.client], self._bytes[request.client]

    def _full(self, request: Request) -> QueueFull:
        return QueueFull(
            f"The model {request.model} has {self._waiting} requests waiting.",
            fix="Try again later.",
            retry_after_ms=self.backlog_ms(),
        )


def _superseded(request: Request) -> QueueFull:
    return QueueFull(
        f"A newer request of the same client took this one's place: {request.model} keeps only the newest.",
        retryable=False,
    )


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


def pack_alike(shapes: Sequence[Hashable], rows: Sequence[int], max_rows: int) -> list[list[int]]:
    """As `pack`, but a group has only indices of equal `shapes`: whose arrays can lie behind one another.

    In each group they keep their order, and the groups are in that of their first members.
    """
    alike: dict[Hashable, list[int]] = {}
    for index, shape in enumerate(shapes):
        alike.setdefault(shape, []).append(index)
    return sorted(
        [indices[place] for place in group]
        for indices in alike.values()
        for group in pack([rows[index] for index in indices], max_rows)
    )
