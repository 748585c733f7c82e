"""A broker in memory and the transport to it: MQTT without sockets, for tests of everything above the seam.

    broker = MemoryBroker()
    transport = broker.transport()
    transport.open(ConnectOptions("memory", 0, "device"), timeout_s=1)

The broker does what a client can notice of a good one: wildcards, retained messages, QoS 1 with redelivery, sessions
that outlive a connection, wills, shared subscriptions, message expiry, and MQTT 5's limits. It has no thread and no
timer of its own: everything happens inside somebody's call, in the order of the calls, so tests are deterministic. Pass
a `clock` to make expiry and will delays happen when the test says.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edge_sdk.errors import BrokerError, TooLarge
from edge_sdk.mqtt.transports.base import (
    BAD_CREDENTIALS,
    FAILURE,
    NO_MATCHING_SUBSCRIBERS,
    NOT_AUTHORIZED,
    SESSION_TAKEN_OVER,
    UNSUPPORTED_VERSION,
    Acknowledged,
    BrokerLimits,
    Closed,
    Connected,
    ConnectOptions,
    Event,
    Message,
    MqttVersion,
    Reached,
    Received,
    Refused,
    Subscribed,
    Transport,
    Will,
)
from edge_sdk.mqtt.transports.packets import publish_size


def topic_matches(topic_filter: str, topic: str) -> bool:
    """Whether a subscription to `topic_filter` receives `topic` (MQTT 5.0, 4.7)."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False
    for index, want in enumerate(wanted):
        if want == "#":
            return True
        if index == len(levels) or want not in ("+", levels[index]):
            return False
    return len(wanted) == len(levels)


@dataclass
class _Queued:
    message: Message
    expires_at: float | None
    packet_id: int | None = None
    sent_before: bool = False


@dataclass
class _Session:
    """What the broker knows of one client id."""

    client_id: str
    subscriptions: dict[str, Literal[0, 1]] = field(default_factory=dict)
    waiting: deque[_Queued] = field(default_factory=deque)
    unacknowledged: dict[int, _Queued] = field(default_factory=dict)
    transport: MemoryTransport | None = None
    options: ConnectOptions | None = None
    packet_id: int = 0
    ends_at: float | None = None
    """When a session without a connection is forgotten; None: it is connected, or never ends."""


class MemoryBroker:
    """The broker: shared by any number of transports, from any threads of one process.

    `versions` are the MQTT versions it speaks; `users` maps names to passwords (None: anybody may come); `limits` is
    what its CONNACK says, and is held against clients; `forbidden` are topic filters that nobody may subscribe to.
    """

    def __init__(
        self,
        *,
        versions: Sequence[MqttVersion] = (4, 5),
        users: Mapping[str, str] | None = None,
        limits: BrokerLimits | None = None,
        forbidden: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.versions = tuple(versions)
        self.users = users
        self.limits = limits or BrokerLimits()
        self.forbidden = forbidden
        self.retained: dict[str, Message] = {}
        self._clock = clock
        self._lock = threading.RLock()
        self._sessions: dict[str, _Session] = {}
        self._wills: list[tuple[float, str, Message]] = []
        self._shared_turns: dict[tuple[str, str], int] = {}
        self._running = True

    def transport(self) -> MemoryTransport:
        """A new transport to this broker."""
        return MemoryTransport(self)

    def stop(self, *, forget: bool = False) -> None:
        """Every connection is lost at once, and new ones fail; `forget` also loses sessions and retained messages."""
        with self._lock:
            self._running = False
            for session in list(self._sessions.values()):
                if session.transport is not None:
                    self._disconnect(session, Closed("the broker stopped"), send_will=False)
            if forget:
                self._sessions.clear()
                self.retained.clear()

    def start(self) -> None:
        with self._lock:
            self._running = True

    def cut(self, client_id: str) -> None:
        """Lose the connection of one client, as if its cable was pulled: Closed there, the will here."""
        with self._lock:
            session = self._sessions[client_id]
            self._disconnect(session, Closed("the broker closed the connection"), send_will=True)

    # ------------------------------------------------------------------------------- called by transports, locked

    def _check_running(self) -> None:
        if not self._running:
            raise BrokerError("The broker in memory is stopped.", fix="Call its start().")

    def _connect(self, transport: MemoryTransport, options: ConnectOptions) -> None:
        self._check_running()
        if options.version not in self.versions:
            transport._deliver(Refused(UNSUPPORTED_VERSION, "Unsupported protocol version"))
            return
        if self.users is not None and self.users.get(options.username or "") != (options.password or ""):
            transport._deliver(Refused(BAD_CREDENTIALS, "Bad user name or password"))
            return
        self._tick()
        earlier = self._sessions.get(options.client_id)
        if earlier is not None and earlier.transport is not None:
            code = SESSION_TAKEN_OVER if options.version == 5 else None
            self._disconnect(earlier, Closed("the session was taken over", code), send_will=True)
            earlier = self._sessions.get(options.client_id)
        session = None if options.clean_start else earlier
        present = session is not None
        if session is None:
            session = self._sessions[options.client_id] = _Session(options.client_id)
        session.transport, session.options, session.ends_at = transport, options, None
        self._wills = [will for will in self._wills if will[1] != options.client_id]
        # What was sent and never acknowledged is sent again, first and in its order, marked as a duplicate.
        session.waiting.extendleft(reversed(list(session.unacknowledged.values())))
        session.unacknowledged.clear()
        transport._session = session
        transport._deliver(Connected(present, self.limits))
        self._send_waiting(session)

    def _disconnect(self, session: _Session, event: Closed | None, *, send_will: bool) -> None:
        transport, options = session.transport, session.options
        if transport is None or options is None:
            return
        session.transport = None
        transport._session = None
        if event is not None:
            transport._deliver(event)
        if send_will and options.will is not None:
            self._schedule_will(session.client_id, options.will, options)
        keeps_for_s = options.session_expiry_s if options.version == 5 else 0 if options.clean_start else None
        if keeps_for_s == 0:
            self._sessions.pop(session.client_id, None)
        elif keeps_for_s is not None:
            session.ends_at = self._clock() + keeps_for_s

    def _schedule_will(self, client_id: str, will: Will, options: ConnectOptions) -> None:
        # The delay ends with the session, if that ends first (3.1.3.2.2).
        delay_s = min(will.delay_s, options.session_expiry_s) if options.version == 5 else 0
        self._wills.append((self._clock() + delay_s, client_id, will.message))
        self._tick()

    def _tick(self) -> None:
        """Let happen what the clock says is due."""
        now = self._clock()
        due = sorted((will for will in self._wills if will[0] <= now), key=lambda will: will[0])
        self._wills = [will for will in self._wills if will[0] > now]
        for _, _, message in due:
            self._publish(message)
        for client_id in [s.client_id for s in self._sessions.values() if s.ends_at is not None and s.ends_at <= now]:
            del self._sessions[client_id]

    def _publish(self, message: Message) -> int:
        """Pass a message on to whoever subscribed; the reason code for its PUBACK."""
        if message.retain:
            if message.payload:
                self.retained[message.topic] = message
            else:
                self.retained.pop(message.topic, None)
        passed_on = message._replace(retain=False)
        receivers = 0
        shared: dict[tuple[str, str], list[tuple[_Session, Literal[0, 1]]]] = {}
        for session in list(self._sessions.values()):
            granted: list[Literal[0, 1]] = []
            for topic_filter, qos in session.subscriptions.items():
                if topic_filter.startswith("$share/"):
                    _, group, plain = topic_filter.split("/", 2)
                    if topic_matches(plain, message.topic):
                        shared.setdefault((group, plain), []).append((session, qos))
                elif topic_matches(topic_filter, message.topic):
                    granted.append(qos)
            if granted:
                receivers += 1
                self._enqueue(session, passed_on, max(granted))
        for key, members in shared.items():
            turn = self._shared_turns[key] = self._shared_turns.get(key, -1) + 1
            session, qos = members[turn % len(members)]
            receivers += 1
            self._enqueue(session, passed_on, qos)
        return 0 if receivers else NO_MATCHING_SUBSCRIBERS

    def _enqueue(self, session: _Session, message: Message, granted: Literal[0, 1]) -> None:
        qos: Literal[0, 1] = 1 if message.qos and granted else 0
        if session.transport is None and not qos:
            return
        expiry_s = message.properties.message_expiry_s
        expires_at = None if expiry_s is None else self._clock() + expiry_s
        session.waiting.append(_Queued(message._replace(qos=qos), expires_at))
        self._send_waiting(session)

    def _send_waiting(self, session: _Session) -> None:
        transport, options = session.transport, session.options
        if transport is None or options is None:
            return
        window = options.receive_maximum if options.version == 5 else 65_535
        while session.waiting:
            queued = session.waiting[0]
            if queued.message.qos and len(session.unacknowledged) >= window:
                return
            session.waiting.popleft()
            message = self._as_sent(queued, options)
            if message is None:
                continue
            skipped, size = 0, publish_size(message, options.version)
            if options.maximum_packet_size is not None and size > options.maximum_packet_size:
                if options.version == 5:
                    continue
                message, skipped = message._replace(payload=b""), size
            duplicate = queued.sent_before
            if message.qos:
                if queued.packet_id is None:
                    queued.packet_id = session.packet_id = session.packet_id % 65_535 + 1
                queued.sent_before = True
                session.unacknowledged[queued.packet_id] = queued
            transport._deliver(
                Received(message, queued.packet_id, duplicate, transport._connection, skipped_bytes=skipped)
            )

    def _as_sent(self, queued: _Queued, options: ConnectOptions) -> Message | None:
        """The message as this client gets it now; None if it expired while it waited."""
        message = queued.message
        if queued.expires_at is not None:
            left_s = queued.expires_at - self._clock()
            if left_s <= 0:
                return None
            properties = message.properties._replace(message_expiry_s=max(1, round(left_s)))
            message = message._replace(properties=properties)
        if options.version == 4:
            message = Message(message.topic, message.payload, message.qos, message.retain)
        return message

    def _subscribe(self, session: _Session, filters: Sequence[str], qos: Literal[0, 1], retained: bool) -> list[int]:
        codes: list[int] = []
        for topic_filter in filters:
            session.subscriptions[topic_filter] = qos
            codes.append(qos)
            wants_retained = retained or session.options is None or session.options.version == 4
            if wants_retained and not topic_filter.startswith("$share/"):
                for message in [m for topic, m in self.retained.items() if topic_matches(topic_filter, topic)]:
                    self._enqueue(session, message, qos)
        return codes


class _Reached:
    """The way to a broker in memory is no way at all."""

    def close(self) -> None:
        pass


class MemoryTransport:
    """One connection at a time to a MemoryBroker; see `edge_sdk.mqtt.transports.base` for what is promised."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._session: _Session | None = None
        self._changed = threading.Condition(broker._lock)
        self._events: deque[Event] = deque()
        self._queued: list[Callable[[], None]] = []
        self._woken = False
        self._connection = 0
        self._connected = False
        self._handle = 0
        self._attended: MemoryTransport | None = None
        self._attendant: MemoryTransport | None = None

    def reach(self, options: ConnectOptions, *, timeout_s: float) -> Reached:
        with self._broker._lock:
            self._broker._check_running()
        return _Reached()

    def open(self, options: ConnectOptions, *, timeout_s: float, reached: Reached | None = None) -> None:
        with self._broker._lock:
            self._leave(send_will=True)
            self._connection += 1
            self._broker._connect(self, options)

    def poll(self, timeout_s: float) -> Sequence[Event]:
        with self._changed:
            queued, self._queued = self._queued, []
            for act in queued:
                act()
            self._broker._tick()
            self._changed.wait_for(
                lambda: self._events or self._woken or (self._attended and self._attended._events), timeout_s
            )
            self._woken = False
            return list(self._taken())

    def _taken(self) -> Iterator[Event]:
        while self._events:
            event = self._events.popleft()
            if isinstance(event, Connected):
                self._connected = True
            elif isinstance(event, Closed):
                self._connected = False
                self._queued.clear()
            yield event

    def publish(self, message: Message) -> int:
        self._handle += 1
        handle = self._handle
        session = self._session
        if not self._connected or session is None or session.options is None:
            return handle
        allowed = self._broker.limits.maximum_packet_size
        size = publish_size(message, session.options.version)
        if allowed is not None and size > allowed:
            raise TooLarge(f"The message takes {size:,} bytes; the broker takes packets of at most {allowed:,}.")
        version = session.options.version
        if version == 4:
            message = Message(message.topic, message.payload, message.qos, message.retain)

        def act() -> None:
            code = self._broker._publish(message)
            if message.qos:
                self._deliver(Acknowledged(handle, code if version == 5 else 0))

        self._when_polled(act)
        return handle

    def acknowledge(self, received: Received) -> None:
        packet_id = received.packet_id
        if packet_id is None or received.connection != self._connection or not self._connected:
            return

        def act() -> None:
            session = self._session
            if session is not None and session.unacknowledged.pop(packet_id, None) is not None:
                self._broker._send_waiting(session)

        self._when_polled(act)

    def subscribe(self, filters: Sequence[str], *, qos: Literal[0, 1] = 1, retained: bool = True) -> int:
        self._handle += 1
        handle = self._handle

        def act() -> None:
            if self._session is not None:
                five = self._session.options is not None and self._session.options.version == 5
                no = NOT_AUTHORIZED if five else FAILURE
                forbidden = self._broker.forbidden
                self._deliver(Subscribed(handle, tuple(no if name in forbidden else qos for name in filters)))
                allowed = [name for name in filters if name not in forbidden]
                self._broker._subscribe(self._session, allowed, qos, retained)

        self._when_polled(act)
        return handle

    def unsubscribe(self, filters: Sequence[str]) -> int:
        self._handle += 1
        handle = self._handle

        def act() -> None:
            if self._session is not None:
                for topic_filter in filters:
                    self._session.subscriptions.pop(topic_filter, None)
                self._deliver(Subscribed(handle, (0,) * len(filters)))

        self._when_polled(act)
        return handle

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def attend(self, other: Transport) -> None:
        if not isinstance(other, MemoryTransport) or other._broker is not self._broker:
            raise TypeError("A transport in memory can only attend another one at the same broker.")
        self._attended = other
        other._attendant = self

    def close(self, *, send_will: bool = False) -> None:
        with self._broker._lock:
            for act in self._queued:
                act()
            self._leave(send_will=send_will)

    def _leave(self, *, send_will: bool) -> None:
        self._queued.clear()
        if self._session is not None:
            self._broker._disconnect(self._session, None, send_will=send_will)
        self._events.clear()
        self._connected = False

    def _when_polled(self, act: Callable[[], None]) -> None:
        """Like a packet in a buffer: it leaves with the next poll, and is lost with the connection."""
        if self._connected and self._session is not None:
            connection = self._connection
            self._queued.append(lambda: act() if self._session is not None and connection == self._connection else None)

    def _deliver(self, event: Event) -> None:
        self._events.append(event)
        self._changed.notify_all()
        if self._attendant is not None:
            self._attendant._changed.notify_all()
