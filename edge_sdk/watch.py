"""Watches that the daemon moves, from a thread of its own: the network's thread, and every batch that is computed.

    watch = Watch(recorder, hang_s=60, on_hang=...)
    watch.start()
    watch.turns += 1            # by the network's thread, each time around
    watch.stop()

What hangs in native code can be ended by nothing inside the process. So `on_hang` is told, once, and is to end all of
it: whoever started us starts the next, and `quarantine` knows what was being computed. systemd's watchdog does the same
for a network thread that hangs; this one also works without systemd, sees the other threads, and says what it was.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from edge_sdk.errors import EngineHung
from edge_sdk.runtime.recorder import FlightRecorder
from edge_sdk.runtime.standstill import STEP_S, Mark, Standstill

NETWORK_S = 15.0
"""The network's thread may take so much longer than a batch: a name server or a disk may keep it waiting."""


class Watch:
    """Looks from time to time, until `stop`."""

    def __init__(self, recorder: FlightRecorder, *, hang_s: float, on_hang: Callable[[EngineHung], None]) -> None:
        """`on_hang` is called on the watching thread. `hang_s` 0: only those have a limit that bring their own."""
        self.turns = 0
        self._recorder = recorder
        self._hang_s = hang_s or math.inf
        self._on_hang = on_hang
        self._standstill = Standstill()
        self._stopped = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._work, name="edge-sdk-watch", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _work(self) -> None:
        while not self._stopped.wait(min(STEP_S / 2, self._hang_s / 4)):
            if late := self._standstill.look(self._marks(), time.monotonic()):
                self._on_hang(_hung(late[0]))
                return

    def _marks(self) -> list[Mark]:
        """The batches first: one that hangs on the network's thread is why that hangs."""
        batches = [
            Mark(("flight", each.number), min(self._hang_s, each.limit_s), str(each))
            for each in self._recorder.in_flight()
            if each.waits is None or not each.waits()
        ]
        return [*batches, Mark(("turn", self.turns), self._hang_s + NETWORK_S, "")]


def _hung(mark: Mark) -> EngineHung:
    if not mark.name:
        return EngineHung(f"The network's thread has stood still for {mark.limit_s:g} s.")
    return EngineHung(
        f"Computing {mark.name} has taken more than {mark.limit_s:g} s.",
        fix="If that is how long it takes, raise [serving] hang_s.",
    )
