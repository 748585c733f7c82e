"""Reading an ONNX file, trusting nothing in it, and saying what it is.

`read_model` gives back a model whose every byte was read by us: weights kept in other files are taken only from plain
files beside the model, opened without following a link, and checked against the shapes they claim to fill. The onnx
library's own loader is not used for them, because what it opens is decided by the file. Whatever the bytes are, the
answer is a model or a ModelError.

`inspect_model` says what a file is, for `edge-sdk inspect` and for the decisions of a build:

>>> print(inspect_model(Path("squeezenet.onnx")))
squeezenet.onnx: opset 13, 1,235,496 parameters, data_0: float32[1, 3, 224, 224] -> softmaxout_1: float32[1, 1000, 1, 1]
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_sdk.errors import BackendUnavailable, ModelError
from edge_sdk.tensors import MAX_RANK, TensorSpec, is_batchable

try:
    import onnx
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
except ImportError as exc:
    raise BackendUnavailable(
        f"Models cannot be read here: the Python package onnx cannot be imported ({exc}).",
        fix="Install it: pip install 'edge-sdk[build]'.",
    ) from exc

MAX_BYTES = 2**31 - 1
"""What one protobuf message can hold, and so a graph with its weights inside."""

_STANDARD_DOMAINS = frozenset({"", "ai.onnx"})

_ELEMENT_BITS: dict[int, int] = {
    TensorProto.FLOAT: 32, TensorProto.DOUBLE: 64, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16,
    TensorProto.INT8: 8, TensorProto.INT16: 16, TensorProto.INT32: 32, TensorProto.INT64: 64,
    TensorProto.UINT8: 8, TensorProto.UINT16: 16, TensorProto.UINT32: 32, TensorProto.UINT64: 64,
    TensorProto.BOOL: 8, TensorProto.COMPLEX64: 64, TensorProto.COMPLEX128: 128,
    TensorProto.FLOAT8E4M3FN: 8, TensorProto.FLOAT8E4M3FNUZ: 8, TensorProto.FLOAT8E5M2: 8,
    TensorProto.FLOAT8E5M2FNUZ: 8, TensorProto.UINT4: 4, TensorProto.INT4: 4,
}  # fmt: skip

_DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64", TensorProto.FLOAT16: "float16",
    TensorProto.INT8: "int8", TensorProto.INT16: "int16", TensorProto.INT32: "int32", TensorProto.INT64: "int64",
    TensorProto.UINT8: "uint8", TensorProto.UINT16: "uint16", TensorProto.UINT32: "uint32",
    TensorProto.UINT64: "uint64", TensorProto.BOOL: "bool", TensorProto.STRING: "string",
}  # fmt: skip

_OTHER_FORMATS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself", "Fetch it: git lfs pull."),
    (b"PK\x03\x04", "a ZIP archive (PyTorch and Keras save such)", "Export the model to ONNX."),
    (b"\x80\x02", "a Python pickle (older PyTorch saves such)", "Export the model to ONNX."),
    (b"\x89HDF", "an HDF5 file (Keras saves such)", "Export the model to ONNX."),
    (b"<", "a text file that begins like HTML or XML", "Was a web page downloaded in place of the model?"),
    (b"ftrt", "a TensorRT engine", "Engines cannot be taken apart; give the ONNX file it was built from."),
)


@dataclass(frozen=True)
class ModelSummary:
    """What an ONNX file is. `size_bytes` counts weights in other files too."""

    file: str
    size_bytes: int
    ir_version: int
    opsets: dict[str, int]
    producer: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    operators: dict[str, int]
    """How often each occurs, subgraphs included, most frequent first; other domains are written `domain::Op`."""
    parameters: int
    already_quantized: bool
    control_flow: bool
    batchable: bool
    """Whether requests can be stacked along the first axis."""

    @property
    def opset(self) -> int:
        return self.opsets.get("", 0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        kind = ", already quantised" if self.already_quantized else ""
        inputs, outputs = (", ".join(map(str, specs)) for specs in (self.inputs, self.outputs))
        return f"{self.file}: opset {self.opset}, {self.parameters:,} parameters{kind}, {inputs} -> {outputs}"


def inspect_model(path: Path) -> ModelSummary:
    """What the file at `path` is; ModelError if it is not a sound ONNX model."""
    return summarize(read_model(path), path.name)


def read_model(path: Path) -> ModelProto:
    """The model at `path`, complete: weights from other files are inside it.

    Raises ModelError for whatever is wrong: no such file, not ONNX, cut short, altered, or reaching outside its folder.
    """
    raw = _read_plain_file(path)
    model = ModelProto()
    try:
        model.ParseFromString(raw)
    except Exception as exc:  # protobuf's DecodeError, and UnicodeDecodeError for names that are not text
        raise _not_onnx(path, raw, f"the protobuf in it cannot be read ({first_line(exc)})") from exc
    if not model.HasField("graph"):
        raise _not_onnx(path, raw, "it holds no graph")
    try:
        _embed_external_data(model, path)
        _check_nothing_is_outside(model)
        _check_claims(model)
        onnx.checker.check_model(model)
        summarize(model, path.name)
    except ModelError:
        raise
    except Exception as exc:  # flipped bits reach every layer below: protobuf, numpy, the checker
        raise ModelError(
            f"{path} is not a sound ONNX model: {first_line(exc)}.",
            fix="Export it again; if it was copied, compare the copy with the original.",
        ) from exc
    return model


def summarize(model: ModelProto, file: str) -> ModelSummary:
    """What `model` is. `file` is the name to call it by."""
    nodes = [node for graph in graphs_of(model) for node in graph.node]
    operators = Counter(_operator(node) for node in nodes)
    inputs = tuple(_tensor_spec(value) for value in data_inputs(model.graph))
    outputs = tuple(_tensor_spec(value) for value in model.graph.output)
    return ModelSummary(
        file=file,
        size_bytes=model.ByteSize(),
        ir_version=model.ir_version,
        opsets={"" if o.domain in _STANDARD_DOMAINS else o.domain: o.version for o in model.opset_import},
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        inputs=inputs,
        outputs=outputs,
        operators=dict(operators.most_common()),
        parameters=sum(math.prod(t.dims) for graph in graphs_of(model) for t in graph.initializer),
        already_quantized=any(_is_quantized(node) for node in nodes),
        control_flow=has_subgraphs(model),
        batchable=is_batchable(inputs, outputs),
    )


def data_inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """The inputs a caller feeds. Before IR 4 every weight was listed as an input too."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def graphs_of(model: ModelProto) -> Iterator[GraphProto]:
    """The model's graph and every subgraph in it."""
    yield from _nested(model.graph)


def has_subgraphs(model: ModelProto) -> bool:
    return any(subgraphs(node) for node in model.graph.node)


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """The graphs in a node's attributes: the branches of an If, the body of a Loop."""
    found = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
    return found + [graph for a in node.attribute if a.type == AttributeProto.GRAPHS for graph in a.graphs]


def has_foreign_operators(model: ModelProto) -> bool:
    return any(node.domain not in _STANDARD_DOMAINS for graph in graphs_of(model) for node in graph.node)


def ends_in_softmax(model: ModelProto) -> bool:
    """Whether the first output is a softmax, seen through operators that only reshape or convert it."""
    producers = {name: node for node in model.graph.node for name in node.output}
    node = producers.get(model.graph.output[0].name)
    while node is not None and node.op_type in _TRANSPARENT and node.input:
        node = producers.get(node.input[0])
    return node is not None and node.op_type in {"Softmax", "QLinearSoftmax"}


_TRANSPARENT = frozenset(
    {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast", "Transpose"}
    | {"QuantizeLinear", "DequantizeLinear"}
)


def _operator(node: NodeProto) -> str:
    return node.op_type if node.domain in _STANDARD_DOMAINS else f"{node.domain}::{node.op_type}"


def _is_quantized(node: NodeProto) -> bool:
    return node.op_type.startswith(("QLinear", "QuantizeLinear", "DequantizeLinear", "DynamicQuantize", "QGemm")) or (
        node.op_type in {"ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QAttention", "QMoE", "MatMulNBits"}
    )


def _tensor_spec(value: ValueInfoProto) -> TensorSpec:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise ModelError(
            f"{value.name!r} is a {(kind or 'value of no type').removesuffix('_type')}; an engine takes tensors.",
            fix="Export it with plain tensors (for scikit-learn: zipmap=False).",
        )
    tensor = value.type.tensor_type
    if tensor.elem_type not in _DTYPES:
        raise ModelError(
            f"{value.name!r} is a tensor of type {_type_name(tensor.elem_type)}, which cannot be sent to an engine.",
            fix="Put a Cast to float32 at that end of the model.",
        )
    if len(tensor.shape.dim) > MAX_RANK:
        raise ModelError(f"{value.name!r} has {len(tensor.shape.dim)} axes; at most {MAX_RANK} are taken.")
    shape = tuple(
        axis.dim_value if axis.WhichOneof("value") == "dim_value" and axis.dim_value >= 0 else axis.dim_param or "?"
        for axis in tensor.shape.dim
    )
    return TensorSpec(value.name, _DTYPES[tensor.elem_type], shape)


def _type_name(elem_type: int) -> str:
    return str(TensorProto.DataType.Name(elem_type)) if elem_type in TensorProto.DataType.values() else f"#{elem_type}"


def _read_plain_file(path: Path) -> bytes:
    """The bytes of a regular file. A link to one is fine here: it was the user who named it."""
    try:
        # Without O_NONBLOCK, opening a FIFO that nobody writes to waits for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise ModelError(f"The model {path} cannot be read: {exc.strerror or exc}.") from exc
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ModelError(f"The model {path} is not a regular file.", fix="Give the .onnx file itself.")
    with os.fdopen(descriptor, "rb") as stream:
        if status.st_size == 0:
            raise ModelError(f"The model {path} is empty.", fix="Export or download it again.")
        if status.st_size > MAX_BYTES:
            raise ModelError(f"The model {path} has {status.st_size:,} bytes; protobuf ends at {MAX_BYTES:,}.")
        return stream.read()


def _not_onnx(path: Path, raw: bytes, problem: str) -> ModelError:
    for magic, what, fix in _OTHER_FORMATS:
        if raw.startswith(magic) or (magic == b"<" and raw.lstrip()[:1] == magic):
            return ModelError(f"{path} is not an ONNX file: it is {what}.", fix=fix)
    if raw[4:8] == b"TFL3":
        return ModelError(f"{path} is not an ONNX file: it is TensorFlow Lite.", fix="Export the model to ONNX.")
    return ModelError(
        f"{path} is not an ONNX file, or was cut short: {problem}.", fix="Export it again, or download it again."
    )


def _nested(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _nested(inner)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor the file holds: weights, sparse weights, constants in attributes; in functions and subgraphs too."""
    nodes = [node for function in model.functions for node in function.node]
    inside_functions = [graph for node in nodes for inner in subgraphs(node) for graph in _nested(inner)]
    for graph in (*graphs_of(model), *inside_functions):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        nodes.extend(graph.node)
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
            if attribute.type == AttributeProto.SPARSE_TENSOR:
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)


def _check_claims(model: ModelProto) -> None:
    """A tensor must bring the data its shape claims, before anybody allocates by that shape."""
    for tensor in _tensors(model):
        bits = _ELEMENT_BITS.get(tensor.data_type)
        if bits is None or not tensor.HasField("raw_data"):
            continue
        claimed = _claimed_bytes(tensor, bits)
        if claimed != len(tensor.raw_data):
            raise ModelError(
                f"The tensor {tensor.name!r} of shape {list(tensor.dims)} claims {claimed:,} bytes; "
                f"the file holds {len(tensor.raw_data):,}.",
                fix="The file was altered or cut short; export or download it again.",
            )


def _claimed_bytes(tensor: TensorProto, bits: int) -> int:
    if len(tensor.dims) > MAX_RANK or any(axis < 0 for axis in tensor.dims):
        raise ModelError(f"The tensor {tensor.name!r} has the impossible shape {list(tensor.dims)[: MAX_RANK + 1]}.")
    return int(-(-math.prod(tensor.dims) * bits // 8))


def _embed_external_data(model: ModelProto, path: Path) -> None:
    """Put the weights that lie in files beside the model into it.

    The folder is opened once and files only relative to it, by plain name and without following links, and judged by
    their open descriptor: nothing can be swapped between the check and the read. A hard link is refused because it may
    be another user's file; a FIFO or a device because it never ends.
    """
    external = [tensor for tensor in _tensors(model) if tensor.data_location == TensorProto.EXTERNAL]
    if not external:
        return
    total = model.ByteSize()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for tensor in external:
            where = {entry.key: entry.value for entry in tensor.external_data}
            size = _claimed_bytes(tensor, _ELEMENT_BITS.get(tensor.data_type, 0))
            total += size
            if total > MAX_BYTES:
                raise ModelError(f"{path} and its weights have more than {MAX_BYTES:,} bytes; edge-sdk ends there.")
            tensor.raw_data = _read_external(folder, tensor.name, where, size)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    finally:
        os.close(folder)


def _check_nothing_is_outside(message: Any) -> None:
    """ModelError if any tensor in this protobuf message says it lies in another file.

    Another reader may look where `_tensors` does not, and would open whatever is named there.
    """
    if isinstance(message, TensorProto):
        if message.data_location == TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in message.external_data}
            raise _refused(message.name, where.get("location", ""), "the tensor is in a place where a model has none")
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                _check_nothing_is_outside(inner)


def _read_external(folder: int, tensor: str, where: dict[str, str], size: int) -> bytes:
    location = where.get("location", "")
    if "/" in location or "\0" in location or location in {"", ".", ".."}:
        raise _refused(tensor, location, "only a plain file in the model's own folder is taken")
    try:
        offset = int(where.get("offset", "0"))
        length = int(where.get("length", str(size)))
    except ValueError as exc:
        raise _refused(tensor, location, "its offset or length is not a number") from exc
    try:
        descriptor = os.open(location, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as exc:
        reason = "it is a symbolic link" if exc.errno == errno.ELOOP else exc.strerror or str(exc)
        raise _refused(tensor, location, reason) from exc
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _refused(tensor, location, "it is not a regular file")
    with os.fdopen(descriptor, "rb") as stream:
        if status.st_nlink > 1:
            raise _refused(tensor, location, "it is a hard link, so it may be another's file")
        if length != size:
            raise _refused(tensor, location, f"the tensor's shape takes {size:,} bytes, its entry says {length:,}")
        if not 0 <= offset <= status.st_size - size:
            raise _refused(
                tensor, location, f"bytes {offset:,} to {offset + size:,} are not in it; it has {status.st_size:,}"
            )
        stream.seek(offset)
        return stream.read(size)


def _refused(tensor: str, location: str, reason: str) -> ModelError:
    return ModelError(
        f"The weights {tensor!r} are said to lie in {location[:200]!r}: {reason}.",
        fix="Save the model with its weights inside, or in a plain file beside it.",
    )


def first_line(exc: Exception) -> str:
    """What a foreign exception says, short enough to be quoted."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip(".")[:300]
