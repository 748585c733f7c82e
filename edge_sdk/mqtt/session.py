"""What the daemon's MQTT session decides, without a socket or a clock: acknowledgements, windows, epochs, duplicates.

Events go in, actions come out; the shell around it performs them in order.

    intake = session.received(event, reply, now)        # is this to be computed?
    session.answered(ticket, message, now)              # it was
    for action in session.due():                        # Publish or Acknowledge
        ...

The promises, and where each is kept:

* *A request is acknowledged only after the broker took its answer, and in the order of arrival* (MQTT 5, 4.6). So a
  daemon killed at any earlier moment gets the request again. `_Ledger` holds the order, `acknowledged` releases.
* *Nothing of an earlier connection is acknowledged on a later one.* A packet id means nothing across connections;
  `closed` forgets the ledger, and the broker sends those requests again.
* *Never more answers in flight than the broker's Receive Maximum*, nor than our own window, also right after a
  reconnect: answers that were in flight go back to the head of the outbox and are sent again in order, through the same
  window. Inference is pure and an answer is bytes, so sending it twice is harmless; losing it is not.
* *The same request is computed once.* Two publications are the same if their topic, reply topic, correlation data and
  payload are. A second one joins the first while it is computed, gets the same bytes again (`duplicate: 1`) after that,
  and is refused if the payload is another. What is remembered is bounded in bytes and in time.
* *An answer larger than the broker takes is replaced by a 413* before it is sent, not resent for ever.

What was answered is kept across a restart of the daemon only if the session is `durable`: then each answer is handed
out in a Record before it is in a Publish, and `restore` takes up what a former daemon recorded. Otherwise a request
whose answer was taken but whose acknowledgement was lost is computed again, and its client drops the second answer.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Union

from edge_sdk.mqtt.fingerprint import fingerprint
from edge_sdk.mqtt.transports.base import (
    FAILURE,
    NO_MATCHING_SUBSCRIBERS,
    Acknowledged,
    BrokerLimits,
    Message,
    Received,
)

DEFAULT_WINDOW = 64
"""Answers in flight. A broker's default Receive Maximum is 65,535; ours bounds what a lost connection sends again."""

REMEMBERED_S = 60.0
"""For how long an answer is given again to who asks again."""

_COST_OF_OBJECTS = 2048
"""Bytes of Python objects around a remembered answer, about."""

Key = tuple[str, str, bytes]
"""Request topic, reply topic, correlation data: what tells a request from any other."""

_FORGOTTEN = Message("", b"")

Fate = Literal["new", "joined", "replayed", "reused"]


class ReplyRoute(NamedTuple):
    """Where an answer goes and how it is recognised there."""

    topic: str
    correlation_data: bytes | None = None
    identifies: bool = True
    """Whether topic and correlation data tell this request from any other; without that, nothing is deduplicated."""


class Intake(NamedTuple):
    """What becomes of a message: `new` is to be computed, `reused` to be refused, the others need nothing more."""

    ticket: int
    fate: Fate


class Publish(NamedTuple):
    """Publish `message`, then tell `published` the handle."""

    message: Message
    tag: int


class Acknowledge(NamedTuple):
    received: Received


class Recorded(NamedTuple):
    """An answer as it is written down: enough to give it again, and to know the request that asks for it again."""

    key: Key
    fingerprint: bytes
    answer: Message
    until: float
    taken: bool = False
    """Whether the broker took it."""


@dataclass(frozen=True)
class Record:
    """Write down, before anything after it is done, these answers, and that those of these requests were taken."""

    answers: tuple[Recorded, ...]
    taken: tuple[Key, ...]


Action = Union[Record, Publish, Acknowledge]


@dataclass
class SessionCounts:
    """What happened, for the stats topic."""

    received: int = 0
    published: int = 0
    acknowledged: int = 0
    duplicates: int = 0
    resent: int = 0
    unheard: int = 0
    """Answers that nobody was subscribed for."""
    refused: int = 0
    """Answers that the broker refused (not authorised, quota)."""
    oversized: int = 0
    connections: int = 0
    session_lost: int = 0
    """Connections on which the broker had forgotten us, and with us what it had accepted for us."""


@dataclass(slots=True)
class _Job:
    """A request from its arrival to the acknowledgement of everything that asked for it."""

    key: Key | None
    fingerprint: bytes
    entries: list[_LedgerEntry] = field(default_factory=list)


@dataclass(slots=True)
class _LedgerEntry:
    """A message of this connection that has to be acknowledged in its turn."""

    received: Received
    done: bool = False
    counts: bool = True


class _Remembered(NamedTuple):
    fingerprint: bytes
    answer: Message
    until: float

    @property
    def cost(self) -> int:
        """Bytes of memory, about: a small answer is mostly the objects around it."""
        return len(self.answer.payload) + _COST_OF_OBJECTS


class _Outgoing(NamedTuple):
    message: Message
    ticket: int | None
    """None: an announcement, which no request waits for."""


class Session:
    """One daemon's session with its broker. Not thread-safe: it lives on the thread that owns the transport."""

    def __init__(
        self,
        *,
        packet_size: Callable[[Message], int],
        too_large: Callable[[Message, int], Message],
        window: int = DEFAULT_WINDOW,
        remembered_bytes: int = 8 * 1024 * 1024,
        remembered_s: float = REMEMBERED_S,
        durable: bool = False,
        numbers: Iterator[int] | None = None,
    ) -> None:
        """`packet_size` is the size of a message on the wire; `too_large` the answer in place of one over a limit.

        Sessions whose tickets must not be mistaken for each other's draw them from the same `numbers`.
        """
        self.counts = SessionCounts()
        self._packet_size = packet_size
        self._too_large = too_large
        self._own_window = window
        self._remembered_bytes = remembered_bytes
        self._remembered_s = remembered_s
        self._durable = durable
        self._unrecorded: list[Recorded] = []
        self._taken: list[Key] = []
        self._connected = False
        self._limits = BrokerLimits()
        self._numbers = numbers if numbers is not None else itertools.count(1)
        self._ledger: deque[_LedgerEntry] = deque()
        self._jobs: dict[int, _Job] = {}
        self._computing: dict[Key, int] = {}
        self._remembered: OrderedDict[Key, _Remembered] = OrderedDict()
        self._held_bytes = 0
        self._outbox: deque[_Outgoing] = deque()
        self._in_flight: OrderedDict[int, _Outgoing] = OrderedDict()
        self._unnumbered: dict[int, _Outgoing] = {}

    # What happened

    def connected(self, limits: BrokerLimits, *, remembered: bool = True) -> None:
        """A connection is up; what waits may go out, within its limits. `remembered`: the broker had our session."""
        self.counts.session_lost += bool(self.counts.connections) and not remembered
        self.counts.connections += 1
        self._connected = True
        self._limits = limits

    def closed(self) -> None:
        """The connection is gone: its acknowledgements are void, its unconfirmed answers go out again on the next."""
        self._connected = False
        self._ledger.clear()
        unconfirmed = [*self._in_flight.values(), *self._unnumbered.values()]
        self._in_flight.clear()
        self._unnumbered.clear()
        self.counts.resent += sum(outgoing.ticket is not None for outgoing in unconfirmed)
        waiting = [*unconfirmed, *self._outbox]
        # Announcements describe a moment; the shell announces afresh on every connection.
        self._outbox = deque(outgoing for outgoing in waiting if outgoing.ticket is not None)
        for job in self._jobs.values():
            job.entries.clear()

    def received(self, event: Received, route: ReplyRoute | None, now: float) -> Intake:
        """Take a message into the books. `route` None: there is no way back; it is acknowledged when `answered`."""
        self.counts.received += 1
        entry = self._enter(event)
        key, fingerprint = None, b""
        if route is not None and route.identifies:
            key = (event.message.topic, route.topic, route.correlation_data or b"")
            fingerprint = self._fingerprint(event.message)
        if key is not None:
            if (ticket := self._computing.get(key)) is not None:
                if self._jobs[ticket].fingerprint == fingerprint:
                    self.counts.duplicates += 1
                    self._jobs[ticket].entries.append(entry)
                    return Intake(ticket, "joined")
                return Intake(self._new_job(None, b"", entry), "reused")
            if (known := self._recall(key, now)) is not None:
                self.counts.duplicates += 1
                ticket = self._new_job(None, b"", entry)
                if known.fingerprint != fingerprint:
                    return Intake(ticket, "reused")
                self._outbox.append(_Outgoing(_marked_duplicate(known.answer), ticket))
                return Intake(ticket, "replayed")
        return Intake(self._new_job(key, fingerprint, entry), "new")

    def answered(self, ticket: int, answer: Message | None, now: float) -> None:
        """The answer to a request. None: there is nobody to tell; the request is acknowledged in its turn."""
        job = self._jobs[ticket]
        if job.key is not None:
            del self._computing[job.key]
        if answer is None:
            self._settle(ticket)
            return
        if job.key is not None:
            until = now + self._remembered_s
            self._remember(job.key, _Remembered(job.fingerprint, answer, until), now)
            if self._durable:
                self._unrecorded.append(Recorded(job.key, job.fingerprint, answer, until))
        self._outbox.append(_Outgoing(answer, ticket))

    def set_aside(self, event: Received) -> None:
        """A message that is nobody's request, and not to be counted: it is acknowledged in its turn."""
        entry = self._enter(event)
        entry.done, entry.counts = True, False

    def announce(self, message: Message) -> None:
        """Publish something that answers no request: availability, metadata. Forgotten if the connection is lost."""
        self._outbox.append(_Outgoing(message, None))

    def published(self, action: Publish, handle: int) -> None:
        """The shell published `action`; the broker will acknowledge `handle`."""
        outgoing = self._unnumbered.pop(action.tag)
        self.counts.published += 1
        if outgoing.message.qos:
            self._in_flight[handle] = outgoing
        else:  # nobody will tell what became of it
            self._done_with(outgoing)

    def unsendable(self, action: Publish) -> None:
        """The shell could not publish `action`, and never will: the request is done with, as if nobody had heard."""
        self.counts.unheard += 1
        self._done_with(self._unnumbered.pop(action.tag))

    def acknowledged(self, event: Acknowledged) -> Message | None:
        """The broker took, or refused, a message of ours. Either way it is done with; an answer's refusal is counted.

        Gives back the message if it was an announcement.
        """
        outgoing = self._in_flight.pop(event.handle, None)
        if outgoing is None:
            return None
        if outgoing.ticket is not None:
            self.counts.unheard += event.code == NO_MATCHING_SUBSCRIBERS
            self.counts.refused += event.code >= FAILURE
        self._done_with(outgoing)
        return outgoing.message if outgoing.ticket is None else None

    def restore(self, recorded: Iterable[Recorded], now: float) -> None:
        """Take up what a former daemon answered: what the broker did not take goes out again, all of it is known.

        For a session that has not yet been connected.
        """
        for one in recorded:
            self._remember(one.key, _Remembered(one.fingerprint, one.answer, one.until), now)
            if not one.taken:
                self.counts.resent += 1
                ticket = self._new_job(None, b"")  # nothing is computed under its key, which is for the record
                self._jobs[ticket].key = one.key
                self._outbox.append(_Outgoing(_marked_duplicate(one.answer), ticket))

    # What to do

    def due(self) -> list[Action]:
        """Everything that may be done now, in order. What it gives back counts as done."""
        actions: list[Action] = []
        if self._unrecorded or self._taken:  # also without a connection: what is computed then is worth keeping
            actions.append(Record(tuple(self._unrecorded), tuple(self._taken)))
            self._unrecorded.clear()
            self._taken.clear()
        if not self._connected:
            return actions
        while self._outbox and len(self._in_flight) + len(self._unnumbered) < self._window:
            outgoing = self._fitting(self._outbox.popleft())
            tag = next(self._numbers)
            self._unnumbered[tag] = outgoing
            actions.append(Publish(outgoing.message, tag))
        while self._ledger and self._ledger[0].done:
            self.counts.acknowledged += self._ledger[0].counts
            actions.append(Acknowledge(self._ledger.popleft().received))
        return actions

    @property
    def idle(self) -> bool:
        """Whether everything received has been answered, confirmed and acknowledged, and nothing waits to be sent."""
        return not (self._jobs or self._outbox or self._in_flight or self._unnumbered or self._ledger)

    @property
    def unsent(self) -> int:
        """How many answers wait for the connection or the window."""
        return len(self._outbox)

    @property
    def remembered_bytes(self) -> int:
        """What the answers that may be asked for again hold, about; bounded."""
        return self._held_bytes

    @property
    def outbox_bytes(self) -> int:
        """What waits for the connection, the window or the broker's word holds, in bytes of payload."""
        waiting = (*self._outbox, *self._in_flight.values(), *self._unnumbered.values())
        return sum(len(outgoing.message.payload) for outgoing in waiting)

    def __repr__(self) -> str:
        return (
            f"<Session connected={self._connected} open={len(self._jobs)} outbox={len(self._outbox)} "
            f"in_flight={len(self._in_flight)} unacknowledged={len(self._ledger)}>"
        )

    @property
    def _window(self) -> int:
        return min(self._own_window, self._limits.receive_maximum)

    def _enter(self, event: Received) -> _LedgerEntry:
        # Without its payload: up to a whole Receive Maximum of them waits here for the broker.
        bare = Received(_FORGOTTEN, event.packet_id, event.duplicate, event.connection)
        entry = _LedgerEntry(bare, done=event.packet_id is None)
        if event.packet_id is not None and self._connected:
            self._ledger.append(entry)
        return entry

    def _new_job(self, key: Key | None, fingerprint: bytes, *entries: _LedgerEntry) -> int:
        ticket = next(self._numbers)
        self._jobs[ticket] = _Job(key, fingerprint, list(entries))
        if key is not None:
            self._computing[key] = ticket
        return ticket

    def _fingerprint(self, request: Message) -> bytes:
        """Tells one payload from another: in this process, or (if it is to be written down) in any."""
        content_type = request.properties.content_type or ""
        if self._durable:
            return hashlib.sha256(content_type.encode() + b"\0" + request.payload).digest()
        return fingerprint(request.payload, content_type).to_bytes(8, "little", signed=True)

    def _done_with(self, outgoing: _Outgoing) -> None:
        if outgoing.ticket is not None:
            if self._durable and (key := self._jobs[outgoing.ticket].key) is not None:
                self._taken.append(key)
            self._settle(outgoing.ticket)

    def _settle(self, ticket: int) -> None:
        """A request is done with: everything that asked for it may be acknowledged in its turn."""
        for entry in self._jobs.pop(ticket).entries:
            entry.done = True

    def _fitting(self, outgoing: _Outgoing) -> _Outgoing:
        limit = self._limits.maximum_packet_size
        if limit is None or outgoing.ticket is None or self._packet_size(outgoing.message) <= limit:
            return outgoing
        self.counts.oversized += 1
        return outgoing._replace(message=self._too_large(outgoing.message, limit))

    def _remember(self, key: Key, remembered: _Remembered, now: float) -> None:
        if (former := self._remembered.pop(key, None)) is not None:
            self._held_bytes -= former.cost
        self._held_bytes += remembered.cost
        self._remembered[key] = remembered
        while self._remembered:
            oldest = next(iter(self._remembered.values()))
            if self._held_bytes <= self._remembered_bytes and oldest.until > now:
                break
            self._held_bytes -= self._remembered.popitem(last=False)[1].cost

    def _recall(self, key: Key, now: float) -> _Remembered | None:
        known = self._remembered.get(key)
        return known if known is not None and known.until > now else None


def _marked_duplicate(answer: Message) -> Message:
    properties = answer.properties
    return answer._replace(properties=properties._replace(user=(*properties.user, ("duplicate", "1"))))
