"""What systemd hears, on a real datagram socket."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.notify import Notifier, watchdog_interval_s


@pytest.fixture(params=["path", "abstract"])
def ear(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket, and NOTIFY_SOCKET's value for it."""
    name = f"edge-sdk-{secrets.token_hex(8)}"
    address = f"@{name}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}" if request.param == "abstract" else address)
        listening.settimeout(5)
        yield listening, address


def test_every_message_arrives(ear: tuple[socket.socket, str]) -> None:
    """Ready, alive, status and stopping, as sd_notify(3) spells them, on a path and in the abstract namespace."""
    listening, address = ear
    notifier = Notifier(address)
    notifier.ready("1 of 1 models ready")
    notifier.alive()
    notifier.status("Not connected")
    notifier.stopping()
    expected = [b"READY=1\nSTATUS=1 of 1 models ready", b"WATCHDOG=1", b"STATUS=Not connected", b"STOPPING=1"]
    actual = [listening.recv(4096) for _ in expected]
    notifier.close()

    assert expected == actual


def test_nobody_listening_stops_nothing(tmp_path: Path) -> None:
    """Without a socket, with one that is gone, and with one that is full, every call returns at once."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        for address in ("", str(tmp_path / "gone"), str(tmp_path / "deaf")):
            notifier = Notifier(address)
            for _ in range(2000):
                notifier.alive()
            notifier.close()
            notifier.alive()


def test_the_environment_names_the_socket(ear: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd passes the address in NOTIFY_SOCKET."""
    listening, address = ear
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notifier = Notifier()
    notifier.alive()
    notifier.close()

    assert b"WATCHDOG=1" == listening.recv(100)


@pytest.mark.parametrize(
    ("micros", "pid", "expected"),
    [
        ("20000000", "", 10.0), ("20000000", "ours", 10.0), ("20000000", "1", None),
        ("", "", None), ("soon", "", None),
    ],
)  # fmt: skip
def test_the_watchdog_is_fed_twice_as_often_as_it_asks(
    monkeypatch: pytest.MonkeyPatch, micros: str, pid: str, expected: float | None
) -> None:
    """Half of WATCHDOG_USEC, if it is meant for this process."""
    monkeypatch.setenv("WATCHDOG_USEC", micros)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)

    assert expected == watchdog_interval_s()
