"""Targets: what a broker or another client may send over MQTT."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

from edge_sdk.errors import EdgeSdkError, Malformed, NoAnswer, RequestError
from edge_sdk.mqtt import commands
from edge_sdk.mqtt.answers import ClientCodec, described
from edge_sdk.mqtt.codec import Codec
from edge_sdk.mqtt.topics import MAX_RESPONSE_TOPIC_BYTES, Topics
from edge_sdk.mqtt.transports.base import ConnectOptions, Message, MqttVersion, Properties, Received
from edge_sdk.mqtt.transports.packets import (
    PUBLISH,
    Inbox,
    MalformedPacket,
    Oversize,
    decode_puback,
    decode_publish,
    decode_publish_head,
    encode_puback,
    encode_publish,
    publish_size,
    variable_length,
)
from edge_sdk.mqtt.transports.paho import PahoCodec
from edge_sdk.runtime.messages import Answer, Request
from edge_sdk.tasks.base import JSON, Body
from tests.fuzz.targets import Pieces, pieces, target

mqtt5: Any = None
with contextlib.suppress(ImportError):  # the oracle, where its wheel is to be had
    import mqtt5

TOPICS = Topics("edge/v1", "fuzzed")
CODEC = Codec(TOPICS, boot_id="b0", max_payload_bytes=2000, timeout_s=30.0, reply_prefixes=("plant/",))
LARGEST = 3000
VERSIONS: tuple[MqttVersion, ...] = (4, 5)

FULL = Properties(
    "edge/v1/reply/me", b"\1\2\3", "image/jpeg; charset=utf-8", 30, (("priority", "7"), ("model-version", "2"))
)
MESSAGES = [
    Message("edge/v1/fuzzed/models/digits/infer", b"{}", properties=FULL),
    Message("edge/v1/fuzzed/models/digits/infer/client/17", b"\xff\xd8\xff", qos=0),
    Message("a", b"", retain=True, properties=Properties(user=(("k", ""), ("k", "ü")))),
]


def packet(message: Message, version: MqttVersion = 5) -> bytes:
    return encode_publish(message, 7 if message.qos else None, version) + message.payload


def cut(data: bytes, piece: int) -> tuple[list[tuple[int, bytes]], str]:
    """The packets that an inbox makes of `data`, `piece` bytes at a time, and how it ended."""
    inbox, found = Inbox(LARGEST), []
    while data:
        room = inbox.room()
        assert room
        assert len(room) <= Inbox.CAPACITY + LARGEST
        count = min(len(room), piece, len(data))
        room[:count] = data[:count]
        data = data[count:]
        inbox.filled(count)
        try:
            while (got := inbox.next_packet()) is not None:
                found.append((got[0], bytes(got[1])))
        except MalformedPacket:
            return found, "malformed"
        except Oversize as exc:
            try:
                if decode_publish_head(*inbox.peek()) is not None:
                    inbox.skip(exc.size)
            except MalformedPacket:
                return found, "malformed"
    return found, "open"


@target(seeds=lambda: [b"\1" + b"".join(map(packet, MESSAGES)), b"\x40\x40\x02\x00\x07\xd0\x00" + packet(MESSAGES[0])])
def inbox(data: bytes) -> None:
    """The same packets however the bytes were cut, MalformedPacket at the same place, and no buffer beyond the largest
    packet; one that is larger passes unread."""
    piece, stream = Pieces(data).byte() + 1, data[1:]

    assert cut(stream, len(stream) or 1) == cut(stream, piece)


@target(
    seeds=lambda: [
        bytes((version, packet(m, version)[0])) + packet(m, version)[2:] for m in MESSAGES for version in (4, 5)
    ]
)
def publish(data: bytes) -> None:
    """A message or MalformedPacket; a message is written and read again as it was, and the `mqtt5` codec, where it
    takes the packet, has read the same."""
    version: MqttVersion = 4 if data[:1] == b"\4" else 5
    first, body = PUBLISH | (data[1] & 0x0F if len(data) > 1 else 0), memoryview(data)[2:]
    with contextlib.suppress(MalformedPacket):
        decode_publish_head(first, body)
    try:
        message, packet_id = decode_publish(first, body, version)
    except MalformedPacket:
        if version == 5 and bytes(body).isascii():  # at text that is not UTF-8 the other codec panics (0.8.0)
            theirs = read_by_another(packet_of(first, body))
            assert theirs is None or not sound(theirs) or theirs.write() != packet_of(first, body), theirs
        return
    theirs = read_by_another(packet_of(first, body)) if version == 5 else None
    again = encode_publish(message, packet_id, version) + message.payload

    assert (message, packet_id) == decode_publish(again[0], body_of(again), version)
    assert len(again) == publish_size(message, version)
    if theirs is not None:
        assert (message, packet_id) == as_ours(theirs)


def packet_of(first: int, body: memoryview) -> bytes:
    return b"".join((bytes((first,)), variable_length(len(body)), body))


def body_of(packet: bytes) -> memoryview:
    head = 1 + next(index for index in range(1, 5) if packet[index] < 0x80)
    return memoryview(packet)[head:]


def read_by_another(packet: bytes) -> Any:
    """The packet as `mqtt5` reads it; None where it refuses it, or is not installed."""
    if mqtt5 is None:
        return None
    try:
        return mqtt5.read(memoryview(packet))[0]
    except (ValueError, IndexError):
        return None


def sound(theirs: Any) -> bool:
    """Whether a broker may send this to us: we asked for no QoS 2 and allowed no topic alias (3.3.2.3.4), and the
    other codec lets pass NUL in text (1.5.4), and a wildcard or nothing for a topic (3.3.2.1). What else it lets pass,
    a property twice (3.3.2.3) or one that reaches past the properties, it would not write like that."""
    texts = [theirs.topic, theirs.content_type, theirs.response_topic, *sum(theirs.user_properties, ())]
    return (
        theirs.qos.value < 2
        and theirs.topic_alias is None
        and bool(theirs.topic)
        and not any(character in theirs.topic for character in "+#")
        and not any("\0" in text for text in texts if text is not None)
    )


def as_ours(theirs: Any) -> tuple[Message, int | None]:
    properties = Properties(
        theirs.response_topic,
        theirs.correlation_data,
        theirs.content_type,
        theirs.message_expiry_interval,
        tuple(theirs.user_properties),
    )
    qos: Literal[0, 1] = 1 if theirs.qos.value else 0
    return Message(theirs.topic, theirs.payload, qos, theirs.retain, properties), theirs.packet_id


@target(seeds=lambda: [encode_puback(7)[2:], b"\0\1\x10\0", b"\0\1\x87\x05\x1f\0\2no"], max_bytes=200)
def puback(data: bytes) -> None:
    """A packet id and a reason code, or MalformedPacket; the `mqtt5` codec reads the same where it takes the packet."""
    try:
        packet_id, code = decode_puback(memoryview(data))
    except MalformedPacket:
        assert len(data) < 2
        return

    assert data[:2] == encode_puback(packet_id)[2:]
    if mqtt5 is not None and data[3:].isascii():  # see `publish`
        with contextlib.suppress(ValueError, IndexError):
            theirs = mqtt5.read(memoryview(b"\x40" + variable_length(len(data)) + data))[0]
            assert (theirs.packet_id, theirs.reason_code.value) == (packet_id, code)


@target(
    seeds=lambda: [
        b"edge/v1/fuzzed/models/digits/infer",
        b"edge/v1/fuzzed/models/digits/versions/2/infer",
        b"edge/v1/fuzzed/models/digits/infer/client/17",
        b"edge/v1/group/all/models/digits/infer",
        b"edge/v1/reply/me/too",
        b"plant/answers",
        b"$SYS/broker",
    ],
    max_bytes=400,
)
def topics(data: bytes) -> None:
    """A request's address or None. What names can be published to is built again as it was; an answer never goes
    where a wildcard stands, under `$`, or outside of what is allowed."""
    topic = data.decode("utf-8", "replace")
    address = TOPICS.parse_infer(topic)
    if address is not None:
        assert address.model
        result = TOPICS.result(address)
        assert result.startswith("edge/v1/fuzzed/models/")
        assert TOPICS.parse_infer(result) is None
        with contextlib.suppress(EdgeSdkError):  # names that we would not give
            built = (
                TOPICS.infer_from(address.model, address.client, address.number or "")
                if address.client is not None
                else TOPICS.infer(address.model, version=address.version)
            )
            assert topic == built or topic.startswith("edge/v1/group/")
    if TOPICS.may_reply_to(topic, ("plant/",)):
        assert topic.startswith(("edge/v1/reply/", "plant/"))
        assert not set(topic) & set("+#\0")
        assert len(topic.encode()) <= MAX_RESPONSE_TOPIC_BYTES
    TOPICS.client_of(topic)
    TOPICS.result_id(topic)


def message_of(given: Pieces) -> Message:
    properties = Properties(
        response_topic=given.maybe_text(),
        correlation_data=given.take() if given.byte() & 1 else None,
        content_type=given.maybe_text(),
        message_expiry_s=given.number() if given.byte() & 1 else None,
        user=tuple((given.text(), given.text()) for _ in range(given.byte() & 7)),
    )
    model = given.text().translate({ord("+"): "-", ord("#"): "-"})  # which no PUBLISH has in its topic
    topic = f"edge/v1/fuzzed/models/{model or 'digits'}/infer"
    return Message(topic, given.rest(), properties=properties)


def request_seed(
    *user: tuple[bytes, bytes], content_type: bytes = b"application/json", payload: bytes = b"{}"
) -> bytes:
    pairs = [value for pair in user for value in pair]
    return pieces(1, b"edge/v1/reply/me", 1, b"id", 1, content_type, 1, 0, 30, len(user), *pairs, b"digits") + payload


@target(
    seeds=lambda: [
        request_seed(),
        request_seed((b"priority", b"9"), (b"model-version", b"2"), (b"accept", b"text/plain")),
        request_seed((b"inference-header-content-length", b"12"), content_type=b"application/octet-stream"),
        request_seed(
            (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), (b"tracestate", b"a=b")
        ),
        request_seed(content_type=b"text/plain; charset=latin-1"),
    ]
)
def requests(data: bytes) -> None:
    """A request or a RequestError; either way an answer that a packet can carry, and that the client reads."""
    message = message_of(Pieces(data))
    if (envelope := CODEC.envelope(message)) is None:
        return
    route = CODEC.route(message, envelope)
    try:
        request: Request | RequestError = CODEC.request(Received(message, 1, False, 1), envelope, 5, 100.0)
    except RequestError as exc:
        request = exc
    if isinstance(request, Request):
        assert len(request.payload.data) <= CODEC.max_payload_bytes
        assert 0 <= request.priority <= 9
        assert request.deadline >= request.received
    result = request if isinstance(request, RequestError) else Body(b"{}", JSON)
    answer = CODEC.message(Answer(5, result), route, 3.0)
    wire = encode_publish(answer, 1, 5) + answer.payload

    assert (answer, 1) == decode_publish(wire[0], body_of(wire), 5)


CLIENT = ClientCodec("edge/v1", "me")


def answer_seed(payload: bytes, *user: tuple[bytes, bytes], content_type: bytes = b"application/json") -> bytes:
    pairs = [value for pair in user for value in pair]
    return pieces(0, 1, b"\0\0\0\0\0\0\0\1", 1, content_type, 0, len(user), *pairs, b"digits") + payload


@target(
    seeds=lambda: [
        answer_seed(
            b'{"model_name":"m","outputs":[{"name":"y","datatype":"FP32","shape":[1],"data":[1.5]}],'
            b'"predictions":[{"label":"7","index":7,"score":0.9}]}',
            (b"status", b"200"),
            (b"server-timing", b"queue;dur=1.2, infer;dur=5.8"),
        ),
        answer_seed(b'{"error":"no","code":"queue_full","status":429,"retryable":true}', (b"status", b"429")),
        answer_seed(b'{"state":"READY"}'),
    ]
)
def answers(data: bytes) -> None:
    """What claims to answer a request is an Answer or one of our errors; what a device retains is an object, or
    NoAnswer."""
    message = message_of(Pieces(data))
    for topic in (CLIENT.reply_topic, message.topic, message.topic.replace("/infer", "/result/me/") + "17"):
        CLIENT.key(Message(topic, message.payload, properties=message.properties))
    with contextlib.suppress(EdgeSdkError):
        CLIENT.answer(message, "m", "d")
    with contextlib.suppress(NoAnswer):
        assert isinstance(described("t", message.payload), dict)


@target(
    seeds=lambda: [
        pieces(1, b"17", b"ping") + b'{"transaction":"t1"}',
        pieces(0, b"load") + b'{"transaction":5,"model":"digits","version":"1"}',
        pieces(0, b"selftest"),
        pieces(0, b"frobnicate") + b'{"transaction":"\\ud83d\\ude00"}',
        pieces(0, b"ping") + b'{"transaction":"t1","status":"ok","data":{},"error":null}',
    ],
    words=("transaction", "status", "data", "error", "\\ud800", "\\u0000", "null", '"', "{", "}", ":", ","),
)
def command(data: bytes) -> None:
    """A command has an answer that a packet can carry, whatever came; and what claims to be one is read or is none."""
    given = Pieces(data)
    correlation_data = given.take() if given.byte() & 1 else None
    name = given.text().translate({ord("+"): "-", ord("#"): "-", ord("/"): "-"})
    message = Message("t", given.rest(), properties=Properties(correlation_data=correlation_data))
    read = commands.read(Received(message, 1, False, 1), name)
    for key in ("model", "version"):
        with contextlib.suppress(Malformed):
            read.text(key)
    commands.answered(message.payload)
    route = commands.route(read, TOPICS)
    answer = commands.phrase(read, commands.Outcome(error=read.problem or None), TOPICS)
    wire = packet(answer)

    assert (answer, 7) == decode_publish(wire[0], body_of(wire), 5)
    assert route.topic == answer.topic


OPTIONS: dict[int, ConnectOptions] = {
    version: ConnectOptions("h", 1883, "c", version=version, maximum_packet_size=LARGEST) for version in VERSIONS
}
BROKER_PACKETS = [
    b"\x20\x03\0\0\0",
    b"\x20\x0c\1\0\x09\x21\0\5\x27\0\0\x10\0\x25\0",
    b"\x20\x02\0\5",
    b"\x90\x05\0\1\0\1\x87",
    b"\xb0\x04\0\1\0\0",
    b"\xd0\0",
    b"\xe0\x02\x8b\0",
    b"\xe0\0",
    b"\x40\x04\0\7\x10\0",
]


def codecs(version: int) -> list[Any]:
    """Whatever reads the packets of that version."""
    options = OPTIONS[version]
    found: list[Any] = [PahoCodec(options, 1)]
    if version == 5 and mqtt5 is not None:
        from edge_sdk.mqtt.transports.mqtt5 import Mqtt5Codec

        found.append(Mqtt5Codec(options, 1))
    return found


@target(
    seeds=lambda: [
        *(b"\5" + one + packet(MESSAGES[0]) for one in BROKER_PACKETS),
        *(b"\4" + one + packet(MESSAGES[1], 4) for one in (b"\x20\x02\0\0", b"\x90\x03\0\1\1", b"\x40\x02\0\7")),
    ]
)
def transports(data: bytes) -> None:
    """What a transport reads of a broker's bytes that come in two pieces: packets, then the end or MalformedPacket."""
    version = 4 if data[:1] == b"\4" else 5
    stream = data[1 : LARGEST + 1]
    for codec in codecs(version):
        codec.connect()
        inbox = Inbox(LARGEST)
        for piece in (stream[: len(stream) // 2], stream[len(stream) // 2 :]):
            inbox.room()[: len(piece)] = piece
            inbox.filled(len(piece))
            try:
                left = len(stream)
                while left and codec.read(inbox) is not None:
                    left -= 1

                assert left or not stream
            except MalformedPacket:
                break
