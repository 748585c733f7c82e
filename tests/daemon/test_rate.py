"""A client that asks more often than it may: it is told when to come back, and nobody else notices."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.mqtt.client import Client
from edge_sdk.package import EnginePackage
from tests.brokers import Broker, eventually
from tests.daemon.processes import DaemonProcess, error_of, running_daemon
from tests.daemon.test_requests import Wire
from tests.faults.conftest import stats_from

DEVICE = "limited"
TOPIC = f"edge/v1/{DEVICE}/models/digits/infer"
RATE, BURST = 1.0, 3


@pytest.fixture(scope="module")
def limited(broker: Broker, digits: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    settings = {
        "limits__client_rate": str(RATE),
        "limits__client_burst": str(BURST),
        "stats_interval_s": "0.2",
        "device": DEVICE,
    }
    folder = tmp_path_factory.mktemp("limited")
    with running_daemon(digits.path.parent, broker.url, folder, ready=["digits"], **settings) as daemon:
        yield daemon


def test_beyond_its_rate_a_client_is_told_when_to_come_back(
    limited: DaemonProcess, broker: Broker, pictures: list[Path]
) -> None:
    """429 with `retry-after` before the payload is looked at; another client is answered meanwhile; it is counted."""
    picture = pictures[0].read_bytes()
    greedy, modest = Wire(broker.url), Wire(broker.url)
    began = time.monotonic()
    answers = [greedy.ask(picture, topic=TOPIC) for _ in range(10)]
    allowed = BURST + RATE * (time.monotonic() - began)
    refused = [answer for answer in answers if dict(answer.properties.user)["status"] == "429"]
    unread = greedy.ask(b"{", topic=TOPIC)
    others = modest.ask(picture, topic=TOPIC)

    assert BURST <= len(answers) - len(refused) <= allowed
    assert (429, "queue_full") == error_of(refused[0].payload)
    assert all(0 < int(dict(answer.properties.user)["retry-after"]) <= 1000 / RATE for answer in refused)
    assert (429, "queue_full") == error_of(unread.payload)
    assert "200" == dict(others.properties.user)["status"]
    assert len(refused) + 1 == eventually(lambda: stats_from(broker, DEVICE)["mqtt"]["limited"], "counted")
    for wire in (greedy, modest):
        wire.transport.close()


def test_an_answer_that_is_asked_for_again_is_no_request(
    limited: DaemonProcess, broker: Broker, pictures: list[Path]
) -> None:
    """What comes again because its answer was lost gets the same bytes, however far over its rate the client is."""
    picture = pictures[0].read_bytes()
    wire = Wire(broker.url)
    first = wire.ask(picture, topic=TOPIC, correlation_data=b"lost")
    for _ in range(2 * BURST):
        wire.ask(picture, topic=TOPIC)
    again = wire.ask(picture, topic=TOPIC, correlation_data=b"lost")
    wire.transport.close()

    assert first.payload == again.payload
    assert ("200", "1") == (dict(again.properties.user)["status"], dict(again.properties.user)["duplicate"])


def test_the_client_library_keeps_to_the_rate(limited: DaemonProcess, broker: Broker, pictures: list[Path]) -> None:
    """It comes back when it was told to, so that its caller sees answers and no refusal."""
    began = time.monotonic()
    with Client(broker.url, device=DEVICE) as client:
        futures = [client.submit("digits", pictures[0]) for _ in range(BURST + 2)]
        labels = {future.result().predictions[0].label for future in futures}
        resent = client.statistics.resent

    assert {pictures[0].parent.name} == labels
    assert resent >= 2
    assert time.monotonic() - began >= 2 / RATE
