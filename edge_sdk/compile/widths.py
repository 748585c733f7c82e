"""FP16 and FP32 graphs from one another.

Both ways, a graph keeps the names *and* dtypes of its inputs and outputs: casts at the edge convert. So a client never
notices what a device computes in, and a model that came in FP16 is built like any other. The result is strongly typed:
what is FP16 in the graph is computed in FP16, which is what TensorRT 10 and later ask for.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper

from edge_sdk.compile.inspect import data_inputs, graphs_of, subgraphs

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
                _retype_tensor(tensor, new)
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


def _retype_tensor(tensor: TensorProto, new: int) -> None:
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
