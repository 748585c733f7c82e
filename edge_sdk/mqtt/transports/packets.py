"""The packets on the hot path as bytes: PUBLISH, its PUBACK, and where one packet ends. Pure: no socket, no clock.

Every request and every answer is a PUBLISH and a PUBACK, so these two are ours; the rare packets (CONNECT, SUBSCRIBE,
DISCONNECT and their answers) stay with the client library. A general-purpose decoder pays for properties nobody uses
and copies what is left of the packet after each field. Here the payload is copied once, out of the receive buffer.

CPU ms a message, sent and received, with six properties: paho 0.27 at 1 KB and 2.6 to 3.9 at 600 KB, this 0.03 and 0.3
to 0.6. (Larger socket buffers and SO_RCVLOWAT were tried at 600 KB too, and changed nothing.)

Section numbers refer to the MQTT 5.0 specification; 3.1.1 is the same without properties.
"""

from __future__ import annotations

import struct

from edge_sdk.mqtt.transports.base import NO_PROPERTIES, Message, MqttVersion, Properties

CONNACK, PUBLISH, PUBACK, SUBACK, UNSUBACK, PINGRESP, DISCONNECT = 0x20, 0x30, 0x40, 0x90, 0xB0, 0xD0, 0xE0
"""The first byte's high half, of every packet a broker may send to a client that uses no QoS 2 and no AUTH."""

PINGREQ = b"\xc0\x00"
MAX_REMAINING_LENGTH = 268_435_455

_EXPIRY, _CONTENT_TYPE, _RESPONSE_TOPIC, _CORRELATION_DATA, _USER = 0x02, 0x03, 0x08, 0x09, 0x26
_PAYLOAD_FORMAT, _SUBSCRIPTION_ID = 0x01, 0x0B

_U16 = struct.Struct("!H")
_U32 = struct.Struct("!I")


class MalformedPacket(ValueError):
    """Bytes that no broker may send; the only way out is to close the connection (4.13)."""


class Oversize(Exception):
    """The packet at the head of the inbox is larger than allowed: `size` bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(f"a packet of {size:,} bytes")
        self.size = size


class Inbox:
    """Bytes as they come from a socket, cut into packets.

        n = sock.recv_into(inbox.room())
        inbox.filled(n)
        while (packet := inbox.next_packet()) is not None:
            first_byte, body = packet

    A body is a view of the buffer: good until the next `room`. The buffer grows to the packet that is arriving and
    never beyond `largest`, so a large packet is received in place and a lying length costs nothing.
    """

    CAPACITY = 256 * 1024
    KEPT = 4 * 1024 * 1024
    """A buffer grown beyond this is given back once it is empty."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._buffer = memoryview(bytearray(self.CAPACITY))
        self._start = 0
        self._end = 0
        self._expected = 0
        self._skipping = 0

    def room(self) -> memoryview:
        """Where the next bytes go; never empty."""
        held = self._end - self._start
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._buffer) > self.KEPT:
                self._buffer = memoryview(bytearray(self.CAPACITY))
        if self._start + self._expected > len(self._buffer) or self._end == len(self._buffer):
            # A buffer of the packet's own size: the bytes after it stay in the socket, and nothing is moved twice.
            target = self._buffer
            if self._expected > len(self._buffer):
                target = memoryview(bytearray(self._expected))
            target[:held] = self._buffer[self._start : self._end]
            self._buffer, self._start, self._end = target, 0, held
        return self._buffer[self._end :]

    def filled(self, count: int) -> None:
        """`count` bytes were put at the start of `room`."""
        self._end += count
        if self._skipping:
            gone = min(self._skipping, self._end - self._start)
            self._start += gone
            self._skipping -= gone

    def next_packet(self) -> tuple[int, memoryview] | None:
        """The first byte and the body of the next packet, or None until more has come.

        Raises MalformedPacket, or Oversize as soon as a length beyond `largest` is known.
        """
        start, end, buffer = self._start, self._end, self._buffer
        self._expected = 0
        if end - start < 2:
            return None
        length, shift, position = 0, 0, start + 1
        while True:
            if position == end:
                return None
            byte = buffer[position]
            position += 1
            length |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 21:
                raise MalformedPacket("a remaining length of more than four bytes (1.5.5)")
        stop = position + length
        if stop - start > self.largest:
            raise Oversize(stop - start)
        if stop > end:
            self._expected = stop - start
            return None
        self._start = stop
        return buffer[start], buffer[position:stop]

    def unread(self) -> memoryview:
        """What is here, from the next packet on; good until the next `room`."""
        return self._buffer[self._start : self._end]

    def take(self, size: int) -> None:
        """The next packet was read, out of `unread`, and had `size` bytes; MalformedPacket if that is too many."""
        if size > self.largest:
            raise MalformedPacket(f"a packet of {size:,} bytes; at most {self.largest:,} were announced")
        self._start += size
        self._expected = 0

    def peek(self) -> tuple[int, memoryview]:
        """The first byte, and as much of the body as is here, of the packet that `next_packet` found oversize."""
        position = self._start + 1
        while self._buffer[position] >= 0x80:
            position += 1
        return self._buffer[self._start], self._buffer[position + 1 : self._end]

    def skip(self, size: int) -> None:
        """Let the packet at the head, `size` bytes with its header, pass unread."""
        gone = min(size, self._end - self._start)
        self._start += gone
        self._skipping = size - gone


def encode_publish(message: Message, packet_id: int | None, version: MqttVersion) -> bytes:
    """Everything of a PUBLISH before its payload.

    Raises ValueError for what no packet can carry: a topic or property over 65,535 bytes, a payload over 256 MB.
    """
    first = PUBLISH | message.qos << 1 | message.retain
    topic = message.topic.encode()
    parts = [_U16.pack(_short(topic)), topic]
    if packet_id is not None:
        parts.append(_U16.pack(packet_id))
    if version == 5:
        properties = _encode_properties(message.properties)
        parts += (variable_length(len(properties)), properties)
    head = b"".join(parts)
    return b"".join((bytes((first,)), variable_length(len(head) + len(message.payload)), head))


def publish_size(message: Message, version: MqttVersion) -> int:
    """The bytes `message` takes on the wire: what a broker's Maximum Packet Size is about."""
    return len(encode_publish(message, 1 if message.qos else None, version)) + len(message.payload)


def encode_puback(packet_id: int) -> bytes:
    return b"\x40\x02" + _U16.pack(packet_id)


def decode_publish(first: int, body: memoryview, version: MqttVersion) -> tuple[Message, int | None]:
    """The message and its packet id (None for QoS 0). Raises MalformedPacket."""
    qos = (first >> 1) & 3
    if qos > 1:
        raise MalformedPacket("a PUBLISH of QoS 2, though no subscription asked for one")
    try:
        topic, position = _text(body, 0)
        packet_id = None
        if qos:
            packet_id = _U16.unpack_from(body, position)[0]
            position += 2
        properties = NO_PROPERTIES
        if version == 5:
            length, position = _variable_int(body, position)
            if length:
                stop = position + length
                if stop > len(body):
                    raise MalformedPacket("properties that reach past the packet")
                properties = _decode_properties(body[position:stop])
                position = stop
    except (struct.error, IndexError) as err:
        raise MalformedPacket("a PUBLISH that ends too early") from err
    if not topic or "#" in topic or "+" in topic:
        raise MalformedPacket("a PUBLISH to an empty topic or to a wildcard (3.3.2.1)")
    message = Message(topic, bytes(body[position:]), 1 if qos else 0, bool(first & 1), properties)
    return message, packet_id


def decode_publish_head(first: int, body: memoryview) -> tuple[str, int | None] | None:
    """Topic and packet id of a PUBLISH of which only the beginning is here; None: even they are not.

    Raises MalformedPacket.
    """
    try:
        if len(body) < 2 + _U16.unpack_from(body)[0]:
            return None
        topic, position = _text(body, 0)
        return topic, _U16.unpack_from(body, position)[0] if first & 6 else None
    except (struct.error, IndexError):
        return None


def decode_puback(body: memoryview) -> tuple[int, int]:
    """Packet id and reason code; a PUBACK without one (always in 3.1.1) means success."""
    if len(body) < 2:
        raise MalformedPacket("a PUBACK without a packet id")
    return _U16.unpack_from(body)[0], body[2] if len(body) > 2 else 0


def _encode_properties(properties: Properties) -> bytes:
    if properties is NO_PROPERTIES:
        return b""
    parts: list[bytes] = []
    if properties.message_expiry_s is not None:
        parts += (b"\x02", _U32.pack(properties.message_expiry_s))
    for identifier, text in ((b"\x03", properties.content_type), (b"\x08", properties.response_topic)):
        if text is not None:
            data = text.encode()
            parts += (identifier, _U16.pack(_short(data)), data)
    if properties.correlation_data is not None:
        parts += (b"\x09", _U16.pack(_short(properties.correlation_data)), properties.correlation_data)
    for key, value in properties.user:
        name, data = key.encode(), value.encode()
        parts += (b"\x26", _U16.pack(_short(name)), name, _U16.pack(_short(data)), data)
    return b"".join(parts)


def _decode_properties(data: memoryview) -> Properties:
    expiry = content_type = response_topic = correlation_data = None
    user: list[tuple[str, str]] = []
    position, stop = 0, len(data)
    while position < stop:
        identifier = data[position]
        position += 1
        if identifier == _USER:
            key, position = _text(data, position)
            value, position = _text(data, position)
            user.append((key, value))
        elif identifier == _CORRELATION_DATA and correlation_data is None:
            view, position = _binary(data, position)
            correlation_data = bytes(view)
        elif identifier == _CONTENT_TYPE and content_type is None:
            content_type, position = _text(data, position)
        elif identifier == _RESPONSE_TOPIC and response_topic is None:
            response_topic, position = _text(data, position)
        elif identifier == _EXPIRY and expiry is None:
            expiry = _U32.unpack_from(data, position)[0]
            position += 4
        elif identifier == _PAYLOAD_FORMAT:
            position += 1
        elif identifier == _SUBSCRIPTION_ID:
            _, position = _variable_int(data, position)
        else:
            # A topic alias would be the broker's mistake too: CONNECT allows none.
            raise MalformedPacket(f"property 0x{identifier:02x} twice, or in a PUBLISH to us (3.3.2.3)")
    if position != stop:
        raise MalformedPacket("a property that reaches past the properties")
    return Properties(response_topic, correlation_data, content_type, expiry, tuple(user))


def _binary(data: memoryview, position: int) -> tuple[memoryview, int]:
    stop = position + 2 + _U16.unpack_from(data, position)[0]
    if stop > len(data):
        raise MalformedPacket("a string that reaches past its packet")
    return data[position + 2 : stop], stop


def _text(data: memoryview, position: int) -> tuple[str, int]:
    view, stop = _binary(data, position)
    try:
        text = str(view, "utf-8")
    except UnicodeDecodeError as err:
        raise MalformedPacket("a string that is not UTF-8 (1.5.4)") from err
    if "\0" in text:
        raise MalformedPacket("a string with a NUL (1.5.4)")
    return text, stop


def _variable_int(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 21:
            raise MalformedPacket("a length of more than four bytes (1.5.5)")


def variable_length(value: int) -> bytes:
    """A length as the wire has it, seven bits a byte (1.5.5)."""
    if value < 0x80:
        return bytes((value,))
    if value > MAX_REMAINING_LENGTH:
        raise ValueError(f"A packet of {value:,} bytes is more than MQTT can carry.")
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _short(data: bytes) -> int:
    if len(data) > 65_535:
        raise ValueError(f"A topic or property of {len(data):,} bytes is more than MQTT can carry (65,535).")
    return len(data)
