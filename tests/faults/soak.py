"""Hours of load with a random fault every few seconds, from a seed.

    python -m tests.faults.soak --hours 72 --seed 1 --output /tmp/soak

The time is divided into chapters of ten minutes: each has a daemon, a broker and a history of its own, is checked at
its end, and draws its faults from seed and chapter, so that one that failed can be run again alone (`--chapter 17`).
Only the histories of chapters that failed are kept. The exit code is 0 if every invariant held in every chapter.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.faults.checker import Report
from tests.faults.fleet import Load
from tests.faults.scene import DEVICE, Scene, busy, make_engines

CHAPTER_S = 600.0
KEEPALIVE_S = 5

Act = Callable[[Scene, random.Random], None]


def kill_daemon(scene: Scene, draw: random.Random) -> None:
    scene.kill_daemon()
    busy(draw.uniform(0.0, 1.0))
    scene.start_daemon()


def stop_daemon(scene: Scene, draw: random.Random) -> None:
    scene.stop_daemon()
    busy(draw.uniform(0.0, 1.0))
    scene.start_daemon()


def kill_broker(scene: Scene, draw: random.Random) -> None:
    scene.broker.kill()
    busy(draw.uniform(0.0, 3.0))
    scene.broker.start()


def restart_broker(scene: Scene, draw: random.Random) -> None:
    scene.broker.stop()
    busy(draw.uniform(0.0, 3.0))
    scene.broker.start()


def reset(scene: Scene, draw: random.Random) -> None:
    scene.proxy.reset()


def half_open(scene: Scene, draw: random.Random) -> None:
    taken = scene.proxy.accepted
    scene.proxy.half_open()
    give_up_at = time.monotonic() + 2 * KEEPALIVE_S + 1
    while scene.proxy.accepted == taken and time.monotonic() < give_up_at:
        busy(0.05)


def flap(scene: Scene, draw: random.Random) -> None:
    for _ in range(draw.randint(2, 10)):
        scene.proxy.refuse(True)
        scene.proxy.reset()
        busy(draw.uniform(0.05, 1.0))
        scene.proxy.heal()
        busy(draw.uniform(0.05, 1.0))


def slow_line(scene: Scene, draw: random.Random) -> None:
    for way in (scene.proxy.to_broker, scene.proxy.to_daemon):
        way.latency_s, way.stall_chance = draw.uniform(0.0, 0.1), draw.uniform(0.0, 0.3)
        way.bytes_per_second = draw.choice([None, 20_000, 100_000])
    busy(draw.uniform(1.0, 10.0))
    scene.proxy.heal()


def cut(scene: Scene, draw: random.Random) -> None:
    way = draw.choice([scene.proxy.to_broker, scene.proxy.to_daemon])
    way.cut_after = draw.randint(1, 5_000)
    busy(1.0)
    way.cut_after = None


def suspend(scene: Scene, draw: random.Random) -> None:
    with suppress(ProcessLookupError):
        assert scene.daemon.process is not None
        scene.daemon.process.send_signal(signal.SIGSTOP)
        busy(draw.uniform(0.5, 3 * KEEPALIVE_S))
        scene.daemon.process.send_signal(signal.SIGCONT)


def reload(scene: Scene, draw: random.Random) -> None:
    scene.daemon.hang_up()


FAULTS: tuple[Act, ...] = (
    kill_daemon, stop_daemon, kill_broker, restart_broker, reset, half_open, flap, slow_line, cut, suspend, reload,
)  # fmt: skip


def chapter(folder: Path, *, seed: int, number: int, seconds: float = CHAPTER_S) -> Report:
    """One chapter of the story; its files stay in `folder`."""
    draw = random.Random(f"{seed}/{number}")
    load = Load(DEVICE, timeout_s=120.0, pause_s=0.04)
    end = time.monotonic() + seconds
    with Scene(
        folder,
        make_engines(folder / "engines"),
        load=load,
        promises={"recovery_s": 8.0, "threads": 24},
        broker__keepalive_s=str(KEEPALIVE_S),
    ) as scene:
        while time.monotonic() < end:
            busy(draw.uniform(0.5, 10.0))
            act = draw.choice(FAULTS)
            with scene.fault(act.__name__):
                act(scene, draw)
        return scene.finish()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=72.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chapter", type=int, default=None, help="run only this one again")
    parser.add_argument("--output", type=Path, default=None, help="a folder for the histories of chapters that failed")
    chosen = parser.parse_args(arguments)
    output = chosen.output or Path(tempfile.mkdtemp(prefix="edge-sdk-soak-"))
    end = time.monotonic() + chosen.hours * 3600
    number, failed = chosen.chapter or 0, 0
    while number == chosen.chapter or (chosen.chapter is None and time.monotonic() < end):
        folder = output / f"chapter-{number}"
        folder.mkdir(parents=True)
        seconds = min(CHAPTER_S, max(10.0, end - time.monotonic()))
        report = chapter(folder, seed=chosen.seed, number=number, seconds=seconds)
        print(f"chapter {number} {'kept' if report.kept else 'FAILED'}\n{report}\n", flush=True)
        if report.kept:
            shutil.rmtree(folder)
        else:
            failed += 1
        number += 1
    print(f"{failed} chapters failed; what they left is in {output}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
