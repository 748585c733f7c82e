"""A plan at work: behind the Engine protocol, and behind Pipelined.

With two lanes, one batch is copied in while another is computed and a third copied out:

    lane 0   copy in | compute | copy out
    lane 1             copy in | wait .. | compute | copy out

What waits is the device: for the arena, which one compute at a time has (see `arena`, and `lanes` for the rest).

While an engine is idle another may take its place on the device. It loads itself again when it is next asked; only its
stagings stay, since their arrays are lent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edge_sdk.backends.base import DeviceTime
from edge_sdk.backends.cuda import Device
from edge_sdk.backends.residency import Needs
from edge_sdk.backends.tensorrt.arena import SharedGpu
from edge_sdk.backends.tensorrt.interface import Interface
from edge_sdk.backends.tensorrt.lanes import (
    Batch,
    Capturing,
    IoTensor,
    Lane,
    Loaded,
    RuntimeApi,
    Staging,
)
from edge_sdk.errors import EngineFailed, OutOfMemory
from edge_sdk.profiles import DeviceProfile
from edge_sdk.tensors import Array, Feeds, Outputs, TensorSpec

__all__ = ["IoTensor", "Options", "Plan", "RuntimeApi", "TensorRTEngine", "open_engine"]

Result = TypeVar("Result")

Plan = Callable[[], bytes]
"""Reads the plan and vouches for it: when the engine is loaded, and each time it comes back."""


@dataclass(frozen=True)
class Options:
    """How an engine is run. The defaults are for serving; `benchmarks/gpu.py` measures them."""

    lanes: int = 2
    """A third one would only wait for the computes of the other two."""
    graphs: bool = True
    weight_streaming: bool = False
    """The plan was built so that weights may stay in the computer's memory."""


def open_engine(
    plan: Plan,
    *,
    api: RuntimeApi,
    profile: DeviceProfile,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    graph: bytes | None = None,
    options: Options | None = None,
    ordinal: int = 0,
) -> TensorRTEngine:
    """The engine in `plan`, loaded. `inputs` and `outputs` are the package's; `graph` fills a plan without weights.

    Raises BackendUnavailable without a GPU, OutOfMemory if the profile's budget or the device has no room, EngineUnfit
    if its inputs or outputs are not the package's or cannot be served, EngineFailed as TensorRT does.
    """
    if options is None:
        options = Options(weight_streaming=profile.tensorrt is not None and profile.tensorrt.weight_streaming)
    gpu = SharedGpu.of(ordinal, profile.memory)
    return TensorRTEngine(plan, gpu=gpu, api=api, inputs=inputs, outputs=outputs, graph=graph, options=options)


class TensorRTEngine:
    """An engine of TensorRT. It leaves `gpu`, which was joined for it, when it is closed or cannot be made."""

    def __init__(
        self,
        plan: Plan,
        *,
        gpu: SharedGpu,
        api: RuntimeApi,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        graph: bytes | None = None,
        options: Options = Options(),
    ) -> None:
        self._plan = plan
        self._gpu = gpu
        self._api = api
        self._interface = Interface(inputs, outputs)
        self._graph = graph
        self._options = options
        self._capturing = Capturing(options.graphs and not api.captures_graphs and gpu.device.can_capture)
        self._lanes = 1
        self._loaded: Loaded | None = None
        self._own: Staging | None = None
        self._slots: list[TensorRTSlot] = []
        self._last: Lane | None = None
        self._closed = False
        try:
            with self.in_use():
                pass
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<{self._api.flavour} engine with {', '.join(map(str, self.inputs))}>"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._interface.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._interface.outputs

    @property
    def device(self) -> Device:
        return self._gpu.device

    @property
    def is_resident(self) -> bool:
        """Whether it lies on the device now; if not, it loads itself when it is next asked."""
        return self._loaded is not None

    def infer(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> Outputs:
        """As the protocol says; InvalidTensor for a dtype, or for sizes, that the engine was not compiled for."""
        with self.in_use() as loaded:
            shapes = self._interface.shapes_of(feeds)
            staging = self._own = self._own or self._new_staging(loaded)
            given = staging.arrays(self._interface.named(shapes))
            for name, array in given.items():
                np.copyto(array, feeds[name])
            lane = loaded.lanes[0]
            computed = staging.arrays(lane.output_shapes(staging, shapes))
            lane.start(Batch(staging, shapes, given, computed))
            lane.finish()
            self._last = lane
            return {name: array.copy() for name, array in computed.items()} if out is None else _copied(computed, out)

    def slots(self, rows: int) -> Sequence[TensorRTSlot]:
        """As the protocol says; none where a size beside the batch is known only when a request comes.

        InvalidTensor if the engine was compiled for less than `rows`.
        """
        if not self._interface.has_one_size:
            return ()
        self._interface.shapes_at(rows)
        if not self._slots:
            with self.in_use() as loaded:
                self._slots = self._with_room(lambda: self._made_slots(loaded))
        return tuple(self._slots)

    def device_time(self) -> DeviceTime | None:
        """Of the batch that was finished last; None where there is none, or the engine has left the device since."""
        if self._closed:
            return None
        self._gpu.use(self)  # so that it does not leave meanwhile
        try:
            with self._gpu.device:
                return self._last.device_time() if self._last is not None else None
        finally:
            self._gpu.rest(self)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with self._gpu.device.for_the_last_time():
            self._unload()
            for staging in self._stagings():
                staging.free()
        for slot in self._slots:
            slot.forget()
        self._own = None
        self._slots.clear()
        self._gpu.leave(self)

    def evict(self) -> None:
        """Make room for another engine: called while nobody uses this one, under the GPU's lock."""
        self._unload()

    # How an engine is used: loaded, and staying so

    @contextmanager
    def in_use(self) -> Iterator[Loaded]:
        loaded = self.begin_use()
        try:
            with self._gpu.device:
                yield loaded
        finally:
            self.end_use()

    def begin_use(self) -> Loaded:
        self._check_open()
        self._gpu.use(self)
        try:
            with self._gpu.device:
                return self._with_room(self._ready)
        except BaseException:
            self.end_use()
            raise

    def end_use(self, finished: Lane | None = None) -> None:
        self._last = finished or self._last
        self._gpu.rest(self)

    def batch_at(self, rows: int, staging: Staging) -> Batch:
        self._check_open()
        shapes = self._interface.shapes_at(rows)
        feeds = staging.arrays(self._interface.named(shapes))
        return Batch(staging, shapes, feeds, staging.arrays(self._interface.output_shapes_at(rows)))

    def _check_open(self) -> None:
        if self._closed:
            raise EngineFailed("This engine was closed; it cannot infer any more.", fix="Load the package again.")

    # Loading: the books are asked before the device is

    def _with_room(self, act: Callable[[], Result]) -> Result:
        """Do it, and once more without anybody idle beside us: the device may have less than the books say."""
        try:
            return act()
        except OutOfMemory:
            if not self._gpu.evict_idle(but=self):
                raise
        return act()  # here the error is gone, and everything that its frames held

    def _ready(self) -> Loaded:
        loaded = self._loaded or self._load()
        self._widen(loaded, self._lanes)
        return loaded

    def _load(self) -> Loaded:
        plan = self._plan()
        kept = self._kept_bytes()
        streaming = self._options.weight_streaming
        room = self._gpu.room_for(self) - kept
        loaded: Loaded | None = None
        try:
            weights = len(plan) + len(self._graph or b"")  # a plan without weights gets them from the graph
            self._gpu.admit(self, Needs(own=min(weights, max(0, room)) if streaming else weights, kept=kept))
            loaded = Loaded(
                self._api, self._gpu, plan, graph=self._graph, streaming=streaming, graphs=self._options.graphs
            )
            loaded.inputs = self._interface.check_engine(loaded.inputs, loaded.outputs)
            loaded.measure(room, buffers=self._options.lanes + 1)
            self._gpu.admit(self, loaded.needs(self._lanes, kept))
            loaded.add_lane(self._capturing)
        except BaseException as exc:
            if loaded is not None:
                loaded.free()
            self._gpu.evicted(self)
            if isinstance(exc, EngineFailed):
                self._gpu.device.check()
            raise
        self._loaded = loaded
        return loaded

    def _unload(self) -> None:
        loaded, self._loaded = self._loaded, None
        self._last = None
        if loaded is not None:
            loaded.free()

    def _stagings(self) -> list[Staging]:
        return [slot.staging for slot in self._slots] + ([self._own] if self._own is not None else [])

    def _kept_bytes(self, more: int = 0) -> int:
        """What its arrays take of the device: nothing, where that has memory of its own."""
        if self._loaded is None or not self._gpu.device.facts.integrated:
            return self._gpu.kept_bytes(self)
        return (len(self._stagings()) + more) * self._loaded.io_bytes

    def _new_staging(self, loaded: Loaded, lent: int = 0) -> Staging:
        device = self._gpu.device
        self._gpu.admit(self, loaded.needs(self._lanes, self._kept_bytes(lent + 1)))
        return Staging(device, loaded.tensors, loaded.sizes, mapped=device.facts.integrated)

    def _made_slots(self, loaded: Loaded) -> list[TensorRTSlot]:
        """All of them, or none and the memory given back."""
        lanes = self._lanes
        stagings: list[Staging] = []
        try:
            self._widen(loaded, self._options.lanes)
            while len(stagings) < self._options.lanes:
                stagings.append(self._new_staging(loaded, lent=len(stagings)))
        except BaseException:
            for staging in stagings:
                staging.free()
            loaded.narrow(lanes)
            self._lanes = lanes
            self._gpu.admit(self, loaded.needs(lanes, self._kept_bytes()))
            raise
        return [TensorRTSlot(self, index, staging) for index, staging in enumerate(stagings)]

    def _widen(self, loaded: Loaded, lanes: int) -> None:
        self._lanes = lanes
        if len(loaded.lanes) < lanes:
            self._gpu.admit(self, loaded.needs(lanes, self._kept_bytes()))
            while len(loaded.lanes) < lanes:
                loaded.add_lane(self._capturing)


class TensorRTSlot:
    """A lane of an engine, and the staging that goes with it."""

    def __init__(self, engine: TensorRTEngine, index: int, staging: Staging) -> None:
        self.staging = staging
        self._engine = engine
        self._index = index
        self._batches: dict[int, Batch] = {}
        self._started: Lane | None = None

    def at(self, rows: int) -> tuple[Feeds, Outputs]:
        """As the protocol says; InvalidTensor if the engine was compiled for less."""
        batch = self._batch(rows)
        return batch.feeds, batch.outputs

    def start(self, rows: int) -> None:
        batch = self._batch(rows)
        if self._started is not None:
            raise EngineFailed("A batch was started in this slot, and not yet finished.")
        loaded = self._engine.begin_use()
        try:
            lane = loaded.lanes[self._index]
            with self._engine.device:
                lane.start(batch)
        except BaseException:
            self._engine.end_use()
            raise
        self._started = lane

    def finish(self) -> None:
        """Nothing, if nothing was started."""
        lane, self._started = self._started, None
        if lane is None:
            return
        try:
            with self._engine.device:
                lane.finish()
        finally:
            self._engine.end_use(lane)

    def forget(self) -> None:
        """The engine was closed: a batch in flight is over, and the arrays are no more."""
        self._started = None
        self._batches.clear()

    def _batch(self, rows: int) -> Batch:
        if (batch := self._batches.get(rows)) is None:
            batch = self._batches[rows] = self._engine.batch_at(rows, self.staging)
        return batch


def _copied(computed: Outputs, out: Mapping[str, Array]) -> Outputs:
    try:
        for name, array in computed.items():
            np.copyto(out[name], array)
    except (KeyError, ValueError) as exc:
        raise EngineFailed(f"The outputs do not fit into the arrays that were given for them: {exc}.") from exc
    return dict(out)
