"""The proxy: an ordinary wire until it is told otherwise, and then exactly that."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.brokers import eventually
from tests.faults.proxy import Proxy


class Echo:
    """A server that says back what it hears, and knows how its connections ended."""

    def __init__(self) -> None:
        self.heard = 0
        self.resets = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65_536):
                    self.heard += len(data)
                    connection.sendall(data)
            except ConnectionResetError:
                self.resets += 1
            except OSError:
                pass


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as between:
        yield between


@pytest.fixture
def end(proxy: Proxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as connection:
        yield connection


def say(end: socket.socket, data: bytes) -> bytes:
    """What comes back; as much as was said, or nothing within a moment."""
    end.sendall(data)
    heard = b""
    with contextlib.suppress(TimeoutError):
        while len(heard) < len(data) and (piece := end.recv(65_536)):
            heard += piece
    return heard


def test_it_is_a_wire(proxy: Proxy, end: socket.socket) -> None:
    data = bytes(range(256)) * 4_000

    threading.Thread(target=end.sendall, args=(data,), daemon=True).start()
    heard = b""
    while len(heard) < len(data):
        heard += end.recv(65_536)

    assert data == heard
    eventually(lambda: proxy.to_broker.passed == proxy.to_daemon.passed == len(data), "every byte is counted")
    assert (1, 1) == (proxy.accepted, proxy.connections)


def test_a_reset_reaches_both_sides(proxy: Proxy, end: socket.socket, echo: Echo) -> None:
    assert b"x" == say(end, b"x")

    assert 1 == proxy.reset()
    with pytest.raises(ConnectionResetError):
        end.recv(1)
    eventually(lambda: echo.resets == 1, "the server sees a reset")
    assert 0 == proxy.connections


def test_an_orderly_end_is_no_reset(proxy: Proxy, end: socket.socket, echo: Echo) -> None:
    assert b"x" == say(end, b"x")

    assert 1 == proxy.close_connections()
    assert b"" == end.recv(1)
    assert 0 == echo.resets


def test_half_open_is_silence_and_new_connections_work(proxy: Proxy, end: socket.socket) -> None:
    assert b"x" == say(end, b"x")

    assert 1 == proxy.half_open()
    end.settimeout(0.2)
    assert b"" == say(end, b"y")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as other:
        assert b"z" == say(other, b"z")


def test_an_end_of_a_dead_line_is_not_told_that_the_other_gave_up() -> None:
    """A server that hangs up on a half-open connection is as far away as one that is silent."""
    with socket.create_server(("127.0.0.1", 0)) as server, Proxy(server.getsockname()[1]) as proxy:
        end = socket.create_connection(("127.0.0.1", proxy.port), timeout=0.3)
        far, _ = server.accept()
        eventually(lambda: proxy.connections == 1, "connected")
        proxy.half_open()
        far.close()
        with pytest.raises(TimeoutError):
            end.recv(1)
        end.close()
        eventually(lambda: proxy.connections == 0, "both ends are gone")


@pytest.mark.parametrize("way", ["to_broker", "to_daemon"])
def test_a_cut_comes_in_the_middle(proxy: Proxy, end: socket.socket, echo: Echo, way: str) -> None:
    """So many bytes arrive, and then a reset."""
    getattr(proxy, way).cut_after = 40
    end.sendall(bytes(100))

    heard = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := end.recv(100):
            heard += piece

    eventually(lambda: proxy.connections == 0, "the connection is gone")
    assert (40 if way == "to_broker" else 100) == echo.heard
    assert len(heard) <= 40


def test_refused_connections_are_counted(proxy: Proxy) -> None:
    proxy.refuse(True)
    with pytest.raises(ConnectionResetError):
        connect_and_read(proxy.port)
    proxy.heal()
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as taken:
        assert b"x" == say(taken, b"x")

    assert 2 == proxy.accepted


def connect_and_read(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as end:
        return end.recv(1)


def test_bandwidth_and_latency_take_their_time(proxy: Proxy, end: socket.socket) -> None:
    proxy.to_broker.bytes_per_second = 10_000
    proxy.to_daemon.latency_s = 0.1

    begun = time.monotonic()
    heard = say(end, bytes(2_000))

    assert 2_000 == len(heard)
    assert 0.3 <= time.monotonic() - begun < 3


def test_what_is_held_comes_later(proxy: Proxy, end: socket.socket) -> None:
    proxy.to_broker.hold = True
    end.settimeout(0.2)

    assert b"" == say(end, b"x")
    proxy.heal()
    end.settimeout(5)
    assert b"x" == end.recv(1)


def test_short_buffers_let_the_sender_feel_the_line(echo: Echo) -> None:
    """With buffers of the usual size a megabyte is gone from its sender at once, whatever the line can carry."""
    with Proxy(echo.port, buffer_bytes=4096) as slow:
        slow.to_broker.bytes_per_second = 10_000
        with socket.socket() as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            end.connect(("127.0.0.1", slow.port))
            end.settimeout(0.3)
            with pytest.raises(TimeoutError):
                end.sendall(bytes(1_000_000))

        assert echo.heard < 100_000


def test_closing_frees_the_port(echo: Echo) -> None:
    with Proxy(echo.port) as proxy:
        port = proxy.port

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
