"""Nothing accepted is lost: the daemon or the broker is killed while requests run, and every caller has its answer."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.errors import DeadlineExceeded, NoAnswer
from edge_sdk.local import in_process
from edge_sdk.mqtt.client import Client
from edge_sdk.package import EnginePackage
from edge_sdk.tasks.base import Payload
from edge_sdk.tasks.oip import decode_response
from tests.brokers import MOSQUITTO, Broker, running_mosquitto
from tests.daemon.processes import DEVICE, running_daemon
from tests.packages import make_package, misbehaving, scaling

REQUESTS = 1_000


@pytest.fixture(scope="module")
def expected(digits: EnginePackage, pictures: list[Path]) -> list[list[object]]:
    """What the package answers to each picture, in this process."""
    with in_process(digits) as submit:
        bodies = [submit(Payload(picture.read_bytes())).result() for picture in pictures]
    return [decode_response(body.data).extra["predictions"] for body in bodies]


@pytest.fixture
def durable_broker(tmp_path: Path) -> Iterator[Broker]:
    """mosquitto that saves its sessions once a second; what a kill takes of that, the client sends again."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    with running_mosquitto(tmp_path) as started:
        yield started


def ask_while(
    disturb: Callable[[], None], client: Client, pictures: list[Path], expected: list[list[object]], pace_s: float
) -> None:
    """Ask REQUESTS times, `disturb` again and again meanwhile; every answer comes once and is the expected one."""
    done = threading.Event()

    def keep_disturbing() -> None:
        while not done.is_set():
            disturb()

    contents = [picture.read_bytes() for picture in pictures]
    disturbing = threading.Thread(target=keep_disturbing)
    disturbing.start()
    try:
        futures = []
        for number in range(REQUESTS):
            futures.append(client.submit("digits", contents[number % len(contents)]))
            time.sleep(pace_s)  # spread over several disturbances
        answers = [future.result() for future in futures]
    finally:
        done.set()
        disturbing.join()

    assert REQUESTS == len(answers)
    for number, answer in enumerate(answers):
        wanted = expected[number % len(expected)]
        assert wanted[0]["index"] == answer.predictions[0].index  # type: ignore[index]


@pytest.mark.timeout(240)
def test_killing_the_daemon_loses_no_request(
    broker: Broker, digits: EnginePackage, pictures: list[Path], expected: list[list[object]], tmp_path: Path
) -> None:
    """kill -9 at random moments while 1,000 requests run: all answered, all correct, each once."""
    draw = random.Random(7)
    kills = 0
    with (
        running_daemon(digits.path.parent, broker.url, tmp_path, device="victim") as daemon,
        Client(broker.url, device="victim", timeout_s=90) as client,
    ):
        daemon.wait_for_state(client, "digits", "READY")

        def kill_and_start() -> None:
            nonlocal kills
            time.sleep(draw.uniform(0.2, 1.5))  # a random moment, not a state that is waited for
            daemon.kill()
            daemon.start()
            kills += 1

        ask_while(kill_and_start, client, pictures, expected, pace_s=0.01)

    assert kills >= 3


@pytest.mark.timeout(240)
def test_restarting_the_broker_loses_no_request(
    durable_broker: Broker, digits: EnginePackage, pictures: list[Path], expected: list[list[object]], tmp_path: Path
) -> None:
    """The broker is stopped and killed in turn while 1,000 requests run: all answered, all correct, each once."""
    draw = random.Random(8)
    restarts = 0
    with (
        running_daemon(digits.path.parent, durable_broker.url, tmp_path, ready=["digits"]),
        # A broker that goes every two seconds keeps a device away for longer than the ten that a client waits.
        Client(durable_broker.url, device=DEVICE, timeout_s=90, wait_for_device_s=90) as client,
    ):

        def restart() -> None:
            nonlocal restarts
            time.sleep(draw.uniform(1.0, 3.0))
            (durable_broker.kill if restarts % 2 else durable_broker.stop)()
            durable_broker.start()
            restarts += 1

        ask_while(restart, client, pictures, expected, pace_s=0.01)

    assert restarts >= 2


def test_a_request_that_hangs_holds_nobody_back(broker: Broker, tmp_path: Path) -> None:
    """Acknowledgements go out in order; one request that never ends is answered 408 at its deadline, and the requests
    behind it, more than a Receive Maximum of them, are all answered."""
    orders = [{"do": "sleep", "seconds": 600.0, "when": 666.0}]
    make_package(tmp_path / "engines" / "hanging", misbehaving(orders), name="hanging", backend="reference")
    make_package(tmp_path / "engines" / "quick", scaling(2.0), name="quick")
    row = np.ones((1, 4), np.float32)
    with (
        running_daemon(
            tmp_path / "engines",
            broker.url,
            tmp_path,
            ready=["hanging", "quick"],
            device="patient",
            broker__receive_maximum="8",
            serving__inline_ms="0",  # a model that hangs on the network thread is for the watchdog to end
        ),
        Client(broker.url, device="patient", timeout_s=30) as client,
    ):
        hung = client.submit("hanging", {"x": row * 666}, timeout_s=2)
        quick = [client.submit("quick", {"x": row}) for _ in range(100)]
        answers = [future.result() for future in quick]
        with pytest.raises((DeadlineExceeded, NoAnswer)):
            hung.result()

    assert 100 == len(answers)


@pytest.mark.parametrize("inline_ms", ["10", "0"], ids=["network thread", "own thread"])
def test_a_lost_device_loses_no_request(broker: Broker, tmp_path: Path, inline_ms: str) -> None:
    """The daemon ends at once, with an exit code that has systemd start it again, and nobody gets a wrong answer: what
    was being computed, and all behind it, is answered after the restart."""
    orders = [{"do": "lose-device", "when": 666.0, "once": str(tmp_path / "lost")}]
    make_package(tmp_path / "engines" / "m", misbehaving(orders), name="m", backend="reference", max_batch=4)
    row = np.ones((1, 4), np.float32)
    with (
        running_daemon(
            tmp_path / "engines", broker.url, tmp_path, ready=["m"], device="losing", serving__inline_ms=inline_ms
        ) as daemon,
        Client(broker.url, device="losing", timeout_s=60) as client,
    ):
        values = [float(n) for n in range(20)] + [666.0] + [float(n) for n in range(20, 60)]
        futures = [client.submit("m", {"x": row * value}) for value in values]
        assert daemon.process is not None
        code = daemon.process.wait(20)
        daemon.start()
        answers = [float(future.result().outputs["y"][0, 0]) for future in futures]

    assert 4 == code
    assert [2 * value for value in values] == answers
    assert 1 == daemon.said().count("told to lose its device")
    assert "Traceback" not in daemon.said()
