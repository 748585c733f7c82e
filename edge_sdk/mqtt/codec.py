"""Messages to requests and answers to messages, on the device's side; pure.

What MQTT 5 carries in properties and MQTT 3.1.1 in the topic ends here: the runtime sees a payload and a deadline, the
session a route. Errors are always JSON in the Open Inference Protocol's form, with our code beside it:

    {"error": "text for a person", "code": "queue_full", "status": 429, "id": "...", "retryable": true}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

    def route(self, message: Message, address: InferTopic) -> ReplyRoute | None:
        """Where the answer goes; None if the request names a topic that we must not write to."""
        properties = message.properties
        if properties.response_topic is not None:
            if not self.topics.may_reply_to(properties.response_topic, self.reply_prefixes):
                return None
            identifies = properties.correlation_data is not None
            return ReplyRoute(properties.response_topic, properties.correlation_data, identifies)
        topic = self.topics.result(address)
        if len(topic.encode()) > MAX_RESPONSE_TOPIC_BYTES:
            return None
        identifies = address.client is not None or properties.correlation_data is not None
        return ReplyRoute(topic, properties.correlation_data, identifies)

    def client(self, message: Message, address: InferTopic) -> str:
        """Who asks, as far as the message tells."""
        return address.client or self.topics.client_of(message.properties.response_topic)

    def request(self, received: Received, address: InferTopic, ticket: int, now: float, key: int = 0) -> Request:
        """The request in a message; raises Malformed, TooLarge or UnsupportedType. `key` as in Request."""
        message, properties = received.message, received.message.properties
        payload_bytes = received.skipped_bytes or len(message.payload)
        if payload_bytes > self.max_payload_bytes:
            raise TooLarge(f"The payload has {payload_bytes:,} bytes; this device takes {self.max_payload_bytes:,}.")
        if properties.correlation_data is not None and not 0 < len(properties.correlation_data) <= MAX_CORRELATION:
            raise Malformed(
                f"The correlation data has {len(properties.correlation_data)} bytes; 1 to {MAX_CORRELATION} are taken."
            )
        timeout_s = self.timeout_s if properties.message_expiry_s is None else float(properties.message_expiry_s)
        return Request(
            ticket=ticket,
            model=address.model,
            version=address.version or properties.user_value("model-version"),
            payload=Payload(
                message.payload,
                _media_type(properties.content_type),
                _header_length(properties.user_value(HEADER_LENGTH)),
                _media_type(properties.user_value("accept")),
                _sequence(properties) if properties.user else None,
            ),
            received=now,
            deadline=now + timeout_s,
            client=self.client(message, address),
            priority=_priority(properties.user_value("priority")),
            id=address.number or properties.correlation_data,
            key=key,
        )

    def message(self, answer: Answer, route: ReplyRoute, remaining_s: float) -> Message:
        """The PUBLISH that carries `answer`; `remaining_s` is what is left until the request's deadline."""
        result = answer.result
        body = self._error_body(result, route) if isinstance(result, RequestError) else result
        user = [("status", str(answer.status))]
        if answer.model_version is not None:
            user.append(("model-version", answer.model_version))
        user += [("device", self.topics.device), ("boot-id", self.boot_id)]
        if answer.timing is not None:
            timing = answer.timing
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
        return Message(
            route.topic,
            body.data,
            qos=self.qos,
            properties=Properties(
                correlation_data=route.correlation_data,
                content_type=body.content_type,
                message_expiry_s=max(1, round(remaining_s)),
                user=tuple(user),
            ),
        )

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


def _sequence(properties: Properties) -> SequencePart | None:
    """The part of a sequence that a request says it is; a flag is `1`, or `0` for whoever likes to say so."""
    if (sequence := properties.user_value(SEQUENCE_ID)) is None:
        return None
    start, end, step = (properties.user_value(name) for name in (SEQUENCE_START, SEQUENCE_END, SEQUENCE_STEP))
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
