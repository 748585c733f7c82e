"""The task `tensors`: every content type in, every form out, and a sentence for what does not fit."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest

from edge_sdk.errors import InferenceFailed, InvalidTensor, Malformed, RequestError, UnsupportedType
from edge_sdk.tasks.base import BINARY, JPEG, JSON, NPY, PNG, TEXT, Body, Decoded, Payload
from edge_sdk.tasks.oip import decode_response, encode_json_request, encode_request
from edge_sdk.tasks.tensors import TensorTask, sniff
from edge_sdk.tensors import Array, TensorSpec

X = np.array([[1, 2, 3]], np.float32)
LABELS = ("cat", "dog", "owl")


def task(*inputs: TensorSpec, dtype: str = "float32") -> TensorTask:
    return TensorTask(
        "m", "1",
        inputs=inputs or (TensorSpec("x", dtype, ("batch", 3)),),
        outputs=(TensorSpec("y", dtype, ("batch", 3)),),
        labels=LABELS,
    )  # fmt: skip


def npy(array: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def payload(body: Body, **more: Any) -> Payload:
    return Payload(body.data, body.content_type, body.header_length, **more)


def json_request(**more: Any) -> Payload:
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
    return Payload(json.dumps({"inputs": [entry], **more}).encode(), JSON)


@pytest.mark.parametrize(
    "sent",
    [
        payload(encode_request({"x": X})),
        payload(encode_json_request({"x": X})),
        Payload(X.tobytes(), BINARY),
        Payload(npy(X), NPY),
        Payload(npy(X[0]), NPY),
        Payload(npy(np.asfortranarray(X)), NPY),
        Payload(npy(X.astype(">f4")), NPY),
        Payload(npy(X)),
        Payload(b"  \n" + encode_json_request({"x": X}).data),
    ],
    ids=["binary", "JSON", "raw", "npy", "npy without batch", "Fortran", "big-endian", "sniffed npy", "sniffed JSON"],
)
def test_every_way_to_say_the_same(sent: Payload) -> None:
    """Each content type is the same feeds, and takes one place of a batch."""
    decoded = task().decode(sent)

    assert (X.tolist(), 1) == (decoded.feeds["x"].tolist(), decoded.rows)


@pytest.mark.parametrize(
    ("sent", "expected", "complaint"),
    [
        (Payload(b"", None), Malformed, "empty"),
        (Payload(b"", JSON), Malformed, "not JSON"),
        (Payload(b"hello", None), UnsupportedType, "do not tell"),
        (Payload(b"RIFF", None), UnsupportedType, "do not tell"),
        (
            Payload(b"\xff\xd8\xff", None),
            UnsupportedType,
            "'image/jpeg' is not taken; this model takes application/json",
        ),
        (Payload(b"a cat", TEXT), UnsupportedType, "'text/plain' is not taken"),
        (Payload(b"x", "x" * 1000), UnsupportedType, "is not taken"),
        (Payload(bytes(11), BINARY), InvalidTensor, "takes 12 bytes .* 11 came"),
        (Payload(b"", BINARY), InvalidTensor, "0 came"),
        (Payload(npy(X.astype(np.float64)), NPY), InvalidTensor, "came as FP64"),
        (Payload(npy(np.zeros((1, 4), np.float32)), NPY), InvalidTensor, r"shape \[1, 4\]"),
        (Payload(npy(np.zeros((0, 3), np.float32)), NPY), InvalidTensor, "batch"),
        (payload(encode_request({"z": X})), InvalidTensor, "no input 'z'"),
        (payload(encode_request({})), InvalidTensor, "'x' is missing"),
        (json_request(outputs=[{"name": "z"}]), InvalidTensor, "no output 'z'"),
        (json_request(outputs=[{"name": "y"}, {"name": "y"}]), Malformed, "twice"),
    ],
)
def test_what_does_not_fit_is_said(sent: Payload, expected: type[RequestError], complaint: str) -> None:
    """The status of the contract, and a sentence with what came and what was expected."""
    with pytest.raises(expected, match=complaint):
        task().decode(sent)


def test_a_model_of_two_inputs_cannot_be_asked_with_one_array() -> None:
    """Raw bytes and .npy name no input; the error names the form that does."""
    two = task(TensorSpec("a", "float32", ("batch", 3)), TensorSpec("b", "float32", ("batch", 3)))
    for sent in (Payload(X.tobytes(), BINARY), Payload(npy(X), NPY)):
        with pytest.raises(InvalidTensor, match=r"2 inputs.*Open Inference Protocol"):
            two.decode(sent)

    assert 2 == two.decode(payload(encode_request({"a": X.repeat(2, 0), "b": X.repeat(2, 0)}))).rows


def test_inputs_without_names_for_their_axes_still_share_a_batch() -> None:
    """Two nameless first axes may differ as shapes, but one request is one batch."""
    two = TensorTask(
        "m", "1", inputs=(TensorSpec("a", "float32", ("?", 3)), TensorSpec("b", "float32", ("?", 3))),
        outputs=(TensorSpec("y", "float32", ("?", 3)),),
    )  # fmt: skip
    with pytest.raises(InvalidTensor, match=r"\[1, 2\] came"):
        two.decode(payload(encode_request({"a": X.repeat(2, 0), "b": X})))


def test_raw_bytes_need_a_fixed_size() -> None:
    """Where an axis other than the batch is free, bytes do not say the shape; .npy does."""
    free = task(TensorSpec("x", "float32", ("batch", "length")))
    with pytest.raises(InvalidTensor, match="no fixed size"):
        free.decode(Payload(X.tobytes(), BINARY))

    assert 1 == free.decode(Payload(npy(X), NPY)).rows


def answer(sent: Payload, y: Array, *, dtype: str = "float32") -> Body:
    asked = task(dtype=dtype) if dtype == "float32" else task(TensorSpec("x", "float32", ("batch", 3)), dtype=dtype)
    return asked.encode({"y": y}, asked.decode(sent))


def test_the_answer_has_the_form_that_was_asked_for() -> None:
    """JSON unless the request, one output, or `accept` says otherwise."""
    wanted = {"name": "y", "parameters": {"binary_data": False}}
    cases: list[tuple[Payload, str]] = [
        (json_request(), JSON),
        (json_request(parameters={"binary_data_output": True}), BINARY),
        (json_request(parameters={"binary_data_output": True}, outputs=[wanted]), JSON),
        (Payload(X.tobytes(), BINARY), JSON),
        (Payload(X.tobytes(), BINARY, accept=BINARY), BINARY),
        (Payload(X.tobytes(), BINARY, accept=NPY), NPY),
        (Payload(X.tobytes(), BINARY, accept="image/webp"), JSON),
        (payload(encode_request({"x": X})), BINARY),
    ]
    for sent, content_type in cases:
        body = answer(sent, X)

        assert content_type == body.content_type
        if content_type == NPY:
            assert X.tolist() == np.load(io.BytesIO(body.data)).tolist()
        else:
            assert X.tolist() == decode_response(body.data, body.header_length).outputs["y"].tolist()


def test_an_answer_echoes_the_requests_id() -> None:
    """And says which model and version it is from."""
    response = decode_response(answer(json_request(id="seven"), X).data)

    assert ("seven", "m", "1") == (response.id, response.model_name, response.model_version)


@pytest.mark.parametrize(
    ("dtype", "scores", "best"),
    [
        ("float32", [[0.1, 0.7, 0.2]], [["0.700000:1:dog", "0.200000:2:owl"]]),
        (
            "float32",
            [[0.1, 0.1, 0.2], [3, 2, 1]],
            [["0.200000:2:owl", "0.100000:0:cat"], ["3.000000:0:cat", "2.000000:1:dog"]],
        ),
        ("uint8", [[0, 255, 7]], [["255.000000:1:dog", "7.000000:2:owl"]]),
        ("int8", [[-128, 127, 7]], [["127.000000:1:dog", "7.000000:2:owl"]]),
        ("bool", [[False, True, False]], [["1.000000:1:dog", "0.000000:0:cat"]]),
        ("float32", [0.1, 0.7, 0.2], ["0.700000:1:dog", "0.200000:2:owl"]),
        ("float32", 0.5, ["0.500000:0:cat"]),
    ],
)
def test_classification(dtype: str, scores: Any, best: list[Any]) -> None:
    """Triton's extension: the best k of the last axis, best first, of any numbers, equal ones in their order."""
    sent = json_request(outputs=[{"name": "y", "parameters": {"classification": 2}}])
    output = decode_response(answer(sent, np.array(scores, dtype), dtype=dtype).data).outputs["y"]

    assert [text.encode() for text in np.ravel(best)] == output.ravel().tolist()
    assert np.shape(best) == output.shape


def test_classes_without_labels_are_numbers() -> None:
    """A class beyond the labels is `score:index`; asking for more classes than there are gives all of them."""
    sent = json_request(outputs=[{"name": "y", "parameters": {"classification": 1000}}])
    output = decode_response(answer(sent, np.array([[0, 1, 2, 3]], np.float32)).data).outputs["y"]

    assert [b"3.000000:3", b"2.000000:2:owl"] == output.ravel().tolist()[:2]
    assert (1, 4) == output.shape


def test_nan_is_an_error_where_it_cannot_be_said() -> None:
    """In JSON and in an order of classes; binary and .npy carry it."""
    nan = np.full((1, 3), np.nan, np.float32)
    classified = json_request(outputs=[{"name": "y", "parameters": {"classification": 1}}])
    for sent in (json_request(), classified):
        with pytest.raises(InferenceFailed, match="NaN"):
            answer(sent, nan)
    for accept in (BINARY, NPY):
        assert accept == answer(Payload(X.tobytes(), BINARY, accept=accept), nan).content_type


def test_strings_have_no_best_classes_and_no_npy() -> None:
    """A string output cannot be classified (422), and goes out as JSON where .npy was asked for."""
    words = np.array([[b"a", b"b", b"c"]], dtype=object)
    with pytest.raises(InvalidTensor, match="no best classes"):
        answer(json_request(outputs=[{"name": "y", "parameters": {"classification": 1}}]), words, dtype="string")

    assert JSON == answer(Payload(X.tobytes(), BINARY, accept=NPY), words, dtype="string").content_type


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xff\xd8\xff\xe0", JPEG), (b"\x89PNG\r\n", PNG), (b"\x93NUMPY", NPY), (b"{}", JSON), (b" \t\r\n{", JSON),
        (b"<svg/>", None), (b"GIF89a", None), (b"\xff\xd8", None), (b"[1]", None), (b"\xef\xbb\xbf{}", None),
    ],
)  # fmt: skip
def test_sniffing(data: bytes, expected: str | None) -> None:
    """The first bytes tell, or it is 415: nothing is guessed."""
    if expected is None:
        with pytest.raises(UnsupportedType):
            sniff(data)
    else:
        assert expected == sniff(data)


def test_decoding_keeps_nothing() -> None:
    """A task is shared by threads: two requests decoded together are answered each in its own form."""
    asked = task()
    first, second = asked.decode(json_request(id="1")), asked.decode(payload(encode_request({"x": X}, id="2")))

    assert isinstance(first, Decoded)
    for decoded, request_id in ((second, "2"), (first, "1")):
        body = asked.encode({"y": X}, decoded)
        assert request_id == decode_response(body.data, body.header_length).id
