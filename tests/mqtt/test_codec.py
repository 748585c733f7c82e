"""Messages to requests and answers to messages, as the wire contract writes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import (
    InferenceFailed,
    Malformed,
    ModelNotFound,
    QueueFull,
    RequestError,
    TooLarge,
    UnsupportedType,
)
from edge_sdk.mqtt.codec import HEADER_LENGTH, MAX_CORRELATION, Codec, Envelope
from edge_sdk.mqtt.session import ReplyRoute
from edge_sdk.mqtt.topics import InferTopic, Topics
from edge_sdk.mqtt.transports.base import Message, Properties, Received
from edge_sdk.mqtt.transports.packets import publish_size
from edge_sdk.runtime.messages import Answer, Request, Timing
from edge_sdk.tasks.base import BINARY, JSON, TEXT, Body

CODEC = Codec(
    Topics("edge/v1", "dev"), boot_id="b007", max_payload_bytes=100, timeout_s=30.0, reply_prefixes=("plant/",)
)
ADDRESS = InferTopic("m")
ROUTE = ReplyRoute("edge/v1/reply/me", b"7")

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=300)
MESSAGES = st.builds(
    Message,
    topic=TEXTS,
    payload=st.binary(max_size=300) | st.integers(0, 3_000_000).map(bytes),
    properties=st.builds(
        Properties, TEXTS | st.none(), st.binary(max_size=300) | st.none(), TEXTS | st.none(),
        st.integers(0, 2**32 - 1) | st.none(), st.lists(st.tuples(TEXTS, TEXTS), max_size=5).map(tuple),
    ),
)  # fmt: skip


def message(payload: bytes = b"{}", *user: tuple[str, str], **properties: Any) -> Message:
    return Message("edge/v1/dev/models/m/infer", payload, properties=Properties(user=user, **properties))


def request_of(sent: Message, address: InferTopic = ADDRESS, *, now: float = 0.0, skipped_bytes: int = 0) -> Request:
    envelope = Envelope(address, "edge/v1/reply/me", address.client or "me")
    return CODEC.request(Received(sent, 1, False, 1, skipped_bytes), envelope, 9, now)


def error_of(answer: Message) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(answer.payload)
    return decoded


# Requests


def test_a_request_says_what_its_properties_say() -> None:
    """Payload, content type, header length, accept, version and deadline, each from its place."""
    sent = message(
        b"abc", (HEADER_LENGTH, "2"), ("accept", "Text/Plain"), ("model-version", "3"),
        content_type="Application/Octet-Stream; charset=UTF-8", message_expiry_s=5,
    )  # fmt: skip
    request = request_of(sent, now=1000.0)
    payload = request.payload

    assert (9, "m", "3", 1000.0, 1005.0) == (
        request.ticket, request.model, request.version, request.received, request.deadline,
    )  # fmt: skip
    assert (b"abc", BINARY, 2, TEXT) == (payload.data, payload.content_type, payload.header_length, payload.accept)


def test_what_is_not_said_has_a_default() -> None:
    """The device's time-out, a content type to be sniffed, no header, the newest version; a topic's version wins."""
    request = request_of(message(content_type=" "))
    pinned = request_of(message(b"", ("model-version", "1")), InferTopic("m", version="2"))

    assert (30.0, None, None, None) == (
        request.deadline, request.payload.content_type, request.payload.header_length, request.version,
    )  # fmt: skip
    assert None is request_of(message(b"", (HEADER_LENGTH, "0"))).payload.header_length
    assert "2" == pinned.version
    assert 50.0 == request_of(message(message_expiry_s=0), now=50.0).deadline


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (message(bytes(101)), TooLarge),
        (message(correlation_data=b""), Malformed),
        (message(correlation_data=bytes(MAX_CORRELATION + 1)), Malformed),
        (message(correlation_data=bytes(65_535)), Malformed),
        (message(b"", (HEADER_LENGTH, "-1")), Malformed),
        (message(b"", (HEADER_LENGTH, "1.5")), Malformed),
        (message(b"", (HEADER_LENGTH, "\N{ARABIC-INDIC DIGIT ONE}")), Malformed),
        (message(b"", (HEADER_LENGTH, "9" * 1000)), Malformed),
        (message(content_type="application/json; charset=utf-16"), UnsupportedType),
        (message(b"", ("accept", "text/plain;charset=latin-1")), UnsupportedType),
    ],
    ids=["payload", "empty id", "id of 129", "id of 64 K", "negative", "fraction", "arabic", "long", "charset",
         "accept"],
)  # fmt: skip
def test_what_cannot_be_taken_is_said(sent: Message, expected: type[RequestError]) -> None:
    """400, 413 or 415, before anything is decoded - and there is still a way to answer."""
    with pytest.raises(expected):
        request_of(sent)

    assert CODEC.envelope(sent) is not None


def test_a_packet_that_was_not_read_is_too_large() -> None:
    """Over MQTT 3.1.1 an oversized request arrives without its payload: 413, with the size it had."""
    with pytest.raises(TooLarge, match="5,000 bytes; this device takes 100"):
        request_of(message(b""), skipped_bytes=5000)


@given(MESSAGES)
def test_any_message_is_a_request_or_refused(sent: Message) -> None:
    """Whatever properties came, only RequestErrors are raised, and they can be sent."""
    try:
        request_of(sent)
    except RequestError as exc:
        error_of(CODEC.message(Answer(1, exc), ROUTE, 1.0))


# Routes


@pytest.mark.parametrize(
    ("tail", "properties", "expected"),
    [
        ("m/infer", {"response_topic": "edge/v1/reply/me", "correlation_data": b"7"}, ROUTE),
        ("m/infer", {"response_topic": "edge/v1/reply/me"}, ReplyRoute("edge/v1/reply/me", None, identifies=False)),
        ("m/infer", {"response_topic": "plant/a"}, ReplyRoute("plant/a", None, identifies=False)),
        ("m/infer", {}, ReplyRoute("edge/v1/dev/models/m/result", None, identifies=False)),
        ("m/infer", {"correlation_data": b"7"}, ReplyRoute("edge/v1/dev/models/m/result", b"7")),
        ("m/infer/c/1", {}, ReplyRoute("edge/v1/dev/models/m/result/c/1")),
        ("m/infer", {"response_topic": "edge/v1/other/models/m/infer"}, None),
        ("m/infer", {"response_topic": "edge/v1/reply/+"}, None),
        ("m/infer", {"response_topic": "$SYS/x"}, None),
        ("m/infer", {"response_topic": "edge/v1/reply/" + "x" * 60_000}, None),
        ("m/infer", {"response_topic": ""}, None),
        ("m" * 60_000 + "/infer", {}, None),
    ],
)
def test_where_an_answer_goes(tail: str, properties: dict[str, Any], expected: ReplyRoute | None) -> None:
    """To an allowed Response Topic, to the topic of MQTT 3.1.1, or nowhere; only an id tells requests apart."""
    sent = message(**properties)._replace(topic=f"edge/v1/dev/models/{tail}")

    for _ in range(2):  # the second time from what was kept
        envelope = CODEC.envelope(sent)

        assert expected == (None if envelope is None else CODEC.route(sent, envelope))


def test_what_is_kept_of_requests_is_bounded() -> None:
    """Whatever strangers write around their requests, and however much: it is read rightly, and soon forgotten."""
    codec = Codec(Topics("edge/v1", "dev"), boot_id="b007", max_payload_bytes=100, timeout_s=30.0)
    for number in range(2_000):
        user = (("priority", str(number % 10)), ("filler", "x" * (number % 700)), *[("a", "")] * (number % 20))
        sent = message(b"", *user, response_topic=f"edge/v1/reply/{number}")
        envelope = codec.envelope(sent)
        assert envelope is not None
        request = codec.request(Received(sent, 1, False, 1), envelope, number, 0.0)

        assert (str(number), number % 10) == (request.client, request.priority)

    assert 0 < len(codec._envelopes) <= 256
    assert 0 < len(codec._said) <= 256
    assert all(len(user) <= 16 and sum(map(len, sum(user, ()))) <= 512 for _, user in codec._said)


def test_of_two_properties_of_a_name_the_first_counts() -> None:
    assert request_of(message(b"", ("priority", "7"), ("priority", "1"))).priority == 7


# Answers


def test_an_answer_carries_the_contracts_properties() -> None:
    """Status, version, device, boot, timing and header length; correlation data to the byte; the time that is left."""
    answer = Answer(1, Body(b"{}x", BINARY, 2), "3", Timing(1.234, 5.678))
    sent = CODEC.message(answer, ReplyRoute("edge/v1/reply/me", b"\0\xff"), remaining_s=2.6)

    assert ("edge/v1/reply/me", b"{}x", 1, False) == (sent.topic, sent.payload, sent.qos, sent.retain)
    assert (b"\0\xff", BINARY, 3) == (
        sent.properties.correlation_data, sent.properties.content_type, sent.properties.message_expiry_s,
    )  # fmt: skip
    assert {
        "status": "200", "model-version": "3", "device": "dev", "boot-id": "b007",
        "server-timing": "queue;dur=1.23, infer;dur=5.68", HEADER_LENGTH: "2",
    } == dict(sent.properties.user)  # fmt: skip


def test_what_took_long_is_told() -> None:
    """Decoding a picture and phrasing a large answer have a place of their own; next to nothing has not."""
    timings = (Timing(1.0, 2.0, decode_ms=10.0, encode_ms=0.5), Timing(1.0, 2.0, decode_ms=0.0, encode_ms=0.049))
    told = [
        CODEC.message(Answer(1, Body(b""), "3", timing), ROUTE, 1.0).properties.user_value("server-timing")
        for timing in timings
    ]

    assert [
        "queue;dur=1.00, infer;dur=2.00, decode;dur=10.00, encode;dur=0.50",
        "queue;dur=1.00, infer;dur=2.00",
    ] == told


@pytest.mark.parametrize("remaining_s", [0.0, -5.0, 0.4])
def test_an_answer_always_lives_for_a_second(remaining_s: float) -> None:
    """Expiry 0 would have the broker drop it at once."""

    assert 1 == CODEC.message(Answer(1, Body(b"")), ROUTE, remaining_s).properties.message_expiry_s


@pytest.mark.parametrize(
    ("error", "route", "expected"),
    [
        (
            QueueFull("It is full.", fix="Wait.", retry_after_ms=40), ROUTE,
            {"error": "It is full. Wait.", "code": "queue_full", "status": 429, "id": "7", "retryable": True,
             "retry_after_ms": 40},
        ),
        (
            ModelNotFound("No."), ReplyRoute("edge/v1/dev/models/m/result/c/1"),
            {"error": "No.", "code": "model_not_found", "status": 404, "id": "c/1", "retryable": False},
        ),
        (
            InferenceFailed("Grün."), ReplyRoute("edge/v1/dev/models/m/result"),
            {"error": "Grün.", "code": "inference_failed", "status": 500, "retryable": False},
        ),
        (
            Malformed("No."), ReplyRoute("edge/v1/reply/me", b"\0\xff"),
            {"error": "No.", "code": "malformed", "status": 400, "id": "00ff", "retryable": False},
        ),
        (
            Malformed("No."), ReplyRoute("edge/v1/reply/me", b"a\nb"),
            {"error": "No.", "code": "malformed", "status": 400, "id": "610a62", "retryable": False},
        ),
    ],
    ids=["429", "3.1.1", "without id", "binary id", "unprintable id"],
)  # fmt: skip
def test_errors_have_one_form(error: RequestError, route: ReplyRoute, expected: dict[str, Any]) -> None:
    """JSON that an Open Inference Protocol client reads, with our code beside the text, and an id its sender knows."""
    sent = CODEC.message(Answer(1, error), route, 1.0)
    user = dict(sent.properties.user)

    assert expected == error_of(sent)
    assert (JSON, str(error.status)) == (sent.properties.content_type, user["status"])
    assert (str(error.retry_after_ms) if error.retry_after_ms else None) == user.get("retry-after")


def test_an_answer_over_the_brokers_limit_becomes_a_413() -> None:
    """Same address, same identity, JSON, its status once, no header length - and much smaller."""
    answer = CODEC.message(Answer(1, Body(bytes(5000), BINARY, 2), "3", Timing(1.0, 1.0)), ROUTE, 9.0)
    sent = CODEC.too_large(answer, 1000)
    keys = [key for key, _ in sent.properties.user]

    assert (ROUTE.topic, ROUTE.correlation_data, JSON, 9) == (
        sent.topic, sent.properties.correlation_data, sent.properties.content_type, sent.properties.message_expiry_s,
    )  # fmt: skip
    assert ("too_large", 413, "7", "413") == (
        error_of(sent)["code"], error_of(sent)["status"], error_of(sent)["id"], sent.properties.user_value("status"),
    )  # fmt: skip
    assert sorted(set(keys)) == sorted(keys)
    assert HEADER_LENGTH not in keys
    assert publish_size(sent, 5) < 1000
