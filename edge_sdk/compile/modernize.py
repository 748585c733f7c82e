"""Any ONNX file as users have them -> one modern FP32 graph, so that everything behind this file sees one kind.

What it does, in order: weights listed as inputs (IR 3) become plain weights; model-local functions are written out;
FP16 becomes FP32 inside; opsets 7 to 16 become 17; constants become weights; onnxslim removes what does nothing. Each
step is checked, and one that fails is left out and noted, because a graph that is less tidy still runs. An already
quantised graph is left exactly as it is: its ranges were chosen for the very nodes it has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from onnx import ModelProto, helper, numpy_helper

from edge_sdk.compile.inspect import ModelSummary, data_inputs, first_line, has_foreign_operators, has_subgraphs
from edge_sdk.compile.widths import widened
from edge_sdk.errors import ModelError

OPSET = 17
"""Per-channel Q/DQ came with 13; TensorRT 8.5 (JetPack 5), the oldest runtime we write for, reads up to 17."""
IR_VERSION = 8
"""The IR that came with opset 15 and that onnxruntime since 1.10 reads."""
MIN_OPSET = 7
"""The oldest that onnx's converter and onnxruntime promise to take."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModernGraph:
    """A graph the rest of the build can rely on, and what a person should know about how it came to be."""

    model: ModelProto
    notes: tuple[str, ...] = ()


def modern_graph(model: ModelProto, summary: ModelSummary, *, simplify: bool = True) -> ModernGraph:
    """The modern form of `model`, which itself stays as it is. `summary` describes `model`."""
    if summary.already_quantized:
        return ModernGraph(model, ("The model is already quantised; its graph is served exactly as it is.",))
    if summary.opset < MIN_OPSET:
        raise ModelError(
            f"{summary.file} uses opset {summary.opset}; opset {MIN_OPSET} is the oldest that can be converted.",
            fix="Export it again with a newer exporter.",
        )
    notes: list[str] = []
    graph = ModelProto()
    graph.CopyFrom(model)
    _remove_weights_from_inputs(graph)
    if graph.functions:
        graph = _tried(notes, "its functions could not be written out", onnx.inliner.inline_local_functions, graph)
    graph = _with_constants_as_weights(widened(graph))
    if summary.opset < OPSET:
        graph = _converted(graph, summary, notes)
    if simplify:
        graph = _tried(notes, "it could not be simplified", _simplified, graph)
    return ModernGraph(graph, tuple(notes))


def _tried(notes: list[str], failure: str, step: Callable[[ModelProto], ModelProto], graph: ModelProto) -> ModelProto:
    """The graph after `step`, or the same graph and a note where the step fails or breaks it."""
    try:
        result = step(graph)
        onnx.checker.check_model(result)
        if _interface(result) != _interface(graph):
            raise ValueError("the inputs or outputs changed")
    except Exception as exc:  # third-party graph surgery: whatever goes wrong, the graph before it still stands
        _log.debug("graph step failed", exc_info=True)
        notes.append(f"The graph is built as it is: {failure} ({first_line(exc)}).")
        return graph
    return result


def _interface(model: ModelProto) -> list[tuple[str, int]]:
    values = [*data_inputs(model.graph), *model.graph.output]
    return [(value.name, value.type.tensor_type.elem_type) for value in values]


def _remove_weights_from_inputs(model: ModelProto) -> None:
    """A weight listed as an input could be overridden by a caller, which keeps runtimes from folding it.

    Before IR 4 it had to be listed, so the IR version rises with this.
    """
    model.ir_version = max(model.ir_version, IR_VERSION)
    kept = data_inputs(model.graph)
    del model.graph.input[:]
    model.graph.input.extend(kept)


def _converted(graph: ModelProto, summary: ModelSummary, notes: list[str]) -> ModelProto:
    """At opset 17, where the converter can be trusted: it loses subgraphs' context and refuses other domains."""
    if has_subgraphs(graph) or has_foreign_operators(graph):
        kind = "control flow" if has_subgraphs(graph) else "operators of another domain"
        notes.append(f"The graph stays at opset {summary.opset}: it has {kind}, which cannot be converted safely.")
        return graph

    def convert(model: ModelProto) -> ModelProto:
        result: ModelProto = onnx.version_converter.convert_version(model, OPSET)
        return result

    return _tried(notes, f"it could not be converted from opset {summary.opset} to {OPSET}", convert, graph)


def _simplified(model: ModelProto) -> ModelProto:
    import onnxslim

    copy = ModelProto()
    copy.CopyFrom(model)  # onnxslim works in place
    result: ModelProto = onnxslim.slim(copy)
    return _with_constants_as_weights(result)


def _with_constants_as_weights(model: ModelProto) -> ModelProto:
    """`model` with the tensors of its Constant nodes as initializers (not in subgraphs)."""
    graph = model.graph
    outputs = {value.name for value in graph.output}
    kept = []
    for node in graph.node:
        constant = _constant(node) if node.op_type == "Constant" and node.output[0] not in outputs else None
        if constant is None:
            kept.append(node)
        else:
            graph.initializer.append(constant)
    del graph.node[:]
    graph.node.extend(kept)
    return model


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    attribute = node.attribute[0]
    if attribute.name in {"sparse_value", "value_string", "value_strings"}:
        return None
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        array = numpy_helper.to_array(value)
    else:
        array = np.asarray(value, "float32" if attribute.name.startswith("value_float") else "int64")
    return numpy_helper.from_array(array, node.output[0])
