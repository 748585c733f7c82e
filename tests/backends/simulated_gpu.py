"""Stand-ins for a GPU, where there is none: a CUDA binding, and a TensorRT that computes with onnxruntime.

`SimulatedCuda` takes the place of pycuda and cuda-python. Device memory is the computer's own, at real addresses. What
is put into a stream is not done until somebody waits for it, and then in an order drawn by chance that keeps only what
the program asked for: the order within a stream, and events. So a result is right only if the program asked for enough.

Beside the results it watches, and a `SimulationError` is what it found:
  * every access, when it is put in and when it is done, lies in one piece of living memory;
  * two accesses of the same memory, one of them a write, are ordered by streams, events or the host (vector clocks);
  * arrays of the host are poisoned when a copy into them is put in, so whoever reads too early reads nonsense;
  * nothing is asked without a current context, of a destroyed handle, or of a lost device.

`SimulatedTensorRT` stands in for a runtime of TensorRT: its engine computes the ONNX graph in its plan. A context
writes all over the scratch memory it was given, and looks before it computes whether that is still its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime

from edge_sdk.backends.cuda import OUT_OF_MEMORY, STICKY, Facts, HostBlock, failure
from edge_sdk.backends.tensorrt.executor import IoTensor
from edge_sdk.errors import EngineFailed
from edge_sdk.tensors import Array

MEBIBYTE = 1 << 20
Clock = dict[int, int]
"""How many operations of each stream are known to be over."""


class SimulationError(AssertionError):
    """Something a real GPU would have punished with wrong results or a crash, perhaps, and some day."""


@dataclass(frozen=True)
class Span:
    """Memory that an operation reads or writes."""

    address: int
    size: int


@dataclass
class Operation:
    label: str
    act: Callable[[], None] = lambda: None
    reads: tuple[Span, ...] = ()
    writes: tuple[Span, ...] = ()
    after: Operation | None = None
    """An event's: this waits until that is over."""
    stream: int = 0
    number: int = 0
    clock: Clock = field(default_factory=dict)
    done_at: float | None = None


@dataclass
class Memory:
    size: int
    array: Array
    last_write: Operation | None = None
    reads: list[Operation] = field(default_factory=list)


@dataclass
class SimulatedStream:
    queue: deque[Operation] = field(default_factory=deque)
    last: Operation | None = None
    count: int = 0
    clock: Clock = field(default_factory=dict)
    """What its next operation comes after."""
    captured: list[Operation] | None = None
    capturer: int | None = None
    """The thread that captures, which meanwhile may not do everything; others may."""


class SimulatedCuda:
    """A binding of `backends.cuda`. `seed` draws the order in which streams get on.

    `fail(function, nth, status)` has the nth call from now of a function answered so; `lose_after(n)` has the device
    lost in the nth operation from now. `eager` is how likely the device gets on with something at each call.
    """

    name = "simulated"
    can_capture = True

    def __init__(
        self, seed: int = 0, *, total_bytes: int = 64 * MEBIBYTE, integrated: bool = False, eager: float = 0.3
    ) -> None:
        self.total_bytes = total_bytes
        self.integrated = integrated
        self.eager = eager
        self.allocated = 0
        self.largest_allocated = 0
        self.retained = 0
        self.faults: list[str] = []
        self.history: list[str] = []
        """The labels of what was done, in order."""
        self.calls: dict[str, int] = {}
        self._draw = random.Random(seed)
        self._lock = threading.RLock()
        self._thread = threading.local()
        self._memory: dict[int, Memory] = {}
        self._streams: dict[int, SimulatedStream] = {}
        self._events: dict[int, Operation | None] = {}
        self._graphs: dict[int, list[Operation]] = {}
        self._host_clock: Clock = {}
        self._handles = iter(range(1, 1 << 30))
        self._now_ms = 0.0
        self._failures: dict[tuple[str, int], str] = {}
        self._sticky = ""
        self._lose_in = -1

    # What a test asks for, and what it sees

    def fail(self, function: str, nth: int, status: str) -> None:
        self._failures[function, self.calls.get(function, 0) + nth] = status

    def lose_after(self, operations: int) -> None:
        self._lose_in = operations

    def leaks(self) -> dict[str, int]:
        """What was not given back, or not properly; empty if everything was."""
        held = {
            "faults": len(self.faults),
            "memory": len(self._memory), "streams": len(self._streams), "events": len(self._events),
            "graphs": len(self._graphs), "contexts": self.retained,
        }  # fmt: skip
        return {kind: count for kind, count in held.items() if count}

    def waiting(self, stream: int) -> list[str]:
        return [operation.label for operation in self._streams[stream].queue]

    def run_where_possible(self, wanted: Callable[[Operation], bool]) -> None:
        """Get on, but only with operations that are `wanted`: a schedule of the test's own choice."""
        with self._lock:
            while ready := [stream for stream in self._ready() if wanted(stream.queue[0])]:
                self._do(ready[0])

    # The device getting on

    def _enter(self, function: str, *, needs_context: bool = True) -> None:
        self.calls[function] = count = self.calls.get(function, 0) + 1
        if status := self._failures.pop((function, count), self._sticky):
            if status in STICKY:
                self._sticky = status
            raise failure(function, status)
        if needs_context and not getattr(self._thread, "depth", 0):
            raise SimulationError(f"{function} without a current context")
        while self._streams and self._draw.random() < self.eager and self._step():
            pass

    def _ready(self) -> list[SimulatedStream]:
        return [
            stream
            for stream in self._streams.values()
            if stream.queue and ((after := stream.queue[0].after) is None or after.done_at is not None)
        ]

    def _step(self) -> bool:
        if self._sticky or not (ready := self._ready()):
            return False
        self._do(self._draw.choice(ready))
        return True

    def _do(self, stream: SimulatedStream) -> None:
        operation = stream.queue.popleft()
        self._now_ms += 1.0
        operation.done_at = self._now_ms
        if self._lose_in == 0:
            self._sticky = "CUDA_ERROR_ILLEGAL_ADDRESS"
            return
        self._lose_in -= 1
        for span in (*operation.reads, *operation.writes):
            self.memory_at(span, operation.label)
        operation.act()
        self.history.append(operation.label)

    def _run_until(self, operation: Operation | None, function: str) -> None:
        while operation is not None and operation.done_at is None:
            if not self._step():
                if self._sticky:
                    break
                raise SimulationError(f"{function} waits for ever")
        if self._sticky:
            raise failure(function, self._sticky)
        if operation is not None:  # the host, and whatever it puts in from now on, comes after it
            _advance(self._host_clock, operation.clock)

    def memory_at(self, span: Span, label: str) -> Memory:
        for address, memory in self._memory.items():
            if address <= span.address and span.address + span.size <= address + memory.size:
                return memory
        raise SimulationError(f"{label} at {span.address:#x}, {span.size} bytes: not within living memory")

    def put(self, stream: int, operation: Operation) -> None:
        """Put an operation into a stream, or into the graph that is being captured there."""
        lane = self._streams[stream]
        if lane.captured is not None:
            lane.captured.append(operation)
            return
        lane.count += 1
        operation.stream, operation.number = stream, lane.count
        _advance(lane.clock, self._host_clock)
        if operation.after is not None:
            _advance(lane.clock, operation.after.clock)
        operation.clock = {**lane.clock, stream: lane.count}
        lane.clock = dict(operation.clock)
        for span in operation.reads:
            memory = self.memory_at(span, operation.label)
            self._ordered(operation, memory.last_write)
            memory.reads.append(operation)
        for span in operation.writes:
            memory = self.memory_at(span, operation.label)
            for earlier in (memory.last_write, *memory.reads):
                self._ordered(operation, earlier)
            memory.last_write, memory.reads = operation, []
        lane.queue.append(operation)
        lane.last = operation

    def _ordered(self, later: Operation, earlier: Operation | None) -> None:
        if earlier is None or earlier is later or later.clock.get(earlier.stream, 0) >= earlier.number:
            return
        raise SimulationError(f"nothing keeps {later.label!r} from running beside {earlier.label!r}")

    # The binding

    def count(self) -> int:
        return 1

    def facts(self, ordinal: int) -> Facts:
        return Facts("Simulated GPU", "8.9", self.total_bytes, self.integrated, "13.0")

    def retain(self, ordinal: int) -> Any:
        self.retained += 1
        return "context"

    def release(self, ordinal: int, context: Any) -> None:
        self.retained -= 1

    def push(self, context: Any) -> None:
        if not self.retained:
            raise SimulationError("a context that was released")
        with self._lock:
            self._enter("push", needs_context=False)
        self._thread.depth = getattr(self._thread, "depth", 0) + 1

    def pop(self, context: Any) -> None:
        self._thread.depth -= 1

    def free_and_total_bytes(self) -> tuple[int, int]:
        with self._lock:
            self._enter("memory")
            return self.total_bytes - self.allocated, self.total_bytes

    def allocate(self, size: int) -> int:
        with self._lock:
            self._enter("allocate")
            if any(stream.capturer == threading.get_ident() for stream in self._streams.values()):
                raise failure("allocate", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
            if size > self.total_bytes - self.allocated:
                raise failure("allocate", OUT_OF_MEMORY, asked_bytes=size)
            self.allocated += size
            self.largest_allocated = max(self.largest_allocated, self.allocated)
            return self._living(size)

    def _living(self, size: int) -> int:
        array = np.full(size, 0xA5, np.uint8)
        address = int(array.ctypes.data)
        self._memory[address] = Memory(size, array)
        return address

    def free(self, address: int) -> None:
        with self._lock:
            self._enter("free")
            if address not in self._memory:
                raise SimulationError(f"{address:#x} was freed twice, or never allocated")
            self.allocated -= self._memory.pop(address).size

    def allocate_host(self, size: int, mapped: bool) -> HostBlock:
        with self._lock:
            self._enter("allocate_host")
            address = self._living(size)
            return HostBlock(self._memory[address].array, address if mapped else None)

    def free_host(self, block: HostBlock) -> None:
        with self._lock:
            self._enter("free_host")
            del self._memory[int(block.array.ctypes.data)]

    def copy_in(self, address: int, array: Array, stream: int) -> None:
        with self._lock:
            self._enter("copy_in")
            source = Span(int(array.ctypes.data), array.nbytes)

            def act() -> None:
                ctypes.memmove(address, source.address, source.size)

            self.put(stream, Operation("copy in", act, (source,), (Span(address, array.nbytes),)))

    def copy_out(self, array: Array, address: int, stream: int) -> None:
        with self._lock:
            self._enter("copy_out")
            target = Span(int(array.ctypes.data), array.nbytes)

            def act() -> None:
                ctypes.memmove(target.address, address, target.size)

            self.put(stream, Operation("copy out", act, (Span(address, array.nbytes),), (target,)))
            ctypes.memset(target.address, 0xCD, target.size)

    def create_stream(self) -> int:
        with self._lock:
            self._enter("create_stream")
            handle = next(self._handles)
            self._streams[handle] = SimulatedStream()
            return handle

    def destroy_stream(self, stream: int) -> None:
        with self._lock:
            self._enter("destroy_stream")
            if self._streams.pop(stream).queue:
                raise SimulationError("a stream was destroyed with work in it")

    def synchronize_stream(self, stream: int) -> None:
        with self._lock:
            self._enter("synchronize_stream")
            self._run_until(self._streams[stream].last, "synchronize_stream")

    def create_event(self, timed: bool) -> int:
        with self._lock:
            self._enter("create_event")
            handle = next(self._handles)
            self._events[handle] = None
            return handle

    def destroy_event(self, event: int) -> None:
        with self._lock:
            self._enter("destroy_event")
            del self._events[event]

    def record(self, event: int, stream: int) -> None:
        with self._lock:
            self._enter("record")
            self._events[event] = operation = Operation("event")
            self.put(stream, operation)

    def wait(self, stream: int, event: int) -> None:
        with self._lock:
            self._enter("wait")
            if (recorded := self._events[event]) is not None:
                self.put(stream, Operation("wait", after=recorded))

    def synchronize_event(self, event: int) -> None:
        with self._lock:
            self._enter("synchronize_event")
            self._run_until(self._events[event], "synchronize_event")

    def elapsed_ms(self, start: int, end: int) -> float:
        with self._lock:
            self._enter("elapsed_ms")
            first, last = self._events[start], self._events[end]
            if first is None or last is None or first.done_at is None or last.done_at is None:
                raise failure("elapsed_ms", "CUDA_ERROR_NOT_READY")
            return last.done_at - first.done_at

    def begin_capture(self, stream: int) -> None:
        with self._lock:
            self._enter("begin_capture")
            self._streams[stream].captured = []
            self._streams[stream].capturer = threading.get_ident()

    def end_capture(self, stream: int) -> int:
        with self._lock:
            captured, self._streams[stream].captured = self._streams[stream].captured, None
            self._streams[stream].capturer = None
            self._enter("end_capture")
            if captured is None:
                raise SimulationError("a capture ended that never began")
            handle = next(self._handles)
            self._graphs[handle] = captured
            return handle

    def launch(self, graph: int, stream: int) -> None:
        with self._lock:
            self._enter("launch")
            for operation in self._graphs[graph]:
                again = Operation(f"{operation.label} (graph)", operation.act, operation.reads, operation.writes)
                self.put(stream, again)

    def destroy_graph(self, graph: int) -> None:
        with self._lock:
            self._enter("destroy_graph")
            del self._graphs[graph]


def _advance(clock: Clock, known: Mapping[int, int]) -> None:
    for stream, count in known.items():
        clock[stream] = max(clock.get(stream, 0), count)


# TensorRT


def simulated_plan(
    model: bytes,
    sizes: Mapping[str, tuple[int, int]],
    *,
    activation_bytes: int = 4096,
    weight_bytes: int = 1000,
    streamable: bool = False,
    unknown_outputs: Sequence[str] = (),
    on_host: Sequence[str] = (),
) -> bytes:
    """What the stand-in loads: an ONNX graph, and the least and largest size of each of its free axes.

    It is as long as its weights say, whatever the graph's own are.
    """
    facts = {
        "sizes": dict(sizes), "activation_bytes": activation_bytes, "weight_bytes": weight_bytes,
        "streamable": streamable, "unknown": list(unknown_outputs), "on_host": list(on_host), "model": len(model),
    }  # fmt: skip
    return json.dumps(facts).encode() + b"\0" + model.ljust(len(model) + weight_bytes, b"\0")


class SimulatedEngine:
    """The weights, which take device memory as soon as there is a context, and their budget."""

    def __init__(self, cuda: SimulatedCuda, plan: bytes) -> None:
        self.cuda = cuda
        self.contexts = 0
        self.budget: int | None = None
        self.weights = 0
        facts, _, model = plan.partition(b"\0")
        try:
            self.facts = json.loads(facts)
            self.session = _session(model[: self.facts["model"]])
        except Exception as exc:  # onnxruntime's exceptions share no base class
            raise EngineFailed("The simulated TensorRT could not load the engine; it says: no plan.") from exc

    def load_weights(self) -> None:
        if not self.weights:
            size = self.facts["weight_bytes"] if self.budget is None else self.budget
            self.weights = self.cuda.allocate(max(1, size))

    def unload_weights(self) -> None:
        if self.weights:
            self.cuda.free(self.weights)
            self.weights = 0

    def __del__(self) -> None:
        """Whatever is wrong is for `leaks`: nobody hears of what is raised here."""
        try:
            if not self.cuda._sticky:
                self.unload_weights()
        except SimulationError as exc:
            self.cuda.faults.append(str(exc))


_sessions: dict[str, Any] = {}


def _session(model: bytes) -> Any:
    key = hashlib.sha256(model).hexdigest()
    if key not in _sessions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        _sessions[key] = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return _sessions[key]


class SimulatedContext:
    def __init__(self, engine: SimulatedEngine, graphs: bool) -> None:
        self.engine = engine
        self.graphs = graphs
        self.addresses: dict[str, int] = {}
        self.scratch: Span | None = None
        self.shapes = {
            node.name: tuple(axis if isinstance(axis, int) else -1 for axis in node.shape)
            for node in engine.session.get_inputs()
        }
        engine.load_weights()
        engine.contexts += 1

    def __del__(self) -> None:
        self.engine.contexts -= 1

    def sizes(self) -> dict[str, int]:
        """The free axes, as the inputs' shapes have them."""
        found = {}
        for node in self.engine.session.get_inputs():
            for axis, size in zip(node.shape, self.shapes[node.name]):
                if isinstance(axis, str) and size != -1:
                    found[axis] = size
        return found


class SimulatedTensorRT:
    """A runtime of TensorRT: `executor.RuntimeApi`, over onnxruntime."""

    flavour = "tensorrt"
    version = "simulated"

    def __init__(self, cuda: SimulatedCuda, *, captures_graphs: bool = False) -> None:
        self.cuda = cuda
        self.captures_graphs = captures_graphs
        self.loads = 0
        self.enqueued = 0
        self.refuse_to_enqueue = False

    def deserialize(self, plan: bytes, *, graph: bytes | None) -> SimulatedEngine:
        self.loads += 1
        return SimulatedEngine(self.cuda, plan)

    def tensors(self, engine: SimulatedEngine) -> tuple[IoTensor, ...]:
        sizes, on_host = engine.facts["sizes"], engine.facts["on_host"]

        def tensor(node: Any, is_input: bool) -> IoTensor:
            dtype = {"float": "float32", "double": "float64", "float16": "float16"}.get(
                node.type[7:-1], node.type[7:-1]
            )
            bounds = [sizes.get(axis, (1, 1)) if isinstance(axis, str) else (axis, axis) for axis in node.shape]
            shape = tuple(axis if isinstance(axis, int) else -1 for axis in node.shape)
            least, most = tuple(low for low, _ in bounds), tuple(high for _, high in bounds)
            host = node.name in on_host
            return IoTensor(
                node.name, is_input, dtype, shape, most if is_input else None, least if is_input else None, host
            )

        inputs = [tensor(node, True) for node in engine.session.get_inputs()]
        return (*reversed(inputs), *(tensor(node, False) for node in engine.session.get_outputs()))

    def activation_bytes(self, engine: SimulatedEngine) -> int:
        streaming = engine.budget is not None and engine.budget < engine.facts["weight_bytes"]
        return int(engine.facts["activation_bytes"]) + (100 if streaming else 0)

    def weight_bytes(self, engine: SimulatedEngine) -> int | None:
        return int(engine.facts["weight_bytes"]) if engine.facts["streamable"] else None

    def set_weight_budget(self, engine: SimulatedEngine, bytes_: int) -> None:
        if engine.contexts or not engine.facts["streamable"]:
            raise EngineFailed("The weight budget cannot be set now.")
        engine.unload_weights()
        engine.budget = bytes_

    def new_context(self, engine: SimulatedEngine, *, graphs: bool) -> SimulatedContext:
        return SimulatedContext(engine, graphs)

    def set_activation(self, context: SimulatedContext, address: int, size: int) -> None:
        if size < self.activation_bytes(context.engine):
            raise SimulationError("too little scratch memory")
        context.scratch = Span(address, size)

    def set_shape(self, context: SimulatedContext, name: str, shape: tuple[int, ...]) -> None:
        tensor = next(tensor for tensor in self.tensors(context.engine) if tensor.name == name)
        bounds = zip(tensor.smallest or (), shape, tensor.largest or ())
        if not all(least <= size <= most for least, size, most in bounds):
            raise EngineFailed(f"The simulated TensorRT does not take {shape} for {name!r}.")
        context.shapes[name] = shape

    def shape(self, context: SimulatedContext, name: str) -> tuple[int, ...]:
        if name in context.shapes:
            return context.shapes[name]
        node = next(node for node in context.engine.session.get_outputs() if node.name == name)
        sizes = context.sizes()
        known = name not in context.engine.facts["unknown"]
        return tuple(axis if isinstance(axis, int) else sizes.get(axis, -1) if known else -1 for axis in node.shape)

    def largest_output_bytes(self, context: SimulatedContext, name: str) -> int:
        tensor = next(tensor for tensor in self.tensors(context.engine) if tensor.name == name)
        return tensor.bytes_at(self.shape(context, name))

    def set_address(self, context: SimulatedContext, name: str, address: int) -> None:
        context.addresses[name] = address

    def enqueue(self, context: SimulatedContext, stream: int) -> None:
        """Two operations: spoil the scratch memory; then compute, if it is still as it was left."""
        self.enqueued += 1
        if self.refuse_to_enqueue:
            raise EngineFailed("The simulated TensorRT could not run the engine.")
        tensors = {tensor.name: tensor for tensor in self.tensors(context.engine)}
        shapes = {name: self.shape(context, name) for name in tensors}
        if any(-1 in shape for shape in shapes.values()):
            raise SimulationError(f"enqueued without shapes: {shapes}")
        places = {
            name: (Span(context.addresses[name], tensor.bytes_at(shapes[name])), tensor.dtype, shapes[name])
            for name, tensor in tensors.items()
        }
        needed = self.activation_bytes(context.engine)
        if needed and context.scratch is None:
            raise SimulationError("enqueued without scratch memory")
        scratch = (context.scratch,) if context.scratch is not None else ()
        session, mark = context.engine.session, self.enqueued % 251

        def spoil() -> None:
            for span in scratch:
                ctypes.memset(span.address, mark, span.size)

        def compute() -> None:
            for span in scratch:
                if not (_array_at(span, "uint8", (span.size,)) == mark).all():
                    raise SimulationError("two computes had the scratch memory at once")
            feeds = {name: _array_at(*places[name]).copy() for name, tensor in tensors.items() if tensor.is_input}
            names = [name for name, tensor in tensors.items() if not tensor.is_input]
            for name, array in zip(names, session.run(names, feeds)):
                _array_at(*places[name])[...] = array

        reads = tuple(places[name][0] for name, tensor in tensors.items() if tensor.is_input)
        writes = tuple(places[name][0] for name, tensor in tensors.items() if not tensor.is_input)
        with self.cuda._lock:
            self.cuda._enter("enqueue")
            self.cuda.put(stream, Operation("scratch", spoil, (), scratch))
            self.cuda.put(stream, Operation("compute", compute, (*reads, *scratch), writes))


def _array_at(span: Span, dtype: str, shape: tuple[int, ...]) -> Array:
    flat = np.ctypeslib.as_array((ctypes.c_uint8 * max(1, span.size)).from_address(span.address))[: span.size]
    assert span.size == math.prod(shape) * np.dtype(dtype).itemsize
    return flat.view(dtype).reshape(shape)
