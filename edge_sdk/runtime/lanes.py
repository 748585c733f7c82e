"""Where a batch lies while it is computed: filled, started, finished.

An engine has one lane or several. A *pipelined* engine lends its own slots, so that one batch is filled or phrased
while another is computed. Any other has a single lane, a `Slab`: arrays of `rows` rows that live as long as the engine,
into which inputs are copied once and in which outputs land; a batch of n is the first n rows of both. So the same
arrays meet the engine every time and nothing is allocated. Only a model whose sizes are known no sooner than the
request gets arrays of its own each time.

    lane = lanes_of(engine, rows=8)[0]
    lane.start(lambda: ([feeds, other_feeds], 2))
    outputs = lane.finish()             # valid until the lane's next `start`

What a batch is made of is asked for when it is computed, and no sooner: before that it may have waited for its turn on
the processor, for longer than some of it can wait.

A model with several *instances* has a lane for each, with a thread of its own that computes: over twins of its engine,
which share the weights, or are processes of their own.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from edge_sdk.backends.base import Engine, Hosting, Pipelined, Shareable, Slot, Threaded
from edge_sdk.errors import DeviceLost, EdgeSdkError
from edge_sdk.runtime.turns import Turnstile
from edge_sdk.tensors import Array, Feeds, Outputs, allocate, is_batchable, sizes_vary, zeros

Load = tuple[Sequence[Feeds], int]
"""Requests that are computed together, and the rows that they have; 0 rows: one request that shares no batch."""


class Lane(Protocol):
    """One batch at a time: `start`, then `finish`. Both raise as `Engine.infer` does."""

    measurable: bool
    """Whether `warm` computes what a request would: then its time says how long one takes."""

    def warm(self, rows: int) -> None:
        """Compute `rows` rows of zeros."""
        ...

    def start(self, board: Callable[[], Load]) -> None:
        """Begin to compute what `board` gives, which is asked as that begins, once, and on whichever thread. Where it
        gives no request, nothing is computed."""
        ...

    def finish(self) -> Outputs:
        """Every output of what was started, once it is there; of nothing, nothing that is worth reading."""
        ...

    def close(self) -> None:
        """Give back what the lane has beside the engine that it was made of. Nothing may be on its way."""
        ...


def turnstile_for(engine: Engine) -> Turnstile:
    """A turnstile for batches of `engine`, which need as many cores as it has threads."""
    return Turnstile(engine.threads if isinstance(engine, Threaded) else 1)


def lanes_of(engine: Engine, rows: int, *, instances: int = 1, turnstile: Turnstile | None = None) -> list[Lane]:
    """The engine's lanes, for batches of up to `rows`; there is at least one. Raises OutOfMemory.

    What they compute on the processor passes `turnstile`. An engine with slots of its own, or one that cannot be
    shared, has no other `instances`. Raises as loading does where an instance cannot be had.
    """
    turnstile = turnstile or turnstile_for(engine)
    if instances == 1 or not isinstance(engine, Shareable):
        return _own_lanes(engine, rows, turnstile)
    lanes: list[Lane] = []
    try:
        lanes.extend(
            _instance(engine, engine.twin() if number else None, rows, turnstile) for number in range(instances)
        )
    except BaseException:  # of those that were made until then
        for made in lanes:
            made.close()
        raise
    return lanes


def _instance(engine: Engine, twin: Engine | None, rows: int, turnstile: Turnstile) -> ThreadLane:
    try:
        (lane,) = _own_lanes(twin or engine, rows, turnstile)
        return ThreadLane(lane, twin)
    except BaseException:
        if twin is not None:
            twin.close()
        raise


def _own_lanes(engine: Engine, rows: int, turnstile: Turnstile) -> list[Lane]:
    batchable = is_batchable(engine.inputs, engine.outputs)
    free = any(spec.has_free_axes for spec in (*engine.inputs, *engine.outputs))
    if sizes_vary(engine.inputs) or (free and not batchable):
        return [PatientLane(LooseLane(engine), turnstile)]
    if isinstance(engine, Pipelined) and (slots := engine.slots(rows)):
        return [SlotLane(slot) for slot in slots]
    inputs, outputs = allocate(engine.inputs, rows), allocate(engine.outputs, rows)
    if inputs is None or outputs is None:
        return [PatientLane(LooseLane(engine), turnstile)]
    if isinstance(engine, Hosting):
        inputs, outputs = engine.arrays(inputs, outputs)
    return [PatientLane(SlotLane(Slab(engine, inputs, outputs, batchable)), turnstile)]


class SlotLane:
    """A lane over a slot, whose arrays are there before the requests."""

    measurable = True

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._outputs: Outputs = {}

    def warm(self, rows: int) -> None:
        feeds, _ = self._slot.at(rows)
        for array in feeds.values():
            array.fill(0)
        self._slot.start(rows)
        self._slot.finish()

    def start(self, board: Callable[[], Load]) -> None:
        requests, rows = board()
        if not requests:
            self._outputs = {}
            return
        slot, rows = self._slot, rows or 1
        feeds, self._outputs = slot.at(rows)
        for name, place in feeds.items():
            _fill(place, [request[name] for request in requests])
        slot.start(rows)

    def finish(self) -> Outputs:
        if self._outputs:
            self._slot.finish()
        return self._outputs

    def close(self) -> None:
        return


class LooseLane:
    """A lane for sizes that only the request knows: arrays are the engine's own, made anew each time.

    Requests that are started together are equal in all but their first axis.
    """

    measurable = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._outputs: Outputs = {}

    def warm(self, rows: int) -> None:
        """One request with every free axis at 1, which need not make sense to the model: its failure is none."""
        try:
            self._engine.infer(zeros(self._engine.inputs))
        except DeviceLost:
            raise
        except EdgeSdkError:
            pass

    def start(self, board: Callable[[], Load]) -> None:
        requests, _ = board()
        if requests:
            self._outputs = self._engine.infer(
                {name: _joined([request[name] for request in requests]) for name in requests[0]}
            )

    def finish(self) -> Outputs:
        outputs, self._outputs = self._outputs, {}
        return outputs

    def close(self) -> None:
        return


class PatientLane:
    """A lane whose batches pass a turnstile before they are computed, on the thread that computes."""

    def __init__(self, lane: Lane, turnstile: Turnstile) -> None:
        """`lane` computes as it starts."""
        self.measurable = lane.measurable
        self._lane = lane
        self._turnstile = turnstile

    def warm(self, rows: int) -> None:
        with self._turnstile:
            self._lane.warm(rows)

    def start(self, board: Callable[[], Load]) -> None:
        if self._turnstile.is_open:
            self._lane.start(board)
            return
        with self._turnstile:
            self._lane.start(board)

    def finish(self) -> Outputs:
        return self._lane.finish()

    def close(self) -> None:
        self._lane.close()


class ThreadLane:
    """A lane whose batches are computed on a thread of its own: `start` hands over, `finish` waits."""

    def __init__(self, lane: Lane, engine: Engine | None) -> None:
        """`engine` is the lane's own, to be closed with it; None where it is somebody else's."""
        self.measurable = lane.measurable
        self._lane = lane
        self.engine = engine
        self._orders: queue.SimpleQueue[Callable[[], Load] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Outputs | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="edge-sdk-instance", daemon=True)
        self._thread.start()

    def warm(self, rows: int) -> None:
        self._lane.warm(rows)

    def start(self, board: Callable[[], Load]) -> None:
        self._orders.put(board)

    def finish(self) -> Outputs:
        done = self._done.get()
        if isinstance(done, BaseException):
            raise done
        return done

    def close(self) -> None:
        self._orders.put(None)
        if self.engine is not None:
            self.engine.close()

    def _work(self) -> None:
        """The life of the thread."""
        while (order := self._orders.get()) is not None:
            try:
                self._lane.start(order)
                self._done.put(self._lane.finish())
            except BaseException as exc:
                self._done.put(exc)


class Slab:
    """The slot of an engine that has none of its own: `start` computes, and there is nothing left to wait for."""

    def __init__(self, engine: Engine, inputs: Feeds, outputs: Outputs, batchable: bool) -> None:
        """`batchable`: a batch may have any number of the rows; otherwise it has the arrays as they are."""
        self._engine = engine
        self._whole = (inputs, outputs)
        self._batchable = batchable
        self._views: dict[int, tuple[Feeds, Outputs]] = {}

    def at(self, rows: int) -> tuple[Feeds, Outputs]:
        return self._views.get(rows) or self._view(rows)

    def start(self, rows: int) -> None:
        self._engine.infer(*self.at(rows))

    def finish(self) -> None:
        return

    def _view(self, rows: int) -> tuple[Feeds, Outputs]:
        inputs, outputs = self._whole
        if self._batchable:
            inputs = {name: array[:rows] for name, array in inputs.items()}
            outputs = {name: array[:rows] for name, array in outputs.items()}
        self._views[rows] = inputs, outputs
        return inputs, outputs


def _fill(place: Array, arrays: Sequence[Array]) -> None:
    """Copy `arrays` one after the other along the first axis of `place`."""
    if len(arrays) == 1:
        np.copyto(place, arrays[0])
    else:
        np.concatenate(arrays, axis=0, out=place)


def _joined(arrays: Sequence[Array]) -> Array:
    return np.asarray(arrays[0], order="C") if len(arrays) == 1 else np.concatenate(arrays, axis=0)
