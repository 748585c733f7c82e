"""A million requests to one daemon, and what it holds meanwhile: memory, threads and descriptors must not grow.

    python -m tests.faults.million --requests 1000000 --output /tmp/million.json

A real daemon and a real mosquitto; a client of edge-sdk keeps so many requests on their way and checks each answer. The
first ones warm up: queues, answer cache and arenas reach their bounds. From then on the resident size is read every
thousand requests. The exit code is 0 if every answer was right, the resident size never grew by more than `--drift`
percent of what it was after the warm-up, and the numbers of threads and descriptors at the end are those after the
warm-up. The figures are written to `--output`, as JSON: the summary, and every reading.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.mqtt.client import Answer, Client
from tests.brokers import running_mosquitto
from tests.daemon.processes import DEVICE, running_daemon
from tests.faults.vitals import Vitals, vitals
from tests.packages import make_package, scaling

READ_EVERY = 1_000
WARM_UP = 20_000
"""The answer cache is full after some four thousand answers, and glibc's heaps have seen every size by then."""
_CALM = 5
"""Readings whose median is what the daemon holds after the warm-up; one alone may have met a moment."""


@dataclass(frozen=True)
class Reading:
    requests: int
    seconds: float
    rss_bytes: int
    threads: int
    fds: int


@dataclass(frozen=True)
class Verdict:
    """What came of it. `drift_percent`: by how much the largest reading after the warm-up is above the first ones."""

    requests: int
    wrong: int
    seconds: float
    warm_bytes: int
    last_bytes: int
    largest_bytes: int
    drift_percent: float
    threads: tuple[int, int]
    """After the warm-up and at the end."""
    fds: tuple[int, int]
    kept: bool

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests in {self.seconds:.0f} s, {self.wrong} wrong answers; resident "
            f"{self.warm_bytes / 1e6:.1f} MB after the warm-up, {self.largest_bytes / 1e6:.1f} at most, "
            f"{self.last_bytes / 1e6:.1f} at the end ({self.drift_percent:+.2f} % at most); "
            f"threads {self.threads[0]} -> {self.threads[1]}, descriptors {self.fds[0]} -> {self.fds[1]}: "
            f"{'kept' if self.kept else 'NOT KEPT'}"
        )


def judged(readings: Sequence[Reading], *, warm_up: int, wrong: int, drift_percent: float) -> Verdict:
    """The verdict over readings of one daemon. ValueError unless there are enough after the warm-up."""
    warm = [reading for reading in readings if reading.requests >= warm_up]
    if len(warm) < 2 * _CALM:
        raise ValueError(f"{len(warm)} readings after {warm_up:,} requests are too few; ask for more requests")
    first = int(statistics.median([reading.rss_bytes for reading in warm[:_CALM]]))
    last = int(statistics.median([reading.rss_bytes for reading in warm[-_CALM:]]))
    largest = max(reading.rss_bytes for reading in warm)
    drift = (largest - first) / first * 100
    threads = (warm[0].threads, warm[-1].threads)
    fds = (warm[0].fds, warm[-1].fds)
    kept = not wrong and drift <= drift_percent and threads[0] == threads[1] and fds[0] == fds[1]
    return Verdict(
        warm[-1].requests, wrong, warm[-1].seconds, first, last, largest, round(drift, 3), threads, fds, kept
    )  # fmt: skip


class Load:
    """One client that keeps `in_flight` requests on their way, and checks what comes."""

    def __init__(self, client: Client, in_flight: int) -> None:
        self._client = client
        self._free = threading.Semaphore(in_flight)
        self.wrong = 0
        self.done = 0

    def ask(self, number: int) -> None:
        """One request more, as soon as there is room for it."""
        self._free.acquire()
        row = np.full((1, 4), number % 1_000_003, np.float32)
        self._client.submit("double", {"x": row}).add_done_callback(lambda done: self._check(done, row))

    def settle(self, requests: int, deadline_s: float = 60.0) -> None:
        """Until so many were answered, right or wrong."""
        give_up_at = time.monotonic() + deadline_s
        while self.done < requests and time.monotonic() < give_up_at:
            time.sleep(0.01)

    def _check(self, done: Future[Answer], row: Any) -> None:
        try:
            right = done.exception() is None and np.array_equal(done.result().outputs["y"], 2 * row)
            self.wrong += not right
        finally:
            self.done += 1
            self._free.release()


def run(requests: int, *, in_flight: int, folder: Path, drift_percent: float, **settings: str) -> dict[str, Any]:
    """The summary and the readings, JSON-ready."""
    make_package(folder / "engines" / "double", scaling(2.0))
    warm_up = min(WARM_UP, requests // 2)
    readings: list[Reading] = []
    with (
        running_mosquitto(folder, autosave_on_changes="false") as broker,
        running_daemon(folder / "engines", broker.url, folder, ready=["double"], **settings) as daemon,
        Client(broker.url, device=DEVICE, timeout_s=120) as client,
    ):
        assert daemon.process is not None
        load = Load(client, in_flight)
        began = time.monotonic()
        for number in range(1, requests + 1):
            load.ask(number)
            if number % READ_EVERY == 0:
                found = vitals(daemon.process.pid)
                assert found is not None, daemon.said()[-2000:]
                readings.append(_reading(number, time.monotonic() - began, found))
        load.settle(requests)
        wrong = load.wrong + requests - load.done
    verdict = judged(readings, warm_up=warm_up, wrong=wrong, drift_percent=drift_percent)
    return {
        "summary": asdict(verdict),
        "text": str(verdict),
        "settings": settings,
        "in_flight": in_flight,
        "readings": [asdict(reading) for reading in readings],
    }


def _reading(number: int, seconds: float, found: Vitals) -> Reading:
    return Reading(number, round(seconds, 2), found.rss_bytes, found.threads, found.fds)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.million", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--drift", type=float, default=2.0, help="percent that the resident size may grow")
    parser.add_argument("--delivery", default="at-least-once", choices=["at-least-once", "durable"])
    parser.add_argument("--output", type=Path, default=None, help="where the figures go; by default a new folder")
    chosen = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="edge-sdk-million-"))
    output = chosen.output or folder / "million.json"
    found = run(
        chosen.requests,
        in_flight=chosen.in_flight,
        folder=folder,
        drift_percent=chosen.drift,
        delivery=chosen.delivery,
        state=str(folder),
    )
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{found['text']}\n{output}", flush=True)
    return 0 if found["summary"]["kept"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
