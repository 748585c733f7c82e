"""Start, reload and stop: what the daemon says of itself, and that nothing accepted is lost on the way."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.errors import ModelNotFound, NoAnswer, Unavailable
from edge_sdk.mqtt.client import Answer, Client
from edge_sdk.package import EnginePackage
from tests.brokers import Broker, eventually
from tests.daemon.processes import DaemonProcess, running_daemon
from tests.faults.proxy import Proxy
from tests.packages import make_package
from tests.packages import scaling as scaling_model

ONES = np.ones((1, 4), np.float32)


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    folder = tmp_path / "engines"
    make_package(folder / "scale", scaling_model(2.0), name="scale")
    return folder


@pytest.fixture
def scaling(engines: Path, broker: Broker, tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(engines, broker.url, tmp_path, ready=["scale"], device="scaling") as daemon:
        yield daemon


def factor(answer: Answer) -> float:
    """What `scale` multiplied by."""
    return float(answer.outputs["y"].ravel()[0])


def test_ready_is_told_to_systemd_after_a_warm_up_and_the_watchdog_is_fed(
    engines: Path, broker: Broker, tmp_path: Path
) -> None:
    """READY=1 comes once a model is ready, WATCHDOG=1 at least twice in its time, STOPPING=1 at the end."""
    address = tmp_path / "notify"
    ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    ear.bind(str(address))
    ear.settimeout(15)
    said: list[str] = []
    daemon = DaemonProcess(engines, broker.url, tmp_path / "log", device="notifying")
    daemon.start(extra={"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "400000"})
    try:
        while sum(line == "WATCHDOG=1" for line in said) < 3 or "READY=1" not in said:
            said += ear.recv(4096).decode().splitlines()
        code = daemon.stop()
        while "STOPPING=1" not in said:
            said += ear.recv(4096).decode().splitlines()
    finally:
        daemon.kill()
        ear.close()

    assert code == 0
    assert "ready" in daemon.said()


def test_a_package_that_does_not_load_harms_no_other(engines: Path, broker: Broker, tmp_path: Path) -> None:
    """It is UNAVAILABLE with the reason, and requests for it are told so; the others serve."""
    make_package(engines / "broken", scaling_model(3.0), name="broken")
    (engines / "broken" / "graph.onnx").write_bytes(b"altered")
    with (
        running_daemon(engines, broker.url, tmp_path, ready=["scale"], device="mixed") as daemon,
        Client(broker.url, device="mixed", timeout_s=5) as client,
    ):
        metadata = daemon.wait_for_state(client, "broken", "UNAVAILABLE")
        answer = client.infer("scale", {"x": ONES})
        with pytest.raises(Unavailable):
            client.infer("broken", {"x": ONES}, timeout_s=1)

    assert "altered" in metadata["reason"]
    assert str(tmp_path) not in metadata["reason"]
    assert factor(answer) == 2.0


def test_reload_takes_new_changed_and_removed_packages_without_losing_a_request(
    engines: Path, scaling: DaemonProcess, broker: Broker
) -> None:
    """SIGHUP under load: every request is answered, by the old package or by the new one."""
    with Client(broker.url, device="scaling", timeout_s=20) as client:
        before = factor(client.infer("scale", {"x": ONES}))
        make_package(engines / "scale", scaling_model(5.0), name="scale")
        make_package(engines / "other", scaling_model(7.0), name="other")
        scaling.hang_up()
        asked: list[Future[Answer]] = []

        def swapped() -> bool:
            asked.append(client.submit("scale", {"x": ONES}))
            return factor(asked[-1].result()) == 5.0

        eventually(swapped, "the changed package serves")
        scaling.wait_for_state(client, "other", "READY")
        other = factor(client.infer("other", {"x": ONES}))
        shutil.rmtree(engines / "other")
        scaling.hang_up()

        def gone() -> bool:
            try:
                client.infer("other", {"x": ONES}, timeout_s=2)
            except ModelNotFound:
                return True
            except Unavailable:
                return False
            return False

        eventually(gone, "the removed package is gone")

    assert before == 2.0
    assert other == 7.0
    assert {factor(future.result()) for future in asked} <= {2.0, 5.0}


def test_what_went_while_the_broker_was_away_is_not_retained_for_ever(
    engines: Path, broker: Broker, tmp_path: Path
) -> None:
    """A package that is taken away while there is no connection is not announced any more on the next one."""
    make_package(engines / "other", scaling_model(7.0), name="other")
    with Proxy(broker.port) as proxy, Client(broker.url, device="parted", timeout_s=20) as client:
        daemon = DaemonProcess(engines, f"mqtt://127.0.0.1:{proxy.port}", tmp_path / "log", device="parted")
        try:
            daemon.start(ready=["scale", "other"])
            proxy.refuse(True)
            proxy.reset()
            eventually(lambda: "trying again" in daemon.said(), "it lost its broker")
            shutil.rmtree(engines / "other")
            daemon.hang_up()
            eventually(lambda: "other 1 is gone from the folder" in daemon.said(), "it lost its package")
            proxy.refuse(False)

            def is_gone() -> bool:
                try:
                    client.metadata("other")
                except NoAnswer:
                    return True
                return False

            eventually(is_gone, "nothing is retained of it")
            left = client.metadata("scale")
        finally:
            daemon.kill()

    assert "READY" == left["state"]


def test_reload_with_broken_settings_keeps_the_former(
    engines: Path, broker: Broker, tmp_path: Path, scaling: DaemonProcess
) -> None:
    """A typing error in edge-sdk.toml is named in the log and changes nothing."""
    config = tmp_path / "edge-sdk.toml"
    config.write_text(f'device = "configured"\nengines = "{engines}"\n')
    daemon = DaemonProcess(engines, broker.url, tmp_path / "configured.log")
    del daemon.environment["EDGE_SDK_ENGINES"], daemon.environment["EDGE_SDK_DEVICE"]
    daemon.start(arguments=["--config", str(config)])
    try:
        with Client(broker.url, device="configured") as client:
            daemon.wait_for_state(client, "scale", "READY")
            config.write_text('devcie = "typo"\n')
            daemon.hang_up()
            eventually(lambda: "devcie" in daemon.said(), "the log names the key")
            answer = client.infer("scale", {"x": ONES})
    finally:
        daemon.kill()

    assert factor(answer) == 2.0


def test_stop_finishes_what_was_accepted_and_says_offline(
    digits: EnginePackage, broker: Broker, tmp_path: Path
) -> None:
    """SIGTERM under load: exit 0, availability `offline`; what was not taken waits for the next daemon."""
    picture = np.zeros((1, 1, 8, 8), np.float32)
    with (
        running_daemon(digits.path.parent, broker.url, tmp_path, ready=["digits"], device="stopping") as daemon,
        Client(broker.url, device="stopping", timeout_s=30) as client,
    ):
        futures = [client.submit("digits", {"image": picture}) for _ in range(300)]
        futures[0].result()
        code = daemon.stop()
        eventually(lambda: not client.devices()["stopping"], "offline is retained")
        daemon.start()
        answers = [future.result() for future in futures]

    assert code == 0
    assert len(answers) == 300


def test_stop_without_a_broker_ends_in_time(engines: Path, tmp_path: Path) -> None:
    """A daemon that never reached its broker stops as promptly as any other."""
    daemon = DaemonProcess(engines, "mqtt://127.0.0.1:9", tmp_path / "log")
    daemon.start()
    eventually(lambda: "trying again" in daemon.said(), "it says that it tries again")

    code = daemon.stop(limit_s=20)

    assert code == 0


def test_idle_memory_is_small(digits: EnginePackage, broker: Broker, tmp_path: Path) -> None:
    """With one small model the daemon takes at most 33 MB more than a bare process in which onnxruntime runs it."""
    bare = (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "session.run(None, {'image': numpy.zeros((1, 1, 8, 8), numpy.float32)})\n"
        "print(open('/proc/self/statm').read().split()[1])\n"
    )
    command = [sys.executable, "-c", bare, str(digits.path / "graph.onnx")]
    pages = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    with (
        running_daemon(digits.path.parent, broker.url, tmp_path, ready=["digits"], device="idle") as daemon,
        Client(broker.url, device="idle") as client,
    ):
        client.infer("digits", {"image": np.zeros((1, 1, 8, 8), np.float32)})
        resident = daemon.resident_bytes()

    assert resident - pages * os.sysconf("SC_PAGE_SIZE") <= 33e6
