"""Reaching a broker on a thread of its own: whoever waits for it is woken, and nothing stays open that nobody wants."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from edge_sdk.errors import BrokerError
from edge_sdk.mqtt.reaching import Reaching
from edge_sdk.mqtt.transports.base import ConnectOptions
from edge_sdk.mqtt.transports.paho import PahoTransport
from edge_sdk.mqtt.transports.pipes import Pipe
from tests.brokers import eventually, free_port


def test_whoever_waits_is_woken() -> None:
    """A poll ends as soon as the broker is reached, and as soon as it cannot be."""
    transport = PahoTransport()
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reaching = Reaching(transport, ConnectOptions("127.0.0.1", listener.getsockname()[1], "c"), timeout_s=5)
        transport.poll(30)
        assert reaching.done
        reaching.result().close()
    reaching = Reaching(transport, ConnectOptions("127.0.0.1", free_port(), "c"), timeout_s=5)
    transport.poll(30)

    with pytest.raises(BrokerError, match="cannot be reached"):
        reaching.result()
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("late", [False, True], ids=["reached before", "reached after"])
def test_what_nobody_wants_is_let_go(late: bool) -> None:
    """The broker sees it hang up, whether it was reached before it was abandoned or after."""
    abandoned = threading.Event()

    class Slow(PahoTransport):
        def reach(self, options: ConnectOptions, *, timeout_s: float) -> Pipe:
            if late:
                abandoned.wait(10)
            return super().reach(options, timeout_s=timeout_s)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        reaching = Reaching(Slow(), ConnectOptions("127.0.0.1", listener.getsockname()[1], "c"), timeout_s=5)
        if not late:
            eventually(lambda: reaching.done, "it was reached")
        reaching.abandon()
        abandoned.set()
        taken, _ = listener.accept()
        with taken:
            taken.settimeout(10)

            assert b"" == taken.recv(1)
