"""The transport on paho-mqtt 2.x: MQTT 5 and 3.1.1 over TCP and TLS, without paho's thread, timers and queues.

paho writes and reads the rare packets: CONNECT, SUBSCRIBE, UNSUBSCRIBE, DISCONNECT and what answers them. It believes
that it talks to a socket; it talks to `_Wire`, a pair of buffers. The socket is ours, and so are PUBLISH and PUBACK
(see `packets`) and the pings. That keeps paho's habits away rather than working against them one by one:

* it never holds a message, so it cannot resend one on reconnect, or past anybody's window;
* its PUBACKs cannot overtake CONNECT, and the broker's maximum packet size is checked before anything is queued;
* its callbacks only note an event; whatever it raises ends the connection with Closed, never the caller;
* every connection has a new paho client: no state survives, and paho never reconnects.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import struct
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Literal, NamedTuple, Union, cast

from paho.mqtt.client import MQTT_CLEAN_START_FIRST_ONLY, Client, ConnectFlags, DisconnectFlags
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_sdk.errors import BrokerError, TooLarge
from edge_sdk.mqtt.transports.base import (
    Acknowledged,
    BrokerLimits,
    Closed,
    Connected,
    ConnectOptions,
    Event,
    Message,
    Received,
    Refused,
    Subscribed,
)
from edge_sdk.mqtt.transports.packets import (
    CONNACK,
    DISCONNECT,
    MAX_REMAINING_LENGTH,
    PINGREQ,
    PINGRESP,
    PUBACK,
    PUBLISH,
    SUBACK,
    UNSUBACK,
    Inbox,
    MalformedPacket,
    Oversize,
    decode_puback,
    decode_publish,
    decode_publish_head,
    encode_puback,
    encode_publish,
    variable_length,
)

if sys.platform == "linux":
    import fcntl
    import termios

MESSAGES_A_POLL = 64
BYTES_A_POLL = 8 * 1024 * 1024
"""A poll that reached either bound returns; what is left comes with the next one, at once."""

FIRST_PUBLISH_ID = 0x8000
"""Our packet ids are the upper half, paho's (for SUBSCRIBE) count up from 1: they share one space (2.2.1)."""

CLOSE_LIMIT_S = 1.0

WITH_WILL = 0x04
"""Reason code of a DISCONNECT that lets the will be published (3.14.2.1)."""

_GATHERED = 64
"""Pieces handed to one sendmsg; Linux takes up to 1,024."""

_LOOKS_A_KEEPALIVE = 8
"""How often we look whether a ping without an answer still waits on our side. Each look is two system calls."""

_TCPI_BYTES_ACKED = 120
"""Where `struct tcp_info` of Linux has tcpi_bytes_acked, 64 bits (linux/tcp.h; since 4.1)."""

_Socket = Union[socket.socket, ssl.SSLSocket]


class PahoTransport:
    """One connection at a time; see `edge_sdk.mqtt.transports.base` for what is promised.

    That a broker takes a long packet slowly only Linux tells (since 4.1). Elsewhere a packet that our kernel has taken
    and that needs longer than about 1.75 keepalives on the line ends the connection: set the keepalive accordingly.
    """

    def __init__(self) -> None:
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._woken = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        weakref.finalize(self, _close_all, self._wake_reader, self._wake_writer, self._selector)

        self._options: ConnectOptions | None = None
        self._limits = BrokerLimits()
        self._sock: _Socket | None = None
        self._tls = False
        self._paho: _PahoClient | None = None
        self._wire = _Wire()
        self._inbox = Inbox(MAX_REMAINING_LENGTH)
        self._outbox: deque[bytes | memoryview] = deque()
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

    def open(self, options: ConnectOptions, *, timeout_s: float) -> None:
        self._drop()
        self._events.clear()
        self._outbox.clear()
        self._publishing.clear()
        self._subscribing.clear()
        self._connection += 1
        self._options = options
        self._limits = BrokerLimits()
        self._packet_id = FIRST_PUBLISH_ID - 1

        self._give_up_at = time.monotonic() + timeout_s
        sock = _connect(options, timeout_s)
        self._sock, self._tls = sock, options.tls
        self._keepalive_s = options.keepalive_s
        self._heard_at = self._sent_at = time.monotonic()
        self._pinged_at = 0.0
        largest = options.maximum_packet_size or MAX_REMAINING_LENGTH
        self._inbox = Inbox(min(largest, MAX_REMAINING_LENGTH))
        self._selector.register(sock, selectors.EVENT_READ)

        self._wire = _Wire()
        self._paho = _paho_client(self, options, self._wire)
        properties = None
        if options.version == 5:
            properties = _paho_properties(PacketTypes.CONNECT)
            properties.ReceiveMaximum = options.receive_maximum
            if options.session_expiry_s:
                properties.SessionExpiryInterval = options.session_expiry_s
            if options.maximum_packet_size is not None:
                properties.MaximumPacketSize = options.maximum_packet_size
        clean_start = options.clean_start if options.version == 5 else MQTT_CLEAN_START_FIRST_ONLY
        self._paho.connect(
            options.host, options.port, options.keepalive_s, clean_start=clean_start, properties=properties
        )
        self._queue_paho()

    def close(self, *, send_will: bool = False) -> None:
        sock, paho = self._sock, self._paho
        if sock is None or paho is None:
            return
        give_up_at = time.monotonic() + CLOSE_LIMIT_S
        version = self._options.version if self._options else 5
        said_goodbye = False
        if self._connected and not (send_will and version == 4):
            reason = ReasonCode(PacketTypes.DISCONNECT, identifier=WITH_WILL) if send_will else None
            paho.on_disconnect = None  # it would call that from within, and the socket has a packet to send yet
            paho.disconnect(reason)
            self._queue_paho()
            said_goodbye = True
        sock.settimeout(0.05)
        try:
            while self._outbox and time.monotonic() < give_up_at:
                self._flush()
            if said_goodbye and not self._outbox:
                _linger(sock, give_up_at)
        except OSError:
            pass
        self._drop()
        self._events.clear()

    def _drop(self) -> None:
        """Let go of the socket, without a word."""
        sock, self._sock = self._sock, None
        self._connected = self._blocked = self._more = False
        self._paho = None
        if sock is not None:
            self._selector.unregister(sock)
            sock.close()

    def _closed(self, reason: str, code: int | None = None) -> None:
        if self._sock is not None:
            self._drop()
            self._events.append(Closed(reason, code))

    # -------------------------------------------------------------------------------------------------- the caller's

    def publish(self, message: Message) -> int:
        self._handle += 1
        if not self._connected or self._options is None:
            return self._handle
        packet_id = self._next_packet_id() if message.qos else None
        head = encode_publish(message, packet_id, self._options.version)
        size = len(head) + len(message.payload)
        allowed = self._limits.maximum_packet_size
        if allowed is not None and size > allowed:
            raise TooLarge(f"The message takes {size:,} bytes; the broker takes packets of at most {allowed:,}.")
        if packet_id is not None:
            self._publishing[packet_id] = self._handle
        self._outbox.append(head)
        if message.payload:
            self._outbox.append(message.payload)
        return self._handle

    def acknowledge(self, received: Received) -> None:
        if received.packet_id is not None and received.connection == self._connection and self._connected:
            self._outbox.append(encode_puback(received.packet_id))

    def subscribe(self, filters: Sequence[str], *, qos: Literal[0, 1] = 1, retained: bool = True) -> int:
        self._handle += 1
        if self._connected and self._paho is not None and self._options is not None:
            wanted: list[Any] = [(name, qos) for name in filters]
            if self._options.version == 5:
                options = SubscribeOptions(qos=qos)
                if not retained:
                    options.retainHandling = SubscribeOptions.RETAIN_DO_NOT_SEND
                wanted = [(name, options) for name in filters]
            _, packet_id = self._paho.subscribe(wanted)
            self._subscribing[cast("int", packet_id)] = (self._handle, len(filters))
            self._queue_paho()
        return self._handle

    def unsubscribe(self, filters: Sequence[str]) -> int:
        self._handle += 1
        if self._connected and self._paho is not None:
            _, packet_id = self._paho.unsubscribe(list(filters))
            self._subscribing[cast("int", packet_id)] = (self._handle, len(filters))
            self._queue_paho()
        return self._handle

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            try:
                self._wake_writer.send(b"\0")
            except OSError:
                pass  # full: it is awake; closed: nobody is left to wake

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
            if self._sock is not None:
                try:
                    if self._outbox and not self._blocked:
                        self._flush()
                    wait_s = 0.0 if self._more or self._events else max(0.0, self._next_moment(give_up_at) - now)
                    readable, woken = self._wait(wait_s)
                    if readable or self._more:
                        self._read()
                except (OSError, MalformedPacket) as err:
                    self._closed(str(err) or type(err).__name__)
                except Exception as err:  # paho raising something new must not end the daemon
                    self._closed(f"paho failed: {err!r}")
                now = time.monotonic()
                self._keep_alive(now)
            else:
                _, woken = self._wait(0.0 if self._events else max(0.0, give_up_at - now))
                now = time.monotonic()
            if self._events or woken or now >= give_up_at:
                events, self._events = self._events, []
                return events

    def _wait(self, wait_s: float) -> tuple[bool, bool]:
        """Whether the socket can be read, and whether somebody woke us. A writable socket is written to."""
        readable = woken = False
        for key, ready in self._selector.select(wait_s):
            if key.fileobj is self._wake_reader:
                # In this order: a wake between the two lines is lost, but its caller is about to be heard anyway.
                self._wake_reader.recv(4096)
                self._woken = False
                woken = True
            else:
                if ready & selectors.EVENT_WRITE:
                    self._flush()
                readable = bool(ready & selectors.EVENT_READ)
        return readable, woken

    def _read(self) -> None:
        """Take what is there, up to the bounds, and turn it into events."""
        sock, inbox = self._sock, self._inbox
        messages_left, bytes_left = MESSAGES_A_POLL, BYTES_A_POLL
        if self._more:
            self._more = False
            messages_left = self._take_packets(messages_left)
        while messages_left > 0 and bytes_left > 0 and self._sock is not None:
            room = inbox.room()
            try:
                count = sock.recv_into(room)  # type: ignore[union-attr]  # the loop ends where it is None
            except (BlockingIOError, ssl.SSLWantReadError):
                return
            if not count:
                self._closed("the broker closed the connection")
                return
            self._heard_at, self._pinged_at = time.monotonic(), 0.0
            inbox.filled(count)
            bytes_left -= count
            messages_left = self._take_packets(messages_left)
            if messages_left > 0 and count < len(room) and not self._tls:
                return  # the kernel had no more, and neither has the inbox
        self._more = self._sock is not None

    def _take_packets(self, limit: int) -> int:
        inbox, events = self._inbox, self._events
        version = self._options.version if self._options else 5
        while limit > 0:
            try:
                packet = inbox.next_packet()
            except Oversize as oversize:
                if not self._skip(oversize.size):
                    return limit
                limit -= 1
                continue
            if packet is None:
                return limit
            first, body = packet
            kind = first & 0xF0
            if kind == PUBLISH and self._connected:
                message, packet_id = decode_publish(first, body, version)
                events.append(Received(message, packet_id, bool(first & 8), self._connection))
                limit -= 1
            elif kind == PUBACK and self._connected:
                packet_id, code = decode_puback(body)
                handle = self._publishing.pop(packet_id, None)
                if handle is not None:
                    events.append(Acknowledged(handle, code))
            elif kind == PINGRESP:
                pass  # it was heard, and that is all it says
            elif kind == CONNACK if not self._connected else kind in (SUBACK, UNSUBACK, DISCONNECT):
                self._feed_paho(first, body)
                if self._sock is None:
                    return 0
            else:
                raise MalformedPacket(f"a packet of type 0x{first:02x} out of place")
        return limit

    def _skip(self, size: int) -> bool:
        """Pass over a packet larger than we take, if it is a message of MQTT 3.1.1; False: too little of it is here."""
        first, body = self._inbox.peek()
        if first & 0xF0 != PUBLISH or not self._connected or self._options is None or self._options.version == 5:
            raise MalformedPacket(f"a packet of {size:,} bytes; at most {self._inbox.largest:,} were announced")
        head = decode_publish_head(first, body)
        if head is None:
            return False
        topic, packet_id = head
        self._inbox.skip(size)
        message = Message(topic, b"", 1 if packet_id is not None else 0, bool(first & 1))
        self._events.append(Received(message, packet_id, bool(first & 8), self._connection, skipped_bytes=size))
        return True

    def _flush(self) -> None:
        """Write what the kernel takes; the rest waits for the socket to be writable."""
        sock, outbox = self._sock, self._outbox
        if sock is None:
            return
        was_blocked, blocked = self._blocked, False
        while outbox:
            try:
                if self._tls:
                    piece = outbox[0] if len(outbox) == 1 else _gather(outbox)
                    sent = sock.send(piece)
                elif len(outbox) == 1:
                    sent = sock.send(outbox[0])
                else:
                    sent = sock.sendmsg([outbox[i] for i in range(min(len(outbox), _GATHERED))])
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError, TimeoutError):
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
            self._selector.modify(sock, wanted)

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
        if self._sock is None:
            return
        if not self._connected:
            if now >= self._give_up_at:
                self._closed("no CONNACK came in time")
            return
        if not self._keepalive_s:
            return
        if self._pinged_at:
            if now >= self._look_at:
                self._look(now, self._sock)
            if now - max(self._pinged_at, self._heard_at) >= self._keepalive_s:
                self._closed(f"nothing came from the broker for {now - self._heard_at:.0f} s, not even to a ping")
        elif now - min(self._heard_at, self._sent_at) >= self._keepalive_s * 0.75:
            self._outbox.append(PINGREQ)
            self._pinged_at = now
            self._taken = self._ping_end = None
            self._look(now, self._sock)

    def _look(self, now: float, sock: _Socket) -> None:
        """While the ping waits on our side, behind bytes that the broker is taking, nobody is silent.

        A ping that the broker's TCP has is to be answered, whatever else goes on being taken: TCP acknowledges for a
        broker that hangs, too. (TCP_USER_TIMEOUT would add nothing: it ends a connection on which nothing is
        acknowledged, and by then the keepalive has.)
        """
        self._look_at = now + self._keepalive_s / _LOOKS_A_KEEPALIVE
        progress = _progress(sock)
        if progress is None:
            return
        before, self._taken = self._taken, progress.taken
        if self._ping_end is None and not self._outbox:
            self._ping_end = progress.given
        waits = self._ping_end is None or progress.taken < self._ping_end
        if waits and before is not None and progress.taken > before:
            self._heard_at = now

    # ---------------------------------------------------------------------------------------------------------- paho

    def _feed_paho(self, first: int, body: memoryview) -> None:
        """Let paho read one packet; its callbacks below note what it meant."""
        paho = self._paho
        if paho is None:
            return
        self._wire.put(first, body)
        while self._wire.inbound and paho is self._paho:
            paho.loop_read()

    def _queue_paho(self) -> None:
        """Move what paho wrote to the outbox."""
        if self._paho is not None:
            self._paho.loop_write()
        self._outbox.extend(self._wire.outbound)
        self._wire.outbound.clear()

    def _on_connect(
        self, _client: Client, _userdata: Any, flags: ConnectFlags, reason: ReasonCode, properties: Any
    ) -> None:
        if reason.is_failure:
            self._drop()
            self._events.append(Refused(reason.value, str(reason)))
            return
        self._connected = True
        self._limits = _limits(properties)
        if self._limits.keepalive_s is not None:
            self._keepalive_s = self._limits.keepalive_s
        self._events.append(Connected(bool(flags.session_present), self._limits))

    def _on_disconnect(
        self, _client: Client, _userdata: Any, flags: DisconnectFlags, reason: ReasonCode, _properties: Any
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._closed(f"the broker ended the connection: {reason}", reason.value)
        else:
            self._closed("the broker sent something that is not MQTT")

    def _on_suback(self, _client: Client, _userdata: Any, packet_id: int, codes: list[ReasonCode], _props: Any) -> None:
        handle, count = self._subscribing.pop(packet_id, (0, 0))
        if handle:
            # An UNSUBACK of 3.1.1 carries no codes: it means that all is well.
            self._events.append(Subscribed(handle, tuple(code.value for code in codes) or (0,) * count))


class _Wire:
    """What paho takes for its socket: a buffer each way."""

    def __init__(self) -> None:
        self.inbound = bytearray()
        self.outbound: list[bytes] = []

    def put(self, first: int, body: memoryview) -> None:
        """A whole packet for paho to read. Its length is written anew, for the original is behind us."""
        self.inbound.append(first)
        self.inbound += variable_length(len(body))
        self.inbound += body

    def recv(self, size: int) -> bytes:
        if not self.inbound:
            raise BlockingIOError
        data = bytes(self.inbound[:size])
        del self.inbound[:size]
        return data

    def send(self, data: bytes | bytearray) -> int:
        self.outbound.append(bytes(data))
        return len(data)

    def fileno(self) -> int:
        return -1

    def setblocking(self, _blocking: bool) -> None:
        pass

    def close(self) -> None:
        pass


class _PahoClient(Client):
    """paho's client on a `_Wire`. `_create_socket` is the one private name we rely on; the contract suite notices."""

    wire: _Wire

    def _create_socket(self) -> Any:
        return self.wire


def _paho_client(transport: PahoTransport, options: ConnectOptions, wire: _Wire) -> _PahoClient:
    five = options.version == 5
    client = _PahoClient(
        CallbackAPIVersion.VERSION2,
        client_id=options.client_id,
        protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
        clean_session=None if five else options.clean_start,
        reconnect_on_failure=False,
        manual_ack=True,
    )
    client.wire = wire
    client.on_connect = transport._on_connect
    client.on_disconnect = transport._on_disconnect
    client.on_subscribe = transport._on_suback
    client.on_unsubscribe = transport._on_suback
    # With this set, paho never writes from inside `subscribe` and the like: `_queue_paho` does.
    client.on_socket_register_write = lambda *_: None
    if options.username is not None:
        client.username_pw_set(options.username, options.password)
    if (will := options.will) is not None:
        properties = None
        if five:
            properties = _paho_properties(PacketTypes.WILLMESSAGE)
            if will.delay_s:
                properties.WillDelayInterval = will.delay_s
            if will.message.properties.content_type is not None:
                properties.ContentType = will.message.properties.content_type
        message = will.message
        client.will_set(message.topic, message.payload, message.qos, message.retain, properties)
    return client


def _paho_properties(packet_type: int) -> Any:
    return PahoProperties(packet_type)  # type: ignore[no-untyped-call]  # paho left this class without types


def _connect(options: ConnectOptions, timeout_s: float) -> _Socket:
    """A socket to the broker, without delay and without blocking, TLS shaken hands; or BrokerError."""
    address = f"{options.host}:{options.port}"
    give_up_at = time.monotonic() + timeout_s
    try:
        sock: _Socket = _reach(_addresses(options.host, options.port, timeout_s), give_up_at)
    except (OSError, ValueError, OverflowError) as err:  # ValueError: names such as `a..b` that no resolver takes
        raise BrokerError(
            f"The MQTT broker at {address} cannot be reached: {_why(err)}.",
            fix="Check the address, and that the broker is running and listens there.",
        ) from err
    try:
        # Without it a PUBACK waits for the peer's delayed ACK: 44 ms a request instead of 0.24.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if options.tls:
            sock.settimeout(max(0.001, give_up_at - time.monotonic()))
            context = ssl.create_default_context(cafile=options.tls_ca_file)
            sock = context.wrap_socket(sock, server_hostname=options.host)
        sock.setblocking(False)
    except (OSError, ValueError) as err:
        sock.close()
        raise BrokerError(
            f"No TLS connection to the MQTT broker at {address}: {_why(err)}.",
            fix="Check the certificate authority (tls_ca_file), the host name, and that this is the broker's TLS port.",
        ) from err
    return sock


def _addresses(host: str, port: int, timeout_s: float) -> list[Any]:
    """What getaddrinfo finds, or gaierror; within `timeout_s`.

    It has no limit of its own (5 s and more for each name server that is silent) and cannot be interrupted: it runs on
    a thread that is left behind. The next attempt waits for that same look-up, and takes what it found meanwhile.
    """
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # a name
    lookup = _lookups.get((host, port))
    if lookup is None or (lookup.done() and lookup.exception() is not None):
        lookup = _lookups[host, port] = Future()
        threading.Thread(target=_look_up, args=(lookup, host, port), name=f"look-up of {host}", daemon=True).start()
    try:
        found = lookup.result(timeout_s)
    except FutureTimeoutError:
        problem = f"no name server answered within {timeout_s:.1f} s"
        raise socket.gaierror(socket.EAI_AGAIN, problem) from None
    _lookups.pop((host, port), None)
    return found


_lookups: dict[tuple[str, int], Future[list[Any]]] = {}


def _look_up(lookup: Future[list[Any]], host: str, port: int) -> None:
    try:
        lookup.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except Exception as err:
        lookup.set_exception(err)


def _reach(addresses: list[Any], give_up_at: float) -> socket.socket:
    """A connection to the first address that answers; each may take its share of the time that is left."""
    problem: OSError = TimeoutError()
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        left_s = (give_up_at - time.monotonic()) / (len(addresses) - index)
        if left_s <= 0:
            break
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as err:  # a family that this kernel does not have
            problem = err
            continue
        try:
            sock.settimeout(left_s)
            sock.connect(address)
        except OSError as err:
            sock.close()
            problem = err
        else:
            return sock
    raise problem


def _why(err: Exception) -> str:
    if isinstance(err, TimeoutError):
        return "it did not answer in time"
    return getattr(err, "strerror", None) or getattr(err, "reason", None) or str(err) or type(err).__name__


def _close_all(*resources: Any) -> None:
    for resource in resources:
        resource.close()


def _linger(sock: _Socket, give_up_at: float) -> None:
    """Wait for the broker to hang up: closing on unread bytes would reset, and DISCONNECT might be lost with it."""
    sock.shutdown(socket.SHUT_WR)
    sock.settimeout(max(0.01, min(0.5, give_up_at - time.monotonic())))
    while time.monotonic() < give_up_at and sock.recv(65_536):
        pass


def _gather(outbox: deque[bytes | memoryview], limit: int = 16_384) -> bytes | memoryview:
    """TLS has no sendmsg: join small pieces into one record rather than send a record each."""
    if len(outbox[0]) >= limit:
        return outbox[0]
    pieces: list[bytes | memoryview] = []
    size = 0
    for piece in outbox:
        pieces.append(piece)
        size += len(piece)
        if size >= limit:
            break
    return b"".join(pieces)[:limit] if size > limit else b"".join(pieces)


class _Progress(NamedTuple):
    """How far the bytes of a connection have come; with TLS, what they were enciphered to."""

    given: int
    """The kernel has taken them from us."""
    taken: int
    """The other side's TCP has acknowledged them."""


def _progress(sock: _Socket) -> _Progress | None:
    """What the kernel knows of the way to the broker; None where it does not tell. TLS has the same descriptor."""
    if sys.platform != "linux":
        return None
    try:
        (waiting,) = struct.unpack("=i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_BYTES_ACKED + 8)
        (taken,) = struct.unpack_from("=Q", info, _TCPI_BYTES_ACKED)
    except (OSError, struct.error):
        return None
    return _Progress(taken + waiting, taken)


def _limits(properties: Any) -> BrokerLimits:
    def value(name: str, default: Any) -> Any:
        return getattr(properties, name, default)

    return BrokerLimits(
        receive_maximum=value("ReceiveMaximum", 65_535),
        maximum_packet_size=value("MaximumPacketSize", None),
        retain_available=bool(value("RetainAvailable", 1)),
        shared_subscriptions=bool(value("SharedSubscriptionAvailable", 1)),
        keepalive_s=value("ServerKeepAlive", None),
    )
