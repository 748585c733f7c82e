"""The kinds of transport the contract suite runs over, each with a broker that can be killed and started again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from edge_sdk.mqtt.transports.base import (
    Connected,
    ConnectOptions,
    Event,
    MqttVersion,
    Subscribed,
    Transport,
)
from edge_sdk.mqtt.transports.memory import MemoryBroker
from edge_sdk.mqtt.transports.paho import PahoTransport
from tests.authority import Authority
from tests.brokers import MOSQUITTO, NO_WEBSOCKETS, eventually, running_amqtt, running_mosquitto


class Killable(Protocol):
    def kill(self) -> None: ...
    def start(self) -> None: ...


@dataclasses.dataclass
class Kind:
    """One row of the suite: how to make a transport, and the broker behind it."""

    name: str
    version: MqttVersion
    broker: Killable
    transport: Callable[[], Transport]
    port: int
    remembers: bool
    """Whether the broker's sessions outlive the broker."""
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further options of every connection."""
    slow: str = ""
    """Why the broker takes minutes to send a large message; empty where it does not."""

    def options(self, client_id: str = "one", **changes: Any) -> ConnectOptions:
        given = {"host": "127.0.0.1", **self.more, **changes}
        return ConnectOptions(port=self.port, client_id=client_id, version=self.version, **given)


SLOW = "mosquitto 2.0 sends 4 KB each tenth of a second over a WebSocket; test_websocket.py has long messages"


class KillableMemoryBroker(MemoryBroker):
    def kill(self) -> None:
        self.stop()


KINDS = (
    "mqtt5 5, mosquitto",
    "mqtt5 5, mosquitto, TLS",
    "paho 5, mosquitto",
    "paho 3.1.1, mosquitto",
    "paho 3.1.1, amqtt",
    "mqtt5 5, WebSocket",
    "memory 5",
    "memory 3.1.1",
)


def transport_of(library: str) -> Callable[[], Transport]:
    """The class for a name that begins with `paho` or `mqtt5`; skips where that is not installed."""
    if library.startswith("paho"):
        return PahoTransport
    pytest.importorskip("mqtt5", reason="the codec mqtt5 is not installed")
    from edge_sdk.mqtt.transports.mqtt5 import Mqtt5Transport

    return Mqtt5Transport


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kind]:
    name: str = request.param
    version: MqttVersion = 5 if " 5" in name else 4
    if name.startswith("memory"):
        memory = KillableMemoryBroker()
        yield Kind(name, version, memory, memory.transport, 1883, remembers=True)
    elif "amqtt" in name:
        pytest.importorskip("amqtt", reason="amqtt, the embedded broker, is not installed")
        with running_amqtt(tmp_path) as broker:
            yield Kind(name, version, broker, PahoTransport, broker.port, remembers=False)
    elif name.endswith("WebSocket"):
        if NO_WEBSOCKETS:
            pytest.skip(NO_WEBSOCKETS)
        pytest.importorskip("wsproto", reason="wsproto is not installed")
        with running_mosquitto(tmp_path, websockets=True) as broker:
            assert broker.websockets_port is not None
            more: dict[str, Any] = {"websocket_path": "/mqtt"}
            yield Kind(
                name, version, broker, transport_of(name), broker.websockets_port, remembers=True, more=more, slow=SLOW
            )
    else:
        if MOSQUITTO is None:
            pytest.skip("mosquitto is not installed")
        lines: list[str] = []
        more = {}
        if name.endswith("TLS"):
            certificate, key = (authority := Authority(tmp_path)).certificate("server")
            lines = [f"certfile {certificate}", f"keyfile {key}"]
            more = {"host": "localhost", "tls": True, "tls_ca_file": str(authority.file)}
        with running_mosquitto(tmp_path, lines=lines) as broker:
            yield Kind(name, version, broker, transport_of(name), broker.port, remembers=True, more=more)


class Driver:
    """A transport and everything that happened on it, for tests that read like a conversation."""

    def __init__(self, transport: Transport, options: ConnectOptions) -> None:
        self.transport = transport
        self.options = options
        self.events: list[Event] = []
        self._read = 0

    def open(self, **changes: Any) -> Event:
        """Connect; the event that CONNECT led to."""
        self.options = dataclasses.replace(self.options, **changes)
        self.transport.open(self.options, timeout_s=5)
        event: Event = self.next(object)
        return event

    def next(self, kind: type[Any], deadline_s: float = 10.0) -> Any:
        """The next event of `kind`; those before it are passed over."""

        def look() -> Any:
            while self._read < len(self.events):
                event = self.events[self._read]
                self._read += 1
                if isinstance(event, kind):
                    return event
            self.events += self.transport.poll(0.05)
            return None

        return eventually(look, f"a {kind.__name__}; {len(self.events)} events so far", deadline_s)

    def silent(self, kind: type[Any], during_s: float = 0.3) -> bool:
        """Whether no event of `kind` comes for a while."""
        end = time.monotonic() + during_s
        while (left := end - time.monotonic()) > 0:
            self.events += self.transport.poll(left)
        return not any(isinstance(event, kind) for event in self.events[self._read :])


@pytest.fixture
def connect(kind: Kind) -> Iterator[Callable[..., Driver]]:
    """Drivers that are connected, subscribed to what the test names, and closed when it ends."""
    drivers: list[Driver] = []

    def make(client_id: str = "one", *filters: str, **changes: Any) -> Driver:
        driver = Driver(kind.transport(), kind.options(client_id, **changes))
        drivers.append(driver)
        event = driver.open()
        assert isinstance(event, Connected), event
        if filters:
            driver.transport.subscribe(filters)
            driver.next(Subscribed)
        return driver

    yield make
    for driver in drivers:
        driver.transport.close(send_will=True)
