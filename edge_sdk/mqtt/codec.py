"""Messages to requests and answers to messages, on the device's side; pure.

What MQTT 5 carries in properties and MQTT 3.1.1 in the topic ends here: the runtime sees a payload and a deadline, the
session a route. Errors are always JSON in the Open Inference Protocol's form, with our code beside it:

    {"error": "text for a person", "code": "queue_full", "status": 429, "id": "...", "retryable": true}

A client says the same around each of its requests: topics, content type, user properties. So what that means is found
out once, as an `Envelope` and as what it `_Said`, and kept for the next one; bounded, and only where it is short.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from edge_sdk.errors import Malformed, RequestError, TooLarge, UnsupportedType
from edge_sdk.mqtt.session import ReplyRoute
from edge_sdk.mqtt.topics import MAX_RESPONSE_TOPIC_BYTES, InferTopic, Topics
from edge_sdk.mqtt.transports.base import Message, Properties, Received
from edge_sdk.runtime.messages import DEFAULT_PRIORITY, Answer, Request
from edge_sdk.tasks.base import BINARY, JPEG, JSON, NPY, PNG, TEXT, Body, Payload, SequencePart
from edge_sdk.tasks.oip import dump_json, sequence_part

HEADER_LENGTH = "inference-header-content-length"
SEQUENCE_ID, SEQUENCE_START, SEQUENCE_END, SEQUENCE_STEP = (
    "sequence-id", "sequence-start", "sequence-end", "sequence-step",
)  # fmt: skip
TOLD_MS = 0.05
"""Of decoding and phrasing, `server-timing` says what took so long: a picture's, and not ten numbers'."""

MAX_CORRELATION = 128
"""Bytes of correlation data that are echoed."""

_OK = ("status", "200")

_KEPT = 256
"""Envelopes, and as many of what is said besides; when there are more, all are forgotten."""
_SHORT, _FEW = 512, 16
"""Characters and user properties of what is kept, at most: a client may send as many as a packet holds."""


class Envelope(NamedTuple):
    """What the topics of a request say: whom it asks, who asks, and where the answer goes."""

    address: InferTopic
    reply_topic: str
    client: str
    """Who asks, as far as that can be told."""


class _Said(NamedTuple):
    """What a request's content type and user properties say."""

    content_type: str | None
    header_length: int | None
    accept: str | None
    sequence: SequencePart | None
    version: str | None
    priority: int


@dataclass(frozen=True)
class Codec:
    """How this device reads requests and signs answers."""

    topics: Topics
    boot_id: str
    max_payload_bytes: int
    timeout_s: float
    reply_prefixes: tuple[str, ...] = ()
    qos: Literal[0, 1] = 1
    """Of answers."""

    _envelopes: dict[tuple[str, str | None], Envelope] = field(default_factory=dict, repr=False, compare=False)
    _said: dict[tuple[str | None, tuple[tuple[str, str], ...]], _Said] = field(
        default_factory=dict, repr=False, compare=False
    )

    def envelope(self, message: Message) -> Envelope | None:
        """What the topics of a request say; None for what is none, or names a topic that we must not write to."""
        topics = (message.topic, message.properties.response_topic)
        return self._envelopes.get(topics) or self._read_envelope(*topics)

    def _read_envelope(self, topic: str, response_topic: str | None) -> Envelope | None:
        if (address := self.topics.parse_infer(topic)) is None:
            return None
        if response_topic is None:
            reply_topic = self.topics.result(address)
            if len(reply_topic.encode()) > MAX_RESPONSE_TOPIC_BYTES:
                return None
        elif self.topics.may_reply_to(response_topic, self.reply_prefixes):
            reply_topic = response_topic
        else:
            return None
        envelope = Envelope(address, reply_topic, address.client or self.topics.client_of(response_topic))
        if address.number is None and len(topic) + len(reply_topic) <= _SHORT:  # a number comes but once
            if len(self._envelopes) >= _KEPT:
                self._envelopes.clear()
            self._envelopes[topic, response_topic] = envelope
        return envelope

    def route(self, message: Message, envelope: Envelope) -> ReplyRoute:
        """Where the answer goes."""
        data = message.properties.correlation_data
        return ReplyRoute(envelope.reply_topic, data, data is not None or envelope.address.client is not None)

    def request(self, received: Received, envelope: Envelope, ticket: int, now: float, key: int = 0) -> Request:
        """The request in a message; raises Malformed, TooLarge or UnsupportedType. `key` as in Request."""
        message = received.message
        payload, properties, address = message.payload, message.properties, envelope.address
        payload_bytes = received.skipped_bytes or len(payload)
        if payload_bytes > self.max_payload_bytes:
            raise TooLarge(f"The payload has {payload_bytes:,} bytes; this device takes {self.max_payload_bytes:,}.")
        data = properties.correlation_data
        if data is not None and not 0 < len(data) <= MAX_CORRELATION:
            raise Malformed(f"The correlation data has {len(data)} bytes; 1 to {MAX_CORRELATION} are taken.")
        said = self._said.get((properties.content_type, properties.user)) or self._read_said(properties)
        expiry_s = properties.message_expiry_s
        return Request(
            ticket,
            address.model,
            Payload(payload, said.content_type, said.header_length, said.accept, said.sequence),
            now,
            now + (self.timeout_s if expiry_s is None else expiry_s),
            address.version or said.version,
            envelope.client,
            said.priority,
            address.number or data,
            key,
        )

    def _read_said(self, properties: Properties) -> _Said:
        user = dict(reversed(properties.user))  # the first of a name counts
        said = _Said(
            _media_type(properties.content_type),
            _header_length(user.get(HEADER_LENGTH)),
            _media_type(user.get("accept")),
            _sequence(user),
            user.get("model-version"),
            _priority(user.get("priority")),
        )
        length = len(properties.content_type or "") + sum([len(name) + len(value) for name, value in properties.user])
        if length <= _SHORT and len(properties.user) <= _FEW:
            if len(self._said) >= _KEPT:
                self._said.clear()
            self._said[properties.content_type, properties.user] = said
        return said

    def message(self, answer: Answer, route: ReplyRoute, remaining_s: float) -> Message:
        """The PUBLISH that carries `answer`; `remaining_s` is what is left until the request's deadline."""
        result = answer.result
        if isinstance(result, RequestError):
            body, user = self._error_body(result, route), [("status", str(result.status))]
        else:
            body, user = result, [_OK]
        if answer.model_version is not None:
            user.append(("model-version", answer.model_version))
        user += self._signature
        if (timing := answer.timing) is not None:
            said = f"queue;dur={timing.queue_ms:.2f}, infer;dur={timing.infer_ms:.2f}"
            if timing.decode_ms >= TOLD_MS:
                said += f", decode;dur={timing.decode_ms:.2f}"
            if timing.encode_ms >= TOLD_MS:
                said += f", encode;dur={timing.encode_ms:.2f}"
            for name, took_ms in timing.stages:
                said += f", {name};dur={took_ms:.2f}"
            user.append(("server-timing", said))
        if body.header_length is not None:
            user.append((HEADER_LENGTH, str(body.header_length)))
        if isinstance(result, RequestError) and result.retry_after_ms is not None:
            user.append(("retry-after", str(result.retry_after_ms)))
        expiry_s = max(1, round(remaining_s))
        properties = Properties(None, route.correlation_data, body.content_type, expiry_s, tuple(user))
        return Message(route.topic, body.data, self.qos, False, properties)

    @cached_property
    def _signature(self) -> tuple[tuple[str, str], ...]:
        return (("device", self.topics.device), ("boot-id", self.boot_id))

    def too_large(self, answer: Message, limit: int) -> Message:
        """What is sent in place of an answer that the broker would not take."""
        error = TooLarge(
            f"The answer has {len(answer.payload):,} bytes; the broker takes packets of {limit:,}.",
            fix="Ask for fewer outputs, or raise the broker's packet limit.",
        )
        kept = tuple(pair for pair in answer.properties.user if pair[0] not in ("status", HEADER_LENGTH))
        properties = answer.properties._replace(content_type=JSON, user=(("status", str(error.status)), *kept))
        route = ReplyRoute(answer.topic, answer.properties.correlation_data)
        return answer._replace(payload=self._error_body(error, route).data, properties=properties)

    def _error_body(self, error: RequestError, route: ReplyRoute) -> Body:
        body: dict[str, object] = {"error": str(error), "code": error.code, "status": error.status}
        if (request_id := self._readable_id(route)) is not None:
            body["id"] = request_id
        body["retryable"] = error.retryable
        if error.retry_after_ms is not None:
            body["retry_after_ms"] = error.retry_after_ms
        return Body(dump_json(body), JSON)

    def _readable_id(self, route: ReplyRoute) -> str | None:
        """The request's id as its sender would recognise it: its correlation data, or `client/n` on MQTT 3.1.1."""
        if route.correlation_data:
            try:
                text = route.correlation_data.decode("utf-8")
            except UnicodeDecodeError:
                return route.correlation_data.hex()
            return text if text.isprintable() else route.correlation_data.hex()
        return self.topics.result_id(route.topic)


_MEDIA_TYPES = frozenset((JSON, BINARY, JPEG, PNG, NPY, TEXT))
"""As most clients write them."""


def _media_type(text: str | None) -> str | None:
    """A content type in lower case and without parameters; UnsupportedType for a charset that is not UTF-8."""
    if text is None or text in _MEDIA_TYPES:
        return text
    if not text.strip():
        return None
    media_type, _, parameters = text.lower().partition(";")
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in ("utf-8", "utf8", "us-ascii"):
            raise UnsupportedType(f"The charset {value.strip()[:40]!r} is not taken; send UTF-8.")
    return media_type.strip()


def _priority(text: str | None) -> int:
    if text is None:
        return DEFAULT_PRIORITY
    if not (text.isascii() and text.isdigit() and len(text) == 1):
        raise Malformed(
            f"`priority` is {text[:40]!r}; it is a digit from 0 to 9, {DEFAULT_PRIORITY} where it is missing."
        )
    return int(text)


def _sequence(user: Mapping[str, str]) -> SequencePart | None:
    """The part of a sequence that a request says it is; a flag is `1`, or `0` for whoever likes to say so."""
    if (sequence := user.get(SEQUENCE_ID)) is None:
        return None
    start, end, step = (user.get(name) for name in (SEQUENCE_START, SEQUENCE_END, SEQUENCE_STEP))
    for name, flag in ((SEQUENCE_START, start), (SEQUENCE_END, end)):
        if flag not in (None, "0", "1"):
            raise Malformed(f"`{name}` is {str(flag)[:40]!r}; it is 1, or left out.")
    if step is not None and not (step.isascii() and step.isdigit() and len(step) <= 18):
        raise Malformed(f"`{SEQUENCE_STEP}` is {step[:40]!r}; it is a number, one more with each request.")
    return sequence_part(sequence, start=start == "1", end=end == "1", step=None if step is None else int(step))


def _header_length(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise Malformed(f"`{HEADER_LENGTH}` is {text[:40]!r}; it is a number of bytes.")
    return int(text) or None
