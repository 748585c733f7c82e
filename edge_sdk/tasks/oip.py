"""The Open Inference Protocol's bodies (KServe and Triton V2), read and written; pure.

Two forms. JSON holds the tensors as lists of numbers. Binary has the same JSON as a header, whose tensors each name a
`binary_data_size`, and behind it the tensors' bytes one after the other: little-endian, row-major. A BYTES element is
its length as uint32 and then the bytes. The protocol: https://github.com/kserve/open-inference-protocol, and Triton's
binary extension to it.

Sizes are checked before anything of that size is allocated, and no element is touched by Python code, BYTES apart.
"""

from __future__ import annotations

import itertools
import json
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np

from edge_sdk.errors import InferenceFailed, InvalidTensor, Malformed
from edge_sdk.tasks.base import BINARY, JSON, Body, SequencePart
from edge_sdk.tensors import DTYPE_FROM_OIP, OIP_FROM_DTYPE, Array, Feeds, dtype_name, element_count

MAX_TENSORS = 256
"""More inputs or outputs than any model has."""


@dataclass(frozen=True)
class OutputChoice:
    """One output a request asks for by name."""

    name: str
    binary: bool | None = None
    """None: as the request as a whole says."""
    classification: int = 0
    """Triton's extension: the best k classes as `score:index:label` strings instead of the tensor."""


@dataclass(frozen=True)
class OipRequest:
    """A request body. `outputs` empty: all of them."""

    feeds: Feeds
    id: str | None = None
    outputs: tuple[OutputChoice, ...] = ()
    binary_output: bool = False
    sequence: SequencePart | None = None
    """Triton's extension: `sequence_id`, `sequence_start` and `sequence_end` among the parameters."""


@dataclass(frozen=True)
class OipResponse:
    """A response body as a client sees it; `extra` holds the keys that are not the protocol's."""

    outputs: dict[str, Array]
    model_name: str = ""
    model_version: str = ""
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def decode_request(data: bytes, header_length: int | None = None) -> OipRequest:
    """The request in `data`; with `header_length`, its first bytes are the JSON header and tensors follow.

    Arrays are read-only views of `data` wherever the bytes are. Raises Malformed or InvalidTensor.
    """
    header, tensors = _split(data, header_length)
    body = _object(parse_json(header), "the body")
    entries = _entries(body, "inputs")
    feeds = _decode_tensors(entries, tensors)
    parameters = _parameters(body)
    return OipRequest(
        feeds=feeds,
        id=_request_id(body),
        outputs=tuple(_output_choice(entry) for entry in _entries(body, "outputs", optional=True)),
        binary_output=parameters.get("binary_data_output") is True,
        sequence=_sequence(parameters) if "sequence_id" in parameters else None,
    )


def encode_request(
    feeds: Mapping[str, Array], *, id: str | None = None, parameters: Mapping[str, Any] | None = None
) -> Body:
    """The binary request body for `feeds`, asking for binary outputs."""
    head: dict[str, Any] = {"inputs": []}
    if id is not None:
        head["id"] = id
    head["parameters"] = {"binary_data_output": True, **(parameters or {})}
    chunks = []
    for name, array in feeds.items():
        raw = to_bytes(array)
        chunks.append(raw)
        head["inputs"].append(_head(name, array, {"binary_data_size": len(raw)}))
    return _binary_body(head, chunks)


def encode_json_request(
    feeds: Mapping[str, Array], *, id: str | None = None, parameters: Mapping[str, Any] | None = None
) -> Body:
    """The JSON request body for `feeds`: for MQTT 3.1.1, which cannot say where a binary header ends."""
    head: dict[str, Any] = {"id": id} if id is not None else {}
    if parameters:
        head["parameters"] = dict(parameters)
    head["inputs"] = [{**_head(name, array), "data": to_list(name, array)} for name, array in feeds.items()]
    return Body(dump_json(head), JSON)


def encode_response(
    outputs: Mapping[str, Array],
    *,
    model_name: str,
    model_version: str,
    id: str | None = None,
    binary: bool | Mapping[str, bool] = False,
    extra: Mapping[str, Any] | None = None,
) -> Body:
    """The response body for `outputs`. `binary` for all of them, or by name.

    Raises InferenceFailed where a value cannot be written: JSON has no NaN and no infinity.
    """
    if binary is True and id is None and not extra:  # as programs ask, whose headers are all the same
        raws = [to_bytes(array) for array in outputs.values()]
        tensors = [
            (name, dtype_name(array), array.shape, len(raw)) for (name, array), raw in zip(outputs.items(), raws)
        ]
        header = _header(model_name, model_version, tuple(tensors))
        return Body(b"".join((header, *raws)), BINARY, len(header))
    head: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    if id is not None:
        head["id"] = id
    entries = []
    chunks: list[bytes] = []
    for name, array in outputs.items():
        if binary if isinstance(binary, bool) else binary.get(name, False):
            raw = to_bytes(array)
            chunks.append(raw)
            entries.append(_head(name, array, {"binary_data_size": len(raw)}))
        else:
            entries.append({**_head(name, array), "data": to_list(name, array)})
    head["outputs"] = entries
    if extra:
        head.update(extra)
    return _binary_body(head, chunks) if chunks else Body(dump_json(head), JSON)


def decode_response(data: bytes, header_length: int | None = None) -> OipResponse:
    """The response in `data`, as `decode_request` reads a request. Arrays are read-only views where they can be."""
    header, tensors = _split(data, header_length)
    body = _object(parse_json(header), "the body")
    known = {"model_name", "model_version", "id", "outputs", "parameters"}
    return OipResponse(
        outputs=_decode_tensors(_entries(body, "outputs", optional=True), tensors),
        model_name=str(body.get("model_name", "")),
        model_version=str(body.get("model_version", "")),
        id=body.get("id"),
        extra={key: value for key, value in body.items() if key not in known},
    )


def parse_json(data: bytes | memoryview) -> Any:
    """Strict JSON: UTF-8 without a byte-order mark, no NaN, no duplicate keys, no nesting deeper than Python's stack.

    Raises Malformed, and nothing else, whatever the bytes.
    """
    try:
        return json.loads(str(data, "utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except UnicodeDecodeError as exc:
        raise Malformed(f"The body is not UTF-8 (byte {exc.start}); JSON is sent as UTF-8.") from exc
    except json.JSONDecodeError as exc:
        raise Malformed(f"The body is not JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}.") from exc
    except RecursionError as exc:
        raise Malformed("The JSON body is nested too deeply.") from exc
    except ValueError as exc:  # an integer of more digits than Python converts
        raise Malformed("The JSON body holds a number too long to read.") from exc


def dump_json(value: Any) -> bytes:
    return _ENCODER.encode(value).encode()


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
"""`json.dumps` would make one each time."""


def to_bytes(array: Array) -> bytes:
    """An array as the binary form carries it."""
    if dtype_name(array) == "string":
        elements = [_as_bytes(element) for element in array.ravel()]
        return b"".join(struct.pack("<I", len(element)) + element for element in elements)
    if array.dtype.byteorder == ">" or _BIG_ENDIAN:
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.tobytes()


_BIG_ENDIAN = sys.byteorder == "big"


def to_list(name: str, array: Array) -> list[Any]:
    """An array's elements, row-major, as JSON carries them; InferenceFailed if there is a NaN or an infinity."""
    if dtype_name(array) == "string":
        return [_as_bytes(element).decode("utf-8", "replace") for element in array.ravel()]
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InferenceFailed(
            f"The tensor {name[:80]!r} holds NaN or infinite values, which JSON cannot carry.",
            fix="Ask for binary output (accept: application/octet-stream) to see them.",
        )
    listed: list[Any] = array.ravel().tolist()
    return listed


def _split(data: bytes, header_length: int | None) -> tuple[memoryview, memoryview | None]:
    view = memoryview(data)
    if header_length is None:
        return view, None
    if not 0 < header_length <= len(view):
        raise Malformed(f"The JSON header is said to be {header_length} bytes long; the payload has {len(view)}.")
    return view[:header_length], view[header_length:]


def _decode_tensors(entries: Sequence[dict[str, Any]], tensors: memoryview | None) -> dict[str, Array]:
    """The arrays of `entries`, their bytes taken from `tensors` in order; the sizes must add up exactly."""
    decoded: dict[str, Array] = {}
    offset = 0
    for entry in entries:
        name, dtype, shape = _declared(entry)
        if name in decoded:
            raise Malformed(f"The tensor {name[:80]!r} comes twice.")
        size = _parameters(entry).get("binary_data_size")
        if size is None:
            decoded[name] = _from_list(name, entry.get("data"), dtype, shape)
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise Malformed(f"`binary_data_size` of {name[:80]!r} is not a size in bytes.")
        if tensors is None or offset + size > len(tensors):
            available = 0 if tensors is None else len(tensors) - offset
            raise Malformed(
                f"The tensor {name[:80]!r} claims {str(size)[:20]} bytes; {available} are left in the payload."
            )
        decoded[name] = _from_bytes(name, tensors[offset : offset + size], dtype, shape)
        offset += size
    if tensors is not None and offset != len(tensors):
        raise Malformed(f"The tensors claim {offset} bytes together; {len(tensors)} follow the header.")
    return decoded


def _declared(entry: dict[str, Any]) -> tuple[str, str, tuple[int, ...]]:
    name = entry.get("name")
    if not isinstance(name, str):
        raise Malformed("A tensor has no `name`.")
    datatype = entry.get("datatype")
    if not isinstance(datatype, str) or datatype not in DTYPE_FROM_OIP:
        raise InvalidTensor(f"The tensor {name[:80]!r} has datatype {str(datatype)[:40]!r}; known are {_KNOWN}.")
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(type(axis) is int for axis in shape):
        raise Malformed(f"The `shape` of {name[:80]!r} is not a list of integers.")
    element_count(shape)
    return name, DTYPE_FROM_OIP[datatype], tuple(shape)


_KNOWN = ", ".join(sorted(DTYPE_FROM_OIP))


def _from_bytes(name: str, raw: memoryview, dtype: str, shape: tuple[int, ...]) -> Array:
    count = element_count(shape)
    if dtype == "string":
        return _strings(name, raw, count).reshape(shape)
    wanted = np.dtype(dtype).newbyteorder("<")
    if count * wanted.itemsize != len(raw):
        raise InvalidTensor(
            f"The tensor {name[:80]!r} of shape {list(shape)} and type {OIP_FROM_DTYPE[dtype]} takes "
            f"{count * wanted.itemsize} bytes; {len(raw)} came."
        )
    return np.frombuffer(raw, dtype=wanted).reshape(shape)


def _strings(name: str, raw: memoryview, count: int) -> Array:
    if count * 4 > len(raw):
        raise Malformed(
            f"The BYTES tensor {name[:80]!r} claims {count} elements; its {len(raw)} bytes cannot hold them."
        )
    elements = np.empty(count, dtype=object)
    offset = 0
    for index in range(count):
        if offset + 4 > len(raw):
            raise Malformed(f"The BYTES tensor {name[:80]!r} ends inside the length of element {index}.")
        (length,) = struct.unpack_from("<I", raw, offset)
        offset += 4
        if offset + length > len(raw):
            raise Malformed(f"Element {index} of the BYTES tensor {name[:80]!r} claims {length} bytes, past its end.")
        elements[index] = bytes(raw[offset : offset + length])
        offset += length
    if offset != len(raw):
        raise Malformed(f"The BYTES tensor {name[:80]!r} has {len(raw) - offset} bytes after its last element.")
    return elements


def _from_list(name: str, data: Any, dtype: str, shape: tuple[int, ...]) -> Array:
    if not isinstance(data, list):
        raise Malformed(f"The tensor {name[:80]!r} has neither `data` as a list nor a `binary_data_size`.")
    flat = _flattened(data, shape)
    # Types before numpy: it would make room for the longest string in the place of every element.
    if not set(map(type, flat)) <= _JSON_TYPES.get(dtype, {int}):
        raise InvalidTensor(
            f"The `data` of {name[:80]!r} holds values that are not {OIP_FROM_DTYPE[dtype]}, "
            "or is nested unlike its shape."
        )
    if len(flat) != element_count(shape):
        raise InvalidTensor(f"The tensor {name[:80]!r} of shape {list(shape)} came with {len(flat)} elements.")
    return _array_of(name, flat, dtype).reshape(shape)


_JSON_TYPES: dict[str, set[type]] = {
    "bool": {bool}, "string": {str}, "float16": {int, float}, "float32": {int, float}, "float64": {int, float},
}  # fmt: skip


def _flattened(data: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """`data` without its nesting, as far as it is nested like `shape`."""
    flat = data
    for size in shape[1:]:
        if set(map(type, flat)) != {list} or set(map(len, flat)) != {size}:
            break
        flat = list(itertools.chain.from_iterable(flat))
    return flat


def _array_of(name: str, values: list[Any], dtype: str) -> Array:
    """`values` in `dtype`, if every one survives the change."""
    if dtype == "string":
        array = np.empty(len(values), dtype=object)
        array[:] = [element.encode("utf-8", "surrogatepass") for element in values]
        return array
    wanted = np.dtype(dtype)
    if wanted.kind in "iu" and values:
        bounds = np.iinfo(wanted)
        if min(values) < bounds.min or max(values) > bounds.max:
            raise InvalidTensor(f"The `data` of {name[:80]!r} does not fit {OIP_FROM_DTYPE[dtype]}.")
    if wanted.kind != "f":
        return np.array(values, dtype=wanted)
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=np.float64).astype(wanted)
        fits = bool(np.isfinite(array).all())
    except OverflowError:  # an integer of more than 308 digits
        fits = False
    if not fits:
        raise InvalidTensor(f"The `data` of {name[:80]!r} holds a number too large for {OIP_FROM_DTYPE[dtype]}.")
    return array


def _request_id(body: dict[str, Any]) -> str | None:
    found = body.get("id")
    if found is None:
        return None
    if not isinstance(found, str):
        raise Malformed("The request's `id` is not a string.")
    try:
        found.encode()
    except UnicodeEncodeError as exc:  # half of a surrogate pair, which no answer could repeat
        raise Malformed("The request's `id` is not text that UTF-8 can carry.") from exc
    return found


MAX_SEQUENCE_ID = 128
"""Bytes."""


def sequence_part(id: str, *, start: bool, end: bool, step: int | None) -> SequencePart:
    """A part of a sequence, its id checked; raises Malformed."""
    if not 0 < len(id.encode("utf-8", "surrogatepass")) <= MAX_SEQUENCE_ID:
        raise Malformed(f"The sequence id {id[:40]!r} has not 1 to {MAX_SEQUENCE_ID} bytes.")
    return SequencePart(id, start, end, step)


def _sequence(parameters: dict[str, Any]) -> SequencePart | None:
    """Triton's ids are strings or numbers, and 0 is none."""
    sequence, step = parameters["sequence_id"], parameters.get("sequence_step")
    if type(sequence) is int and 0 <= sequence < 1 << 64:
        sequence = str(sequence)
    if not isinstance(sequence, str):
        raise Malformed("`sequence_id` is neither a string nor a number of 64 bits.")
    if sequence == "0":
        return None
    if step is not None and (type(step) is not int or not 0 <= step < 1 << 63):
        raise Malformed("`sequence_step` is not a number from 0.")
    start, end = parameters.get("sequence_start", False), parameters.get("sequence_end", False)
    if not isinstance(start, bool) or not isinstance(end, bool):
        raise Malformed("`sequence_start` and `sequence_end` are true or false.")
    return sequence_part(sequence, start=start, end=end, step=step)


def _output_choice(entry: dict[str, Any]) -> OutputChoice:
    name = entry.get("name")
    if not isinstance(name, str):
        raise Malformed("An entry of `outputs` has no `name`.")
    parameters = _parameters(entry)
    binary = parameters.get("binary_data")
    classes = parameters.get("classification", 0)
    if binary is not None and not isinstance(binary, bool):
        raise Malformed(f"`binary_data` of output {name[:80]!r} is not true or false.")
    if type(classes) is not int or not 0 <= classes <= 1000:
        raise Malformed(f"`classification` of output {name[:80]!r} is not a number of classes from 0 to 1000.")
    return OutputChoice(name, binary, classes)


def _entries(body: dict[str, Any], key: str, *, optional: bool = False) -> list[dict[str, Any]]:
    entries = body.get(key)
    if entries is None and optional:
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise Malformed(f"The body has no list `{key}` of objects.")
    if len(entries) > MAX_TENSORS:
        raise Malformed(f"`{key}` has {len(entries)} entries; at most {MAX_TENSORS} are taken.")
    return entries


def _parameters(entry: dict[str, Any]) -> dict[str, Any]:
    parameters = entry.get("parameters")
    return {} if parameters is None else _object(parameters, "`parameters`")


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"A JSON object was expected for {what}.")
    return value


def _head(name: str, array: Array, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    head: dict[str, Any] = {
        "name": name,
        "datatype": OIP_FROM_DTYPE[dtype_name(array)],
        "shape": list(array.shape),
    }
    if parameters:
        head["parameters"] = parameters
    return head


@lru_cache(maxsize=64)
def _header(model_name: str, model_version: str, tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]) -> bytes:
    """The JSON before outputs that are all binary; name, dtype, shape and size of each."""
    outputs = [
        {
            "name": name,
            "datatype": OIP_FROM_DTYPE[dtype],
            "shape": shape,
            "parameters": {"binary_data_size": size},
        }
        for name, dtype, shape, size in tensors
    ]
    return dump_json({"model_name": model_name, "model_version": model_version, "outputs": outputs})


def _binary_body(head: dict[str, Any], chunks: list[bytes]) -> Body:
    header = dump_json(head)
    return Body(b"".join((header, *chunks)), BINARY, len(header))


def _as_bytes(element: Any) -> bytes:
    return element if isinstance(element, bytes) else str(element).encode()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise Malformed("The JSON body has an object with the same key twice.")
    return made


def _refuse_constant(text: str) -> NoReturn:
    raise Malformed(f"The JSON body holds {text}, which is not JSON.")
