"""The real daemon as a subprocess, for tests that ask it over a real broker."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edge_sdk.errors import NoAnswer
from edge_sdk.mqtt.client import Client
from tests.brokers import eventually

DEVICE = "under-test"


class DaemonProcess:
    """`edge-sdk serve` with settings as environment variables; what it says is kept in `log`."""

    def __init__(
        self, engines: Path, broker_url: str, log: Path, *, program: str = "edge_sdk", **settings: str
    ) -> None:
        """`program` is the module whose `serve` is run."""
        self.engines = engines
        self.program = program
        self.broker_url = broker_url
        self.log = log
        self.environment = {
            "EDGE_SDK_ENGINES": str(engines),
            "EDGE_SDK_DEVICE": DEVICE,
            "EDGE_SDK_BROKER__URL": broker_url,
            **{f"EDGE_SDK_{key.upper()}": value for key, value in settings.items()},
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(
        self, *, ready: Sequence[str] = (), extra: dict[str, str] | None = None, arguments: Sequence[str] = ()
    ) -> None:
        """Start it; and, if models are named, wait until their retained state is READY."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.program, "serve", *arguments],
                env={**os.environ, **self.environment, **(extra or {})},
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        if ready:
            with Client(self.broker_url, device=self.environment["EDGE_SDK_DEVICE"]) as client:
                for model in ready:
                    self.wait_for_state(client, model, "READY")

    def wait_for_state(self, client: Client, model: str, state: str) -> dict[str, Any]:
        """The model's metadata once it is in `state`."""

        def look() -> dict[str, Any] | None:
            assert self.process is None or self.process.poll() is None, self.said()
            with contextlib.suppress(NoAnswer):
                metadata = client.metadata(model)
                return metadata if metadata["state"] == state else None
            return None

        found: dict[str, Any] = eventually(look, f"{model} {state}")
        return found

    def kill(self) -> None:
        """SIGKILL, and gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, limit_s: float = 20.0) -> int:
        """SIGTERM; its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(limit_s)

    def hang_up(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    def resident_bytes(self) -> int:
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def said(self) -> str:
        return self.log.read_text(errors="replace")


@contextlib.contextmanager
def running_daemon(
    engines: Path,
    broker_url: str,
    folder: Path,
    *,
    ready: Sequence[str] = (),
    program: str = "edge_sdk",
    **settings: str,
) -> Iterator[DaemonProcess]:
    """A daemon for one test, with its models READY."""
    daemon = DaemonProcess(engines, broker_url, folder / "daemon.log", program=program, **settings)
    daemon.start(ready=ready)
    try:
        yield daemon
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.kill()


def error_of(payload: bytes) -> tuple[int, str]:
    """Status and code of an error body."""
    body = json.loads(payload)
    return body["status"], body["code"]
