"""Parts of an ONNX graph as models of their own, to find out which of them TensorRT takes.

As in `backends.onnx_bytes`, protobuf is read and written as it lies there: the device that compiles has no `onnx`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from edge_sdk.backends.onnx_bytes import fields

# onnx.proto's field numbers.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_WEIGHT, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE = 1, 2, 5, 11, 12, 13
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OPERATOR, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_GRAPHS = (6, 11)
_TENSOR_NAME = 8
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR, _TENSOR_TYPE_ELEMENT, _FLOAT = 1, 1, 1
_VARINT, _BYTES = 0, 2

_MOST_REFUSALS = 4
"""A model cut into more pieces than five is no split that anybody wants."""


@dataclass(frozen=True)
class Node:
    name: str
    operator: str
    inputs: tuple[str, ...]
    """What it reads, also from within its subgraphs."""
    outputs: tuple[str, ...]
    raw: memoryview = field(repr=False)

    @property
    def title(self) -> str:
        return f"{self.name or ', '.join(self.outputs)} ({self.operator})"


@dataclass(frozen=True)
class Graph:
    """A model, as far as it has to be known to take it apart."""

    nodes: tuple[Node, ...]
    weights: dict[str, memoryview]
    values: dict[str, memoryview]
    """The name and type of every tensor whose type the graph tells, as a ValueInfo."""
    outputs: tuple[str, ...]
    around: bytes
    """The model's other fields: IR version, opsets, functions."""

    @classmethod
    def read(cls, model: bytes) -> Graph | None:
        """None for bytes that are no ONNX model."""
        try:
            return cls._read(memoryview(model))
        except (IndexError, ValueError):
            return None

    @classmethod
    def _read(cls, view: memoryview) -> Graph:
        nodes: list[Node] = []
        weights: dict[str, memoryview] = {}
        values: dict[str, memoryview] = {}
        outputs: list[str] = []
        around = b""
        for number, kind, value, stop in fields(view, 0, len(view)):
            if number != _MODEL_GRAPH:
                around += _varint_field(number, value) if kind == _VARINT else _field(number, view[value:stop])
                continue
            for inner, content in _contents(view[value:stop]):
                if inner == _GRAPH_NODE:
                    nodes.append(_node(content))
                elif inner == _GRAPH_WEIGHT:
                    weights[_texts(content, _TENSOR_NAME)[0]] = content
                elif inner in (_GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE):
                    name = _texts(content, _VALUE_NAME)[0]
                    values.setdefault(name, content)
                    if inner == _GRAPH_OUTPUT:
                        outputs.append(name)
        return cls(tuple(nodes), weights, values, tuple(outputs), around)

    def crossing(self, first: int, last: int) -> tuple[list[str], list[str]]:
        """The tensors that nodes `first` to `last` (not included) take from elsewhere, and those they make for it."""
        inside = self.nodes[first:last]
        made = {name for node in inside for name in node.outputs}
        read = dict.fromkeys(name for node in inside for name in node.inputs if name not in made)
        needed = {name for node in (*self.nodes[:first], *self.nodes[last:]) for name in node.inputs}
        wanted = needed | set(self.outputs)
        return (
            [name for name in read if name and name not in self.weights],
            [name for node in inside for name in node.outputs if name in wanted],
        )

    def part(self, first: int, last: int) -> bytes | None:
        """Nodes `first` to `last` (not included) as a model; None where the type of what they read is not known."""
        inputs, outputs = self.crossing(first, last)
        if not outputs or any(name not in self.values for name in inputs):
            return None
        inside = self.nodes[first:last]
        read = {name for node in inside for name in node.inputs}
        graph = b"".join((
            *(_field(_GRAPH_NODE, node.raw) for node in inside),
            _field(_GRAPH_NAME, b"part"),
            *(_field(_GRAPH_WEIGHT, weight) for name, weight in self.weights.items() if name in read),
            *(_field(_GRAPH_INPUT, self.values[name]) for name in inputs),
            *(_field(_GRAPH_OUTPUT, self.values.get(name) or _float(name)) for name in outputs),
        ))  # fmt: skip
        return self.around + _field(_MODEL_GRAPH, graph)

    def described(self, first: int, last: int) -> str:
        """A part by its size and the tensors at its edges."""
        inputs, outputs = self.crossing(first, last)
        nodes = "1 node" if last - first == 1 else f"{last - first} nodes"
        return f"the {nodes} from {_listed(inputs)} to {_listed(outputs)}"


@dataclass(frozen=True)
class Split:
    """The parts, first node to last (not included), that are taken; the nodes that are not; and how many were untried
    because nothing tells the type of what they read."""

    parts: tuple[tuple[int, int], ...]
    refused: tuple[int, ...]
    untried: int

    @property
    def taken(self) -> int:
        return sum(last - first for first, last in self.parts)


def split(graph: Graph, refused: int, refused_at: Callable[[bytes], int | None]) -> Split | None:
    """Cut `graph` around the node `refused`, and around any other that turns out to be refused; None if they are many.

    `refused_at` tries a model, and gives the index of the first node in it that is refused, or None.
    """
    parts: list[tuple[int, int]] = []
    stopped = [refused]
    untried = 0
    waiting = [(refused + 1, len(graph.nodes)), (0, refused)]
    while waiting:
        first, last = waiting.pop()
        if first >= last:
            continue
        model = graph.part(first, last)
        at = refused_at(model) if model is not None else -1
        if at is None:
            parts.append((first, last))
        elif 0 <= at < last - first:
            stopped.append(first + at)
            if len(stopped) > _MOST_REFUSALS:
                return None
            waiting += [(first + at + 1, last), (first, first + at)]
        else:
            untried += last - first
    return Split(tuple(parts), tuple(sorted(stopped)), untried)


def _node(content: memoryview) -> Node:
    read = [*_texts(content, _NODE_INPUT)]
    for number, inner in _contents(content):
        if number == _NODE_ATTRIBUTE:
            for kind, graph in _contents(inner):
                if kind in _ATTRIBUTE_GRAPHS:
                    read += _read_from_outside(graph)
    name, operator = (_texts(content, number) for number in (_NODE_NAME, _NODE_OPERATOR))
    return Node("".join(name), "".join(operator), tuple(read), tuple(_texts(content, _NODE_OUTPUT)), content)


def _read_from_outside(graph: memoryview) -> list[str]:
    nodes = [_node(content) for number, content in _contents(graph) if number == _GRAPH_NODE]
    made = {name for node in nodes for name in node.outputs}
    for number, content in _contents(graph):
        if number == _GRAPH_WEIGHT:
            made.update(_texts(content, _TENSOR_NAME))
        elif number == _GRAPH_INPUT:
            made.update(_texts(content, _VALUE_NAME))
    return [name for node in nodes for name in node.inputs if name not in made]


def _contents(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a message that are bytes: texts and other messages."""
    for number, kind, value, stop in fields(message, 0, len(message)):
        if kind == _BYTES:
            yield number, message[value:stop]


def _texts(message: memoryview, wanted: int) -> list[str]:
    return [bytes(content).decode("utf-8", "replace") for number, content in _contents(message) if number == wanted]


def _field(number: int, content: bytes | memoryview) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _float(name: str) -> bytes:
    """A ValueInfo for a tensor whose type is not known: the parser wants one, and most are FP32.

    Where this one is not, the parser refuses the part for it, and the part counts as untried.
    """
    tensor = _varint_field(_TENSOR_TYPE_ELEMENT, _FLOAT)
    return _field(_VALUE_NAME, name.encode()) + _field(_VALUE_TYPE, _field(_TYPE_TENSOR, tensor))


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _listed(names: list[str]) -> str:
    shown = " and ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing"
