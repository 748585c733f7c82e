"""Engines for a daemon under fire, scenes, and daemons at brokers that a test makes itself."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import MOSQUITTO, Broker, running_mosquitto
from tests.daemon.processes import DaemonProcess
from tests.daemon.test_requests import Wire
from tests.faults.fleet import FACTOR
from tests.faults.scene import DEVICE, Scene, make_engines
from tests.packages import make_package, misbehaving, scaling

FULL_LENGTH = bool(os.environ.get("FAULTS_FULL_LENGTH"))
"""Whether faults last as long as docs/reliability.md says, or, as in CI, only as long as it takes to see them."""

MODELS = f"edge/v1/{DEVICE}/models"
POISON = 666.0
"""The value that a misbehaving model misbehaves at."""

OpenScene = Callable[..., Scene]
OpenDaemon = Callable[..., DaemonProcess]


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`scale` doubles four numbers; `wide` doubles many, so that requests and answers are long."""
    return make_engines(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def misbehaving_engines(tmp_path: Path) -> Callable[..., Path]:
    """A folder with `scale`, which is quick, and `odd`, which follows orders; both double four numbers."""

    def make(*orders: dict[str, object], **package: Any) -> Path:
        folder = tmp_path / "misbehaving"
        make_package(folder / "scale", scaling(FACTOR), name="scale")
        make_package(folder / "odd", misbehaving(orders), name="odd", backend="reference", **package)
        return folder

    return make


@pytest.fixture
def open_scene(tmp_path: Path, engines: Path) -> Iterator[OpenScene]:
    """Scenes that end with the test; the folder and the engines are given."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    with ExitStack() as stack:

        def make(**options: Any) -> Scene:
            place = options.pop("engines", engines)
            return stack.enter_context(Scene(tmp_path, place, **options))

        yield make


@pytest.fixture(params=["auto", "paho"])
def each_transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemons of a test speak MQTT 5 by what is chosen where everything is installed, and then by paho."""
    monkeypatch.setenv("EDGE_SDK_BROKER__TRANSPORT", request.param)


@pytest.fixture
def scene(open_scene: OpenScene) -> Scene:
    """A scene in which nothing is out of the ordinary yet."""
    return open_scene()


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Broker]:
    """A broker for one test, with its sessions saved at each change."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    home = tmp_path / "mosquitto"
    home.mkdir()
    with running_mosquitto(home, autosave_on_changes="true") as broker:
        yield broker


@pytest.fixture
def open_daemon(tmp_path: Path, engines: Path) -> Iterator[OpenDaemon]:
    """Daemons, started at a broker's address and not waited for; killed with the test."""
    daemons: list[DaemonProcess] = []

    def make(
        url: str, *, extra: dict[str, str] | None = None, engines: Path = engines, device: str = DEVICE, **settings: str
    ) -> DaemonProcess:
        log = tmp_path / f"daemon-{len(daemons)}.log"
        daemon = DaemonProcess(engines, url, log, device=device, **settings)
        daemons.append(daemon)
        daemon.start(extra=extra)
        return daemon

    yield make
    for daemon in daemons:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.kill()


def alive(daemon: DaemonProcess) -> bool:
    return daemon.process is not None and daemon.process.poll() is None


def pid_of(daemon: DaemonProcess) -> int:
    assert daemon.process is not None
    return daemon.process.pid


def numbers(*row: float, width: int = 4) -> bytes:
    """A request for a model that doubles: the numbers, and zeros."""
    data = [*row, *[0.0] * (width - len(row))]
    return json.dumps({"inputs": [{"name": "x", "shape": [1, width], "datatype": "FP32", "data": data}]}).encode()


def doubled(payload: bytes) -> list[float]:
    """The numbers in an answer."""
    found: list[float] = json.loads(payload)["outputs"][0]["data"]
    return found


def stats_from(broker: Broker, device: str = DEVICE) -> dict[str, Any]:
    """The next statistics that the daemon publishes; start it with a short `stats_interval_s`."""
    ear = Wire(broker.url, name="stats")
    ear.subscribe(f"edge/v1/{device}/stats")
    ear.inbox.clear()
    told: dict[str, Any] = json.loads(ear.next().payload)
    ear.transport.close()
    return told


def status_of(port: int, path: str) -> int | None:
    """What the daemon's `health` answers there; None while nothing listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code
    except OSError:
        return None
