"""A stand-in for TensorRT's runtime, where there is no GPU: its engines compute ONNX graphs with onnxruntime.

It runs over `simulated_gpu`, at whose addresses it reads and writes. A context writes all over the scratch memory it
was given, and looks before it computes whether that is still its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from edge_sdk.backends.tensorrt.executor import IoTensor
from edge_sdk.errors import EngineFailed
from edge_sdk.tensors import Array
from tests.backends.simulated_gpu import Operation, SimulatedCuda, SimulationError, Span


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
