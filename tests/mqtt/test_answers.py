"""The client's side of the wire: what goes out for what users have, and what is made of whatever comes back. Pure."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_sdk.errors import Malformed, NoAnswer, QueueFull, RequestError, SettingsError
from edge_sdk.mqtt.answers import Answer, ClientCodec, described, encoder
from edge_sdk.mqtt.codec import HEADER_LENGTH
from edge_sdk.mqtt.transports.base import Message, MqttVersion, Properties

CODEC = ClientCodec("edge/v1", "me")
REPLY = "edge/v1/reply/me"
RESULT = "edge/v1/dev/models/m/result/me"
DEEP = b'{"error":' + b"[" * 200_000


def answer(payload: bytes, **properties: Any) -> Answer:
    user = tuple(properties.pop("user", {}).items())
    message = Message(REPLY, payload, properties=Properties(user=user, **properties))
    return CODEC.answer(message, "m", "dev")


@pytest.mark.parametrize("version", [5, 4])
def test_a_request_leaves_an_address_that_its_answer_has(version: MqttVersion) -> None:
    """The key is found again in what the device answers with: correlation data, or the last level of the topic."""
    body = encoder(b"\xff\xd8\xff")(version)

    sent = CODEC.request(2**62 + 7, "dev", "m", body, protocol=version, remaining_s=2.5)

    if version == 5:
        assert ("edge/v1/dev/models/m/infer", REPLY, 3, "image/jpeg") == (
            sent.topic,
            sent.properties.response_topic,
            sent.properties.message_expiry_s,
            sent.properties.content_type,
        )
        back = Message(REPLY, b"", properties=Properties(correlation_data=sent.properties.correlation_data))
    else:
        assert (f"edge/v1/dev/models/m/infer/me/{2**62 + 7}", Properties()) == (sent.topic, sent.properties)
        back = Message(f"{RESULT}/{sent.topic.rpartition('/')[2]}", b"")
    assert 2**62 + 7 == CODEC.key(back)


def test_a_version_cannot_be_asked_for_on_3_1_1() -> None:
    """Not even where the connection changed to it after the request was made: another version is not the same."""
    with pytest.raises(SettingsError, match="'2' needs MQTT 5"):
        CODEC.request(1, "dev", "m", encoder(b"x")(4), version="2", protocol=4, remaining_s=1)


@pytest.mark.parametrize("remaining_s", [-1.0, 0.0, 1e18, float("inf")])
def test_any_deadline_can_be_said(remaining_s: float) -> None:
    """The message's expiry is a number of 32 bits, and at least a second."""
    sent = CODEC.request(1, "dev", "m", encoder(b"x")(5), protocol=5, remaining_s=remaining_s)

    assert 1 <= (sent.properties.message_expiry_s or 0) < 2**32


@pytest.mark.parametrize(
    ("topic", "correlation", "expected"),
    [
        (REPLY, b"\0" * 7 + b"\x05", 5),
        (REPLY, None, -1),
        (REPLY, b"\x05", -1),
        (f"{RESULT}/17", None, 17),
        (f"{RESULT}/{'9' * 5_000}", None, -1),
        (f"{RESULT}/\u0665", None, -1),
        (f"{RESULT}/-1", None, -1),
        ("edge/v1/dev/availability", None, None),
        ("other/dev/models/m/result/me/17", None, None),
    ],
)
def test_a_foreign_message_is_nobody_s_answer(topic: str, correlation: bytes | None, expected: int | None) -> None:
    """-1 is a key that no request has; None: the message is no answer at all."""

    assert expected == CODEC.key(Message(topic, b"", properties=Properties(correlation_data=correlation)))


@pytest.mark.parametrize(
    "payload",
    [
        b'{"outputs": [], "predictions": [{"index": 1e999, "score": 0.5}]}',
        b'{"outputs": [], "predictions": [{"index": 1, "score": 1' + b"0" * 400 + b"}]}",
        b'{"outputs": [], "predictions": {"a": 1}}',
        b'{"outputs": ' + b"[" * 200_000,
        b'{"outputs": [], "outputs": []}',
        b"{" + b"7" * 5_000,
    ],
)
def test_an_answer_that_cannot_be_read_is_no_answer(payload: bytes) -> None:
    with pytest.raises(NoAnswer, match="'m' cannot be read"):
        answer(payload, user={"status": "200"})


@pytest.mark.parametrize("payload", [DEEP, b'{"error":' + b"7" * 5_000 + b"}", b'{"error": NaN}', b"\xff", b"[]", b"7"])
def test_an_error_that_cannot_be_read_is_malformed(payload: bytes) -> None:
    with pytest.raises(Malformed, match="status 500 and a body that is no error"):
        answer(payload, user={"status": "500"})


def test_an_error_has_its_class_and_its_pause() -> None:
    with pytest.raises(QueueFull) as caught:
        answer(
            b'{"error": "full", "code": "queue_full", "retry_after_ms": 1}', user={"status": "429", "retry-after": "7"}
        )

    assert ("full", 7) == (caught.value.problem, caught.value.retry_after_ms)


def test_the_device_s_timing_is_read_where_it_can_be() -> None:
    got = answer(
        b"raw", content_type="text/plain", user={"server-timing": "queue;dur=1.5, nonsense, infer;dur=x,,a;dur="}
    )

    assert {"queue": 1.5} == got.timing


USER = st.dictionaries(
    st.sampled_from(["status", "retry-after", "model-version", "device", "server-timing", HEADER_LENGTH]) | st.text(),
    st.text() | st.integers().map(str) | st.floats().map(lambda number: f"queue;dur={number}"),
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
KNOWN = ("error", "code", "status", "retry_after_ms", "outputs", "predictions", "model_name", "model_version")
BODIES = st.dictionaries(st.sampled_from(KNOWN), JSON_VALUES).map(lambda body: json.dumps(body).encode())
PREDICTIONS = st.lists(
    st.fixed_dictionaries({}, optional={"index": JSON_VALUES, "score": JSON_VALUES, "label": JSON_VALUES})
).map(lambda predictions: json.dumps({"outputs": [], "predictions": predictions}).encode())
CONTENT_TYPES = st.sampled_from([None, "application/json", "application/octet-stream", "image/png"]) | st.text()


@given(st.binary() | BODIES | PREDICTIONS, CONTENT_TYPES, USER)
@example(DEEP, None, {})
@example(b'{"predictions": [{"index": 1e999, "score": 1}]}', None, {})
def test_whatever_comes_is_an_answer_or_an_error_of_ours(
    payload: bytes, content_type: str | None, user: dict[str, str]
) -> None:
    """Nothing a stranger can put into an answer gets past: a foreign exception would end the client's thread."""
    try:
        got = answer(payload, content_type=content_type, user=user)
    except (NoAnswer, RequestError):
        return

    assert payload == got.raw


@given(st.text() | st.text().map(lambda tail: f"{RESULT}/{tail}") | st.just(REPLY), st.none() | st.binary())
@example(f"{RESULT}/{'1' * 5_000}", None)
def test_whatever_the_topic_there_is_a_key_or_none(topic: str, correlation: bytes | None) -> None:
    key = CODEC.key(Message(topic, b"", properties=Properties(correlation_data=correlation)))

    assert key is None or -1 <= key < 10**20


@given(st.binary() | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 200_000)
def test_whatever_is_retained_is_a_description_or_no_answer(payload: bytes) -> None:
    try:
        got = described("edge/v1/dev/info", payload)
    except NoAnswer:
        return

    assert isinstance(got, dict)


def test_a_description_that_is_none_is_shown() -> None:
    with pytest.raises(NoAnswer, match=r"edge/v1/dev/info .*b'not json'"):
        described("edge/v1/dev/info", b"not json")


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        (b"\xff\xd8\xff", "image/jpeg"),
        (b"\x89PNG", "image/png"),
        (b"\x93NUMPY", "application/x-npy"),
        (b"RIFF....WAVE", "audio/wav"),
        (b" \n{}", "application/json"),
        (b"raw", "application/octet-stream"),
        (b"", "application/octet-stream"),
        (memoryview(b"\xff\xd8\xff"), "image/jpeg"),
    ],
)
def test_bytes_are_sniffed(data: bytes, content_type: str) -> None:
    """As the device would do it, but WAV is known too, and what is nothing else is a raw tensor."""

    assert content_type == encoder(data)(5).content_type


def test_arrays_are_said_in_each_version() -> None:
    """Binary with a header where a property can say its length; .npy or JSON where none can."""
    one = encoder({"x": np.zeros(2, np.float32)})
    two = encoder({"x": np.zeros(2, np.float32), "y": np.zeros(2, np.float32)})

    assert [True, False, False] == [body.header_length is not None for body in (one(5), one(4), two(4))]
    assert ["application/octet-stream", "application/x-npy", "application/json"] == [
        body.content_type for body in (one(5), one(4), two(4))
    ]
