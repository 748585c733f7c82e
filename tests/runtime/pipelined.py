"""A stand-in for an engine on an accelerator: pipelined, with a thread for a device, and no GPU.

It keeps the promises of `backends.base` and counts how the caller kept his: what was started while what was under way,
whether a slot was written while the device read it, and whether the engine was closed with work in it. `pause` holds
the device, so that a test can look at what piles up before it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from edge_sdk.errors import EngineFailed
from edge_sdk.tensors import Array, Feeds, Outputs, TensorSpec

PATIENCE_S = 20.0
POISON = 666.0
"""A batch that holds this fails while it is computed."""
UNSTARTABLE = 667.0
"""A batch that holds this cannot even be started."""


class StandInSlot:
    def __init__(self, engine: StandInPipelinedEngine, rows: int) -> None:
        self._engine = engine
        self._feeds = np.zeros((rows, 4), np.float32)
        self._outputs = np.zeros((rows, 4), np.float32)
        self._computed = threading.Event()
        self._error: EngineFailed | None = None
        self._under_way = False

    def at(self, rows: int) -> tuple[Feeds, Outputs]:
        if self._under_way:
            self._engine.faults.append("a slot was asked for while the device worked in it")
        return {"x": self._feeds[:rows]}, {"y": self._outputs[:rows]}

    def start(self, rows: int) -> None:
        if self._under_way:
            self._engine.faults.append("a slot was started twice")
        if np.any(self._feeds[:rows] == UNSTARTABLE):
            raise EngineFailed("The stand-in was told not to start.")
        self._under_way = True
        self._computed.clear()
        self._engine.launch(self, rows)

    def finish(self) -> None:
        if not self._computed.wait(PATIENCE_S):
            self._engine.faults.append("a batch was waited for in vain")
        self._under_way = False
        self._engine.landed()
        if (error := self._error) is not None:
            self._error = None
            raise error

    def compute(self, rows: int, factor: float) -> None:
        """The device's part, on its thread."""
        before = self._feeds[:rows].copy()
        if np.any(before == POISON):
            self._error = EngineFailed("The stand-in was told to fail.")
        np.multiply(before, factor, out=self._outputs[:rows])
        if not np.array_equal(before, self._feeds[:rows]):
            self._engine.faults.append("the feeds changed while the device read them")
        self._computed.set()


class StandInPipelinedEngine:
    """y = factor * x. `faults` lists what the caller did that the seam forbids; `most_in_flight` what it made of it."""

    inputs = (TensorSpec("x", "float32", ("batch", 4)),)
    outputs = (TensorSpec("y", "float32", ("batch", 4)),)

    def __init__(self, factor: float = 2.0, *, slots: int = 2) -> None:
        self.factor = factor
        self.faults: list[str] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.batches: list[int] = []
        """The rows of each batch, in the order in which they were started."""
        self.closed = False
        self._count = slots
        self._slots: list[StandInSlot] = []
        self._running = threading.Event()
        self._running.set()
        self._lock = threading.Lock()
        self._launched: queue.SimpleQueue[tuple[StandInSlot, int] | None] = queue.SimpleQueue()
        self._device = threading.Thread(target=self._work, name="stand-in device", daemon=True)
        self._device.start()

    def infer(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> Outputs:
        if self.closed:
            raise EngineFailed("This engine was closed.")
        if np.any(feeds["x"] == POISON):
            raise EngineFailed("The stand-in was told to fail.")
        return {"y": feeds["x"] * np.float32(self.factor)}

    def slots(self, rows: int) -> Sequence[StandInSlot]:
        self._slots = self._slots or [StandInSlot(self, rows) for _ in range(self._count)]
        return self._slots

    def close(self) -> None:
        if self.in_flight:
            self.faults.append(f"closed with {self.in_flight} batches under way")
        self.closed = True
        self._launched.put(None)

    def pause(self) -> None:
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    def launch(self, slot: StandInSlot, rows: int) -> None:
        with self._lock:
            if self.closed:
                self.faults.append("a batch was started in a closed engine")
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.batches.append(rows)
        self._launched.put((slot, rows))

    def landed(self) -> None:
        with self._lock:
            self.in_flight -= 1

    def _work(self) -> None:
        while (order := self._launched.get()) is not None:
            self._running.wait(PATIENCE_S)
            slot, rows = order
            slot.compute(rows, self.factor)
