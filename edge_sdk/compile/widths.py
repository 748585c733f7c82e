"""FP16 and FP32 graphs from one another.

Both ways, a graph keeps the names *and* dtypes of its inputs and outputs: casts at the edge convert. So a client never
notices what a device computes in, and a model that came in FP16 is built like any other. The result is strongly typed:
what is FP16 in the graph is computed in FP16, which is what TensorRT 10 and later ask for.

onnxruntime's CPU is another matter: it computes whole chains of FP16 nodes in FP32 and leaves out the rounding between
them, so that a value beyond FP16's range goes unnoticed. `rounded` is the graph to judge an FP16 graph by.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx.shape_inference
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_sdk.compile.inspect import data_inputs, graphs_of, subgraphs
from edge_sdk.tensors import Array

_FP16_MAX = float(np.finfo(np.float16).max)

_FP32_INPUTS = {"Resize": (1, 2), "Upsample": (1,)}
"""Inputs that the specification has as FP32 whatever the data is."""


def widened(model: ModelProto) -> ModelProto:
    """`model` computing in FP32 what it computed in FP16 or bfloat16; itself if there was neither."""
    for narrow in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        if _mentions(model, narrow):
            model = _retyped(model, narrow, TensorProto.FLOAT)
    return model


def narrowed(model: ModelProto) -> ModelProto:
    """`model` computing in FP16 what it computed in FP32. Constants beyond FP16's range become its largest."""
    return _retyped(model, TensorProto.FLOAT, TensorProto.FLOAT16)


def rounded(model: ModelProto) -> ModelProto:
    """`model` computing in FP32 all that it says in FP16, each value then rounded to FP16, and infinite beyond 65504.

    An accelerator that sums up in FP32 computes so. Values below 6e-5 keep more digits than FP16 has for them.
    """
    values = onnx.shape_inference.infer_shapes(model).graph
    halves = {
        value.name
        for value in (*values.value_info, *values.output, *values.input)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16
    }
    halves |= {f"{name}/float32" for name in halves}  # what `_cast_edges` calls them inside
    result = _retyped(model, TensorProto.FLOAT16, TensorProto.FLOAT)
    graph = result.graph
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in _ROUNDING.items())
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type in _EXACT:
            continue
        for slot, name in enumerate(node.output):
            if name in halves:
                node.output[slot] = f"{name}/exact"
                nodes += _rounding(f"{name}/exact", name)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return result


_EXACT = frozenset(
    {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather", "Expand", "Tile"}
    | {"Identity", "Relu", "MaxPool", "GlobalMaxPool", "Neg", "Abs", "Where", "Pad", "DepthToSpace", "SpaceToDepth"}
)
"""Operators whose results are values they were given, which are rounded already."""

_ROUNDING: dict[str, Array] = {
    "rounding/splitter": np.array(2**13 + 1, np.float32),
    "rounding/lowest": np.nextafter(np.float32(-65520), np.float32(0)),
    "rounding/highest": np.nextafter(np.float32(65520), np.float32(0)),
    "rounding/large": np.array(2.0**100, np.float32),
}
"""From 65520 on, the nearest FP16 number is infinity."""


def _rounding(source: str, target: str) -> list[NodeProto]:
    """FP32 arithmetic that rounds to FP16's 11 bits (Veltkamp's splitting); a Cast there and back would be removed.

    What exceeds the range does so by 2^-8 or more, and 2^200 times that is infinity. NaN and infinity stay so.
    """
    inside, scaled, low, nearest, excess, larger, infinite = (f"{target}/{i}" for i in range(7))
    return [
        helper.make_node("Clip", [source, "rounding/lowest", "rounding/highest"], [inside]),
        helper.make_node("Mul", [inside, "rounding/splitter"], [scaled]),
        helper.make_node("Sub", [scaled, inside], [low]),
        helper.make_node("Sub", [scaled, low], [nearest]),
        helper.make_node("Sub", [source, inside], [excess]),
        helper.make_node("Mul", [excess, "rounding/large"], [larger]),
        helper.make_node("Mul", [larger, "rounding/large"], [infinite]),
        helper.make_node("Add", [nearest, infinite], [target]),
    ]


def _mentions(model: ModelProto, elem_type: int) -> bool:
    values = [*model.graph.input, *model.graph.output]
    return any(value.type.tensor_type.elem_type == elem_type for value in values) or any(
        tensor.data_type == elem_type for graph in graphs_of(model) for tensor in _constants(graph)
    )


def _retyped(model: ModelProto, old: int, new: int) -> ModelProto:
    result = ModelProto()
    result.CopyFrom(model)
    pinned = _pinned(result) if old == TensorProto.FLOAT else frozenset()
    for graph in graphs_of(result):
        for tensor in _constants(graph):
            if tensor.data_type == old and tensor.name not in pinned:
                retyped_tensor(tensor, new)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in {"to", "dtype"} and attribute.type == AttributeProto.INT and attribute.i == old:
                    attribute.i = new
        del graph.value_info[:]  # of the old type; shape inference finds them again
    for graph in list(graphs_of(result))[1:]:
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type == old:
                value.type.tensor_type.elem_type = new
    _cast_edges(result.graph, old, new)
    return result


def _pinned(model: ModelProto) -> frozenset[str]:
    """Constants that must stay FP32 because of the place they are used in."""
    return frozenset(
        node.input[slot]
        for graph in graphs_of(model)
        for node in graph.node
        for slot in _FP32_INPUTS.get(node.op_type, ())
        if slot < len(node.input)
    )


def _constants(graph: GraphProto) -> Iterable[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                if not attribute.t.name and node.op_type == "Constant":
                    attribute.t.name = node.output[0]
                yield attribute.t


def retyped_tensor(tensor: TensorProto, new: int) -> None:
    array = numpy_helper.to_array(tensor)
    if new == TensorProto.FLOAT16:
        array = np.where(np.isfinite(array), np.clip(array, -_FP16_MAX, _FP16_MAX), array)
    tensor.CopyFrom(numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(new)), tensor.name))


def _cast_edges(graph: GraphProto, old: int, new: int) -> None:
    """Casts behind inputs and before outputs of the type `old`, which keep that type."""
    inputs = [value.name for value in data_inputs(graph) if value.type.tensor_type.elem_type == old]
    outputs = [value.name for value in graph.output if value.type.tensor_type.elem_type == old]
    inner = {name: f"{name}/{helper.tensor_dtype_to_np_dtype(new).name}" for name in (*inputs, *outputs)}
    _rename(graph, inner)
    casts = [helper.make_node("Cast", [name], [inner[name]], to=new) for name in inputs]
    nodes = [*casts, *graph.node]
    nodes += [helper.make_node("Cast", [inner[name]], [name], to=old) for name in outputs if name not in inputs]
    del graph.node[:]
    graph.node.extend(nodes)


def _rename(graph: GraphProto, names: dict[str, str]) -> None:
    """Give values other names, wherever nodes of `graph` or of its subgraphs make or use them."""
    for node in graph.node:
        _rename_list(node.input, names)
        _rename_list(node.output, names)
        for inner in subgraphs(node):
            _rename(inner, names)
            for value in inner.output:
                value.name = names.get(value.name, value.name)


def _rename_list(values: object, names: dict[str, str]) -> None:
    listed = list(values)  # type: ignore[call-overload]  # protobuf's repeated field, which has no public type
    if any(name in names for name in listed):
        values[:] = [names.get(name, name) for name in listed]  # type: ignore[index]
