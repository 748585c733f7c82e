"""What of an engine lies on the device, and beside it: lanes, and the stagings that batches lie in.

A *lane* is what one batch in flight needs: an execution context, a stream, buffers for the largest batch. A *staging*
is where a batch lies in the computer's memory: pinned, so that the device copies it by itself; on an integrated GPU
the device computes in it, and nothing is copied. A lane takes batches of any staging, one behind the other.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from edge_sdk.backends.base import DeviceTime
from edge_sdk.backends.cuda import Device, DeviceMemory, Event, Graph, HostMemory
from edge_sdk.backends.residency import Needs
from edge_sdk.backends.tensorrt.arena import Arena, Scratch, SharedGpu
from edge_sdk.errors import BackendError, DeviceLost, EdgeSdkError, EngineUnfit, OutOfMemory
from edge_sdk.tensors import Array, Feeds, Outputs

log = logging.getLogger(__name__)

MAX_GRAPHS = 16
"""For each lane: a graph takes memory of the device, and a serving loop has one shape for each batch size it uses."""
Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]
"""One for each input, in the package's order."""


@dataclass(frozen=True)
class IoTensor:
    """An input or output, as the engine has it."""

    name: str
    is_input: bool
    dtype: str
    """numpy's name."""
    shape: Shape
    """-1 for an axis that varies."""
    largest: Shape | None
    """Inputs: the most that the engine was compiled for."""
    smallest: Shape | None
    on_host: bool
    """TensorRT reads or writes it in the computer's memory: a tensor of sizes."""

    def bytes_at(self, shape: Shape) -> int:
        return math.prod(shape) * np.dtype(self.dtype).itemsize


class RuntimeApi(Protocol):
    """What running a plan asks of a generation of TensorRT; `api` has the adapters."""

    flavour: str
    version: str
    captures_graphs: bool
    """The runtime itself runs a context as CUDA graphs, better than a stranger's capture."""

    def deserialize(self, plan: bytes, *, graph: bytes | None) -> Any: ...
    def tensors(self, engine: Any) -> tuple[IoTensor, ...]: ...
    def activation_bytes(self, engine: Any) -> int: ...
    def weight_bytes(self, engine: Any) -> int | None: ...
    def set_weight_budget(self, engine: Any, bytes_: int) -> None: ...
    def new_context(self, engine: Any, *, graphs: bool) -> Any: ...
    def set_activation(self, context: Any, address: int, size: int) -> None: ...
    def set_shape(self, context: Any, name: str, shape: Shape) -> None: ...
    def shape(self, context: Any, name: str) -> Shape: ...
    def largest_output_bytes(self, context: Any, name: str) -> int: ...
    def set_address(self, context: Any, name: str, address: int) -> None: ...
    def enqueue(self, context: Any, stream: int) -> None: ...


class Batch(NamedTuple):
    """Arrays of certain shapes in a staging: the same memory each time."""

    staging: Staging
    shapes: Shapes
    feeds: Feeds
    outputs: Outputs


class Staging:
    """Memory of the computer for the largest batch, which the device reaches by itself."""

    def __init__(self, device: Device, tensors: Sequence[IoTensor], sizes: Mapping[str, int], *, mapped: bool) -> None:
        self.mapped = mapped
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._memory: dict[str, HostMemory] = {}
        try:
            for tensor in tensors:
                in_place = mapped and not tensor.on_host
                self._memory[tensor.name] = device.allocate_host(sizes[tensor.name], mapped=in_place)
        except BaseException:
            self.free()
            raise

    def address(self, name: str) -> int:
        """Where TensorRT finds the tensor, if not in a buffer of the device."""
        memory = self._memory[name]
        return memory.address if memory.address is not None else int(memory.array.ctypes.data)

    def arrays(self, shapes: Iterable[tuple[str, Shape]]) -> dict[str, Array]:
        """The first bytes of the memory of each tensor, as an array of that shape."""
        found = {}
        for name, shape in shapes:
            tensor = self._tensors[name]
            flat = self._memory[name].array[: tensor.bytes_at(shape)]
            found[name] = flat.view(tensor.dtype).reshape(shape)
        return found

    def free(self) -> None:
        """The arrays must not be touched any more."""
        for memory in self._memory.values():
            memory.free()
        self._memory.clear()


class Capturing:
    """Whether an engine's computes are captured as CUDA graphs: until the first that cannot be."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted

    def failed(self, exc: EdgeSdkError) -> None:
        self.wanted = False
        log.info("The engine cannot be captured as a CUDA graph, and runs without: %s", exc)


class Loaded:
    """An engine on the device: its weights, and its lanes."""

    def __init__(
        self, api: RuntimeApi, gpu: SharedGpu, plan: bytes, *, graph: bytes | None, streaming: bool, graphs: bool
    ) -> None:
        self.api = api
        self.gpu = gpu
        self.lanes: list[Lane] = []
        self.weight_bytes = len(plan) + len(graph or b"")
        self._graphs = graphs
        self._engine: Any = api.deserialize(plan, graph=graph)
        self._spare: Any = None
        self.tensors = api.tensors(self._engine)
        self.inputs = tuple(tensor for tensor in self.tensors if tensor.is_input)
        self.outputs = tuple(tensor for tensor in self.tensors if not tensor.is_input)
        self.activation_bytes = api.activation_bytes(self._engine)
        self.sizes: dict[str, int] = {}
        """Of each tensor at its largest, in bytes."""
        self._streamable_bytes = api.weight_bytes(self._engine) if streaming else None

    def measure(self, room: int, *, buffers: int) -> None:
        """Ask the engine how large everything can get.

        Where weights are streamed, they get what so many times its inputs and outputs leave of `room`.

        EngineUnfit for an output whose size only the data decides: there is no buffer for it to be made beforehand.
        """
        if self._streamable_bytes is not None:  # nothing of them has to be there in order to ask
            self.api.set_weight_budget(self._engine, 0)
        self._spare = self.api.new_context(self._engine, graphs=self._graphs)
        largest = [(tensor, tensor.largest or tensor.shape) for tensor in self.inputs]
        for tensor, shape in largest:
            if -1 in tensor.shape:
                self.api.set_shape(self._spare, tensor.name, shape)
            self.sizes[tensor.name] = tensor.bytes_at(shape)
        for tensor in self.outputs:
            if -1 in self.api.shape(self._spare, tensor.name):
                reason = f"the size of its output {tensor.name!r} is only known once it has been computed"
                raise EngineUnfit(
                    f"TensorRT's engine is of no use here: {reason}. The graph runs on onnxruntime instead.",
                    reasons=(reason,),
                )
            self.sizes[tensor.name] = self.api.largest_output_bytes(self._spare, tensor.name)
        if self._streamable_bytes is not None:
            self._spare = None  # while there is a context the budget is fixed
            self._set_weight_budget(room - buffers * self.io_bytes)

    def _set_weight_budget(self, room: int) -> None:
        """All of them if they fit. Streaming takes scratch memory of its own, so that is asked again."""
        total = self._streamable_bytes or 0
        for _ in range(2):
            self.weight_bytes = max(0, min(total, room - self.activation_bytes))
            self.api.set_weight_budget(self._engine, self.weight_bytes)
            self.activation_bytes = self.api.activation_bytes(self._engine)
        if self.weight_bytes < total:
            log.info("%s of %s bytes of weights are streamed.", f"{total - self.weight_bytes:,}", f"{total:,}")

    @property
    def io_bytes(self) -> int:
        """Of the inputs and outputs at their largest, without those in the computer's memory."""
        return sum(self.sizes[tensor.name] for tensor in self.tensors if not tensor.on_host)

    def needs(self, lanes: int, kept_bytes: int) -> Needs:
        buffers = 0 if self.gpu.device.facts.integrated else lanes * self.io_bytes
        return Needs(own=self.weight_bytes + buffers, kept=kept_bytes, shared=self.activation_bytes)

    def add_lane(self, capturing: Capturing) -> None:
        self.lanes.append(Lane(self, capturing))

    def take_context(self) -> Any:
        """A context that nobody else has.

        Whoever takes it must have no second name for it: an exception keeps its frames' names, and so the memory.
        """
        if self._spare is None:
            return self.api.new_context(self._engine, graphs=self._graphs)
        context, self._spare = self._spare, None
        return context

    def narrow(self, lanes: int) -> None:
        """Give back those beyond the first `lanes`."""
        while len(self.lanes) > lanes:
            self.lanes.pop().free()

    def free(self) -> None:
        """In this order: contexts must not outlive their engine."""
        self.narrow(0)
        self._spare = None
        self._engine = None


class Lane:
    """A context, a stream, buffers for the largest batch. Batches go through it in the order in which they start."""

    def __init__(self, loaded: Loaded, capturing: Capturing) -> None:
        self._api = loaded.api
        self._arena: Arena = loaded.gpu.arena
        self._inputs = loaded.inputs
        self._outputs = loaded.outputs
        self._context: Any = loaded.take_context()
        self._generation = 0
        self._shapes: Shapes | None = None
        self._bound: Staging | None = None
        self._buffers: dict[str, DeviceMemory] = {}
        self._graphs: dict[object, Graph] = {}
        self._came_once: list[object] = []
        self._owned = contextlib.ExitStack()
        # Sizes in the computer's memory are read as the work is put in, so a graph would keep the first ones.
        self._capturing = Capturing(False) if any(tensor.on_host for tensor in loaded.tensors) else capturing
        device = loaded.gpu.device
        with contextlib.ExitStack() as owned:  # given back at once if the rest cannot be had
            owned.callback(self._forget_context)
            self._stream = device.stream()
            owned.callback(self._stream.free)
            self._began, self._ready = self._event(device, owned), self._event(device, owned)
            self._computed, self._done = self._event(device, owned), self._event(device, owned)
            if not device.facts.integrated:
                self._allocate(device, loaded, owned)
            self._owned = owned.pop_all()

    def _event(self, device: Device, owned: contextlib.ExitStack) -> Event:
        event = device.event(timed=True)
        owned.callback(event.free)
        return event

    def _allocate(self, device: Device, loaded: Loaded, owned: contextlib.ExitStack) -> None:
        for tensor in loaded.tensors:
            if not tensor.on_host:
                memory = self._buffers[tensor.name] = device.allocate(loaded.sizes[tensor.name])
                owned.callback(memory.free)
                self._api.set_address(self._context, tensor.name, memory.address)

    def output_shapes(self, staging: Staging, shapes: Shapes) -> list[tuple[str, Shape]]:
        """What the outputs will be, for inputs of these shapes; sizes that are inputs lie in the staging already."""
        self._prepare(staging, shapes)
        return [(tensor.name, self._api.shape(self._context, tensor.name)) for tensor in self._outputs]

    def start(self, batch: Batch) -> None:
        """Give the device its orders for a batch. On a failure it has none left, and the batch may be touched again."""
        try:
            self._order(batch)
        except BaseException as exc:
            self._abandon(exc)
            raise

    def _order(self, batch: Batch) -> None:
        stream = self._stream
        self._began.record(stream)
        for name, memory in self._buffers.items():
            if name in batch.feeds:
                stream.copy_in(memory.address, batch.feeds[name])
        self._prepare(batch.staging, batch.shapes)
        with self._arena.turn(stream) as scratch:
            self._settle(scratch)
            self._ready.record(stream)
            self._compute((batch.shapes, id(batch.staging) if batch.staging.mapped else None))
            self._computed.record(stream)
        for name, memory in self._buffers.items():
            if name in batch.outputs:
                stream.copy_out(batch.outputs[name], memory.address)
        self._done.record(stream)

    def finish(self) -> None:
        """Wait for everything that was started."""
        self._done.synchronize()

    def device_time(self) -> DeviceTime:
        """Of the batch that was started last, which is finished."""
        return DeviceTime(self._done.since(self._began), self._computed.since(self._ready))

    def free(self) -> None:
        with contextlib.suppress(EdgeSdkError):
            self._stream.synchronize()
        self._drop_graphs()
        self._owned.close()

    def _prepare(self, staging: Staging, shapes: Shapes) -> None:
        if self._bound is not staging:
            for tensor in (*self._inputs, *self._outputs):
                if tensor.name not in self._buffers:
                    self._api.set_address(self._context, tensor.name, staging.address(tensor.name))
            self._bound = staging
        if self._shapes != shapes:
            self._shapes = None
            for tensor, shape in zip(self._inputs, shapes):
                if -1 in tensor.shape:
                    self._api.set_shape(self._context, tensor.name, shape)
            self._shapes = shapes

    def _settle(self, scratch: Scratch) -> None:
        """Compute in the arena where it is now; what was captured knows its old place."""
        if scratch.generation != self._generation:
            self._drop_graphs()
            if scratch.size:
                self._api.set_activation(self._context, scratch.address, scratch.size)
            self._generation = scratch.generation

    def _compute(self, key: object) -> None:
        if (graph := self._graphs.get(key)) is not None:
            graph.launch(self._stream)
            return
        self._api.enqueue(self._context, self._stream.handle)
        if self._capturing.wanted and len(self._graphs) < MAX_GRAPHS:
            if key in self._came_once:
                self._came_once.remove(key)
                self._capture(key)
            else:  # a shape that came once may never come again, and a capture costs more than a few launches save
                self._came_once = [*self._came_once[1 - MAX_GRAPHS :], key]

    def _capture(self, key: object) -> None:
        """For the next time: TensorRT wants a shape to have been enqueued just before it is captured."""
        try:
            with self._stream.capture() as captured:
                self._api.enqueue(self._context, self._stream.handle)
        except DeviceLost:
            raise
        except (BackendError, OutOfMemory) as exc:
            self._capturing.failed(exc)
            return
        self._graphs[key] = captured[0]

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            graph.free()
        self._graphs.clear()
        self._came_once.clear()

    def _forget_context(self) -> None:
        self._context = None

    def _abandon(self, exc: BaseException) -> None:
        """Wait for what is on its way already. If that fails for good, that was the reason."""
        try:
            self._stream.synchronize()
        except DeviceLost as lost:
            if not isinstance(exc, DeviceLost):
                raise lost from exc
        except EdgeSdkError:
            pass
