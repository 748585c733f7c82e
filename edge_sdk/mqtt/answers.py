"""Requests to messages and messages to answers, on the client's side; pure but for a file it is told to read.

The device's side of the same wire is `edge_sdk.mqtt.codec`. What MQTT 5 carries in properties and MQTT 3.1.1 in the
topic ends here: `edge_sdk.mqtt.client` sees keys, bodies and answers.

Anybody who may publish on our topics writes what is read here. So whatever comes is an Answer, or an error for the one
request it claims to answer, and never anything else: the client's other requests share its thread.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Union

import numpy as np

from edge_sdk.errors import DataError, EdgeSdkError, Malformed, NoAnswer, RequestError, SettingsError, request_error
from edge_sdk.mqtt import topics
from edge_sdk.mqtt.codec import HEADER_LENGTH, SEQUENCE_END, SEQUENCE_ID, SEQUENCE_START, SEQUENCE_STEP
from edge_sdk.mqtt.topics import Topics
from edge_sdk.mqtt.transports.base import Message, MqttVersion, Properties
from edge_sdk.tasks.base import BINARY, JSON, NPY, Body, SequencePart
from edge_sdk.tasks.npy import encode_npy
from edge_sdk.tasks.oip import decode_response, encode_json_request, encode_request, parse_json
from edge_sdk.tasks.tensors import sniff
from edge_sdk.tensors import Array

Data = Union[bytes, bytearray, memoryview, str, "os.PathLike[str]", Array, Mapping[str, Array]]
"""What a model can be asked about. See `Client.infer`."""

WAV = "audio/wav"

KEY_DIGITS = 20
"""Of a key of 8 bytes. More are a stranger's, and Python refuses to read thousands of them."""
LONGEST_EXPIRY_S = 2**32 - 1


@dataclass(frozen=True)
class Prediction:
    """One class of a classification; `score` is the model's, usually a probability."""

    label: str
    index: int
    score: float


@dataclass(frozen=True)
class Answer:
    """What a device answered. `outputs` are read-only views of `raw` where that is possible."""

    outputs: dict[str, Array]
    predictions: tuple[Prediction, ...]
    """The best classes first; empty for a model that does not classify."""
    model: str
    model_version: str
    device: str
    timing: dict[str, float]
    """Milliseconds on the device, by stage (`queue`, `infer`; `decode`, `encode` where they took long); empty on MQTT
    3.1.1."""
    content_type: str
    raw: bytes = field(repr=False)
    """The body as it came."""
    status: int = 200


@dataclass(frozen=True)
class ClientCodec:
    """How this client signs requests and recognises answers. Raises SettingsError for names no topic can hold."""

    root: str
    client_id: str

    def __post_init__(self) -> None:
        topics.reply(topics.check_root(self.root), self.client_id)

    @cached_property
    def reply_topic(self) -> str:
        return topics.reply(self.root, self.client_id)

    def answers_filter(self, protocol: MqttVersion) -> str:
        """Where this client's answers come: its Response Topic, or, without such a thing, its place at every device."""
        return self.reply_topic if protocol == 5 else f"{self.root}/+/models/+/result/{self.client_id}/+"

    def request(
        self,
        key: int,
        device: str,
        model: str,
        body: Body,
        *,
        version: str | None = None,
        accept: str | None = None,
        sequence: SequencePart | None = None,
        protocol: MqttVersion,
        remaining_s: float,
        group: str | None = None,
        trace: tuple[tuple[str, str], ...] = (),
    ) -> Message:
        """The PUBLISH that asks; `remaining_s` is what is left until the deadline. `body` must be `protocol`'s form.

        It asks whoever of `group` gets it, or else `device`. `trace` are user properties that name the request's span,
        on MQTT 5. Raises SettingsError for a `version` or a `group` on MQTT
        3.1.1.
        """
        check_version(version, protocol, group)
        if protocol == 4:
            address = Topics(self.root, device)
            return Message(address.infer_from(model, self.client_id, str(key)), body.data)
        user: list[tuple[str, str]] = []
        if body.header_length is not None:
            user.append((HEADER_LENGTH, str(body.header_length)))
        if accept is not None:
            user.append(("accept", accept))
        if version is not None and group is not None:  # a group's topics name no version
            user.append(("model-version", version))
        if sequence is not None:
            user += _sequence_properties(sequence)
        user += trace
        properties = Properties(
            response_topic=self.reply_topic,
            correlation_data=key.to_bytes(8, "big"),
            content_type=body.content_type or None,
            message_expiry_s=max(1, math.ceil(min(remaining_s, LONGEST_EXPIRY_S))),
            user=tuple(user),
        )
        if group is not None:
            topic = topics.infer_in_group(self.root, group, model)
        else:
            topic = Topics(self.root, device).infer(model, version=version)
        return Message(topic, body.data, properties=properties)

    def key(self, message: Message) -> int | None:
        """The request that a message claims to answer: -1 if it is none of ours, None if this is no answer."""
        if message.topic == self.reply_topic:
            data = message.properties.correlation_data
            return int.from_bytes(data, "big") if data is not None and len(data) == 8 else -1
        head, found, number = message.topic.rpartition(f"/result/{self.client_id}/")
        if not found or not head.startswith(f"{self.root}/"):
            return None
        return _number(number, -1, digits=KEY_DIGITS)

    def answer(self, message: Message, model: str, device: str) -> Answer:
        """The Answer in a message; raises the RequestError that it holds instead, or NoAnswer if it is unreadable."""
        try:
            return _read_answer(message, model, device)
        except EdgeSdkError:
            raise
        except Exception as err:  # a stranger's bytes; see the module
            raise NoAnswer(f"The answer for model {model!r} cannot be read: {err!r}.") from err


def check_version(version: str | None, protocol: MqttVersion, group: str | None = None) -> None:
    """SettingsError if `protocol` has no way to ask for that version of a model, or to ask a group."""
    if group is not None and protocol == 4:
        raise SettingsError(f"A request to group {group!r} needs MQTT 5: 3.1.1 has no way back for it.")
    if version is not None and protocol == 4:
        raise SettingsError(
            f"A request for version {version!r} needs MQTT 5: 3.1.1 has no topic with a version and a way back."
        )


def described(topic: str, payload: bytes) -> dict[str, Any]:
    """What a device retains on `topic` about itself or a model; NoAnswer if it is no JSON object."""
    try:
        description = parse_json(payload)
    except Malformed as err:
        raise NoAnswer(f"What is retained on {topic} cannot be read: {payload[:80]!r}. {err}") from err
    if not isinstance(description, dict):
        raise NoAnswer(f"What is retained on {topic} is not an object: {payload[:80]!r}.")
    return description


def _sequence_properties(part: SequencePart) -> list[tuple[str, str]]:
    said = [(SEQUENCE_ID, part.id)]
    said += [(name, "1") for name, flag in ((SEQUENCE_START, part.start), (SEQUENCE_END, part.end)) if flag]
    return said if part.step is None else [*said, (SEQUENCE_STEP, str(part.step))]


def encoder(data: Data, sequence: SequencePart | None = None) -> Callable[[MqttVersion], Body]:
    """How `data` is said in each version of MQTT. Raises DataError for what cannot be said.

    Without properties, on MQTT 3.1.1, only the body can say of which `sequence` it is a part.
    """
    if sequence is None:
        return _encoder(data)
    feeds = {str(name): np.asarray(array) for name, array in data.items()} if isinstance(data, Mapping) else None
    parameters = {
        "sequence_id": sequence.id, "sequence_start": sequence.start, "sequence_end": sequence.end,
        **({} if sequence.step is None else {"sequence_step": sequence.step}),
    }  # fmt: skip
    in_properties = _encoder(data)

    def encode(version: MqttVersion) -> Body:
        if version == 5:
            return in_properties(version)
        if feeds is None:
            raise DataError(
                "On MQTT 3.1.1 a part of a sequence is sent as {input name: array}: nothing else says whose it is.",
                fix="Give it in that form, or use a broker that speaks MQTT 5.",
            )
        return encode_json_request(feeds, parameters=parameters)

    return encode


def _encoder(data: Data) -> Callable[[MqttVersion], Body]:
    if isinstance(data, np.ndarray):
        array = data
        if array.dtype.kind in "OSU":
            raise DataError("An array of strings or objects has no raw form.", fix="Give {input name: array}.")
        return lambda _version: Body(encode_npy(array), NPY)
    if isinstance(data, Mapping):
        feeds = {str(name): np.asarray(array) for name, array in data.items()}

        def encode(version: MqttVersion) -> Body:
            if version == 5:
                return encode_request(feeds)
            # 3.1.1 has no property to say where a binary body's header ends.
            (first, *others) = feeds.values()
            return encode_json_request(feeds) if others or first.dtype.kind in "OSU" else Body(encode_npy(first), NPY)

        if not feeds:
            raise DataError("There is no input in {}.", fix="Give {input name: array}.")
        return encode
    if isinstance(data, (str, os.PathLike)):
        path = Path(data)
        try:
            data = path.read_bytes()
        except OSError as err:
            raise DataError(f"The input {path} cannot be read: {err.strerror}.") from err
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise DataError(
            f"A {type(data).__name__} is not something a model can be asked about.",
            fix="Give bytes, the path of a file, an array, or {input name: array}.",
        )
    body = Body(bytes(data), _sniff(data))
    return lambda _version: body


def _sniff(data: bytes | bytearray | memoryview) -> str:
    """The content type that the first bytes show; a raw tensor shows none."""
    head = bytes(data[:64])
    if head.startswith(b"RIFF"):
        return WAV
    try:
        return sniff(head)
    except RequestError:
        return BINARY


def _read_answer(message: Message, model: str, device: str) -> Answer:
    """The Answer in a message; raises the RequestError that it holds instead."""
    properties = message.properties
    user = dict(properties.user)
    status = _number(user.get("status"), 0)
    content_type = properties.content_type or _sniff(message.payload)
    if status >= 400 or (not status and message.payload.startswith(b'{"error"')):
        raise _read_error(message.payload, status, user.get("retry-after"))
    outputs: dict[str, Array] = {}
    predictions: tuple[Prediction, ...] = ()
    version = user.get("model-version", "")
    if content_type in (JSON, BINARY):
        header_length = _number(user.get(HEADER_LENGTH), 0) or None
        try:
            response = decode_response(message.payload, header_length)
            predictions = tuple(
                Prediction(str(each.get("label", "")), int(each["index"]), float(each["score"]))
                for each in response.extra.get("predictions", ())
            )
        except RequestError as err:
            raise NoAnswer(f"The answer for model {model!r} cannot be read: {err}") from err
        outputs, version = response.outputs, response.model_version or version
    return Answer(
        outputs=outputs,
        predictions=predictions,
        model=model,
        model_version=version,
        device=user.get("device", device),
        timing=_timing(user.get("server-timing", "")),
        content_type=content_type,
        raw=message.payload,
        status=status or 200,
    )


def _read_error(payload: bytes, status: int, retry_after: str | None) -> EdgeSdkError:
    try:
        body = parse_json(payload)
        text, code = str(body["error"]), str(body.get("code", ""))
    except (Malformed, TypeError, KeyError, AttributeError):
        return Malformed(f"The device answered with status {status} and a body that is no error: {payload[:80]!r}.")
    wait = retry_after if retry_after is not None else body.get("retry_after_ms")
    retry_after_ms = _number(str(wait), -1) if wait is not None else -1
    retryable = body.get("retryable")
    return request_error(
        code,
        text,
        retry_after_ms if retry_after_ms >= 0 else None,
        retryable if isinstance(retryable, bool) else None,
    )


def _timing(text: str) -> dict[str, float]:
    """`queue;dur=1.2, infer;dur=5.8` as milliseconds by name; what does not look like that is left out."""
    timing: dict[str, float] = {}
    for entry in text.split(","):
        name, _, duration = entry.partition(";dur=")
        try:
            timing[name.strip()] = float(duration)
        except ValueError:
            continue
    return timing


def _number(text: str | None, otherwise: int, *, digits: int = 15) -> int:
    """A number of at most `digits`; for anything else `otherwise`."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) <= digits else otherwise
