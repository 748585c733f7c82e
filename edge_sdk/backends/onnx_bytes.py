"""What has to be known of a graph before a runtime is given its bytes: that it names no file.

ONNX lets a tensor lie in another file. Given bytes, onnxruntime and onnx's evaluator look for that file from the
current folder, and - onnxruntime 1.23 did, with its own setting for that folder too - wherever an absolute path leads.
A package is whole in itself, so its graph is refused before anybody opens anything. The structure is walked as protobuf
lays it out, without the `onnx` package, which a device that only serves does not have; weights are stepped over.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_sdk.errors import EngineFailed

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


def refuse_external_data(graph: bytes) -> None:
    """Raise EngineFailed if a tensor of the ONNX model `graph` has its data in a file, or the bytes are no protobuf."""
    view = memoryview(graph)
    waiting = [("Model", 0, len(view))]
    try:
        while waiting:
            message, start, end = waiting.pop()
            for number, kind, value, stop in _fields(view, start, end):
                if message == "Tensor" and number == _DATA_LOCATION and kind == _VARINT and value:
                    raise EngineFailed(
                        "The runtime cannot load the graph: some of its data lies in another file, "
                        "which a package never has.",
                        fix="Build the package again with `edge-sdk build-engine`.",
                    )
                if kind == _BYTES and (inner := _MESSAGES[message].get(number)):
                    waiting.append((inner, value, stop))
    except (IndexError, ValueError) as exc:
        raise EngineFailed("The runtime cannot load the graph: it is cut off, or no ONNX model.") from exc


def _fields(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
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
