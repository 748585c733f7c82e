"""Faults of the process and of its host: cases 65 to 68."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_sdk.mqtt.client import Client
from edge_sdk.mqtt.transports.base import Message, Properties
from tests.brokers import MOSQUITTO, Broker, eventually
from tests.daemon.test_requests import Wire
from tests.faults import kill, soak
from tests.faults.conftest import FULL_LENGTH, MODELS, POISON, OpenDaemon, OpenScene, alive, doubled, numbers, pid_of
from tests.faults.fleet import PATIENT, Load
from tests.faults.history import read
from tests.faults.proxy import Proxy
from tests.faults.scene import DEVICE, busy
from tests.faults.vitals import vitals

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


# The end of a process


def test_case_65_sigterm_under_load(open_scene: OpenScene) -> None:
    """What was accepted is finished, `offline` said, exit 0; what was not taken waits for the next daemon."""
    scene = open_scene(clients=PATIENT)
    for _ in range(3):
        scene.wait_for_answers()
        with scene.fault("stop"):
            code = scene.stop_daemon()
            scene.start_daemon()
        assert 0 == code
    scene.wait_for_answers()
    report = scene.finish()

    assert report.kept, report


@pytest.mark.parametrize("gone", ["half-open", "refusing"])
def test_case_65_sigterm_without_a_broker(
    mosquitto: Broker, open_daemon: OpenDaemon, misbehaving_engines: Callable[..., Path], gone: str
) -> None:
    """With answers on their way and nobody to take them, a stop ends within its limit, and ends well."""
    slow = misbehaving_engines({"do": "sleep", "seconds": 0.2}, max_batch=1)
    with Proxy(mosquitto.port) as proxy:
        daemon = open_daemon(
            f"mqtt://127.0.0.1:{proxy.port}", engines=slow, limits__drain_s="2", serving__inline_ms="0"
        )
        with Client(mosquitto.url, device=DEVICE) as client:
            daemon.wait_for_state(client, "odd", "READY")
            futures = [client.submit("odd", numbers(float(number))) for number in range(30)]
            futures[0].result()
            if gone == "half-open":
                proxy.half_open()
            else:
                proxy.refuse(True)
                proxy.reset()
            begun = time.monotonic()
            code = daemon.stop(limit_s=20)
            took_s = time.monotonic() - begun
            for future in futures:
                future.cancel()

    assert 0 == code
    assert took_s < 2 + 5


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("daemon", "broker", "delivery"), [(12, 4, "at-least-once"), (12, 0, "at-least-once"), (8, 2, "durable")]
)
def test_case_65_killed_at_random_moments(tmp_path: Path, daemon: int, broker: int, delivery: str) -> None:
    """kill -9 of the daemon and of the broker under load. `python -m tests.faults.kill` does it a thousand times."""
    report = kill.run(tmp_path, daemon=daemon, broker=broker, seed=65, delivery=delivery)

    assert daemon == report.counts["x daemon kill"]
    assert report.kept, report


def test_case_65_the_command_leaves_its_files(tmp_path: Path) -> None:
    """History, report and log can be read after the run; the exit code is the checker's."""
    command = [sys.executable, "-m", "tests.faults.kill", "--daemon", "2", "--broker", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert 0 == done.returncode, done.stdout + done.stderr
    assert "I1 holds" in (tmp_path / "report.txt").read_text()
    assert len(list(read(tmp_path / "history.jsonl"))) > 10
    assert "Connected" in (tmp_path / "daemon.log").read_text()


# What the host does


def test_case_66_a_flood_of_messages_is_not_a_flood_of_lines(mosquitto: Broker, open_daemon: OpenDaemon) -> None:
    """Messages that may not be answered are logged once a minute, however many there are."""
    daemon = open_daemon(mosquitto.url)
    with Client(mosquitto.url, device=DEVICE) as client:
        daemon.wait_for_state(client, "scale", "READY")
        wire = Wire(mosquitto.url)
        told = Properties(response_topic="elsewhere/x", correlation_data=b"1")
        for _ in range(300):
            wire.send(Message(f"{MODELS}/scale/infer", numbers(1.0), properties=told))
        answer = wire.ask(numbers(2.0), topic=f"{MODELS}/scale/infer")
        wire.transport.close()

    assert 4.0 == doubled(answer.payload)[0]
    assert 1 == daemon.said().count("was not answered")


def test_case_66_failing_requests_do_not_flood_the_log(
    mosquitto: Broker, open_daemon: OpenDaemon, misbehaving_engines: Callable[..., Path]
) -> None:
    """A request that fails again and again is logged, and not each time."""
    failing = misbehaving_engines({"do": "raise", "when": POISON})
    daemon = open_daemon(mosquitto.url, engines=failing)
    with Client(mosquitto.url, device=DEVICE) as client:
        daemon.wait_for_state(client, "odd", "READY")
    wire = Wire(mosquitto.url)
    lines_before = len(daemon.said().splitlines())
    for _ in range(100):
        wire.ask(numbers(POISON), topic=f"{MODELS}/odd/infer")
    wire.transport.close()

    assert len(daemon.said().splitlines()) - lines_before < 20


@pytest.fixture(scope="session")
def moved_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that moves the wall clock of the process that it is loaded into."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here: the clock of one process cannot be moved")
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


YEAR_S = 365 * 24 * 3600


@pytest.mark.parametrize("begins_at", [0, "1970"], ids=["as it is", "1970"])
def test_case_67_the_clock_jumps(
    mosquitto: Broker, open_daemon: OpenDaemon, moved_clock: Path, tmp_path: Path, begins_at: int | str
) -> None:
    """An hour back, ten years ahead, from 1970 to now: deadlines are not affected, and nobody is answered 408."""
    offset = tmp_path / "offset"
    first = -int(time.time()) + 3600 if begins_at == "1970" else 0
    offset.write_text(f"{first}\n")
    environment = {"LD_PRELOAD": str(moved_clock), "CLOCK_OFFSET_FILE": str(offset)}
    daemon = open_daemon(mosquitto.url, extra=environment, broker__keepalive_s="2")
    with Client(mosquitto.url, device=DEVICE, timeout_s=10) as client:
        daemon.wait_for_state(client, "scale", "READY")
        answers = []
        for jump in (-3600, 10 * YEAR_S, 0):
            offset.write_text(f"{jump}\n")
            daemon.hang_up()  # it logs that, with the date that it believes in
            answers += [client.infer("scale", numbers(float(number)), timeout_s=5) for number in range(20)]
        reconnects = client.statistics.reconnects
    years = {line[:4] for line in daemon.said().splitlines() if line[:4].isdigit()}

    assert 60 == len(answers)
    assert str(time.localtime().tm_year + 10) in years
    assert begins_at == 0 or "1970" in years
    assert 1 == daemon.said().count("Connected")
    assert 0 == reconnects


def test_case_67_suspended_and_resumed(open_scene: OpenScene) -> None:
    """A process that slept through its keepalive finds its connection gone, makes a new one, and nothing is lost."""
    scene = open_scene(clients=PATIENT, broker__keepalive_s="2", promises={"recovery_s": 6.0})
    scene.wait_for_answers()
    with scene.fault("suspended"):
        assert scene.daemon.process is not None
        scene.daemon.process.send_signal(signal.SIGSTOP)
        busy(5.0)
        scene.daemon.process.send_signal(signal.SIGCONT)
    scene.wait_for_answers()
    report = scene.finish()

    assert report.kept, report


def test_case_68_no_descriptors_left(mosquitto: Broker, open_daemon: OpenDaemon) -> None:
    """A daemon that may open nothing more stays, says so, and connects as soon as it may again."""
    with Proxy(mosquitto.port) as proxy, Client(mosquitto.url, device=DEVICE, timeout_s=30) as client:
        daemon = open_daemon(f"mqtt://127.0.0.1:{proxy.port}")
        daemon.wait_for_state(client, "scale", "READY")
        pid = pid_of(daemon)
        former = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, former[1]))
        proxy.reset()
        eventually(lambda: "Too many open files" in daemon.said(), "it says what is missing")
        during = alive(daemon)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, former)
        answer = client.infer("scale", numbers(2.0))
        held = vitals(pid)

    assert during
    assert 4.0 == doubled(answer.raw)[0]
    assert held is not None


@pytest.mark.timeout(900)
def test_case_68_soak(tmp_path: Path) -> None:
    """A short chapter of `python -m tests.faults.soak`: random faults from a seed, every invariant kept."""
    report = soak.chapter(tmp_path, seed=68, number=0, seconds=soak.CHAPTER_S if FULL_LENGTH else 10.0)

    assert report.kept, report


def test_case_68_many_requests_leave_nothing_behind(open_scene: OpenScene) -> None:
    """Under load as fast as the clients can, memory, threads and descriptors stay what they were after a second."""
    scene = open_scene(load=Load(DEVICE, in_flight=32, pause_s=0.0), promises={"rss_growth": 0.05})
    scene.wait_for_answers(300)
    before = vitals(scene.pid)
    scene.wait_for_answers(20_000 if FULL_LENGTH else 2_000, deadline_s=60)
    after = vitals(scene.pid)
    report = scene.finish()

    assert before is not None
    assert after is not None
    assert after.rss_bytes < before.rss_bytes * 1.1
    assert (before.threads, before.fds) == (after.threads, after.fds)
    assert report.kept, report
