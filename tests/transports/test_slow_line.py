"""A line that is slow is not a broker that is silent: the keepalive tells them apart, also behind a long message.

The proxy's small buffers are what makes the line slow for its sender; otherwise one kernel takes a whole message from
another at once. What is on its way then waits in our own kernel, and the ping waits behind it.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.mqtt.transports.base import Acknowledged, Closed, Connected, ConnectOptions, Message
from edge_sdk.mqtt.transports.paho import PahoTransport
from edge_sdk.mqtt.transports.pipes import Pipe
from tests.authority import Authority
from tests.brokers import eventually, running_mosquitto
from tests.faults.proxy import Proxy
from tests.transports.conftest import Driver
from tests.transports.test_hostile import CONNACK_5, fake_broker, needs_mosquitto

KEEPALIVE_S = 1
LONG = 100_000
SLOW = 30_000
"""Bytes and bytes a second: more than three keepalives."""
BUFFER = 2_048

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what the other side has taken")

Open = Callable[..., Driver]


@pytest.fixture
def open_at() -> Iterator[Open]:
    """A driver that is connected to a port, and closed when the test ends."""
    drivers: list[Driver] = []

    def make(port: int, host: str = "127.0.0.1", **more: Any) -> Driver:
        options = ConnectOptions(host, port, "slow", keepalive_s=KEEPALIVE_S, **more)
        drivers.append(Driver(PahoTransport(), options))
        assert isinstance(drivers[-1].open(), Connected)
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.transport.close(send_will=True)


@needs_mosquitto
@pytest.mark.parametrize("tls", [False, True], ids=["TCP", "TLS"])
def test_a_message_longer_than_the_keepalive_arrives(tmp_path: Path, open_at: Open, tls: bool) -> None:
    """While the broker takes a message, however slowly, the ping behind it may stay without an answer."""
    lines, more = [], {}
    if tls:
        authority = Authority(tmp_path)
        certificate, key = authority.certificate("server")
        lines = [f"certfile {certificate}", f"keyfile {key}"]
        more = {"host": "localhost", "tls": True, "tls_ca_file": str(authority.file)}
    with running_mosquitto(tmp_path, lines=lines) as broker, Proxy(broker.port, buffer_bytes=BUFFER) as proxy:
        driver = open_at(proxy.port, **more)
        proxy.to_broker.bytes_per_second = SLOW
        begun = time.monotonic()
        handle = driver.transport.publish(Message("t", bytes(LONG)))
        event = driver.next(object)
        took_s = time.monotonic() - begun

    assert isinstance(event, Acknowledged), event
    assert handle == event.handle
    assert took_s > 2 * KEEPALIVE_S


def take_and_keep_silent(connection: socket.socket) -> None:
    """A broker that answers CONNECT, and then reads for ever."""
    connection.recv(4096)
    connection.sendall(CONNACK_5)
    while connection.recv(65_536):
        pass


@pytest.mark.parametrize("way", ["nothing is taken any more", "all is taken and nothing answered"])
def test_a_line_that_dies_under_a_long_message_is_noticed(open_at: Open, way: str) -> None:
    """Progress excuses silence only as long as there is progress, and only of what stands before the ping."""
    with fake_broker(take_and_keep_silent) as port, Proxy(port, buffer_bytes=BUFFER) as proxy:
        driver = open_at(proxy.port)
        line = proxy.to_broker
        line.bytes_per_second = SLOW
        driver.transport.publish(Message("t", bytes(LONG)))

        def most_of_it_is_through() -> bool:
            driver.events += driver.transport.poll(0.05)
            return line.passed > 0.7 * LONG

        eventually(most_of_it_is_through, "70 % of a long message")
        alive = not any(isinstance(event, Closed) for event in driver.events)
        if way == "nothing is taken any more":
            line.hold = True
        else:
            line.bytes_per_second = None
        begun = time.monotonic()
        while not any(isinstance(event, Closed) for event in driver.events):
            driver.transport.publish(Message("t", b"something to acknowledge, all the time"))
            driver.events += driver.transport.poll(0.05)
            assert time.monotonic() - begun < 5
        noticed_s = time.monotonic() - begun

    assert alive
    assert noticed_s <= 2 * KEEPALIVE_S + 0.3


def test_where_the_kernel_does_not_tell_there_is_no_progress() -> None:
    """A socket that is not TCP stands for an old kernel: the keepalive then goes by what is heard alone."""
    one, other = socket.socketpair()
    with one, other:
        assert None is Pipe(one).progress()
