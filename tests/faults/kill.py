"""kill -9 at random moments, under load: the daemon, the broker, again and again.

    python -m tests.faults.kill --daemon 1000 --broker 100 --output /tmp/kills

The daemon is killed from its first moment on: while it starts, connects, computes, answers. The broker saves its
sessions at each change.

    python -m tests.faults.kill --daemon 1000 --broker 0

Without kills of the broker every request is the daemon's to answer: half of the clients never send anything again, and
the model takes its time, so that requests die with the daemon while they wait and while they are computed.

    python -m tests.faults.kill --delivery durable

Now answers are written down before they go out, and a daemon gives those of the one before it.

History, report and the daemon's log stay in the output folder; the exit code is the checker's.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.checker import Report
from tests.faults.fleet import KINDS, PATIENT, Load
from tests.faults.scene import DEVICE, Scene, busy, make_engines

LONGEST_LIFE_S = 1.2
"""A daemon answers about half a second after its start: half of them are killed before that, half while they serve."""
SLOW_S = 0.05
"""What a batch takes of the model that takes its time."""
Tell = Callable[[str], None]


def run(
    folder: Path,
    *,
    daemon: int,
    broker: int,
    seed: int = 0,
    delivery: str = "at-least-once",
    tell: Tell = lambda text: None,
) -> Report:
    """Kill so many times, then let everybody have their answer, and judge."""
    draw = random.Random(seed)
    victims = ["daemon"] * daemon + ["broker"] * broker
    draw.shuffle(victims)
    load = Load(DEVICE, timeout_s=120.0)
    engines = make_engines(folder / "engines", slow_s=0.0 if broker else SLOW_S)
    clients = KINDS if broker else PATIENT
    with Scene(
        folder, engines, load=load, clients=clients, serving__inline_ms="1", delivery=delivery, state=str(folder)
    ) as scene:
        for number, victim in enumerate(victims, 1):
            busy(draw.uniform(0.0, LONGEST_LIFE_S))
            with scene.fault(f"{victim} kill"):
                if victim == "daemon":
                    scene.kill_daemon()
                    scene.start_daemon()
                else:
                    scene.broker.kill()
                    scene.broker.start()
            if number % 50 == 0:
                tell(f"{number} of {len(victims)} kills, {scene.fleet.open} requests open")
        return scene.finish()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kill", description=__doc__.splitlines()[0])
    parser.add_argument("--daemon", type=int, default=1000, help="how often the daemon is killed")
    parser.add_argument("--broker", type=int, default=100, help="how often the broker is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delivery", choices=("at-least-once", "durable"), default="at-least-once")
    parser.add_argument("--output", type=Path, default=None, help="a folder for history, report and log")
    chosen = parser.parse_args(arguments)
    folder = chosen.output or Path(tempfile.mkdtemp(prefix="edge-sdk-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    report = run(
        folder, daemon=chosen.daemon, broker=chosen.broker, seed=chosen.seed, delivery=chosen.delivery, tell=_tell
    )
    _tell(f"{report}\n{time.monotonic() - begun:.0f} s in all; everything is in {folder}")
    return 0 if report.kept else 1


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
