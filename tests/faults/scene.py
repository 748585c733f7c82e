"""A broker, a daemon behind a proxy, clients that ask, and the history of what happens to them.

    with Scene(tmp_path, engines) as scene:
        with scene.fault("broker restart"):
            scene.broker.stop()
            scene.broker.start()
        report = scene.finish()

    assert report.kept, report

Clients are connected to the broker itself, the daemon through `proxy`. `finish` lets everybody have their answer, stops
the daemon as systemd would, and checks the history.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.brokers import MOSQUITTO, Broker, eventually, running_mosquitto
from tests.daemon.processes import DaemonProcess
from tests.faults.checker import Report, check
from tests.faults.fleet import FACTOR, KINDS, Bystander, Fleet, Load
from tests.faults.history import Answered, Fault, History, Life, Said, Sampled
from tests.faults.proxy import Proxy
from tests.faults.vitals import disk_bytes, vitals
from tests.packages import make_package, misbehaving, scaling

DEVICE = "under-fire"
SAMPLE_S = 0.25
STOP_LIMIT_S = 20.0
KILLED = -9

_DEFECT = re.compile(r"Traceback|defect of edge-sdk|^\w*(Error|Exception)\b|Fatal Python error")


def make_engines(folder: Path, *, slow_s: float = 0.0) -> Path:
    """`scale` doubles four numbers; `wide` doubles many, so that requests and answers are long.

    With `slow_s` each batch of `scale` takes that long.
    """
    if slow_s:
        slow = misbehaving([{"do": "sleep", "seconds": slow_s}])
        make_package(folder / "scale", slow, name="scale", backend="reference")
    else:
        make_package(folder / "scale", scaling(FACTOR), name="scale")
    make_package(folder / "wide", scaling(FACTOR, width=4_000), name="wide")
    return folder


class Scene:
    """One run of the harness; a context manager. `settings` are the daemon's."""

    def __init__(
        self,
        folder: Path,
        engines: Path,
        *,
        clients: Sequence[str] = KINDS,
        load: Load | None = None,
        broker_settings: dict[str, Any] | None = None,
        promises: dict[str, Any] | None = None,
        supervised: bool = False,
        program: str = "edge_sdk",
        **settings: str,
    ) -> None:
        """`supervised`: a daemon that ends by itself is started again at once, as systemd does it. `program` is the
        module whose `serve` is run."""
        self.folder = folder
        self.engines = engines
        self.load = load or Load(DEVICE)
        self._clients = clients
        self._broker_settings = {"autosave_on_changes": "true", **(broker_settings or {})}
        self._promises = promises or {}
        self._supervised = supervised
        self._program = program
        self._settings = settings
        self._stack = contextlib.ExitStack()
        self._closing = threading.Event()
        self._wanted = False
        """Whether the daemon should be running now."""
        self._life = threading.RLock()
        self._counted = self._good = 0
        self.crashes = 0

    def __enter__(self) -> Scene:
        assert MOSQUITTO is not None
        with contextlib.ExitStack() as stack:
            home = self.folder / "broker"
            home.mkdir(parents=True)
            self.history = stack.enter_context(History(self.folder / "history.jsonl", **self._promises))
            self.broker: Broker = stack.enter_context(running_mosquitto(home, **self._broker_settings))
            self.proxy = stack.enter_context(Proxy(self.broker.port))
            self.daemon = DaemonProcess(
                self.engines,
                f"mqtt://127.0.0.1:{self.proxy.port}",
                self.folder / "daemon.log",
                device=self.load.device,
                program=self._program,
                **self._settings,
            )
            stack.callback(self._end_daemon)
            self.bystander = Bystander(self.broker.port, self.load.device, self.history)
            stack.callback(self.bystander.close)
            self.start_daemon()
            eventually(self._is_online, f"the daemon is online; {self.daemon.log}")
            self.fleet = Fleet(self.broker.port, self.history, self.load, self._clients)
            stack.callback(self.fleet.close)
            stack.callback(self.fleet.stop)
            watching = threading.Thread(target=self._watch, name="scene", daemon=True)
            watching.start()
            stack.callback(watching.join)
            stack.callback(self._closing.set)
            self.fleet.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # What is done to it

    @contextlib.contextmanager
    def fault(self, name: str) -> Iterator[None]:
        """What happens inside is the fault `name`; it is over when the block is."""
        self.history.note(Fault, name=name, phase="begins")
        try:
            yield
        finally:
            self.history.note(Fault, name=name, phase="ends")

    def start_daemon(self) -> None:
        with self._life:
            self._wanted = True
            self.daemon.start()
            self.history.note(Life, pid=self.pid, what="started")

    def kill_daemon(self) -> None:
        with self._life:
            self._wanted = False
            pid = self.pid
            self.daemon.kill()
            self.history.note(Life, pid=pid, what="ended", code=self.code, expected=(KILLED,))

    def stop_daemon(self, limit_s: float = STOP_LIMIT_S) -> int:
        """SIGTERM; its exit code, which should be 0."""
        with self._life:
            self._wanted = False
            pid = self.pid
            code = self.daemon.stop(limit_s)
            self.history.note(Life, pid=pid, what="ended", code=code, expected=(0,))
            return code

    @property
    def pid(self) -> int:
        assert self.daemon.process is not None
        return self.daemon.process.pid

    @property
    def code(self) -> int | None:
        return None if self.daemon.process is None else self.daemon.process.returncode

    def answers(self) -> int:
        """How many good answers have come so far."""
        events = self.history.events
        while self._counted < len(events):
            event = events[self._counted]
            self._good += isinstance(event, Answered) and event.status == 200
            self._counted += 1
        return self._good

    def wait_for_answers(self, more: int = 40, deadline_s: float = 20.0) -> None:
        """Until so many more good answers have come: the load goes on."""
        wanted = self.answers() + more
        eventually(lambda: self.answers() >= wanted, f"{more} more answers; {self.daemon.said()[-2000:]}", deadline_s)

    def finish(self) -> Report:
        """Everybody has their answer, the daemon is stopped, and the history is judged."""
        self.fleet.stop()
        self.fleet.drain()
        if self._wanted:
            self.bystander.sees("online")
            self.stop_daemon()
            self.bystander.sees("offline")
        self._look_at_log()
        report = check(self.history.events)
        (self.folder / "report.txt").write_text(f"{report}\n")
        return report

    def _is_online(self) -> bool:
        assert self.daemon.process is not None
        assert self.daemon.process.poll() is None, self.daemon.said()
        return self.bystander.last == "online"

    def _end_daemon(self) -> None:
        with self._life:
            self._wanted = False
            if self.daemon.process is not None and self.daemon.process.poll() is None:
                self.daemon.kill()

    def _watch(self) -> None:
        """Sample what the daemon holds, and notice when it ends unasked."""
        while not self._closing.wait(SAMPLE_S):
            with self._life:
                process = self.daemon.process
                if process is None or not self._wanted:
                    continue
                held = vitals(process.pid)
                if held is not None and process.poll() is None:
                    self.history.note(
                        Sampled,
                        pid=process.pid,
                        rss_bytes=held.rss_bytes,
                        threads=held.threads,
                        fds=held.fds,
                        disk_bytes=disk_bytes(self.engines),
                    )
                    continue
                self.crashes += 1
                expected = (process.returncode,) if self._supervised else ()
                self.history.note(Life, pid=process.pid, what="ended", code=process.returncode, expected=expected)
                self._wanted = False
                if self._supervised:
                    self.start_daemon()

    def _look_at_log(self) -> None:
        if self._supervised:
            return  # it crashes on order, and says so
        for line in self.daemon.said().splitlines():
            if _DEFECT.search(line):
                self.history.note(Said, line=line[:300])


def busy(seconds: float) -> None:
    """Let the load go on for a while: the length of a fault, not a state that is waited for."""
    time.sleep(seconds)
