"""An engine in a process of its own, under a real daemon and a real broker."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np

from edge_sdk.mqtt.client import Client
from edge_sdk.spec import Serving
from tests.brokers import Broker, eventually
from tests.daemon.processes import running_daemon
from tests.packages import make_package, scaling


def children(parent: int) -> list[int]:
    """The processes of a daemon's isolated engines."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            ppid = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if ppid == parent and b"isolated_child" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def test_a_crash_of_the_runtime_is_no_crash_of_the_daemon(broker: Broker, tmp_path: Path) -> None:
    """SIGKILL for the engine's process, again and again under load: every request is answered right, by the same
    daemon, which takes the last of them with it when it stops."""
    make_package(tmp_path / "engines" / "double", scaling(), max_batch=4, serving=Serving(isolation="process"))
    with (
        running_daemon(tmp_path / "engines", broker.url, tmp_path, ready=["double"], device="isolating") as daemon,
        Client(broker.url, device="isolating", timeout_s=60) as client,
    ):
        assert daemon.process is not None
        pid = daemon.process.pid
        killed: set[int] = set()
        futures = []
        for number in range(300):
            futures.append(client.submit("double", {"x": np.full((1, 4), number, np.float32)}))
            if number % 100 == 50:
                child = min(eventually(lambda: set(children(pid)) - killed, "another child"))
                os.kill(child, signal.SIGKILL)
                killed.add(child)
        answers = [float(future.result().outputs["y"][0, 0]) for future in futures]
        code = daemon.stop()
        left = children(pid)

    assert [2.0 * number for number in range(300)] == answers
    assert (0, [], 3) == (code, left, len(killed))
