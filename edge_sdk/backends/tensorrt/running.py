"""The half of TensorRT that runs plans, for each generation of its API: what `lanes.RuntimeApi` asks for.

`Running` has what all generations share; a subclass is exactly what differs. Nothing here knows CUDA: addresses, sizes
and streams are numbers that the executor brings. As in `compiling`, whatever is asked of the vendor's module is
written out, and listed in `names`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

from edge_sdk.backends.tensorrt.lanes import IoTensor
from edge_sdk.backends.tensorrt.logs import NEEDS_GPU, Said
from edge_sdk.backends.tensorrt.vendor import (
    DataType,
    ICudaEngine,
    IExecutionContext,
    IRuntimeConfig,
    OnnxParserRefitter,
    Refitter,
    Runtime,
)
from edge_sdk.errors import EdgeSdkError, EngineFailed, OutOfMemory

_NUMPY = {
    "FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8", "UINT8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
"""TensorRT's types -> numpy's. BF16, FP8 and the like have none, so no input or output of ours is of them."""


class Running(ABC):
    """Engines, their tensors, and the contexts in which they compute."""

    trt: Any
    flavour: str
    version: str
    said: Said
    logger: Any
    captures_graphs = False
    """Whether the runtime itself can run a context as one CUDA graph."""

    def deserialize(self, plan: bytes, *, graph: bytes | None) -> ICudaEngine:
        """The engine in `plan`; with `graph` (ONNX), its weights are put back from there, as a stripped plan needs.

        Raises EngineFailed with what TensorRT logged, OutOfMemory.
        """
        self.said.clear()
        runtime: Runtime = self._runtime
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._failed("load the engine")
        if graph is not None:
            self.refit(engine, graph)
        return engine

    @cached_property
    def _runtime(self) -> Runtime:
        """One for the process, because no engine may outlive it."""
        try:
            runtime: Runtime = self.trt.Runtime(self.logger)
        except Exception as exc:  # the bindings' TypeError: TensorRT made none
            raise self._failed("start") from exc
        self.prepare_runtime(runtime)
        return runtime

    def prepare_runtime(self, runtime: Runtime) -> None:
        """A version-compatible plan brings the runtime it was built with; its signature was checked before it came."""
        runtime.engine_host_code_allowed = True

    @abstractmethod
    def refit(self, engine: ICudaEngine, graph: bytes) -> None:
        """Put the weights of an ONNX graph into an engine that was compiled from it; EngineFailed."""

    def tensors(self, engine: ICudaEngine) -> tuple[IoTensor, ...]:
        """The engine's inputs and outputs, in its order; EngineFailed for a type that numpy does not have."""
        return tuple(self._tensor(engine, engine.get_tensor_name(index)) for index in range(engine.num_io_tensors))

    def _tensor(self, engine: ICudaEngine, name: str) -> IoTensor:
        kind: DataType = engine.get_tensor_dtype(name)
        if kind.name not in _NUMPY:
            raise EngineFailed(f"The engine's tensor {name!r} is of type {kind.name}, which no request can hold.")
        shape = tuple(engine.get_tensor_shape(name))
        is_input = bool(engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT)
        smallest: tuple[int, ...] | None = shape if is_input else None
        largest = smallest
        if is_input and -1 in shape:
            smallest, _, largest = (tuple(sizes) for sizes in engine.get_tensor_profile_shape(name, 0))
        on_host = bool(engine.get_tensor_location(name) == self.trt.TensorLocation.HOST)
        return IoTensor(name, is_input, _NUMPY[kind.name], shape, largest, smallest, on_host)

    @abstractmethod
    def activation_bytes(self, engine: ICudaEngine) -> int:
        """The scratch memory that one context needs, and that the caller gives it."""

    @abstractmethod
    def weight_bytes(self, engine: ICudaEngine) -> int | None:
        """The weights that can be streamed; None where the plan was not built for it."""

    @abstractmethod
    def set_weight_budget(self, engine: ICudaEngine, bytes_: int) -> None:
        """Keep at most `bytes_` of weights on the GPU and stream the rest; before the first context is made."""

    def new_context(self, engine: ICudaEngine, *, graphs: bool) -> IExecutionContext:
        """A context without scratch memory of its own; `graphs` is only heeded where `captures_graphs`."""
        self.said.clear()
        context = self.create_context(engine, graphs)
        if context is None:
            raise self._failed("make an execution context")
        return context

    @abstractmethod
    def create_context(self, engine: ICudaEngine, graphs: bool) -> IExecutionContext:
        """A context without scratch memory of its own, or None."""

    @abstractmethod
    def set_activation(self, context: IExecutionContext, address: int, size: int) -> None:
        """Compute in this memory of the device: at least `activation_bytes`, at a multiple of 256."""

    def set_shape(self, context: IExecutionContext, name: str, shape: tuple[int, ...]) -> None:
        self.said.clear()
        if not context.set_input_shape(name, shape):
            raise self._failed(f"take the shape {list(shape)} for the input {name!r}")

    def shape(self, context: IExecutionContext, name: str) -> tuple[int, ...]:
        """The shape of a tensor under the input shapes that were set; -1 where only computing tells."""
        return tuple(context.get_tensor_shape(name))

    def largest_output_bytes(self, context: IExecutionContext, name: str) -> int:
        """An upper bound of an output's size, over all shapes that the engine takes."""
        self.said.clear()
        size = int(context.get_max_output_size(name))
        if size < 0:
            raise self._failed(f"say how large the output {name!r} gets")
        return size

    def set_address(self, context: IExecutionContext, name: str, address: int) -> None:
        self.said.clear()
        if not context.set_tensor_address(name, address):
            raise self._failed(f"take an address for {name!r}")

    def enqueue(self, context: IExecutionContext, stream: int) -> None:
        """Give one inference to the CUDA stream with the handle `stream`; EngineFailed, OutOfMemory."""
        self.said.clear()
        if not context.execute_async_v3(stream):
            raise self._failed("run the engine")

    def _failed(self, act: str) -> EdgeSdkError:
        """The error for what TensorRT answered with None or False."""
        problem = f"{self.flavour} {self.version} could not {act}; it says: {self.said}."
        if self.said.out_of_memory:
            return OutOfMemory(problem, fix="Use a smaller max_batch, or unload another model.")
        if self.said.no_driver:
            return EngineFailed(problem, fix=NEEDS_GPU)
        return EngineFailed(problem)


class Running8(Running):
    """8.6: scratch memory without a size, and neither streamed nor stripped weights."""

    def refit(self, engine: ICudaEngine, graph: bytes) -> None:
        raise EngineFailed(f"{self.flavour} {self.version} cannot put weights back from a graph; TensorRT 10 can.")

    def activation_bytes(self, engine: ICudaEngine) -> int:
        return int(engine.device_memory_size)

    def weight_bytes(self, engine: ICudaEngine) -> None:
        return None

    def set_weight_budget(self, engine: ICudaEngine, bytes_: int) -> None:
        raise EngineFailed(f"{self.flavour} {self.version} cannot stream weights; TensorRT 10 can.")

    def create_context(self, engine: ICudaEngine, graphs: bool) -> IExecutionContext:
        """8.6 gives its profile to the first context only; one more has none until it is told which."""
        context: IExecutionContext = engine.create_execution_context_without_device_memory()
        if context is not None and context.active_optimization_profile < 0:
            context.active_optimization_profile = 0
        return context

    def set_activation(self, context: IExecutionContext, address: int, size: int) -> None:
        context.device_memory = address


class Running10(Running):
    """10 and 11."""

    def refit(self, engine: ICudaEngine, graph: bytes) -> None:
        refitter: Refitter = self.trt.Refitter(engine, self.logger)
        parser: OnnxParserRefitter = self.trt.OnnxParserRefitter(refitter, self.logger)
        if not (parser.refit_from_bytes(graph) and refitter.refit_cuda_engine()):
            raise self._failed("put the weights back into the engine")

    def activation_bytes(self, engine: ICudaEngine) -> int:
        return int(engine.device_memory_size_v2)

    def weight_bytes(self, engine: ICudaEngine) -> int | None:
        return int(engine.streamable_weights_size) or None

    def set_weight_budget(self, engine: ICudaEngine, bytes_: int) -> None:
        engine.weight_streaming_budget_v2 = bytes_

    def create_context(self, engine: ICudaEngine, graphs: bool) -> IExecutionContext:
        return engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def set_activation(self, context: IExecutionContext, address: int, size: int) -> None:
        context.set_device_memory(address, size)


class RunningRtx(Running10):
    """TensorRT for RTX: captures CUDA graphs by itself, also while it still specialises kernels for a shape."""

    captures_graphs = True

    def prepare_runtime(self, runtime: Runtime) -> None:
        """Its plans bring no code for the host."""

    def create_context(self, engine: ICudaEngine, graphs: bool) -> IExecutionContext:
        config: IRuntimeConfig = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.cuda_graph_strategy = (
            self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if graphs else self.trt.CudaGraphStrategy.DISABLED
        )
        return engine.create_execution_context(config)
