"""Telling systemd how the daemon is: ready, alive, stopping (sd_notify(3), over its datagram socket).

Without a NOTIFY_SOCKET, outside systemd, every call does nothing.
"""

from __future__ import annotations

import os
import socket


class Notifier:
    """The service manager's ear. Messages are small datagrams that never block."""

    def __init__(self, address: str | None = None) -> None:
        """`address` is NOTIFY_SOCKET's value; a leading `@` is Linux's abstract namespace."""
        address = os.environ.get("NOTIFY_SOCKET") if address is None else address
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={text}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str) -> None:
        if self._socket is None or self._address is None:
            return
        try:
            self._socket.sendto(message.encode(), socket.MSG_DONTWAIT, self._address)
        except OSError:
            pass  # a service manager that cannot hear must not stop the service


def watchdog_interval_s() -> float | None:
    """How often to feed the watchdog: half of what systemd grants (WATCHDOG_USEC); None if it does not watch."""
    micros = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not micros.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(micros) / 1e6 / 2
