"""MQTT inside a WebSocket: frames cut anywhere, pings, goodbyes, and web servers that are no broker."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import BrokerError
from edge_sdk.mqtt.access import BrokerAccess
from edge_sdk.mqtt.broker import find_broker
from edge_sdk.mqtt.client import Client
from edge_sdk.mqtt.transports.base import Acknowledged, Closed, Connected, ConnectOptions, Message, Received, Subscribed
from edge_sdk.mqtt.transports.paho import PahoTransport
from edge_sdk.mqtt.transports.pipes import Piece, Pipe
from tests.authority import Authority
from tests.brokers import MOSQUITTO, eventually, running_mosquitto
from tests.transports.conftest import Driver
from tests.transports.test_hostile import CONNACK_5, fake_broker

wsproto = pytest.importorskip("wsproto", reason="wsproto is not installed")
from wsproto import ConnectionType, WSConnection  # noqa: E402  # not before it is known to be there
from wsproto.events import (  # noqa: E402
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    Pong,
    Request,
    TextMessage,
)
from wsproto.utilities import ProtocolError  # noqa: E402

from edge_sdk.mqtt.transports.websocket import WebSocketPipe  # noqa: E402

needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


# The pipe alone


def joined() -> tuple[WSConnection, WSConnection]:
    """Both ends of a WebSocket, past the handshake."""
    client, server = WSConnection(ConnectionType.CLIENT), WSConnection(ConnectionType.SERVER)
    server.receive_data(client.send(Request(host="x", target="/mqtt", subprotocols=["mqtt"])))
    list(server.events())
    client.receive_data(server.send(AcceptConnection(subprotocol="mqtt")))
    list(client.events())
    return client, server


class Line(Pipe):
    """A pipe that gives what it was given, and takes as much at a time as the test says: 0 is no room."""

    def __init__(self, takes: Sequence[int] = (), gives: Sequence[bytes] = ()) -> None:
        self.takes = deque(takes)
        self.gives = deque(gives)
        self.taken = b""
        self.sock = None  # type: ignore[assignment]  # there is none, and nobody asks for it

    def receive(self, room: memoryview) -> int | None:
        if not self.gives:
            return None
        piece = self.gives.popleft()
        if len(piece) > len(room):
            self.gives.appendleft(piece[len(room) :])
            piece = piece[: len(room)]
        room[: len(piece)] = piece
        return len(piece)

    def send(self, outbox: deque[Piece]) -> int | None:
        count = min(self.takes.popleft() if self.takes else 1 << 30, len(outbox[0]))
        self.taken += bytes(outbox[0][:count])
        return count or None


@given(
    pieces=st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=20),
    takes=st.lists(st.integers(0, 90), max_size=60),
    pings=st.sets(st.integers(0, 30)),
)
def test_what_goes_in_comes_out_however_the_line_takes_it(
    pieces: list[bytes], takes: list[int], pings: set[int]
) -> None:
    """In order and whole, though frames leave in parts and pongs come between them."""
    client, server = joined()
    line = Line(takes)
    pipe = WebSocketPipe(line, client)
    outbox: deque[Piece] = deque(pieces)
    turns = 0
    while outbox:
        turns += 1
        if turns in pings:
            line.gives.append(server.send(Ping(b"%d" % turns)))

            assert pipe.receive(memoryview(bytearray(8))) is None
        sent = pipe.send(outbox) or 0
        while sent:
            head = outbox.popleft()
            if sent < len(head):
                outbox.appendleft(head[sent:])
            sent -= min(sent, len(head))
    server.receive_data(line.taken)
    events = list(server.events())

    assert b"".join(pieces) == b"".join(bytes(event.data) for event in events if isinstance(event, BytesMessage))
    answered = [event for event in events if isinstance(event, Pong)]
    assert len([turn for turn in pings if 1 <= turn <= turns]) == len(answered)


@given(
    messages=st.lists(st.binary(max_size=300), min_size=1, max_size=10),
    cuts=st.lists(st.integers(1, 100), min_size=1, max_size=10),
    room=st.integers(1, 100),
    fragment=st.integers(1, 100),
)
def test_frames_are_joined_however_they_are_cut(
    messages: list[bytes], cuts: list[int], room: int, fragment: int
) -> None:
    """Fragmented messages, frames cut anywhere on the line, and small buffers."""
    client, server = joined()
    data = b""
    for message in messages:
        parts = [message[at : at + fragment] for at in range(0, len(message), fragment)] or [b""]
        for index, part in enumerate(parts):
            data += server.send(BytesMessage(part, message_finished=index == len(parts) - 1))
            if index == 0 and len(parts) > 1:
                data += server.send(Ping(b"in the middle of a message"))
    gives, turn = [], 0
    while data:
        gives.append(data[: cuts[turn % len(cuts)]])
        data = data[len(gives[-1]) :]
        turn += 1
    pipe = WebSocketPipe(Line(gives=gives), client)
    came, buffer = b"", memoryview(bytearray(room))
    while count := pipe.receive(buffer):
        came += bytes(buffer[:count])

    assert b"".join(messages) == came


def test_pings_that_nobody_lets_us_answer_are_not_kept() -> None:
    """A server that pings for ever and never reads costs bounded memory."""
    client, server = joined()
    flood = b"".join(server.send(Ping(bytes(125))) for _ in range(5_000))
    pipe = WebSocketPipe(Line(takes=[0] * 10_000, gives=[flood]), client)

    assert pipe.receive(memoryview(bytearray(8))) is None
    assert len(pipe._unsent) < 200_000


# A web server in front of a broker


class Gateway:
    """A WebSocket at /mqtt that leads to a broker's port, as a reverse proxy does it; `said` has what clients said."""

    def __init__(self, broker_port: int, *, fragment: int = 100_000, context: ssl.SSLContext | None = None) -> None:
        self.broker_port = broker_port
        self.fragment = fragment
        self.context = context
        self.said: list[Event] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                threading.Thread(target=self._carry, args=(sock,), daemon=True).start()

    def _carry(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, ProtocolError):  # whoever leaves in the middle is not the gateway's concern
            if self.context is not None:
                sock = self.context.wrap_socket(sock, server_side=True)
            server = WSConnection(ConnectionType.SERVER)
            requests: list[Request] = []
            while not requests:
                if not (data := sock.recv(4096)):
                    return
                server.receive_data(data)
                requests = [event for event in server.events() if isinstance(event, Request)]
            request = requests[0]
            assert ("/mqtt", ["mqtt"]) == (request.target, request.subprotocols)
            sock.sendall(server.send(AcceptConnection(subprotocol="mqtt")))
            with socket.create_connection(("127.0.0.1", self.broker_port)) as broker, sock:
                lines = [sock, broker]
                while True:
                    pending = isinstance(sock, ssl.SSLSocket) and sock.pending()
                    ready = [sock] if pending else select.select(lines, [], [])[0]
                    if sock in ready:
                        if not (data := sock.recv(65_536)):
                            return
                        server.receive_data(data)
                        for event in server.events():
                            if isinstance(event, BytesMessage):
                                broker.sendall(event.data)
                            else:
                                self.said.append(event)
                            if isinstance(event, CloseConnection):
                                return
                    if broker in ready:
                        if not (data := broker.recv(65_536)):
                            lines.remove(broker)
                        sock.sendall(server.send(Ping(b"?")))
                        for at in range(0, len(data), self.fragment):
                            last = at + self.fragment >= len(data)
                            part = data[at : at + self.fragment]
                            sock.sendall(server.send(BytesMessage(part, message_finished=last)))


@needs_mosquitto
def test_long_messages_through_a_gateway(tmp_path: Path) -> None:
    """Two megabytes there and back, fragmented, with pings between that are all answered."""
    with running_mosquitto(tmp_path) as broker:
        gateway = Gateway(broker.port, fragment=1000)
        options = ConnectOptions("127.0.0.1", gateway.port, "one", websocket_path="/mqtt")
        driver = Driver(PahoTransport(), options)
        driver.open()
        driver.transport.subscribe(["t"])
        driver.next(Subscribed)
        payloads = [os.urandom(2_000_000), b"", b"short", os.urandom(300_000)]
        for payload in payloads:
            driver.transport.publish(Message("t", payload))
        came = []
        for _ in payloads:
            received = driver.next(Received, 30)
            driver.transport.acknowledge(received)
            came.append(received.message.payload)
        driver.next(Acknowledged)
        driver.transport.close()

    assert payloads == came
    assert any(isinstance(event, Pong) and event.payload == b"?" for event in gateway.said)
    eventually(lambda: CloseConnection(1000, "") in gateway.said, f"a goodbye: {gateway.said[-3:]}")


@needs_mosquitto
def test_over_tls_by_url(tmp_path: Path) -> None:
    """wss:// for everybody who takes an address; the path is /mqtt where none is given."""
    authority = Authority(tmp_path / "authority")
    certificate, key = authority.certificate("gateway")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    with running_mosquitto(tmp_path) as broker:
        url = f"wss://localhost:{Gateway(broker.port, context=context).port}"
        access = BrokerAccess(ca_file=authority.file)
        found = find_broker(url, access=access)
        with Client(url, access=access) as client:
            devices = client.devices()

    assert (True, "5") == (found.reachable, found.protocol)
    assert {} == devices


# What is no broker


def serving(answer: Callable[[socket.socket], None]) -> contextlib.AbstractContextManager[int]:
    """A web server of one answer to one request."""

    def talk(connection: socket.socket) -> None:
        connection.recv(4096)
        answer(connection)

    return fake_broker(talk)


@contextlib.contextmanager
def upgrading(*events: Event, subprotocol: str | None = "mqtt") -> Iterator[int]:
    """A server that takes the WebSocket, and then says `events`."""

    def talk(connection: socket.socket) -> None:
        server = WSConnection(ConnectionType.SERVER)
        server.receive_data(connection.recv(4096))
        list(server.events())
        connection.sendall(server.send(AcceptConnection(subprotocol=subprotocol)))
        for event in events:
            connection.sendall(server.send(event))
        connection.recv(4096)

    with fake_broker(talk) as port:
        yield port


def reply(text: str, *, hang_up: bool = False) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(text.encode())
        if hang_up:
            connection.shutdown(socket.SHUT_RDWR)

    return answer


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (reply("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"), "HTTP 404 when asked for a WebSocket at /here"),
        (reply("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"), "HTTP 200"),
        (reply("SSH-2.0-OpenSSH_9.2\r\n\r\n"), "no WebSocket's"),
        (reply("", hang_up=True), "hung up"),
        (lambda connection: None, "in time"),
    ],
)
def test_a_web_server_that_is_no_broker(answer: Callable[[socket.socket], None], complaint: str) -> None:
    """BrokerError by the time-out, saying what it answered and what to check."""
    with serving(answer) as port:
        options = ConnectOptions("127.0.0.1", port, "one", websocket_path="/here")
        with pytest.raises(BrokerError, match=complaint) as caught:
            PahoTransport().open(options, timeout_s=0.5)

    assert "path" in caught.value.fix


def test_a_web_socket_for_something_else() -> None:
    """A server that does not choose the subprotocol `mqtt` would not understand us."""
    with upgrading(subprotocol=None) as port, pytest.raises(BrokerError, match="not one for MQTT"):
        PahoTransport().open(ConnectOptions("127.0.0.1", port, "one", websocket_path="/mqtt"), timeout_s=5)


@pytest.mark.parametrize(
    ("event", "complaint"),
    [
        (CloseConnection(1001), "the broker closed the connection"),
        (CloseConnection(1008, "go away"), "1008 go away"),
        (TextMessage("hello"), "text"),
    ],
)
def test_goodbyes_and_nonsense_end_the_connection(event: Event, complaint: str) -> None:
    """Closed, with what the server said; what it said before that is heard."""
    with upgrading(BytesMessage(CONNACK_5), event) as port:
        driver = Driver(PahoTransport(), ConnectOptions("127.0.0.1", port, "one", websocket_path="/mqtt"))
        first = driver.open()
        closed = driver.next(Closed)

    assert isinstance(first, Connected)
    assert complaint in closed.reason


def test_frames_that_break_the_protocol_end_the_connection() -> None:
    """A reserved opcode, masked by a server, longer than anything: Closed, and nothing is kept of it."""
    for broken in (b"\x83\x00", b"\x82\x80abcd", b"\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xff"):

        def talk(connection: socket.socket, broken: bytes = broken) -> None:
            server = WSConnection(ConnectionType.SERVER)
            server.receive_data(connection.recv(4096))
            list(server.events())
            connection.sendall(server.send(AcceptConnection(subprotocol="mqtt")) + broken)
            connection.recv(4096)

        with fake_broker(talk) as port:
            driver = Driver(PahoTransport(), ConnectOptions("127.0.0.1", port, "one", websocket_path="/mqtt"))

            assert isinstance(driver.open(), Closed), broken
