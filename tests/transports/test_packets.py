"""The packets we read and write ourselves, held against a codec that nobody here wrote, and against garbage."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.mqtt.transports.base import Message, MqttVersion, Properties
from edge_sdk.mqtt.transports.packets import (
    MAX_REMAINING_LENGTH,
    Inbox,
    MalformedPacket,
    Oversize,
    decode_puback,
    decode_publish,
    decode_publish_head,
    encode_puback,
    encode_publish,
    publish_size,
)
from tests.transports.pieces import in_pieces

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
TOPIC = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0+#"), min_size=1, max_size=40)
PROPERTIES = st.builds(
    Properties,
    st.none() | TOPIC,
    st.none() | st.binary(max_size=40),
    st.none() | TEXT,
    st.none() | st.integers(0, 2**32 - 1),
    st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple),
)
MESSAGES = st.builds(
    Message, TOPIC, st.binary(max_size=300), st.sampled_from([0, 1]), st.booleans(), properties=PROPERTIES
)


def packets_of(data: bytes, pieces: int, largest: int = MAX_REMAINING_LENGTH) -> list[tuple[int, bytes]]:
    """What an inbox makes of `data` when it comes `pieces` bytes at a time."""
    inbox, found = Inbox(largest), []
    for _ in in_pieces(inbox, data, pieces):
        while (packet := inbox.next_packet()) is not None:
            found.append((packet[0], bytes(packet[1])))
    return found


@given(st.lists(MESSAGES, max_size=5), st.sampled_from([4, 5]), st.integers(1, 400))
def test_messages_survive_any_fragmentation(messages: list[Message], version: MqttVersion, pieces: int) -> None:
    """What was written is read again, however the bytes were cut; MQTT 3.1.1 drops the properties."""
    wire = b"".join(encode_publish(m, 7 if m.qos else None, version) + m.payload for m in messages)

    read = [decode_publish(first, memoryview(body), version) for first, body in packets_of(wire, pieces)]

    expected = messages if version == 5 else [Message(m.topic, m.payload, m.qos, m.retain) for m in messages]
    assert [(m, 7 if m.qos else None) for m in expected] == read
    assert len(wire) == sum(publish_size(m, version) for m in messages)


@given(MESSAGES)
def test_another_codec_agrees(message: Message) -> None:
    """The `mqtt5` codec writes the same message, and we read what it wrote."""
    mqtt5 = pytest.importorskip("mqtt5", reason="the codec mqtt5 is not installed")
    p = message.properties
    theirs: Any = mqtt5.PublishPacket(
        topic=message.topic,
        payload=message.payload,
        qos=mqtt5.QoS(message.qos),
        retain=message.retain,
        packet_id=7 if message.qos else None,
        response_topic=p.response_topic,
        correlation_data=p.correlation_data,
        content_type=p.content_type,
        message_expiry_interval=p.message_expiry_s,
        user_properties=list(p.user),
    )
    written = theirs.write()

    ((first, body),) = packets_of(written, 1000)

    assert message == decode_publish(first, memoryview(body), 5)[0]
    assert len(written) == publish_size(message, 5)
    ours = encode_publish(message, 7 if message.qos else None, 5) + message.payload
    assert theirs == mqtt5.read(memoryview(ours))[0]


@given(st.binary(max_size=200), st.integers(0, 255), st.sampled_from([4, 5]))
def test_garbage_is_malformed_or_a_message(body: bytes, first: int, version: MqttVersion) -> None:
    """Whatever the bytes: a message, or MalformedPacket, and nothing else."""
    for decode in (lambda: decode_publish(first, memoryview(body), version), lambda: decode_puback(memoryview(body))):
        try:
            decode()
        except MalformedPacket:
            pass


@given(st.binary(max_size=300), st.integers(1, 50))
def test_garbage_does_not_upset_the_inbox(data: bytes, pieces: int) -> None:
    """Whatever the bytes: packets, MalformedPacket or Oversize, and nothing else."""
    try:
        packets_of(data, pieces, largest=1000)
    except (MalformedPacket, Oversize):
        pass


def test_a_lying_length_costs_nothing() -> None:
    """A header that promises 256 MB is refused before a byte of it is awaited, if less is allowed."""
    with pytest.raises(Oversize) as caught:
        packets_of(b"\x30\xff\xff\xff\x7f", 5, largest=2_000_000)

    assert MAX_REMAINING_LENGTH + 5 == caught.value.size


@pytest.mark.parametrize("message", [Message("a/topic", b"payload"), Message("a/topic", b"payload", qos=0)])
def test_a_head_that_is_not_all_here_is_awaited(message: Message) -> None:
    """However little of an oversized packet came: nothing is known yet, or topic and id are, and it is never malformed.
    The connection would be closed for it, and the broker would send it again."""
    body = memoryview(encode_publish(message, 7 if message.qos else None, 4))[2:]
    known = 2 + len("a/topic") + 2 * message.qos
    heads = [decode_publish_head(0x32 if message.qos else 0x30, body[:length]) for length in range(len(body) + 1)]

    assert [None] * known == heads[:known]
    assert {("a/topic", 7 if message.qos else None)} == set(heads[known:])


def test_a_large_packet_is_received_in_place() -> None:
    """The buffer grows to the packet that arrives, is kept while that is sensible, and given back after a huge one."""
    small, large, huge = (b"\x30\x80\x80\x80" + bytes((n,)) for n in (0, 1, 3))
    inbox = Inbox(MAX_REMAINING_LENGTH)
    sizes = []

    for head, length in ((large, 1 << 21), (huge, 3 << 21), (small, 0)):
        left = head + bytes(length)
        while left:
            room = inbox.room()
            count = min(len(room), len(left))
            room[:count] = left[:count]
            left = left[count:]
            inbox.filled(count)
            inbox.next_packet()
        sizes.append(len(inbox.room()))

    assert [5 + (1 << 21), Inbox.CAPACITY] == sizes[:2]


def test_puback_is_four_bytes() -> None:
    """Without a reason there is nothing else to say; with one, it is read."""

    assert b"\x40\x02\x01\x02" == encode_puback(0x0102)
    assert (0x0102, 0) == decode_puback(memoryview(b"\x01\x02"))
    assert (0x0102, 0x10) == decode_puback(memoryview(b"\x01\x02\x10\x00"))


@pytest.mark.parametrize(
    "message", [Message("t" * 65_536, b""), Message("t", b"", properties=Properties("r" * 65_536))]
)
def test_what_no_packet_can_carry_is_refused(message: Message) -> None:
    """A topic or property over 65,535 bytes is the caller's mistake."""
    with pytest.raises(ValueError, match="more than MQTT can carry"):
        encode_publish(message, 1, 5)
