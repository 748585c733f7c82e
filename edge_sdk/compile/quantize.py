"""A graph and its ranges -> a Q/DQ graph in the device's own scheme.

INT8 travels as QuantizeLinear and DequantizeLinear nodes of the ONNX standard, so one graph says it to every runtime.
Which tensors get them decides both speed and accuracy, and follows from three rules:

1. *Weighted* operators (Conv, Gemm, MatMul with constant weights) are worth computing in 8 bits: their data input and
   their weights are quantised. Weights are signed and symmetric, with a scale for each output channel.
2. A *follower* (pooling, concatenation, addition, reshaping...) is taken in only if it lies between weighted operators.
   One that leads only to float - the pooling before a softmax - would round the answer and save nothing.
3. onnxruntime's integer convolution also writes 8 bits, so its output is quantised - behind a following Relu or Clip,
   whose bounds the 8-bit range then implies. TensorRT quantises where it reads, and wants outputs left alone.

    placement = place(model, scheme)
    statistics = observe(model, placement.observed, samples, backend, profile)
    graph = quantized(model, placement, statistics.ranges("mse", symmetric=scheme.symmetric), scheme)

onnxruntime's own quantiser is not used: what it imports and what its options mean changes between releases, it takes
followers in whether or not rule 2 holds, and its INT32 biases cannot be had without.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx.checker
import onnx.shape_inference
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_sdk.compile.calibrate import Range
from edge_sdk.compile.inspect import subgraphs
from edge_sdk.errors import ModelError
from edge_sdk.profiles import Quantization
from edge_sdk.tensors import Array

MIN_OPSET = 13
"""The first with per-channel DequantizeLinear."""

_SAME_RANGE = frozenset(
    {"Concat", "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather"}
    | {"DepthToSpace", "SpaceToDepth"}
)
"""Followers that move values without making new ones. With one range for what goes in and comes out, 8-bit values are
copied; a Concat whose inputs differ would have each value looked up (a quarter of SqueezeNet's time on a CPU)."""
_OWN_RANGE = frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu"})
_FOLLOWERS = _SAME_RANGE | _OWN_RANGE
_DATA_INPUTS = dict.fromkeys(_SAME_RANGE - {"Concat"}, 1)
"""How many of a follower's inputs are data; the rest are shapes, axes and indices. Others: all of them."""
_BOUNDING = frozenset({"Relu", "Clip"})
_FLOAT_OUTPUT = frozenset({"Gemm", "MatMul"})
"""Operators whose integer kernels in onnxruntime can write FP32 directly."""


@dataclass(frozen=True)
class Placement:
    """Where 8 bits begin and end: nodes are named by their first output."""

    weighted: frozenset[str]
    followers: frozenset[str]
    activations: tuple[str, ...]
    """The tensors that get a Q/DQ pair, in the order of the graph."""
    observed: tuple[str, ...]
    """Those of them that depend on the data, so that their ranges must be observed. The others are constants."""
    moved: tuple[tuple[str, str], ...]
    """Pairs of activations of which one is the other's values in another order or shape."""
    joined: tuple[tuple[str, str], ...]
    """Pairs of which one is a part of the other."""

    def __bool__(self) -> bool:
        return bool(self.weighted)


def writes_8_bits(scheme: Quantization) -> bool:
    """Whether integer kernels want their outputs quantised too (rule 3).

    The same runtimes want INT32 biases, and TensorRT wants neither; so a profile says it once, with `quantize_bias`.
    """
    return scheme.quantize_bias


def place(model: ModelProto, scheme: Quantization) -> Placement:
    """Where `model` is computed in 8 bits under `scheme`; a falsy placement if nothing in it is worth it.

    Raises ModelError if the graph's opset is too old for per-channel Q/DQ.
    """
    opset = next((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), 0)
    if opset < MIN_OPSET:
        raise ModelError(
            f"INT8 takes opset {MIN_OPSET} or later; this graph could not be converted from opset {opset}.",
            fix="Export the model at a newer opset, or build it as fp32.",
        )
    graph = _Graph(model)
    weighted = {node.output[0] for node in graph.nodes if graph.is_weighted(node, scheme)}
    followers = _followers(graph, weighted)
    region = weighted | followers
    activations: dict[str, None] = {}
    moved: list[tuple[str, str]] = []
    joined: list[tuple[str, str]] = []
    for node in graph.nodes:
        if node.output[0] not in region:
            continue
        activations.update(dict.fromkeys(graph.data_inputs(node)))
        if writes_8_bits(scheme) and node.op_type not in _FLOAT_OUTPUT:
            activations.update(dict.fromkeys(graph.bounded(name) for name in node.output if name))
    for node in graph.nodes:
        if node.output[0] in followers and node.op_type in _SAME_RANGE:
            tensors = [name for name in (*node.output, *graph.data_inputs(node)) if name in activations]
            pairs = joined if node.op_type == "Concat" else moved
            pairs += [(tensors[0], other) for other in tensors[1:]]
    return Placement(
        weighted=frozenset(weighted),
        followers=frozenset(followers),
        activations=tuple(activations),
        observed=tuple(name for name in activations if name not in graph.weights),
        moved=tuple(moved),
        joined=tuple(joined),
    )


def quantized(model: ModelProto, placement: Placement, ranges: Mapping[str, Range], scheme: Quantization) -> ModelProto:
    """`model` with Q/DQ nodes at `placement`, 8-bit weights, and biases as `scheme` wants them.

    `ranges` has one for each of `placement.observed`.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    complete = {name: _constant_range(weights[name]) for name in placement.activations if name in weights}
    return _Writer(model, placement, _shared(placement, {**complete, **ranges}), scheme).write()


def _constant_range(tensor: TensorProto) -> Range:
    values = numpy_helper.to_array(tensor)
    return Range(float(values.min(initial=0.0)), float(values.max(initial=0.0)))


@dataclass(frozen=True)
class Levels:
    """How real numbers map to 8 bits: real = (integer - zero_point) * scale."""

    scale: Array
    zero_point: Array


def activation_levels(span: Range, scheme: Quantization) -> Levels:
    """The levels for one activation. Zero is always a level exactly: padding and ReLU rely on it."""
    kind = np.dtype("uint8" if scheme.activations == "u8" else "int8")
    lowest, highest = (0, 255) if scheme.activations == "u8" else (-128, 127)
    if scheme.symmetric:
        scale = _positive(span.reach / 127)
        return Levels(scale, np.array(128 if scheme.activations == "u8" else 0, kind))
    low, high = min(span.low, 0.0), max(span.high, 0.0)
    scale = _positive((high - low) / 255)
    if low == 0.0 and scale * np.float32(255) > np.float32(high):
        # The highest level may not exceed the range: only then does onnxruntime see that a Clip to it is implied.
        scale = np.nextafter(scale, np.float32(0))
    zero_point = np.clip(np.rint(lowest - low / float(scale)), lowest, highest)
    return Levels(scale, zero_point.astype(kind))


def _positive(scale: float) -> Array:
    """A scale of zero (a tensor that is always 0) would divide by zero."""
    return np.array(scale if scale > np.finfo(np.float32).tiny else 1.0, np.float32)


def _shared(placement: Placement, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """`ranges`, with those made one that are better one.

    The parts of a Concat share a range unless only some of them are negative: a tensor behind a Relu that got a
    negative half could no longer imply the Relu, and onnxruntime would compute its convolution in FP32.
    """
    shared = dict(ranges)
    changed = True
    while changed:  # ranges only widen, to at most the widest there is
        changed = False
        for one, other in (*placement.moved, *placement.joined):
            if (one, other) in placement.joined and (shared[one].low < 0) != (shared[other].low < 0):
                continue
            union = shared[one].union(shared[other])
            changed = changed or (shared[one], shared[other]) != (union, union)
            shared[one] = shared[other] = union
    return shared


def _followers(graph: _Graph, weighted: set[str]) -> set[str]:
    """The nodes of rule 2: reached from a weighted node through followers alone, and leading to one."""
    reached: set[str] = set()
    eight_bit: set[str] = set()  # tensors, behind their Relu or Clip
    for node in graph.nodes:
        key = node.output[0]
        if node.op_type in _FOLLOWERS and any(name in eight_bit for name in graph.data_inputs(node)):
            reached.add(key)
        if key in weighted or key in reached:
            eight_bit.update(graph.bounded(name) for name in node.output if name)
    leading = set(weighted)
    for node in reversed(graph.nodes):
        if node.output[0] in reached:
            consumers = (user for name in node.output if name for user in graph.users[graph.bounded(name)])
            if any(user is not None and user.output[0] in leading for user in consumers):
                leading.add(node.output[0])
    return leading - weighted


class _Graph:
    """A top-level graph with what placement asks of it."""

    def __init__(self, model: ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._outputs = {value.name for value in model.graph.output}
        self._floats = _float_tensors(model)
        self.users: dict[str, list[NodeProto | None]] = defaultdict(list)
        """Who reads a tensor; None stands for a subgraph."""
        for node in self.nodes:
            for name in node.input:
                self.users[name].append(node)
            for inner in subgraphs(node):
                for name in _read_in(inner):
                    self.users[name].append(None)

    def is_weighted(self, node: NodeProto, scheme: Quantization) -> bool:
        """Whether `node` multiplies FP32 data with constant weights in a form that has an integer kernel."""
        if node.op_type not in _CHANNEL_AXIS or len(node.input) < 2 or node.domain not in {"", "ai.onnx"}:
            return False
        if node.input[0] in self.weights or node.input[0] not in self._floats:
            return False
        weight = self.weights.get(node.input[1])
        if weight is None or weight.data_type != TensorProto.FLOAT:
            return False
        bias = node.input[2] if len(node.input) > 2 else ""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Gemm":
            plain = attributes.get("alpha", 1.0) == 1.0 and not attributes.get("transA", 0)
            return plain and (not bias or (attributes.get("beta", 1.0) == 1.0 and self._is_vector(bias)))
        if node.op_type == "MatMul":
            return len(weight.dims) == 2
        if node.op_type == "ConvTranspose":
            return not writes_8_bits(scheme) and attributes.get("group", 1) == 1  # onnxruntime has no integer kernel
        return not bias or bias in self.weights

    def data_inputs(self, node: NodeProto) -> list[str]:
        """The FP32 tensors that `node` computes on, its weights and bias apart."""
        count = 1 if node.op_type in _CHANNEL_AXIS else _DATA_INPUTS.get(node.op_type, len(node.input))
        return [name for name in node.input[:count] if name in self._floats]

    def bounded(self, name: str) -> str:
        """The tensor behind the Relu or Clip that alone reads `name`, else `name` itself."""
        users = self.users[name]
        if name not in self._outputs and len(users) == 1 and users[0] is not None and users[0].op_type in _BOUNDING:
            return str(users[0].output[0])
        return name

    def _is_vector(self, name: str) -> bool:
        return name in self.weights and len(self.weights[name].dims) == 1


_CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
"""The axis of the weights that runs over output channels (Gemm: 0 if transB)."""


def _float_tensors(model: ModelProto) -> set[str]:
    """The FP32 tensors of the top-level graph, as far as shape inference knows."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    floats = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return floats | {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT and t.dims}


def _read_in(graph: GraphProto) -> Iterator[str]:
    """Every name that nodes of a subgraph read; those of the graph around it are among them."""
    for node in graph.node:
        yield from node.input
        for inner in subgraphs(node):
            yield from _read_in(inner)
    yield from (value.name for value in graph.output)


class _Writer:
    """Writes the Q/DQ graph, node by node in the order of the old one."""

    def __init__(
        self, model: ModelProto, placement: Placement, ranges: Mapping[str, Range], scheme: Quantization
    ) -> None:
        self._model = model
        self._graph = _Graph(model)
        self._placement = placement
        self._scheme = scheme
        self._levels = {name: activation_levels(ranges[name], scheme) for name in placement.activations}
        self._nodes: list[NodeProto] = []
        self._weights: list[TensorProto] = []
        self._written: set[str] = set()

    def write(self) -> ModelProto:
        graph = self._model.graph
        outputs = {value.name for value in graph.output}
        everywhere = writes_8_bits(self._scheme)
        # A quantised tensor that the caller reads keeps its name for what comes out of the DequantizeLinear.
        inner = {name: f"{name}/float" for name in self._levels if everywhere and name in outputs}
        dequantized = {name: name if name in inner else f"{name}/dequantized" for name in self._levels}
        for name in self._levels:
            if name in self._graph.weights or any(name == value.name for value in graph.input):
                self._add_pair(name, name, dequantized[name])
        for node in graph.node:
            copy = NodeProto()
            copy.CopyFrom(node)
            key = node.output[0]
            if key in self._placement.weighted:
                self._write_weights(copy)
            if everywhere or key in self._placement.weighted | self._placement.followers:
                data = set(self._graph.data_inputs(node)) if not everywhere else self._levels.keys()
                copy.input[:] = [dequantized.get(name, name) if name in data else name for name in copy.input]
            copy.output[:] = [inner.get(name, name) for name in copy.output]
            self._nodes.append(copy)
            for name in node.output:
                if name in self._levels:
                    self._add_pair(name, inner.get(name, name), dequantized[name])
        return self._assembled()

    def _assembled(self) -> ModelProto:
        result = ModelProto()
        result.CopyFrom(self._model)
        graph = result.graph
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in node.input} | {value.name for value in graph.output}
        used.update(name for node in self._nodes for inner in subgraphs(node) for name in _read_in(inner))
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *self._weights])
        onnx.checker.check_model(result)
        return result

    def _add_pair(self, name: str, source: str, target: str) -> None:
        """Q and DQ behind the tensor `source`, with the levels of `name`, coming out as `target`."""
        levels = self._levels[name]
        scale = self._constant(f"{name}/scale", levels.scale)
        zero_point = self._constant(f"{name}/zero_point", levels.zero_point)
        self._nodes.append(
            helper.make_node(
                "QuantizeLinear", [source, scale, zero_point], [f"{name}/quantized"], f"{name}/QuantizeLinear"
            )
        )
        self._nodes.append(
            helper.make_node(
                "DequantizeLinear", [f"{name}/quantized", scale, zero_point], [target], f"{name}/DequantizeLinear"
            )
        )

    def _write_weights(self, node: NodeProto) -> None:
        """Put 8-bit weights behind `node`, and an INT32 bias where the scheme has them.

        Each node gets weights of its own: two that share them rarely agree on what their biases need.
        """
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weight = numpy_helper.to_array(self._graph.weights[node.input[1]])
        axis = 0 if node.op_type == "Gemm" and attributes.get("transB", 0) else _CHANNEL_AXIS[node.op_type]
        scales = _weight_scales(weight, axis, self._scheme)
        source = self._levels[node.input[0]].scale
        bias_name = node.input[2] if len(node.input) > 2 else ""
        bias = None
        if bias_name and self._scheme.quantize_bias:
            bias = numpy_helper.to_array(self._graph.weights[bias_name])
            scales = _room_for_bias(scales, bias, source)
        prefix = f"{node.output[0]}/weight"
        node.input[1] = self._add_dequantized(prefix, _rounded(weight, scales, axis, np.int8), scales, axis)
        if bias is not None:
            scale = (scales * source).astype(np.float32)
            integers = _rounded(bias, scale, 0, np.int32)
            node.input[2] = self._add_dequantized(f"{node.output[0]}/bias", integers, scale, 0)

    def _add_dequantized(self, name: str, integers: Array, scales: Array, axis: int) -> str:
        inputs = [
            self._constant(f"{name}/quantized", integers),
            self._constant(f"{name}/scale", scales),
            self._constant(f"{name}/zero_point", np.zeros(scales.shape, integers.dtype)),
        ]
        target = f"{name}/dequantized"
        node = helper.make_node("DequantizeLinear", inputs, [target], f"{name}/DequantizeLinear")
        if scales.ndim:
            node.attribute.append(helper.make_attribute("axis", axis))
        self._nodes.append(node)
        return target

    def _constant(self, name: str, array: Array) -> str:
        if name not in self._written:
            self._written.add(name)
            self._weights.append(numpy_helper.from_array(array, name))
        return name


def _weight_scales(weight: Array, axis: int, scheme: Quantization) -> Array:
    """One scale for each output channel, or one for all; the largest weight becomes the highest level."""
    highest = 63 if scheme.reduce_range else 127
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others if scheme.per_channel else None, initial=0.0)
    return np.where(largest > np.finfo(np.float32).tiny, largest / highest, 1.0).astype(np.float32)


def _room_for_bias(scales: Array, bias: Array, source: Array) -> Array:
    """`scales`, larger where a bias would not fit INT32: a channel whose weights are next to nothing."""
    largest = np.abs(bias) if scales.ndim else np.abs(bias).max(initial=0.0)
    return np.maximum(scales, (largest / (float(source) * 2.0**30))).astype(np.float32)


def _rounded(values: Array, scales: Array, axis: int, kind: type[np.int8 | np.int32]) -> Array:
    shape = [1] * values.ndim
    if scales.ndim:
        shape[axis] = -1
    limit = np.iinfo(kind).max
    steps = np.rint(values.astype(np.float64) / scales.astype(np.float64).reshape(shape))
    return np.clip(steps, -limit, limit).astype(kind)
