"""Targets: the bodies of requests and answers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from edge_sdk.errors import InferenceFailed, InvalidTensor, Malformed, RequestError, TooLarge, UnsupportedType
from edge_sdk.spec import Preprocess
from edge_sdk.tasks.base import BINARY, JSON, NPY, Payload
from edge_sdk.tasks.images import decode_image
from edge_sdk.tasks.npy import decode_npy, encode_npy
from edge_sdk.tasks.oip import (
    decode_request,
    decode_response,
    dump_json,
    encode_json_request,
    encode_request,
    encode_response,
    parse_json,
)
from edge_sdk.tasks.tensors import TensorTask, sniff
from edge_sdk.tensors import DTYPE_FROM_OIP, Array, Feeds, TensorSpec
from tests.fuzz.targets import Pieces, pieces, target
from tests.tasks.strategies import same

Read = TypeVar("Read")

FEEDS: dict[str, Array] = {
    "x": np.arange(6, dtype=np.float32).reshape(2, 3),
    "n": np.array([-1, 2], np.int64),
    "flag": np.array([[True], [False]]),
    "words": np.array([b"one", b""], dtype=object),
}


JSON_WORDS = (
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "null",
    "true",
    "false",
    '""',
    "\\u0000",
    "\\ud800",
    "NaN",
    "Infinity",
    "1e999",
)
OIP_WORDS = (
    *JSON_WORDS,
    *(f'"{word}"' for word in ("inputs", "outputs", "name", "datatype", "shape", "data", "parameters", "id")),
    *(f'"{word}":' for word in ("binary_data_size", "binary_data", "binary_data_output", "classification")),
    *(f'"{dtype}"' for dtype in DTYPE_FROM_OIP),
)


def json_bodies() -> list[bytes]:
    asking = b'"outputs":[{"name":"y","parameters":{"binary_data":true,"classification":3}}]'
    return [
        encode_json_request(FEEDS, id="17").data,
        b'{"inputs":[{"name":"x","datatype":"FP16","shape":[1,2],"data":[[1e4,-0.5]]}],%s}' % asking,
        b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\\ud83d\\ude00"]}],"parameters":null}',
        b'{"inputs":[],"id":null}',
    ]


@target(seeds=json_bodies, words=OIP_WORDS)
def oip(data: bytes) -> None:
    """A JSON body is a request, or Malformed, or InvalidTensor. What was read can be written and read again, in both
    forms, to the bit; JSON says when it cannot (NaN, infinity), and no form can where a name is half a character."""
    request = read(lambda: decode_request(data), Malformed, InvalidTensor)
    if request is None or not writable(request.feeds):
        return
    binary = encode_request(request.feeds, id=request.id)
    again = decode_request(binary.data, binary.header_length)
    _assert_same(request.feeds, again.feeds)
    assert request.id == again.id
    if all(is_text(array) for array in request.feeds.values()):
        with contextlib.suppress(InferenceFailed):
            _assert_same(request.feeds, decode_request(encode_json_request(request.feeds).data).feeds)


def read(decode: Callable[[], Read], *errors: type[RequestError]) -> Read | None:
    """What `decode` gives; None where it raised one of `errors`, whose text an answer can carry."""
    try:
        return decode()
    except errors as exc:
        refusal = str(exc)
    written = dump_json({"error": refusal})

    assert len(written) < 2000
    return None


def writable(feeds: Feeds) -> bool:
    """Whether the inputs' names are text: JSON can escape half a character, which UTF-8 cannot carry."""
    return not any("\ud800" <= character <= "\udfff" for character in "".join(feeds))


def is_text(array: Any) -> bool:
    """Whether an array of BYTES is UTF-8, as JSON needs it; others are numbers."""
    if array.dtype != object:
        return True
    try:
        return all(element.decode() is not None for element in array.ravel())
    except UnicodeDecodeError:
        return False


def binary_bodies() -> list[bytes]:
    bodies = [encode_request(FEEDS, id="1"), encode_request({"x": FEEDS["x"]})]
    return [body.header_length.to_bytes(2, "big") + body.data for body in bodies if body.header_length is not None]


@target(seeds=binary_bodies, words=OIP_WORDS)
def oip_binary(data: bytes) -> None:
    """A header and the tensors behind it are a request, or Malformed, or InvalidTensor; as many elements as came."""
    given = Pieces(data)
    length = given.number()
    body = given.rest()
    request = read(lambda: decode_request(body, length), Malformed, InvalidTensor)
    if request is None or not writable(request.feeds):
        return

    assert sum(array.nbytes for array in request.feeds.values() if array.dtype != object) <= 8 * len(body)
    written = encode_request(request.feeds)
    _assert_same(request.feeds, decode_request(written.data, written.header_length).feeds)


def response_bodies() -> list[bytes]:
    outputs = {"y": FEEDS["x"], "words": FEEDS["words"]}
    bodies = [
        encode_response(outputs, model_name="m", model_version="1", binary=binary, extra={"predictions": []})
        for binary in (False, True)
    ]
    return [(body.header_length or 0).to_bytes(2, "big") + body.data for body in bodies]


@target(seeds=response_bodies, words=OIP_WORDS)
def oip_response(data: bytes) -> None:
    """The body of an answer, as a client reads it: a response, or Malformed, or InvalidTensor."""
    given = Pieces(data)
    with contextlib.suppress(Malformed, InvalidTensor):
        length = given.number()
        decode_response(given.rest(), length or None)


@target(
    words=JSON_WORDS,
    seeds=lambda: [
        b'{"a":[1,-2.5e3,true,null,"\\u00e9\\ud800"]}',
        b"[[[[]]]]",
        b'"\xc3\xa9"',
        b"123456789012345678901",
    ],
)
def json(data: bytes) -> None:
    """Strict JSON is a value, or Malformed; a value of text that UTF-8 has is written and read again as it was."""
    try:
        value = parse_json(data)
    except Malformed:
        return
    with contextlib.suppress(UnicodeEncodeError):  # half of a surrogate pair
        written = dump_json(value)
        if b"Infinity" not in written:  # 1e999 is a number in JSON, and infinite in Python
            assert value == parse_json(written)


def arrays() -> list[bytes]:
    fortran = io.BytesIO()
    np.save(fortran, np.asfortranarray(FEEDS["x"].astype(">f8")))
    words = io.BytesIO()
    np.save(words, FEEDS["words"], allow_pickle=True)
    return [encode_npy(FEEDS["x"]), encode_npy(FEEDS["flag"]), fortran.getvalue(), words.getvalue()]


@target(seeds=arrays, words=("'descr'", "'fortran_order'", "'shape'", "'<f4'", "'|O'", "True", "()", "{", "}"))
def npy(data: bytes) -> None:
    """An array of plain numbers, or Malformed, UnsupportedType or InvalidTensor; never a pickle. What was read is
    written and read again as it was, and numpy reads the same."""
    array = read(lambda: decode_npy(data), Malformed, UnsupportedType, InvalidTensor)
    if array is None:
        return

    assert array.nbytes <= len(data)
    assert same(array, decode_npy(encode_npy(array)))
    assert same(array, np.load(io.BytesIO(data), allow_pickle=False))


PREPARED = (
    Preprocess.model_validate({"resize_short_side": 32, "center_crop": 28}),
    Preprocess.model_validate({"resize": [16, 24], "color": "L", "layout": "NHWC", "mean": [0.5], "std": [0.25]}),
)


def pictures() -> list[bytes]:
    from PIL import Image

    found = []
    pixels = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)
    for mode, form in (
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("P", "PNG"),
        ("LA", "PNG"),
        ("1", "PNG"),
    ):
        stream = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6  # Orientation
        Image.fromarray(pixels).convert(mode).save(stream, form, exif=exif)
        found.append(stream.getvalue())
    deep = io.BytesIO()
    Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)).save(deep, "PNG")
    return [bytes((number & 1,)) + data for number, data in enumerate([*found, deep.getvalue()])]


@target(seeds=pictures, max_bytes=8192)
def image(data: bytes) -> None:
    """A picture becomes finite numbers in the shape that was declared, or it is UnsupportedType, TooLarge or
    Malformed; a size that only its header claims costs nothing."""
    preprocess = PREPARED[data[0] & 1 if data else 0]
    pixels = read(lambda: decode_image(data[1:], preprocess), UnsupportedType, TooLarge, Malformed)
    if pixels is None:
        return

    assert ((1, 3, 28, 28), (1, 16, 24, 1))[data[0] & 1] == pixels.shape
    assert np.isfinite(pixels).all()


TASKS = tuple(
    TensorTask("m", "1", inputs=inputs, outputs=(TensorSpec("y", "float32", ("batch", 3)),))
    for inputs in (
        (TensorSpec("x", "float32", ("batch", 3)),),
        (TensorSpec("x", "float32", ("batch", 3)), TensorSpec("n", "int64", ("batch",))),
        (TensorSpec("words", "string", ("batch", 1)),),
    )
)
TYPES = (None, JSON, BINARY, NPY)


def tensor_bodies() -> list[bytes]:
    given = {"x": FEEDS["x"], "n": FEEDS["n"]}
    words = {"words": FEEDS["words"].reshape(2, 1)}
    return [
        pieces(0, 3, 0, 0) + encode_npy(FEEDS["x"]),
        pieces(0, 2, 0, 0) + FEEDS["x"][:1].tobytes(),
        pieces(0, 0, 0, 0) + encode_json_request({"x": FEEDS["x"]}).data,
        pieces(2, 1, 0, 0) + encode_json_request(words).data,
        *(
            pieces(number, 2) + body.header_length.to_bytes(2, "big") + body.data
            for number, body in ((1, encode_request(given)), (2, encode_request(words)))
            if body.header_length is not None
        ),
    ]


@target(seeds=tensor_bodies, words=OIP_WORDS)
def tensors(data: bytes) -> None:
    """The task `tensors`: feeds that fit the model, or Malformed, UnsupportedType, TooLarge or InvalidTensor; then an
    answer can be phrased."""
    given = Pieces(data)
    task = TASKS[given.byte() % len(TASKS)]
    content_type = TYPES[given.byte() % len(TYPES)]
    header_length = given.number() or None
    body = given.rest()
    with contextlib.suppress(UnsupportedType, Malformed):
        sniff(body)
    payload = Payload(body, content_type, header_length)
    decoded = read(lambda: task.decode(payload), Malformed, UnsupportedType, TooLarge, InvalidTensor)
    if decoded is None:
        return

    assert {spec.name for spec in task.inputs} == set(decoded.feeds)
    assert {decoded.rows} == {len(array) for array in decoded.feeds.values()}
    answer = task.encode({"y": np.ones((decoded.rows, 3), np.float32)}, decoded)
    assert decode_response(answer.data, answer.header_length).model_name == "m" or answer.content_type == NPY


def _assert_same(expected: Any, actual: Any) -> None:
    assert list(expected) == list(actual)
    for name in expected:
        assert same(expected[name], actual[name])
