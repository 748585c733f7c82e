"""What has to be known of a graph before a runtime is given its bytes: that it names no file, and what goes in and out.

ONNX lets a tensor lie in another file. Given bytes, onnxruntime and onnx's evaluator look for that file from the
current folder, and - onnxruntime 1.23 did, with its own setting for that folder too - wherever an absolute path leads.
A package is whole in itself, so its graph is refused before anybody opens anything. The structure is walked as protobuf
lays it out, without the `onnx` package, which a device that only serves does not have; weights are stepped over.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_sdk.errors import EngineFailed
from edge_sdk.tensors import TensorSpec

_MESSAGES = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
"""onnx.proto, as far as it leads to tensors: message -> field number -> message."""

_DATA_LOCATION = 14
"""TensorProto's field; 0 (or absent): the data is in the tensor."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def refuse_external_data(graph: bytes | memoryview) -> None:
    """Raise EngineFailed if a tensor of the ONNX model `graph` has its data in a file, or the bytes are no protobuf."""
    with memoryview(graph) as view:  # let go of in any case: what it shows may be memory that somebody lends us
        try:
            if _names_a_file(view):
                raise EngineFailed(
                    "The runtime cannot load the graph: some of its data lies in another file, "
                    "which a package never has.",
                    fix="Build the package again with `edge-sdk build-engine`.",
                )
        except (IndexError, ValueError) as exc:
            raise EngineFailed("The runtime cannot load the graph: it is cut off, or no ONNX model.") from exc


def _names_a_file(view: memoryview) -> bool:
    waiting = [("Model", 0, len(view))]
    while waiting:
        message, start, end = waiting.pop()
        for number, kind, value, stop in fields(view, start, end):
            if message == "Tensor" and number == _DATA_LOCATION and kind == _VARINT and value:
                return True
            if kind == _BYTES and (inner := _MESSAGES[message].get(number)):
                waiting.append((inner, value, stop))
    return False


_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64",
}  # fmt: skip
"""TensorProto.DataType."""


def interface(graph: bytes) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and the outputs of the ONNX model `graph`; EngineFailed if it is none, or they are no tensors we know.

    An axis without a size is called as the graph calls it, `?` where it has no name.
    """
    view = memoryview(graph)
    try:
        start, stop = _inner(view, 0, len(view), 7)[-1]
        constants = {_text(view, *at, 8) for at in _inner(view, start, stop, 5)}  # old models list them as inputs
        inputs = [_spec(view, *at) for at in _inner(view, start, stop, 11) if _text(view, *at, 1) not in constants]
        return tuple(inputs), tuple([_spec(view, *at) for at in _inner(view, start, stop, 12)])
    except (IndexError, KeyError, ValueError) as exc:
        raise EngineFailed("The runtime cannot load the graph: its inputs and outputs cannot be made out.") from exc


def _spec(view: memoryview, start: int, end: int) -> TensorSpec:
    """A ValueInfoProto: its name, and in its TypeProto's Tensor the element type and the shape."""
    tensor = _inner(view, *_inner(view, start, end, 2)[-1], 1)[-1]
    dtype = next((value for number, _, value, _ in fields(view, *tensor) if number == 1), 0)
    shapes = _inner(view, *tensor, 2)
    axes = [_axis(view, *at) for at in _inner(view, *shapes[-1], 1)] if shapes else []
    return TensorSpec(_text(view, start, end, 1), _DTYPES[dtype], tuple(axes))


def _axis(view: memoryview, start: int, end: int) -> int | str:
    for number, kind, value, _ in fields(view, start, end):
        if number == 1 and kind == _VARINT:
            return value
    return _text(view, start, end, 2) or "?"


def _inner(view: memoryview, start: int, end: int, wanted: int) -> list[tuple[int, int]]:
    """Where each field of that number lies in a message."""
    return [(at, stop) for number, kind, at, stop in fields(view, start, end) if number == wanted and kind == _BYTES]


def _text(view: memoryview, start: int, end: int, wanted: int) -> str:
    found = _inner(view, start, end, wanted)
    return bytes(view[slice(*found[-1])]).decode("utf-8") if found else ""


def fields(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field of a message: its number, its wire type, and its value - of bytes, where they start and end."""
    at = start
    while at < end:
        tag, at = _varint(view, at)
        kind = tag & 7
        value, stop = at, at
        if kind == _VARINT:
            value, stop = _varint(view, at)
        elif kind == _BYTES:
            length, value = _varint(view, at)
            stop = value + length
        elif kind in (_FIXED32, _FIXED64):
            stop = at + (4 if kind == _FIXED32 else 8)
        else:  # groups, which onnx.proto has none of
            raise ValueError(f"wire type {kind}")
        if stop > end:
            raise ValueError("a field is longer than its message")
        yield tag >> 3, kind, value, stop
        at = stop


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number of more than ten bytes")
