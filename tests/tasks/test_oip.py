"""The Open Inference Protocol's bodies: exact round trips, agreement with NVIDIA's client, and hostile bytes."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import InferenceFailed, InvalidTensor, Malformed, UnsupportedType
from edge_sdk.tasks.base import Body
from edge_sdk.tasks.oip import (
    OipRequest,
    OutputChoice,
    decode_request,
    decode_response,
    encode_json_request,
    encode_request,
    encode_response,
    parse_json,
)
from edge_sdk.tensors import Array
from tests.tasks.strategies import NAMES, arrays, same

FEEDS = st.dictionaries(NAMES, arrays(), max_size=3)
FINITE_FEEDS = st.dictionaries(NAMES, arrays(finite=True), max_size=3)
IDS = st.none() | st.text(st.characters(codec="utf-8"), max_size=5)

X = {"name": "x", "datatype": "FP32", "shape": [1, 2]}


def body(*inputs: Mapping[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def binary(*inputs: Mapping[str, Any], tensors: bytes = b"") -> tuple[bytes, int]:
    header = body(*inputs)
    return header + tensors, len(header)


def same_feeds(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return list(one) == list(other) and all(same(one[name], other[name]) for name in one)


# Round trips


@given(FEEDS, IDS)
def test_a_binary_request_survives(feeds: dict[str, Array], request_id: str | None) -> None:
    """Every dtype, shape, layout and byte order comes back to the bit, with its id, and asks for binary outputs."""
    encoded = encode_request(feeds, id=request_id)
    decoded = decode_request(encoded.data, encoded.header_length)

    assert same_feeds(feeds, decoded.feeds)
    assert (request_id, True) == (decoded.id, decoded.binary_output)


@given(FINITE_FEEDS, IDS)
def test_a_json_request_survives(feeds: dict[str, Array], request_id: str | None) -> None:
    """So does the JSON form, for everything JSON can carry: finite numbers, and strings that are text."""
    encoded = encode_json_request(feeds, id=request_id)
    decoded = decode_request(encoded.data)

    assert same_feeds(feeds, decoded.feeds)
    assert (request_id, False) == (decoded.id, decoded.binary_output)


@given(FINITE_FEEDS, st.sets(NAMES), IDS)
def test_a_response_survives(outputs: dict[str, Array], as_binary: set[str], request_id: str | None) -> None:
    """Outputs may mix the forms, one by one."""
    binary = {name: index % 2 == 0 or name in as_binary for index, name in enumerate(outputs)}
    encoded = encode_response(
        outputs, model_name="m", model_version="1", id=request_id, binary=binary, extra={"predictions": [1]}
    )
    decoded = decode_response(encoded.data, encoded.header_length)

    assert same_feeds(outputs, decoded.outputs)
    assert ("m", "1", request_id) == (decoded.model_name, decoded.model_version, decoded.id)
    assert {"predictions": [1]} == decoded.extra


def test_arrays_are_views_of_the_payload() -> None:
    """A binary tensor is not copied, and nobody can write into the payload through it."""
    encoded = encode_request({"x": np.zeros(1000, np.float32)})
    array = decode_request(encoded.data, encoded.header_length).feeds["x"]

    assert not array.flags.owndata
    assert not array.flags.writeable


def test_nan_goes_in_binary_and_not_in_json() -> None:
    """JSON has no NaN: the answer says so, and how to see it."""
    outputs = {"y": np.array([np.nan, np.inf], np.float32)}
    encoded = encode_response(outputs, model_name="m", model_version="1", binary=True)

    assert same(outputs["y"], decode_response(encoded.data, encoded.header_length).outputs["y"])
    with pytest.raises(InferenceFailed, match="'y' holds NaN"):
        encode_response(outputs, model_name="m", model_version="1")


def test_outputs_are_chosen_one_by_one() -> None:
    """Names, form and classification of each output asked for."""
    wanted = [
        {"name": "a", "parameters": {"binary_data": True}},
        {"name": "b", "parameters": {"classification": 3}},
        {"name": "c"},
    ]
    decoded = decode_request(body(outputs=wanted, parameters={"binary_data_output": False}))

    assert OipRequest({}, None, (OutputChoice("a", True), OutputChoice("b", None, 3), OutputChoice("c"))) == decoded


def test_unknown_optional_fields_are_ignored() -> None:
    """Newer clients may say more than this release understands."""
    entry = {**X, "data": [1, 2], "parameters": {"novelty": 1}, "novelty": {}}

    assert [[1, 2]] == decode_request(body(entry, novelty=[], parameters={"novelty": 1})).feeds["x"].tolist()


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]])
def test_lists_are_flat_or_nested_as_their_shape(data: list[Any]) -> None:
    """The protocol allows both, and the elements are row-major."""

    assert [[1, 2], [3, 4]] == decode_request(body({**X, "shape": [2, 2], "data": data})).feeds["x"].tolist()


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("FP64", [100000000000000000000, 1e300]),
        ("FP32", [1, 2.5]),
        ("UINT64", [2**64 - 1, 0]),
        ("INT64", [-(2**63), 2**63 - 1]),
    ],
)
def test_numbers_as_other_languages_write_them(datatype: str, data: list[float]) -> None:
    """JavaScript writes 1e20 with all its zeros; 64-bit integers keep their last digit."""
    decoded = decode_request(body({**X, "shape": [2], "datatype": datatype, "data": data}))

    assert data == decoded.feeds["x"].tolist()


# Another implementation


def test_tritonclient_is_understood() -> None:
    """What NVIDIA's HTTP client sends is decoded to the arrays it was given, in both forms."""
    triton = pytest.importorskip(
        "tritonclient.http", reason="tritonclient[http] is not installed", exc_type=ImportError
    )
    sent = {
        "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
        "flags": np.array([[True, False]]),
        "words": np.array([[b"golden", "grün".encode()]], dtype=object),
    }
    for as_binary in (True, False):
        inputs = []
        for name, array in sent.items():
            datatype = {"floats": "FP32", "flags": "BOOL", "words": "BYTES"}[name]
            inputs.append(triton.InferInput(name, list(array.shape), datatype))
            inputs[-1].set_data_from_numpy(array, binary_data=as_binary)
        outputs = [triton.InferRequestedOutput("y", binary_data=as_binary, class_count=0 if as_binary else 2)]
        data, header_length = triton.InferenceServerClient.generate_request_body(
            inputs, outputs=outputs, request_id="7"
        )
        decoded = decode_request(bytes(data), header_length)

        assert same_feeds(sent, decoded.feeds)
        assert ("7", (OutputChoice("y", as_binary, 0 if as_binary else 2),)) == (decoded.id, decoded.outputs)


def test_tritonclient_understands_us() -> None:
    """Our responses are read by NVIDIA's HTTP client, in both forms."""
    triton = pytest.importorskip(
        "tritonclient.http", reason="tritonclient[http] is not installed", exc_type=ImportError
    )
    outputs = {
        "y": np.arange(6, dtype=np.float32).reshape(2, 3),
        "words": np.array([b"0.9:1:cat", b"0.1:0:dog"], dtype=object),
        "flags": np.array([True, False]),
    }
    for as_binary in (True, False):
        encoded = encode_response(outputs, model_name="m", model_version="1", id="7", binary=as_binary)
        result = triton.InferenceServerClient.parse_response_body(encoded.data, header_length=encoded.header_length)

        assert "7" == result.get_response()["id"]
        for name in ("y", "flags"):
            assert same(outputs[name], result.as_numpy(name))
        assert [b"0.9:1:cat", b"0.1:0:dog"] == [
            w if isinstance(w, bytes) else w.encode() for w in result.as_numpy("words")
        ]


# Hostile bodies

MALFORMED = {
    "malformed JSON": b'{"inputs": [}',
    "truncated JSON": body({**X, "data": [1, 2]})[:-5],
    "nothing": b"",
    "100k deep": b"[" * 100_000,
    "100k deep and closed": b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "duplicate keys": b'{"inputs": [], "inputs": []}',
    "an int of 100k digits": b'{"inputs": [], "id": ' + b"9" * 100_000 + b"}",
    "NaN literal": b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [NaN]}]}',
    "infinity literal": b'{"inputs": [], "a": -Infinity}',
    "UTF-16": body().decode().encode("utf-16"),
    "byte-order mark": b"\xef\xbb\xbf" + body(),
    "not UTF-8": b'{"inputs": [], "id": "\xff"}',
    "half a surrogate pair": b'{"inputs": [], "id": "\\ud800"}',
    "a list": b"[]",
    "a string": b'"inputs"',
    "no inputs": b"{}",
    "inputs that are no list": b'{"inputs": {}}',
    "inputs that are no objects": b'{"inputs": [1]}',
    "more inputs than models have": body(*[{**X, "name": str(n), "data": [1, 2]} for n in range(300)]),
    "an id that is no string": body(id=7),
    "parameters that are no object": body(parameters=[]),
    "an input without a name": body({"datatype": "FP32", "shape": [1], "data": [1]}),
    "an input twice": body({**X, "data": [1, 2]}, {**X, "data": [1, 2]}),
    "an input without data": body(X),
    "a shape of floats": body({**X, "shape": [1.0, 2], "data": [1, 2]}),
    "a shape of booleans": body({**X, "shape": [True, 2], "data": [1, 2]}),
    "an output without a name": body(outputs=[{}]),
    "a classification of -1": body(outputs=[{"name": "y", "parameters": {"classification": -1}}]),
    "binary_data that is no bool": body(outputs=[{"name": "y", "parameters": {"binary_data": 1}}]),
    "sizes without tensors": body({**X, "parameters": {"binary_data_size": 8}}),
}
"""Bodies that are no requests: 400."""

INVALID = {
    "a float in INT8": body({**X, "datatype": "INT8", "data": [1e9, 0]}),
    "an int too large for INT8": body({**X, "datatype": "INT8", "data": [128, 0]}),
    "a negative UINT8": body({**X, "datatype": "UINT8", "data": [-1, 0]}),
    "an int beyond 64 bits": body({**X, "datatype": "INT64", "data": [2**70, 0]}),
    "a string in FP32": body({**X, "data": ["1.0", 0]}),
    "a null in FP32": body({**X, "data": [None, 0]}),
    "a boolean in FP32": body({**X, "data": [True, 0]}),
    "a number in BOOL": body({**X, "datatype": "BOOL", "data": [1, 0]}),
    "a number in BYTES": body({**X, "datatype": "BYTES", "data": [1, "a"]}),
    "1e400 in FP64": b'{"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "data": [1e400]}]}',
    "1e300 in FP32": body({**X, "data": [1e300, 0]}),
    "an int of 400 digits in FP64": body({**X, "datatype": "FP64", "data": [10**400, 0]}),
    "an unknown datatype": body({**X, "datatype": "FP8", "data": [1, 2]}),
    "a negative axis": body({**X, "shape": [-1, 2], "data": [1, 2]}),
    "2^62 x 2^62": body({**X, "shape": [2**62, 2**62], "data": [1, 2]}),
    "zero times 2^62": body({**X, "shape": [0, 2**62], "data": []}),
    "a product that does not match": body({**X, "shape": [3, 2], "data": [1, 2]}),
    "rank 40": body({**X, "shape": [1] * 40, "data": [1]}),
    "nested unlike its shape": body({**X, "shape": [2, 3], "data": [[1, 2], [3, 4, 5, 6]]}),
    "nested deeper than its shape": body({**X, "data": [[[1], [2]]]}),
    "an object for a number": body({**X, "data": [{}, 0]}),
}
"""Requests whose tensors are not what they claim: 422."""


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_no_request_is_malformed(case: str) -> None:
    """400, at once: well within a second of CPU time."""
    started = time.process_time()
    with pytest.raises(Malformed):
        decode_request(MALFORMED[case])

    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("case", INVALID)
def test_what_is_no_tensor_is_invalid(case: str) -> None:
    """422, at once: well within a second of CPU time."""
    started = time.process_time()
    with pytest.raises(InvalidTensor):
        decode_request(INVALID[case])

    assert time.process_time() - started < 1.0


LONG = "x" * 200_000
DIGITS = 10**4000

WORDY = {
    "a tensor twice": binary(*[{**X, "name": LONG, "parameters": {"binary_data_size": 8}}] * 2, tensors=bytes(16)),
    "no data": (body({**X, "name": LONG}), None),
    "too few elements": (body({**X, "name": LONG, "data": [1]}), None),
    "the wrong elements": (body({**X, "name": LONG, "data": ["a", "b"]}), None),
    "elements that do not fit": (body({**X, "name": LONG, "datatype": "INT8", "data": [500, 1]}), None),
    "an element too large": (body({**X, "name": LONG, "data": [1e300, 1]}), None),
    "no size": binary({**X, "name": LONG, "parameters": {"binary_data_size": -1}}),
    "too large a size": binary({**X, "name": LONG, "parameters": {"binary_data_size": DIGITS}}),
    "the wrong size": binary({**X, "name": LONG, "parameters": {"binary_data_size": 4}}, tensors=bytes(4)),
    "no strings": binary(
        {**X, "name": LONG, "datatype": "BYTES", "parameters": {"binary_data_size": 4}}, tensors=bytes(4)
    ),
    "cut strings": binary(
        {**X, "name": LONG, "datatype": "BYTES", "parameters": {"binary_data_size": 10}}, tensors=bytes([6]) + bytes(9)
    ),
    "a string too long": binary(
        {**X, "name": LONG, "datatype": "BYTES", "parameters": {"binary_data_size": 8}}, tensors=b"\xff" * 8
    ),
    "more than strings": binary(
        {**X, "name": LONG, "datatype": "BYTES", "parameters": {"binary_data_size": 9}}, tensors=bytes(9)
    ),
    "an unknown datatype": (body({**X, "name": LONG, "datatype": LONG, "data": [1, 2]}), None),
    "no shape": (body({**X, "name": LONG, "shape": LONG, "data": [1, 2]}), None),
    "negative axes": (body({**X, "shape": [-DIGITS] * 16, "data": [1, 2]}), None),
    "long axes": (body({**X, "shape": [DIGITS] * 16, "data": [1, 2]}), None),
    "a choice": (body({**X, "data": [1, 2]}, outputs=[{"name": LONG, "parameters": {"binary_data": 1}}]), None),
    "a count": (body({**X, "data": [1, 2]}, outputs=[{"name": LONG, "parameters": {"classification": -1}}]), None),
}


@pytest.mark.parametrize("case", WORDY)
def test_an_error_is_short(case: str) -> None:
    """What a stranger sends is not sent back at length: names and numbers are cut."""
    data, header_length = WORDY[case]
    with pytest.raises((Malformed, InvalidTensor)) as caught:
        decode_request(data, header_length)

    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("payload", "header_length", "expected"),
    [
        (body(), 10_000, Malformed),
        (body(), -1, Malformed),
        (b"", 1, Malformed),
        (*binary({**X, "parameters": {"binary_data_size": -8}}, tensors=bytes(8)), Malformed),
        (*binary({**X, "parameters": {"binary_data_size": 16}}, tensors=bytes(8)), Malformed),
        (*binary({**X, "parameters": {"binary_data_size": 8}}, tensors=bytes(9)), Malformed),
        (*binary({**X, "parameters": {"binary_data_size": True}}, tensors=bytes(1)), Malformed),
        (*binary({**X, "parameters": {"binary_data_size": 8.0}}, tensors=bytes(8)), Malformed),
        (*binary({**X, "parameters": {"binary_data_size": 4}}, tensors=bytes(4)), InvalidTensor),
        (*binary({**X, "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 6}},
                 tensors=struct.pack("<I", 3) + b"ab"), Malformed),
        (*binary({**X, "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 2}},
                 tensors=b"ab"), Malformed),
        (*binary({**X, "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 7}},
                 tensors=struct.pack("<I", 2) + b"abc"), Malformed),
        (*binary({**X, "datatype": "BYTES", "shape": [2**31], "parameters": {"binary_data_size": 4}},
                 tensors=bytes(4)), Malformed),
    ],
    ids=["header beyond payload", "negative header", "empty payload", "negative size", "size beyond payload",
         "bytes left over", "size is a bool", "size is a float", "size unlike shape", "BYTES past its end",
         "BYTES inside a length", "BYTES left over", "BYTES by the billion"],
)  # fmt: skip
def test_lying_sizes_are_refused(payload: bytes, header_length: int, expected: type[Exception]) -> None:
    """Sizes that do not add up are 400; a tensor whose bytes are not its shape's is 422."""
    with pytest.raises(expected):
        decode_request(payload, header_length)


@pytest.mark.parametrize(
    "payload",
    [
        body({**X, "shape": [2**30], "data": [1]}),
        body({**X, "shape": [2**30], "datatype": "BYTES", "data": ["a"]}),
        body({**X, "shape": [50_001], "data": ["x" * 100_000, *[0] * 50_000]}),
        body({**X, "shape": [50_001], "data": ["x" * 100_000, *[""] * 50_000]}),
    ],
    ids=["a huge shape", "a huge shape of strings", "one long string among numbers", "one long string among others"],
)  # fmt: skip
def test_claims_allocate_nothing(payload: bytes) -> None:
    """Memory follows the bytes that came, not what they claim."""
    tracemalloc.start()
    with pytest.raises(InvalidTensor):
        decode_request(payload)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 10 * len(payload) + 1_000_000


BODY = 1_000_000
"""Stands for the length of the body that was drawn."""
JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ENTRIES = st.fixed_dictionaries(
    {"name": st.just("x") | JSON_VALUES, "datatype": st.sampled_from(["FP32", "BYTES", "INT8", "BOOL"]) | JSON_VALUES},
    optional={
        "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON_VALUES,
        "data": st.lists(st.integers(-1, 3) | JSON_VALUES, max_size=3) | JSON_VALUES,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 12) | JSON_VALUES}) | JSON_VALUES,
    },
)
BODIES = st.fixed_dictionaries(
    {"inputs": st.lists(ENTRIES, max_size=2) | JSON_VALUES},
    optional={"id": JSON_VALUES, "outputs": st.lists(ENTRIES, max_size=2) | JSON_VALUES, "parameters": JSON_VALUES},
).map(lambda drawn: json.dumps(drawn).encode())


@given(st.binary() | BODIES, st.binary(max_size=24), st.none() | st.integers(-1, 300) | st.just(BODY))
def test_any_bytes_are_decoded_or_refused(head: bytes, tail: bytes, header_length: int | None) -> None:
    """Whatever came: a request or one of three errors, and what was decoded can be answered."""
    length = len(head) if header_length == BODY else header_length
    for decode in (decode_request, decode_response):
        try:
            decoded = decode(head + tail, length)
        except (Malformed, InvalidTensor, UnsupportedType) as exc:
            str(exc).encode()  # an error can be sent
        else:
            if isinstance(decoded, OipRequest):
                answer = encode_response(decoded.feeds, model_name="m", model_version="1", id=decoded.id, binary=True)
                assert isinstance(answer, Body)


@given(st.binary())
def test_any_bytes_are_json_or_malformed(data: bytes) -> None:
    """`parse_json` raises nothing else."""
    try:
        parse_json(data)
    except Malformed:
        pass
