"""A broker that does what it is told, packet by packet, for what no real broker does on demand.

    with FakeBroker(Rules(connack=connack(receive_maximum=1), pubacks=False)) as broker:
        ...                                        # connect to broker.port
        broker.send(publish("t", b"x", packet_id=1))
        broker.published("edge/v1/reply/")         # what came, oldest first
        broker.drop()

Each connection is treated by the rules whose turn it is; the last rules hold for all that follow. Everything that
arrives is kept in `heard`, with its moment. PUBLISH and PUBACK are read by the project's own decoder, which is tested
against another codec (tests/transports/test_packets.py); the rest is bytes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from edge_sdk.mqtt.transports.base import NO_PROPERTIES, Message, MqttVersion, Properties
from edge_sdk.mqtt.transports.packets import (
    MAX_REMAINING_LENGTH,
    Inbox,
    decode_puback,
    decode_publish,
    encode_publish,
    variable_length,
)
from tests.brokers import eventually

CONNECT, PUBLISH, PUBACK, SUBSCRIBE, UNSUBSCRIBE, PINGREQ, DISCONNECT = 0x10, 0x30, 0x40, 0x80, 0xA0, 0xC0, 0xE0

_RST_ON_CLOSE = struct.pack("ii", 1, 0)


def packet(first: int, body: bytes) -> bytes:
    return bytes((first,)) + variable_length(len(body)) + body


def connack(
    code: int = 0,
    *,
    session_present: bool = False,
    receive_maximum: int | None = None,
    maximum_packet_size: int | None = None,
    server_keepalive_s: int | None = None,
    shared_subscriptions: bool = True,
) -> bytes:
    """MQTT 5's CONNACK."""
    properties = b""
    if receive_maximum is not None:
        properties += b"\x21" + receive_maximum.to_bytes(2, "big")
    if maximum_packet_size is not None:
        properties += b"\x27" + maximum_packet_size.to_bytes(4, "big")
    if server_keepalive_s is not None:
        properties += b"\x13" + server_keepalive_s.to_bytes(2, "big")
    if not shared_subscriptions:
        properties += b"\x2a\x00"
    return packet(0x20, bytes((session_present, code)) + variable_length(len(properties)) + properties)


def disconnect(code: int) -> bytes:
    return packet(DISCONNECT, bytes((code, 0)))


def publish(
    topic: str,
    payload: bytes,
    *,
    packet_id: int | None,
    duplicate: bool = False,
    properties: Properties = NO_PROPERTIES,
    version: MqttVersion = 5,
) -> bytes:
    message = Message(topic, payload, qos=0 if packet_id is None else 1, properties=properties)
    head = encode_publish(message, packet_id, version)
    return bytes((head[0] | (8 if duplicate else 0),)) + head[1:] + payload


@dataclass(frozen=True)
class Rules:
    """How a connection is treated."""

    connack: bytes | None = None
    """None: accept, in the client's version. b"": never answer."""
    then: bytes = b""
    """Bytes that follow CONNACK at once."""
    hang_up: bool = False
    """End the connection after that."""
    subacks: tuple[int, ...] | None = (1,)
    """The codes of SUBACK, the last one for all filters that follow; None: never answer."""
    pubacks: bool = True
    puback_code: int = 0
    pongs: bool = True
    reads: bool = True
    """False: nothing is read after CONNECT, and the client's messages pile up."""


@dataclass(frozen=True)
class Heard:
    """A packet from the client."""

    at: float
    connection: int
    first: int
    body: bytes
    version: MqttVersion

    @property
    def kind(self) -> int:
        return self.first & 0xF0

    @property
    def message(self) -> Message:
        return decode_publish(self.first, memoryview(self.body), self.version)[0]

    @property
    def packet_id(self) -> int | None:
        """Of a PUBLISH or a PUBACK."""
        if self.kind == PUBACK:
            return decode_puback(memoryview(self.body))[0]
        return decode_publish(self.first, memoryview(self.body), self.version)[1]


class FakeBroker:
    """Listens on a free port of the loopback interface; a context manager."""

    def __init__(self, *rules: Rules) -> None:
        self.rules = list(rules) or [Rules()]
        self.heard: list[Heard] = []
        self.connected_at: list[float] = []
        """When each connection was taken."""
        self._current: socket.socket | None = None
        self._open: dict[int, socket.socket] = {}
        self._version: MqttVersion = 5
        self._lock = threading.Lock()
        self._last_id = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, name="fake broker", daemon=True).start()

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    # What came

    def of(self, kind: int, *, connection: int | None = None) -> list[Heard]:
        """The packets of a kind, of one connection (counted from 1) or of all."""
        return [
            heard
            for heard in list(self.heard)
            if heard.kind == kind and (connection is None or heard.connection == connection)
        ]

    def published(self, prefix: str = "", *, connection: int | None = None) -> list[Message]:
        """What the client published on topics that begin with `prefix`."""
        messages = [heard.message for heard in self.of(PUBLISH, connection=connection)]
        return [message for message in messages if message.topic.startswith(prefix)]

    def acknowledged(self, *, connection: int | None = None) -> list[int | None]:
        """The packet ids that the client acknowledged, in order."""
        return [heard.packet_id for heard in self.of(PUBACK, connection=connection)]

    def wait(self, condition: Callable[[], Any], what: str, deadline_s: float = 15.0) -> Any:
        return eventually(condition, f"{what}; heard {[hex(heard.first) for heard in self.heard][-20:]}", deadline_s)

    # What is done

    def send(self, data: bytes, *, connection: int | None = None) -> None:
        """Bytes to the client of that connection, or of the newest; lost if it is gone."""
        with self._lock, contextlib.suppress(OSError):
            wanted = self._current if connection is None else self._open[connection]
            if wanted is not None:
                wanted.sendall(data)

    def request(
        self,
        topic: str,
        payload: bytes,
        *,
        correlation_data: bytes | None = None,
        reply: str = "edge/v1/reply/fake",
        packet_id: int | None = None,
        duplicate: bool = False,
        **properties: Any,
    ) -> int:
        """Send a request of QoS 1; its packet id."""
        if packet_id is None:
            self._last_id += 1
            packet_id = self._last_id
        told = Properties(response_topic=reply, correlation_data=correlation_data, **properties)
        self.send(publish(topic, payload, packet_id=packet_id, duplicate=duplicate, properties=told))
        return packet_id

    def acknowledge(self, heard: Heard, code: int = 0) -> None:
        """Acknowledge a PUBLISH, whenever and in whatever order the test likes."""
        packet_id = heard.packet_id
        assert packet_id is not None
        self.send(packet(PUBACK, packet_id.to_bytes(2, "big") + (bytes((code, 0)) if code else b"")))

    def drop(self, *, abruptly: bool = True, connection: int | None = None) -> None:
        """End that connection, or the newest."""
        with self._lock:
            if connection is None:
                ended, self._current = self._current, None
            else:
                ended = self._open[connection]
        if ended is not None:
            _end(ended, abruptly)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    def __enter__(self) -> FakeBroker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # A connection's life

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                number = len(self.connected_at) + 1
                rules = self.rules[min(number, len(self.rules)) - 1]
                self.connected_at.append(time.monotonic())
                self._open[number] = connection
                threading.Thread(target=self._serve, args=(connection, number, rules), daemon=True).start()

    def _serve(self, connection: socket.socket, number: int, rules: Rules) -> None:
        inbox = Inbox(MAX_REMAINING_LENGTH)
        version: MqttVersion = 5
        with contextlib.suppress(OSError):
            while count := connection.recv_into(inbox.room()):
                inbox.filled(count)
                while (found := inbox.next_packet()) is not None:
                    first, body = found
                    if first == CONNECT:
                        version = 5 if body[6] == 5 else 4
                        self._current, self._version = connection, version
                    heard = Heard(time.monotonic(), number, first, bytes(body), version)
                    self.heard.append(heard)
                    self._answer(connection, heard, rules)
                    if first == CONNECT and rules.hang_up:
                        _end(connection, abruptly=False)
                        return
                    if not rules.reads:
                        return
        _end(connection, abruptly=False)

    def _answer(self, connection: socket.socket, heard: Heard, rules: Rules) -> None:
        reply = b""
        if heard.kind == CONNECT:
            accepted = connack() if heard.version == 5 else b"\x20\x02\x00\x00"
            reply = (accepted if rules.connack is None else rules.connack) + rules.then
        elif heard.kind == SUBSCRIBE and rules.subacks is not None:
            filters = _filters(heard)
            codes = [*rules.subacks, *[rules.subacks[-1]] * filters][:filters]
            reply = packet(0x90, heard.body[:2] + (b"\x00" if heard.version == 5 else b"") + bytes(codes))
        elif heard.kind == PUBLISH and rules.pubacks and heard.packet_id is not None:
            code = bytes((rules.puback_code, 0)) if rules.puback_code else b""
            reply = packet(PUBACK, heard.packet_id.to_bytes(2, "big") + code)
        elif heard.kind == PINGREQ and rules.pongs:
            reply = b"\xd0\x00"
        if reply:
            with self._lock:
                connection.sendall(reply)


def _filters(subscribe: Heard) -> int:
    """How many filters a SUBSCRIBE holds."""
    position = 2
    if subscribe.version == 5:
        position += 1 + subscribe.body[2]  # properties of less than 128 bytes, as every client here sends
    count = 0
    while position < len(subscribe.body):
        position += 2 + int.from_bytes(subscribe.body[position : position + 2], "big") + 1
        count += 1
    return count


def _end(connection: socket.socket, abruptly: bool) -> None:
    with contextlib.suppress(OSError):
        if abruptly:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
            connection.shutdown(socket.SHUT_RD)
        else:
            connection.shutdown(socket.SHUT_RDWR)
    connection.close()
