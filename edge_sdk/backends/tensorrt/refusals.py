"""A graph that TensorRT does not take, told to whoever can change it: the node, what is wanted, what to do.

The parser stops at the first node it refuses. Where the rest of the graph would be taken, the places to cut the model
at are named - after the parts were tried on the parser, which says little about the rest of a graph that it refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edge_sdk.backends.tensorrt.parts import Graph, Split, split
from edge_sdk.errors import ModelError

STILL_RUNS = "The package's graph still runs, on onnxruntime."

_WORDS = {
    "UNSUPPORTED_NODE": "it has no such operator, or not with these inputs",
    "UNSUPPORTED_NODE_ATTR": "it does not take the operator with these attributes",
    "UNSUPPORTED_NODE_INPUT": "it does not take the operator with these inputs",
    "UNSUPPORTED_NODE_DATATYPE": "it does not take the operator for this data type",
    "UNSUPPORTED_NODE_SHAPE": "it does not take the operator for these shapes",
    "UNSUPPORTED_NODE_DYNAMIC": "it does not take the operator where sizes vary",
    "MODEL_DESERIALIZE_FAILED": "it cannot read the file as ONNX",
}
"""What the parser's codes mean, for where it gives no reason: it may say no more than `false`."""


@dataclass(frozen=True)
class Fault:
    """Where TensorRT's parser stopped, and why, in its own words."""

    code: str
    index: int
    """Of the node in the graph; -1: of none."""
    name: str
    operator: str
    reason: str


class Refused(Exception):
    """TensorRT's parser did not take a graph; never leaves this package."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault = fault


def as_model_error(
    graph: bytes, fault: Fault, fault_in: Callable[[bytes], Fault | None], runtime: str
) -> ModelError:  # fmt: skip
    """What to tell of a refused graph; `fault_in` tries another one on the parser of `runtime`."""
    parsed = Graph.read(graph)
    problem = f"{runtime} does not take {_subject(fault, parsed)}: {_reason(fault)}."
    if _is_about_quantisation(fault):
        return ModelError(
            problem,
            fix="It takes symmetric signed INT8, with zero point 0, and biases in FP32. Give edge-sdk the FP32 model, "
            f"which it quantises in that scheme for this profile. {STILL_RUNS}",
        )
    return ModelError(problem, fix=f"{_way_out(parsed, fault, fault_in)} {STILL_RUNS}")


def _subject(fault: Fault, graph: Graph | None) -> str:
    name, operator = _node(fault, graph)
    if not operator:
        return "the graph"
    return f"the node {name or f'number {fault.index}'} ({operator})"


def _node(fault: Fault, graph: Graph | None) -> tuple[str, str]:
    """Its name and operator; TensorRT 8.6 tells only the number."""
    if graph is not None and 0 <= fault.index < len(graph.nodes) and not fault.operator:
        node = graph.nodes[fault.index]
        return node.name, node.operator
    return fault.name, fault.operator


def _reason(fault: Fault) -> str:
    """What TensorRT wants, without the condition in its source that found it missing."""
    if "Plugin not found" in fault.reason:
        return "it has no such operator, and no plugin of that name"
    reason = re.sub(r"^(Assertion failed: .*?: |Invalid Node - [^;]*; )", "", fault.reason)
    if not re.search(r"[A-Za-z]{3,}\W+[A-Za-z]{2,}", reason):
        return _WORDS.get(fault.code, f"it says only {fault.reason or fault.code!r}")
    return f"it says: {reason.rstrip('.')}"


def _is_about_quantisation(fault: Fault) -> bool:
    return fault.operator in ("QuantizeLinear", "DequantizeLinear") or "ZeroPoint" in fault.reason


def _way_out(graph: Graph | None, fault: Fault, fault_in: Callable[[bytes], Fault | None]) -> str:
    if graph is None or fault.index < 0:
        return "Export the model again, with a current exporter."

    def refused_at(part: bytes) -> int | None:
        found = fault_in(part)
        return None if found is None else found.index

    return _offered(graph, split(graph, fault.index, refused_at))


def _offered(graph: Graph, found: Split | None) -> str:
    """The split in words, or that there is none worth its while."""
    instead = "Export the model with operators that TensorRT has."
    if found is None:
        return f"It refuses several of its nodes, so cutting the model does not help. {instead}"
    if 2 * (found.taken + found.untried) < len(graph.nodes) or not found.parts:
        return f"It takes {found.taken} of the other {len(graph.nodes) - 1} nodes, too few to cut the model. {instead}"
    refused = ", ".join(graph.nodes[index].title for index in found.refused)
    parts = "; ".join(graph.described(first, last) for first, last in found.parts)
    untried = (
        f" The {found.untried} others could not be tried: the graph does not say what shapes they work on."
        if found.untried
        else ""
    )
    return (
        f"{instead} Or cut it at {refused}, and compute that elsewhere: TensorRT takes, as models of their own, "
        f"{parts}.{untried}"
    )


def fallback_notes(left: Mapping[str, Sequence[str]], layers: int) -> tuple[str, ...]:
    """Which layers run on the GPU though a DLA was asked for, by kind; nothing where it takes them all."""
    if not left:
        return ()
    count = sum(map(len, left.values()))
    kinds = (
        f"{kind.lower()} ({len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in sorted(left.items(), key=lambda item: -len(item[1]))
    )
    return (
        f"{count} of {layers} layers run on the GPU, because the DLA does not take them: {', '.join(kinds)}. "
        "It computes FP16 and INT8, with fixed shapes.",
    )
