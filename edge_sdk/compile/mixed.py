"""An INT8 graph whose rest is computed in FP16, for devices that compute FP16 faster than FP32.

TensorRT's networks are strongly typed: what is FP32 in the graph is computed in FP32. Quantised operators are left as
they are, in between their Q/DQ nodes with FP32 scales: TensorRT makes INT8 kernels of them, and FP16 scales, which came
with opset 19, keep onnxruntime from its own. The other nodes fall into *regions*, each surrounded by quantised
operators and by the graph's edges. A region becomes FP16 as a whole, with casts around it, or stays FP32 as a whole:

1. If it multiplies matrices (attention does) it becomes FP16.
2. Otherwise it does if it is worth its casts: if it has at least one node for each that is more than an elementwise
   operation. An activation between two convolutions is not worth two casts; it is computed on the way.

    graph = mixed(quantized(model, placement, ranges, scheme))
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx.checker
import onnx.defs
import onnx.shape_inference
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper

from edge_sdk.compile.inspect import data_inputs, subgraphs
from edge_sdk.compile.widths import retyped_tensor

_HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"})
_MATRICES = frozenset({"Gemm", "MatMul"})
_JOINING = frozenset({"Add", "Sub", "Mul", "Sum"})
"""Elementwise, but where both inputs depend on the data they read two large tensors, and in FP16 half as much."""
_REDUCING = frozenset(
    {"Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization", "BatchNormalization", "LpNormalization"}
    | {"GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool", "Resize", "LRN", "ReduceMean", "ReduceSum"}
    | {"ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare", "CumSum", "TopK"}
)
_UNTYPED = frozenset({"", "ai.onnx"})


def mixed(model: ModelProto, *, matrices: bool = False) -> ModelProto:
    """`model`, a Q/DQ graph, with what is not quantised in FP16 wherever that is worth it; itself if it is nowhere.

    With `matrices` the quantised Gemms and MatMuls are FP16 as well, for devices that have no FP32 ones; onnxruntime
    then computes those in floats. Names and dtypes of inputs and outputs stay. Raises what onnx's checker raises if the
    result is not sound.
    """
    plan = _Plan(model, matrices)
    if not plan.halved:
        return model
    result = plan.written()
    onnx.checker.check_model(result, full_check=True)
    return result


@dataclass(frozen=True)
class _Tensors:
    """The FP32 tensors of a graph that depend on data, who makes each and who reads it."""

    names: frozenset[str]
    maker: Mapping[str, int]
    readers: Mapping[str, frozenset[int]]


class _Plan:
    """Which nodes, by their position, are computed in FP16."""

    def __init__(self, model: ModelProto, matrices: bool) -> None:
        self._model = model
        self._matrices = matrices
        self._nodes = list(model.graph.node)
        self._opset = next((o.version for o in model.opset_import if o.domain in _UNTYPED), 0)
        self._weights = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
        self._outputs = {value.name for value in model.graph.output}
        self._tensors = _float_tensors(model, self._weights)
        free = {i for i, node in enumerate(self._nodes) if self._may_be_halved(node)}
        self.halved: set[int] = set()
        for region in self._regions(free):
            if self._is_worth_it(region):
                self.halved |= region

    def written(self) -> ModelProto:
        """The graph, with casts where a tensor passes between the widths, and each tensor cast once at most."""
        result = ModelProto()
        result.CopyFrom(self._model)
        graph = result.graph
        del graph.node[:], graph.value_info[:]
        there: set[str] = {value.name for value in graph.input}
        halves: dict[str, TensorProto] = {}
        for index, node in enumerate(self._nodes):
            copy = NodeProto()
            copy.CopyFrom(node)
            if index in self.halved:
                for slot, name in enumerate(node.input):
                    if name in self._weights and _takes_half(node, slot, self._opset):
                        copy.input[slot] = _half(name)
                        halves.setdefault(name, _half_tensor(self._weights[name]))
                    elif name in self._tensors.names:
                        if _half(name) not in there:
                            graph.node.append(_cast(name, _half(name), TensorProto.FLOAT16))
                            there.add(_half(name))
                        copy.input[slot] = _half(name)
                copy.output[:] = [_half(name) if name in self._tensors.names else name for name in node.output]
            graph.node.append(copy)
            there.update(copy.output)
            for name in node.output:
                wide = name in self._outputs or self._tensors.readers.get(name, frozenset()) - self.halved
                if index in self.halved and name in self._tensors.names and wide:
                    graph.node.append(_cast(_half(name), name, TensorProto.FLOAT))
        read = {name for node in graph.node for name in _read_by(node)} | self._outputs
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *halves.values()])
        return result

    def _may_be_halved(self, node: NodeProto) -> bool:
        """Whether `node` computes FP32 outside of the quantised part, and could compute FP16 as it is."""
        if node.op_type in {"QuantizeLinear", "DequantizeLinear", "Cast"} or node.domain not in _UNTYPED:
            return False
        if any(a.name == "dtype" or a.type == AttributeProto.TENSOR for a in node.attribute) or subgraphs(node):
            return False
        makers = [self._nodes[self._tensors.maker[name]] for name in node.input if name in self._tensors.maker]
        if any(maker.op_type == "DequantizeLinear" for maker in makers):
            return self._matrices and node.op_type in _MATRICES
        floats = [slot for slot, name in enumerate(node.input) if name in self._tensors.names]
        made = [slot for slot, name in enumerate(node.output) if name in self._tensors.names]
        return bool(made) and all(
            _takes_half(node, slot, self._opset, written=slots is made) for slots in (floats, made) for slot in slots
        )

    def _regions(self, free: set[int]) -> Iterable[set[int]]:
        """The nodes of `free`, those together that touch the same tensor."""
        touching: dict[int, frozenset[str]] = {
            index: self._tensors.names.intersection([*self._nodes[index].input, *self._nodes[index].output])
            for index in free
        }
        at: dict[str, set[int]] = defaultdict(set)
        for index, names in touching.items():
            for name in names:
                at[name].add(index)
        left = set(free)
        while left:
            region: set[int] = set()
            waiting = {min(left)}
            while waiting:
                region |= waiting
                waiting = {other for index in waiting for name in touching[index] for other in at[name]} - region
            left -= region
            yield region

    def _is_worth_it(self, region: set[int]) -> bool:
        nodes = [self._nodes[index] for index in region]
        if any(node.op_type in _HEAVY for node in nodes):
            return True
        read = {name for node in nodes for name in node.input} & self._tensors.names
        made = {name for node in nodes for name in node.output} & self._tensors.names
        left = {name for name in made if name in self._outputs or self._tensors.readers[name] - region}
        return sum(map(self._is_substantial, nodes)) >= len(read - made) + len(left)

    def _is_substantial(self, node: NodeProto) -> bool:
        joins = node.op_type in _JOINING and sum(name in self._tensors.names for name in node.input) > 1
        return joins or node.op_type in _REDUCING


def _float_tensors(model: ModelProto, weights: Mapping[str, TensorProto]) -> _Tensors:
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.value_info, *data_inputs(graph), *graph.output]
    names = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT} - set(weights)
    readers: dict[str, set[int]] = {name: set() for name in names}
    maker = {}
    for index, node in enumerate(model.graph.node):
        for name in _read_by(node):
            if name in readers:
                readers[name].add(index)
        maker.update({name: index for name in node.output if name in names})
    return _Tensors(frozenset(names), maker, {name: frozenset(indices) for name, indices in readers.items()})


def _read_by(node: NodeProto) -> set[str]:
    """What a node reads, its subgraphs included."""
    read = set(node.input)
    for inner in subgraphs(node):
        read.update(value.name for value in inner.output)
        for other in inner.node:
            read |= _read_by(other)
    return read


def _takes_half(node: NodeProto, slot: int, opset: int, *, written: bool = False) -> bool:
    """Whether the specification lets the tensor in this place be FP16; some, such as a Resize's scales, are FP32."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return False
    formal = schema.outputs if written else schema.inputs
    wanted = formal[min(slot, len(formal) - 1)].type_str
    allowed: Sequence[str] = next(
        (c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == wanted), [wanted]
    )
    return "tensor(float16)" in allowed


def _half(name: str) -> str:
    return f"{name}/float16"


def _half_tensor(tensor: TensorProto) -> TensorProto:
    half = TensorProto()
    half.CopyFrom(tensor)
    half.name = _half(tensor.name)
    retyped_tensor(half, TensorProto.FLOAT16)
    return half


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}/Cast", to=to)
