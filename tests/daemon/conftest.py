"""A broker, a daemon that serves the bundled digits, and a client: started once for all tests that only ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk import resources
from edge_sdk.mqtt.client import Client
from edge_sdk.package import EnginePackage
from tests.brokers import MOSQUITTO, Broker, running_mosquitto
from tests.daemon.processes import DEVICE, DaemonProcess, running_daemon


@pytest.fixture(scope="package")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """mosquitto, quick: sessions are saved when it stops, not at each message."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    with running_mosquitto(tmp_path_factory.mktemp("broker"), autosave_on_changes="false") as started:
        yield started


@pytest.fixture(scope="package")
def daemon(broker: Broker, digits: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with running_daemon(digits.path.parent, broker.url, tmp_path_factory.mktemp("daemon"), ready=["digits"]) as started:
        yield started


@pytest.fixture
def client(broker: Broker, daemon: DaemonProcess) -> Iterator[Client]:
    with Client(broker.url, device=DEVICE, timeout_s=15) as connected:
        yield connected


@pytest.fixture(scope="session")
def pictures() -> list[Path]:
    """Held-out digits; the folder's name is the label."""
    return sorted((resources.EXAMPLES / "digits" / "heldout").rglob("*.png"))
