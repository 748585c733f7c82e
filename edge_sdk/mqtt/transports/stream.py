"""What every transport over a stream of bytes does alike: one connection, its packets cut, queued and timed.

A `StreamTransport` stands between two parts that know nothing of each other. A pipe (`pipes`) carries bytes: TCP, TLS.
A `PacketCodec` says what they mean; each library that reads and writes MQTT packets has one, in a file of its own,
and is imported nowhere else. Here is what is left: when to read and write, how much at a time, pings, packet ids, and
the events that follow.

Every connection has a codec of its own, so no state of a library survives one. Whatever a codec raises while it reads
ends the connection with Closed, never the caller.
"""

from __future__ import annotations

import selectors
import socket
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, Union

from edge_sdk.errors import BrokerError, TooLarge
from edge_sdk.mqtt.transports.base import (
    Acknowledged,
    BrokerLimits,
    Closed,
    Connected,
    ConnectOptions,
    Event,
    Message,
    Reached,
    Received,
    Refused,
    Subscribed,
    Transport,
)
from edge_sdk.mqtt.transports.packets import MAX_REMAINING_LENGTH, PINGREQ, Inbox, MalformedPacket
from edge_sdk.mqtt.transports.pipes import Piece, Pipe, open_pipe

MESSAGES_A_POLL = 64
BYTES_A_POLL = 8 * 1024 * 1024
"""A poll that reached either bound returns; what is left comes with the next one, at once."""

FIRST_PUBLISH_ID = 0x8000
"""Packet ids of messages are the upper half, those of SUBSCRIBE the codec's and below: they share a space (2.2.1)."""

CLOSE_LIMIT_S = 1.0

_LOOKS_A_KEEPALIVE = 8
"""How often we look whether a ping without an answer still waits on our side. Each look is two system calls."""


class PubAck(NamedTuple):
    packet_id: int
    code: int


class SubAck(NamedTuple):
    """Also the answer to UNSUBSCRIBE, where no codes (as in 3.1.1) mean that all is well."""

    packet_id: int
    codes: tuple[int, ...]


class Pong(NamedTuple):
    """It was heard, and that is all it says."""


Packet = Union[Connected, Refused, Received, PubAck, SubAck, Pong, Closed]
"""What a broker may say; Closed is its DISCONNECT."""


class PacketCodec(Protocol):
    """The packets of one connection, to bytes and from them; no socket, no thread.

    What is written is given back as the pieces of one packet: a large payload is a piece, and is not copied.
    """

    def connect(self) -> bytes: ...

    def publish(self, message: Message, packet_id: int | None) -> Sequence[bytes]:
        """Raises ValueError for what no packet can carry."""
        ...

    def puback(self, packet_id: int) -> bytes: ...

    def subscribe(self, filters: Sequence[str], *, qos: Literal[0, 1], retained: bool) -> tuple[int, bytes]:
        """A packet id below FIRST_PUBLISH_ID, and the packet."""
        ...

    def unsubscribe(self, filters: Sequence[str]) -> tuple[int, bytes]: ...

    def disconnect(self, *, with_will: bool) -> bytes:
        """Empty where leaving without a word is the only way to have the will published."""
        ...

    def read(self, inbox: Inbox) -> Packet | None:
        """Take the next packet out of `inbox`; None until more has come. Raises MalformedPacket."""
        ...


class StreamTransport:
    """One connection at a time; see `edge_sdk.mqtt.transports.base` for what is promised.

    That a broker takes a long packet slowly only Linux tells (since 4.1). Elsewhere a packet that our kernel has taken
    and that needs longer than about 1.75 keepalives on the line ends the connection: set the keepalive accordingly.
    """

    def __init__(self, new_codec: Callable[[ConnectOptions, int], PacketCodec]) -> None:
        """`new_codec` makes the codec of a connection, from its options and its number."""
        self._new_codec = new_codec
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._woken = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        weakref.finalize(self, _close_all, self._wake_reader, self._wake_writer, self._selector)

        self._limits = BrokerLimits()
        self._pipe: Pipe | None = None
        self._codec: PacketCodec | None = None
        self._inbox = Inbox(MAX_REMAINING_LENGTH)
        self._outbox: deque[Piece] = deque()
        self._events: list[Event] = []

        self._connection = 0
        self._connected = False
        self._blocked = False
        self._more = False
        self._give_up_at = 0.0
        self._keepalive_s = 0.0
        self._heard_at = self._sent_at = self._pinged_at = self._look_at = 0.0
        self._taken: int | None = None
        self._ping_end: int | None = None
        """How much of the connection's bytes the other side had at the last look, and up to which the ping goes."""

        self._handle = 0
        self._packet_id = FIRST_PUBLISH_ID - 1
        self._publishing: dict[int, int] = {}
        self._subscribing: dict[int, tuple[int, int]] = {}

    # ------------------------------------------------------------------------------------------------ connection

    def reach(self, options: ConnectOptions, *, timeout_s: float) -> Pipe:
        return open_pipe(options, timeout_s)

    def open(self, options: ConnectOptions, *, timeout_s: float, reached: Reached | None = None) -> None:
        if reached is not None and not isinstance(reached, Pipe):
            raise TypeError("A transport on streams can only go on with a pipe.")
        self._drop()
        self._events.clear()
        self._outbox.clear()
        self._publishing.clear()
        self._subscribing.clear()
        self._connection += 1
        self._limits = BrokerLimits()
        self._packet_id = FIRST_PUBLISH_ID - 1

        self._give_up_at = time.monotonic() + timeout_s
        self._pipe = self.reach(options, timeout_s=timeout_s) if reached is None else reached
        self._selector.register(self._pipe, selectors.EVENT_READ)
        self._more = not self._pipe.tells_empty  # a handshake may have read what came behind it
        self._keepalive_s = options.keepalive_s
        self._heard_at = self._sent_at = time.monotonic()
        self._pinged_at = 0.0
        largest = options.maximum_packet_size or MAX_REMAINING_LENGTH
        self._inbox = Inbox(min(largest, MAX_REMAINING_LENGTH))
        self._codec = self._new_codec(options, self._connection)
        self._outbox.append(self._codec.connect())

    def close(self, *, send_will: bool = False) -> None:
        pipe, codec = self._pipe, self._codec
        if pipe is None or codec is None:
            return
        give_up_at = time.monotonic() + CLOSE_LIMIT_S
        goodbye = codec.disconnect(with_will=send_will) if self._connected else b""
        if goodbye:
            self._outbox.append(goodbye)
        pipe.block(0.05)
        try:
            while self._outbox and time.monotonic() < give_up_at:
                self._flush()
            if goodbye and not self._outbox:
                pipe.linger(give_up_at)
        except OSError:
            pass
        self._drop()
        self._events.clear()

    def _drop(self) -> None:
        """Let go of the pipe, without a word."""
        pipe, self._pipe = self._pipe, None
        self._connected = self._blocked = self._more = False
        self._codec = None
        if pipe is not None:
            self._selector.unregister(pipe)
            pipe.close()

    def _end(self, event: Closed | Refused) -> None:
        if self._pipe is not None:
            self._drop()
            self._events.append(event)

    # -------------------------------------------------------------------------------------------------- the caller's

    def publish(self, message: Message) -> int:
        self._handle += 1
        if not self._connected or self._codec is None:
            return self._handle
        packet_id = self._next_packet_id() if message.qos else None
        pieces = self._codec.publish(message, packet_id)
        allowed = self._limits.maximum_packet_size
        if allowed is not None and (size := sum(map(len, pieces))) > allowed:
            raise TooLarge(f"The message takes {size:,} bytes; the broker takes packets of at most {allowed:,}.")
        if packet_id is not None:
            self._publishing[packet_id] = self._handle
        self._outbox.extend(pieces)
        return self._handle

    def acknowledge(self, received: Received) -> None:
        if received.packet_id is not None and received.connection == self._connection and self._codec is not None:
            self._outbox.append(self._codec.puback(received.packet_id))

    def subscribe(self, filters: Sequence[str], *, qos: Literal[0, 1] = 1, retained: bool = True) -> int:
        self._handle += 1
        if self._connected and self._codec is not None:
            packet_id, packet = self._codec.subscribe(filters, qos=qos, retained=retained)
            self._subscribing[packet_id] = (self._handle, len(filters))
            self._outbox.append(packet)
        return self._handle

    def unsubscribe(self, filters: Sequence[str]) -> int:
        self._handle += 1
        if self._connected and self._codec is not None:
            packet_id, packet = self._codec.unsubscribe(filters)
            self._subscribing[packet_id] = (self._handle, len(filters))
            self._outbox.append(packet)
        return self._handle

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            try:
                self._wake_writer.send(b"\0")
            except OSError:
                pass  # full: it is awake; closed: nobody is left to wake

    def attend(self, other: Transport) -> None:
        if not isinstance(other, StreamTransport):
            raise TypeError("A transport on streams can only attend another one.")
        self._selector.register(other._selector, selectors.EVENT_READ)  # on Linux and macOS it is a descriptor, too

    def _next_packet_id(self) -> int:
        if len(self._publishing) >= 0x10000 - FIRST_PUBLISH_ID:
            raise BrokerError(f"{len(self._publishing):,} messages are unacknowledged; MQTT has no free packet id.")
        while True:
            self._packet_id = self._packet_id + 1 if self._packet_id < 0xFFFF else FIRST_PUBLISH_ID
            if self._packet_id not in self._publishing:
                return self._packet_id

    # ---------------------------------------------------------------------------------------------------------- poll

    def poll(self, timeout_s: float) -> Sequence[Event]:
        now = time.monotonic()
        give_up_at = now + timeout_s
        woken = False
        while True:
            if self._pipe is not None:
                try:
                    if self._outbox and not self._blocked:
                        self._flush()
                    wait_s = 0.0 if self._more or self._events else max(0.0, self._next_moment(give_up_at) - now)
                    if wait_s or self._blocked or self._woken:
                        readable, woken = self._wait(wait_s)
                    else:
                        readable = True  # or not: to read and find nothing costs less than to ask
                    if readable or self._more:
                        self._read()
                except (OSError, MalformedPacket) as err:
                    self._end(Closed(str(err) or type(err).__name__))
                except Exception as err:  # a library raising something new must not end the daemon
                    self._end(Closed(f"{type(self).__name__} failed: {err!r}"))
                now = time.monotonic()
                self._keep_alive(now)
            else:
                _, woken = self._wait(0.0 if self._events else max(0.0, give_up_at - now))
                now = time.monotonic()
            if self._events or woken or now >= give_up_at:
                events, self._events = self._events, []
                return events

    def _wait(self, wait_s: float) -> tuple[bool, bool]:
        """Whether the pipe can be read, and whether somebody woke us. A pipe with room is written to."""
        readable = woken = False
        for key, ready in self._selector.select(wait_s):
            if key.fileobj is self._wake_reader:
                # In this order: a wake between the two lines is lost, but its caller is about to be heard anyway.
                self._wake_reader.recv(4096)
                self._woken = False
                woken = True
            elif key.fileobj is not self._pipe:
                woken = True  # one that is attended has something
            else:
                if ready & selectors.EVENT_WRITE:
                    self._flush()
                readable = bool(ready & selectors.EVENT_READ)
        return readable, woken

    def _read(self) -> None:
        """Take what is there, up to the bounds, and turn it into events."""
        pipe, inbox = self._pipe, self._inbox
        messages_left, bytes_left = MESSAGES_A_POLL, BYTES_A_POLL
        if self._more:
            self._more = False
            messages_left = self._take_packets(messages_left)
        while messages_left > 0 and bytes_left > 0 and pipe is not None and pipe is self._pipe:
            room = inbox.room()
            count = pipe.receive(room)
            if count is None:
                return
            if not count:
                self._end(Closed("the broker closed the connection"))
                return
            self._heard_at, self._pinged_at = time.monotonic(), 0.0
            inbox.filled(count)
            bytes_left -= count
            messages_left = self._take_packets(messages_left)
            if messages_left > 0 and count < len(room) and pipe.tells_empty:
                return  # the kernel had no more, and neither has the inbox
        self._more = self._pipe is not None

    def _take_packets(self, limit: int) -> int:
        """Turn what the inbox holds into events, at most `limit` messages; how many fewer may follow."""
        inbox, events = self._inbox, self._events
        while limit > 0 and self._codec is not None:
            packet = self._codec.read(inbox)
            if packet is None:
                return limit
            if isinstance(packet, (Connected, Refused)) is self._connected:
                raise MalformedPacket("a packet of the broker before its CONNACK, or a second CONNACK (3.2)")
            if isinstance(packet, Received):
                events.append(packet)
                limit -= 1
            elif isinstance(packet, PubAck):
                handle = self._publishing.pop(packet.packet_id, None)
                if handle is not None:
                    events.append(Acknowledged(handle, packet.code))
            elif isinstance(packet, SubAck):
                handle, count = self._subscribing.pop(packet.packet_id, (0, 0))
                if handle:
                    events.append(Subscribed(handle, packet.codes or (0,) * count))
            elif isinstance(packet, Connected):
                self._connected = True
                self._limits = packet.limits
                if packet.limits.keepalive_s is not None:
                    self._keepalive_s = packet.limits.keepalive_s
                events.append(packet)
            elif isinstance(packet, (Refused, Closed)):
                self._end(packet)
        return limit

    def _flush(self) -> None:
        """Write what the pipe takes; the rest waits until it has room."""
        pipe, outbox = self._pipe, self._outbox
        if pipe is None:
            return
        was_blocked, blocked = self._blocked, False
        while outbox:
            sent = pipe.send(outbox)
            if sent is None:
                blocked = True
                break
            while sent:
                piece = outbox[0]
                if sent < len(piece):
                    outbox[0] = memoryview(piece)[sent:]
                    break
                sent -= len(piece)
                outbox.popleft()
            self._sent_at = time.monotonic()
            if was_blocked:
                self._heard_at = self._sent_at  # room in the kernel's buffer: the broker took something
        if blocked != was_blocked:
            self._blocked = blocked
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if blocked else 0)
            self._selector.modify(pipe, wanted)

    # --------------------------------------------------------------------------------------------------------- pings

    def _next_moment(self, give_up_at: float) -> float:
        if not self._connected:
            return min(give_up_at, self._give_up_at)
        if not self._keepalive_s:
            return give_up_at
        if self._pinged_at:
            return min(give_up_at, self._look_at, max(self._pinged_at, self._heard_at) + self._keepalive_s)
        return min(give_up_at, min(self._heard_at, self._sent_at) + self._keepalive_s * 0.75)

    def _keep_alive(self, now: float) -> None:
        if self._pipe is None:
            return
        if not self._connected:
            if now >= self._give_up_at:
                self._end(Closed("no CONNACK came in time"))
            return
        if not self._keepalive_s:
            return
        if self._pinged_at:
            if now >= self._look_at:
                self._look(now, self._pipe)
            if now - max(self._pinged_at, self._heard_at) >= self._keepalive_s:
                silent_s = now - self._heard_at
                self._end(Closed(f"nothing came from the broker for {silent_s:.0f} s, not even to a ping"))
        elif now - min(self._heard_at, self._sent_at) >= self._keepalive_s * 0.75:
            self._outbox.append(PINGREQ)
            self._pinged_at = now
            self._taken = self._ping_end = None
            self._look(now, self._pipe)

    def _look(self, now: float, pipe: Pipe) -> None:
        """While the ping waits on our side, behind bytes that the broker is taking, nobody is silent.

        A ping that the broker's TCP has is to be answered, whatever else goes on being taken: TCP acknowledges for a
        broker that hangs, too. (TCP_USER_TIMEOUT would add nothing: it ends a connection on which nothing is
        acknowledged, and by then the keepalive has.)
        """
        self._look_at = now + self._keepalive_s / _LOOKS_A_KEEPALIVE
        progress = pipe.progress()
        if progress is None:
            return
        before, self._taken = self._taken, progress.taken
        if self._ping_end is None and not self._outbox:
            self._ping_end = progress.given
        waits = self._ping_end is None or progress.taken < self._ping_end
        if waits and before is not None and progress.taken > before:
            self._heard_at = now


def _close_all(*resources: Any) -> None:
    for resource in resources:
        resource.close()
