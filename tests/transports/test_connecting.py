"""Reaching a broker takes the time it was given and no more, whatever its name and its addresses do."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from edge_sdk.errors import BrokerError
from edge_sdk.mqtt.transports.base import Connected, ConnectOptions
from edge_sdk.mqtt.transports.paho import PahoTransport
from tests.transports.conftest import Driver
from tests.transports.test_hostile import CONNACK_5, after_connect, fake_broker

Address = tuple[str, int]


def found(*addresses: Address) -> list[Any]:
    """What getaddrinfo would say."""
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]


@pytest.fixture
def black_hole() -> Iterator[Address]:
    """An address where nothing refuses and nothing answers: a listener whose queue is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example", "a\0b", ".", "no-such-host.invalid"])
def test_a_host_that_cannot_be_is_a_broker_error(host: str) -> None:
    """Names that no resolver takes raise UnicodeError and the like inside Python; here they are BrokerError."""
    with pytest.raises(BrokerError, match="cannot be reached"):
        PahoTransport().open(ConnectOptions(host, 1883, "c"), timeout_s=2)


def test_a_name_server_that_is_silent_costs_the_time_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look-up cannot be interrupted, so it is left behind; the next attempt waits for the same one and takes what
    it finds, for a name server that takes longer than one attempt must not be asked anew for ever."""
    go_on, calls = threading.Event(), []
    with fake_broker(after_connect(CONNACK_5)) as port:

        def slow(host: str, *_: Any, flags: int = 0, **__: Any) -> list[Any]:
            if flags & socket.AI_NUMERICHOST:
                raise socket.gaierror
            calls.append(host)
            go_on.wait(10)
            return found(("127.0.0.1", port))

        monkeypatch.setattr("edge_sdk.mqtt.transports.pipes.socket.getaddrinfo", slow)
        driver = Driver(PahoTransport(), ConnectOptions("broker.example", 1, "c"))
        for _ in range(3):
            begun = time.monotonic()
            with pytest.raises(BrokerError, match="no name server answered"):
                driver.transport.open(driver.options, timeout_s=0.2)
            assert 0.15 < time.monotonic() - begun < 1
        go_on.set()

        assert isinstance(driver.open(), Connected)
        assert ["broker.example"] == calls
        driver.transport.close()


def test_dead_addresses_share_the_time(monkeypatch: pytest.MonkeyPatch, black_hole: Address) -> None:
    """A broker with two dead addresses before a good one is reached in time; with only dead ones it is given up."""
    with fake_broker(after_connect(CONNACK_5)) as port:
        addresses = found(black_hole, black_hole, ("127.0.0.1", port))
        monkeypatch.setattr("edge_sdk.mqtt.transports.pipes.socket.getaddrinfo", lambda *_, **__: addresses)
        driver = Driver(PahoTransport(), ConnectOptions("broker.example", 1, "c"))
        driver.transport.open(driver.options, timeout_s=1.5)
        assert isinstance(driver.next(Connected), Connected)
        driver.transport.close()

        addresses[:] = found(black_hole, black_hole, black_hole)
        begun = time.monotonic()
        with pytest.raises(BrokerError, match="did not answer in time"):
            driver.transport.open(driver.options, timeout_s=0.6)
        assert 0.5 < time.monotonic() - begun < 1
