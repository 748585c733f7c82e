"""Models that were taken away while no daemon ran: nothing of them stays with the broker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_sdk.daemon import Daemon
from edge_sdk.mqtt.transports.base import Acknowledged, ConnectOptions, Message, Received, Subscribed
from edge_sdk.mqtt.transports.memory import MemoryBroker
from edge_sdk.mqtt.transports.paho import PahoTransport
from edge_sdk.settings import load_settings
from edge_sdk.stages import build_pipeline
from tests.brokers import Broker, eventually
from tests.daemon.processes import running_daemon
from tests.packages import make_package, misbehaving, scaling
from tests.transports.conftest import Driver

PIPELINE = """
name = "sees"

[[stage]]
name = "eye"
model = "nobody"
picture = "request"

[outputs]
y = "eye.y"
"""
DOCUMENT = b'{"state": "READY"}'

Connect = Callable[..., Driver]


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """A model, one that takes its time to load, and a pipeline that lacks its model."""
    folder = tmp_path / "engines"
    make_package(folder / "scale", scaling(), name="scale")
    slow = misbehaving([{"do": "sleep", "seconds": 0.6}])
    make_package(folder / "slow", slow, name="slow", backend="reference")
    (tmp_path / "engine.toml").write_text(PIPELINE)
    build_pipeline(tmp_path / "engine.toml", folder / "sees")
    return folder


@pytest.fixture
def connect(broker: Broker) -> Iterator[Connect]:
    """Clients of bare messages, which have asked for these filters."""
    made: list[Driver] = []

    def connected(*filters: str) -> Driver:
        driver = Driver(
            PahoTransport(), ConnectOptions("127.0.0.1", broker.port, f"sweeping-{len(made)}", clean_start=True)
        )
        made.append(driver)
        driver.open()
        if filters:
            driver.transport.subscribe(filters)
            driver.next(Subscribed)
        return driver

    yield connected
    for driver in made:
        driver.transport.close()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_what_went_while_no_daemon_ran_is_not_retained_for_ever(
    engines: Path, broker: Broker, tmp_path: Path, connect: Connect, protocol: str
) -> None:
    """A daemon clears the documents of models that it does not have, and of no other: not of one that is still loading,
    of a pipeline, of what lies deeper, or of another device."""
    device = f"swept-{protocol[0]}"
    mine = f"edge/v1/{device}/models"
    gone, kept = f"{mine}/gone", [f"{mine}/{name}" for name in ("scale", "slow", "sees", "gone/result")]
    others = [f"edge/v1/{device}-2/models/gone", f"edge/v1/{device}/deploy/gone"]
    publisher = connect()
    for topic in (gone, *kept, *others):
        publisher.transport.publish(Message(topic, DOCUMENT, retain=True))
        publisher.next(Acknowledged)
    watcher = connect(f"{mine}/+", *kept[-1:], *others)
    told: list[Message] = []

    def is_cleared() -> bool:
        told.append(watcher.next(Received).message)
        return (gone, b"") == told[-1][:2]

    with running_daemon(
        engines, broker.url, tmp_path, ready=["scale", "slow"], device=device, broker__protocol=protocol
    ) as daemon:
        eventually(is_cleared, "the document is cleared")
        daemon.stop()
    newcomer = connect(f"{mine}/+", *kept[-1:], *others)
    left = {newcomer.next(Received).message.topic for _ in (*kept, *others)}

    assert {*kept, *others} == left
    assert newcomer.silent(Received)
    assert {gone} == {message.topic for message in told if not message.payload}
    assert "was not answered" not in daemon.said()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_daemon_looks_for_leftovers_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    """It reads its own documents for a while, and no more: the broker would keep sending them, also to the next one."""
    monkeypatch.setattr("edge_sdk.mqtt.leftovers.LOOK_S", 0.5)
    make_package(tmp_path / "scale", scaling())
    broker = MemoryBroker()
    given = {"engines": str(tmp_path), "device": "once", "broker": {"protocol": protocol}}
    daemon = Daemon(load_settings(None, given), broker.transport())
    watcher = Driver(broker.transport(), ConnectOptions("memory", 0, "watcher"))
    watcher.open()
    thread = threading.Thread(target=daemon.run)
    thread.start()

    def is_read() -> bool:
        watcher.transport.publish(Message("edge/v1/once/models/probe", DOCUMENT))
        return bool(watcher.next(Acknowledged).code == 0)  # and not 0x10, that nobody does

    try:
        looked = eventually(is_read, "it looks")
        left = eventually(lambda: not is_read(), "it has looked")
    finally:
        daemon.stop()
        thread.join(30)

    assert (True, True) == (looked, left)
