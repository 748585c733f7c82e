"""What systemd hears of a daemon, and grants it: the other end of sd_notify(3)."""

from __future__ import annotations

import socket
from pathlib import Path
from types import TracebackType

from tests.brokers import eventually


class Ear:
    """A notify socket in `folder`; a context manager. `environment` is what the daemon has to be started with."""

    def __init__(self, folder: Path, *, watchdog_s: float | None = None) -> None:
        address = folder / "notify"
        self.environment = {"NOTIFY_SOCKET": str(address)}
        if watchdog_s is not None:
            self.environment["WATCHDOG_USEC"] = str(round(watchdog_s * 1e6))
        self.lines: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(address))
        self._socket.setblocking(False)

    def listen(self) -> list[str]:
        """Every line so far, oldest first."""
        while True:
            try:
                self.lines += self._socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return self.lines

    @property
    def status(self) -> str:
        """What `systemctl status` shows now."""
        told = [line for line in self.listen() if line.startswith("STATUS=")]
        return told[-1].removeprefix("STATUS=") if told else ""

    @property
    def fed(self) -> int:
        """How often the watchdog has been fed."""
        return self.listen().count("WATCHDOG=1")

    def hears(self, text: str, deadline_s: float = 15.0) -> None:
        """Wait until a line holds `text`."""
        eventually(
            lambda: any(text in line for line in self.listen()), f"systemd hears {text!r}: {self.lines}", deadline_s
        )

    def __enter__(self) -> Ear:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
