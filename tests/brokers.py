"""Real brokers for tests: mosquitto with any setting on a free loopback port, ready when the fixture returns.

with running_mosquitto(tmp_path, max_packet_size=200_000) as broker:
    broker.kill(); broker.start()         # the same port and the same persistence directory
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MOSQUITTO = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")

NO_WEBSOCKETS = (
    "mosquitto is not installed"
    if MOSQUITTO is None
    else "this mosquitto was built without WebSockets"
    if b"Websockets support not available" in Path(MOSQUITTO).read_bytes()
    else ""
)
"""Why there is no broker for WebSockets; empty where there is one."""

DEADLINE_S = 15.0
"""How long a test polls for a state before it fails; never how long it waits."""


def eventually(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """The first true value of `condition()`, polled until the deadline."""
    give_up_at = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < give_up_at, f"not in {deadline_s} s: {what}"
        time.sleep(0.005)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class Broker:
    """A broker subprocess that can be killed and started again on its port."""

    def __init__(self, command: Callable[[int], list[str]], log: Path) -> None:
        self.command = command
        self.log = log
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.websockets_port: int | None = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it accepts connections; another port if somebody took this one meanwhile."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command(self.port), stdout=log, stderr=log)
        eventually(lambda: self._answers(), f"broker ready; its log: {self.log}")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        return listens(self.port) and (self.websockets_port is None or listens(self.websockets_port))

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """SIGTERM, and gone: mosquitto saves its sessions."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()


@contextlib.contextmanager
def running_mosquitto(directory: Path, **settings: Any) -> Iterator[Broker]:
    """mosquitto for one test. A setting of None is left out; `lines` are added as they are.

    `websockets` adds a listener for them, at `websockets_port`.
    """
    assert MOSQUITTO is not None
    lines = list(settings.pop("lines", ()))
    websockets_port = free_port() if settings.pop("websockets", False) else None
    if websockets_port is not None:
        lines += [f"listener {websockets_port} 127.0.0.1", "protocol websockets"]
    values = {
        "allow_anonymous": "true",
        "persistence": "true",
        "persistence_location": f"{directory}/",
        "autosave_interval": 1,
        "autosave_on_changes": "false",
        "max_inflight_messages": 0,
        "max_queued_messages": 10_000,
        "set_tcp_nodelay": "true",
        "user": "root" if os.geteuid() == 0 else None,
        **settings,
    }
    configuration = directory / "mosquitto.conf"

    def command(port: int) -> list[str]:
        text = [f"{key} {value}" for key, value in values.items() if value is not None]
        configuration.write_text("\n".join([f"listener {port} 127.0.0.1", *text, *lines, ""]))
        return [str(MOSQUITTO), "-c", str(configuration)]

    broker = Broker(command, directory / "mosquitto.log")
    broker.websockets_port = websockets_port
    broker.start()
    try:
        yield broker
    finally:
        broker.kill()


@contextlib.contextmanager
def running_amqtt(directory: Path) -> Iterator[Broker]:
    """The embedded fallback: MQTT 3.1.1 only, nothing kept."""
    broker = Broker(
        lambda port: [sys.executable, "-m", "edge_sdk.mqtt.broker", "--port", str(port)], directory / "amqtt.log"
    )
    broker.start()
    try:
        yield broker
    finally:
        broker.kill()
