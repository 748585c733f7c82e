"""The two codecs against each other: what one writes the other reads, and garbage is a MalformedPacket to both."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_sdk.mqtt.transports.base import ConnectOptions, Message, Properties, Received
from edge_sdk.mqtt.transports.packets import MAX_REMAINING_LENGTH, Inbox, MalformedPacket
from edge_sdk.mqtt.transports.paho import PahoCodec
from edge_sdk.mqtt.transports.stream import Packet, PacketCodec
from tests.transports.pieces import in_pieces
from tests.transports.test_packets import MESSAGES

pytest.importorskip("mqtt5", reason="the codec mqtt5 is not installed")

from edge_sdk.mqtt.transports.mqtt5 import LARGE, Mqtt5Codec

OPTIONS = ConnectOptions("localhost", 1883, "c")
MQTT5, PAHO = Mqtt5Codec(OPTIONS, 1), PahoCodec(OPTIONS, 1)

# mqtt5 panics at text that is not UTF-8, and leaves Python's error behind as one that nobody could take.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def read_in_pieces(codec: PacketCodec, data: bytes, pieces: int, largest: int = MAX_REMAINING_LENGTH) -> list[Packet]:
    """What `codec` reads of `data` when it comes `pieces` bytes at a time."""
    inbox, found = Inbox(largest), []
    for _ in in_pieces(inbox, data, pieces):
        while (packet := codec.read(inbox)) is not None:
            found.append(packet)
    return found


@pytest.mark.parametrize(("writer", "reader"), [(MQTT5, PAHO), (PAHO, MQTT5), (MQTT5, MQTT5)], ids=["mp", "pm", "mm"])
@given(messages=st.lists(MESSAGES, max_size=5), pieces=st.integers(1, 400))
def test_messages_survive_any_fragmentation(
    writer: PacketCodec, reader: PacketCodec, messages: list[Message], pieces: int
) -> None:
    """What one codec wrote the other reads, property by property, however the bytes were cut."""
    wire = b"".join(b"".join(writer.publish(message, 7 if message.qos else None)) for message in messages)

    expected = [Received(message, 7 if message.qos else None, False, 1) for message in messages]
    assert expected == read_in_pieces(reader, wire, pieces)


@pytest.mark.parametrize("size", [0, 127, 128, LARGE - 1, LARGE, LARGE + 1, 2_097_151, 2_097_152, 3_000_000])
def test_payloads_of_every_size(size: int) -> None:
    """Also where a payload is no longer copied, and where the length takes one byte more."""
    message = Message("t", bytes(size), properties=Properties(user=(("a", "b"),)))
    pieces = MQTT5.publish(message, 7)

    assert (2 if size >= LARGE else 1) == len(pieces)
    assert [Received(message, 7, False, 1)] == read_in_pieces(PAHO, b"".join(pieces), 1_000_000)
    assert [Received(message, 7, False, 1)] == read_in_pieces(MQTT5, b"".join(pieces), 1_000_000)


@pytest.mark.parametrize("message", [
    Message("t" * 65_536, b""),
    Message("t", b"", properties=Properties(content_type="c" * 65_536)),
    Message("t", b"", properties=Properties(user=(("k", "v" * 65_536),))),
    Message("t", bytes(MAX_REMAINING_LENGTH)),
], ids=["topic", "content type", "user property", "payload"])  # fmt: skip
def test_what_no_packet_can_carry_is_a_value_error(message: Message) -> None:
    """Not a panic, and not a packet that ends the connection."""
    for codec in (MQTT5, PAHO):
        with pytest.raises(ValueError, match=r"\d"):
            codec.publish(message, 7)


@given(st.binary(max_size=60), st.integers(1, 60))
@example(b"\x30\x05\x00\x02\xff\xfe\x00", 60)
@example(b"\x40\x00", 60)
@example(b"\x32\x05\x00\xff\x61\x00\x01" + bytes(50), 60)
def test_garbage_is_malformed_or_incomplete(data: bytes, pieces: int) -> None:
    """Whatever comes is read, waited for, or MalformedPacket; no panic of Rust passes by, and nothing loops."""
    for codec in (Mqtt5Codec(OPTIONS, 1), PahoCodec(OPTIONS, 1)):
        try:
            read_in_pieces(codec, data, pieces)
        except MalformedPacket:
            pass


def test_a_whole_packet_over_the_limit_is_refused_too() -> None:
    """Also one so small that it came in one piece."""
    wire = b"".join(MQTT5.publish(Message("t", bytes(100)), 7))
    for codec in (MQTT5, PAHO):
        with pytest.raises(MalformedPacket, match="at most 50"):
            read_in_pieces(codec, wire, 1000, largest=50)
