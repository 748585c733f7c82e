"""The transport on mqtt5 0.8 and later: MQTT 5 by a compiled codec without socket, thread or state of its own.

It reads every packet, and writes all but PUBACK. CPU us a PUBLISH with six properties, and in brackets of `packets`:

    read   1 KB  5.6 (13.8)   600 KB  21 (29)
    write  1 KB  2.2  (4.9)   600 KB   2.9 (4.8), and 31 if the codec copied the payload

What it leaves to its user, or does in a way of its own, is guarded here:

* it knows the reason codes of the specification and refuses others. A refused PUBACK would be asked for again on each
  connection, so that packet is then read by `packets`; so is a CONNACK in the form of 3.1.1, which refuses MQTT 5;
* its codes are no ints, whatever its types say;
* it takes topics with wildcards or NUL, topic aliases and QoS 2, none of which a broker may send to us;
* text that is not UTF-8 and a payload beyond what MQTT carries are panics of Rust, no Exceptions;
* it copies a payload into the packet that it writes. A large one therefore stays beside its packet, whose remaining
  length is then made right.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Literal

import mqtt5

from edge_sdk.mqtt.transports.base import (
    FAILURE,
    UNSUPPORTED_VERSION,
    WITH_WILL,
    BrokerLimits,
    Closed,
    Connected,
    ConnectOptions,
    Message,
    Properties,
    Received,
    Refused,
)
from edge_sdk.mqtt.transports.packets import (
    CONNACK,
    PUBACK,
    Inbox,
    MalformedPacket,
    Oversize,
    decode_puback,
    encode_puback,
    variable_length,
)
from edge_sdk.mqtt.transports.stream import FIRST_PUBLISH_ID, Packet, Pong, PubAck, StreamTransport, SubAck

LARGE = 32 * 1024
"""Bytes of a payload that is not copied. Below, one piece for the kernel and a copy cost less than two pieces."""

_QOS = (mqtt5.QoS.AT_MOST_ONCE, mqtt5.QoS.AT_LEAST_ONCE)


class Mqtt5Transport(StreamTransport):
    """The transport for MQTT 5, where the codec is installed."""

    def __init__(self) -> None:
        super().__init__(Mqtt5Codec)


class Mqtt5Codec:
    """The packets of one connection."""

    def __init__(self, options: ConnectOptions, connection: int) -> None:
        self._options = options
        self._connection = connection
        self._packet_id = 0

    # Writing

    def connect(self) -> bytes:
        options = self._options
        password = options.password.encode() if options.password is not None else None
        return mqtt5.ConnectPacket(
            options.client_id,
            username=options.username,
            password=password if options.username is not None else None,
            clean_start=options.clean_start,
            will=self._will(),
            keep_alive=options.keepalive_s,
            session_expiry_interval=options.session_expiry_s,
            receive_max=options.receive_maximum,
            max_packet_size=options.maximum_packet_size,
        ).write()

    def _will(self) -> mqtt5.Will | None:
        if (will := self._options.will) is None:
            return None
        message = will.message
        return mqtt5.Will(
            message.topic,
            payload=message.payload,
            qos=_QOS[message.qos],
            retain=message.retain,
            content_type=message.properties.content_type,
            will_delay_interval=will.delay_s,
        )

    def publish(self, message: Message, packet_id: int | None) -> Sequence[bytes]:
        payload, properties = message.payload, message.properties
        large = len(payload) >= LARGE
        packet = mqtt5.PublishPacket(
            message.topic,
            b"" if large else payload,
            qos=_QOS[message.qos],
            retain=message.retain,
            packet_id=packet_id,
            message_expiry_interval=properties.message_expiry_s,
            content_type=properties.content_type,
            response_topic=properties.response_topic,
            correlation_data=properties.correlation_data,
            user_properties=list(properties.user),
        ).write()
        return (_lengthened(packet, len(payload)), payload) if large else (packet,)

    def puback(self, packet_id: int) -> bytes:
        return encode_puback(packet_id)

    def subscribe(self, filters: Sequence[str], *, qos: Literal[0, 1], retained: bool) -> tuple[int, bytes]:
        handling = mqtt5.RetainHandling.SEND_ALWAYS if retained else mqtt5.RetainHandling.SEND_NEVER
        wanted = [
            mqtt5.TopicFilter(name, max_qos=_QOS[qos], retain_as_published=False, retain_handling=handling)
            for name in filters
        ]
        packet_id = self._next_packet_id()
        return packet_id, mqtt5.SubscribePacket(packet_id, wanted).write()

    def unsubscribe(self, filters: Sequence[str]) -> tuple[int, bytes]:
        packet_id = self._next_packet_id()
        return packet_id, mqtt5.UnsubscribePacket(packet_id, list(filters)).write()

    def disconnect(self, *, with_will: bool) -> bytes:
        return mqtt5.DisconnectPacket(reason_code=mqtt5.DisconnectReasonCode(WITH_WILL if with_will else 0)).write()

    def _next_packet_id(self) -> int:
        self._packet_id = self._packet_id % (FIRST_PUBLISH_ID - 1) + 1
        return self._packet_id

    # Reading

    def read(self, inbox: Inbox) -> Packet | None:
        unread = inbox.unread()
        if not unread:
            return None
        try:
            packet, size = mqtt5.read(unread)
        except (IndexError, ValueError) as err:
            return _read_otherwise(inbox, err)
        except BaseException as err:
            if type(err).__name__ != "PanicException":
                raise
            raise MalformedPacket("a string that is not UTF-8 (1.5.4)") from err
        inbox.take(size)
        if isinstance(packet, mqtt5.PublishPacket):
            return self._received(packet)
        if isinstance(packet, mqtt5.PubAckPacket):
            return PubAck(packet.packet_id, packet.reason_code.value)
        if isinstance(packet, mqtt5.PingRespPacket):
            return Pong()
        if isinstance(packet, (mqtt5.SubAckPacket, mqtt5.UnsubAckPacket)):
            return SubAck(packet.packet_id, tuple(code.value for code in packet.reason_codes))
        if isinstance(packet, mqtt5.ConnAckPacket):
            return _connack(packet)
        if isinstance(packet, mqtt5.DisconnectPacket):
            words = packet.reason_str or _words(packet.reason_code)
            return Closed(f"the broker ended the connection: {words}", packet.reason_code.value)
        raise MalformedPacket(f"a {type(packet).__name__}, which no broker sends us")

    def _received(self, packet: mqtt5.PublishPacket) -> Received:
        topic, packet_id, content_type = packet.topic, packet.packet_id, packet.content_type
        response_topic, user = packet.response_topic, packet.user_properties
        if packet.qos == mqtt5.QoS.EXACTLY_ONCE:
            raise MalformedPacket("a PUBLISH of QoS 2, though no subscription asked for one")
        if "#" in topic or "+" in topic or packet.topic_alias is not None:
            raise MalformedPacket("a PUBLISH to a wildcard, or with a topic alias, of which we allow none (3.3.2)")
        if "\0" in topic or "\0" in (response_topic or "") or "\0" in (content_type or ""):
            raise MalformedPacket("a string with a NUL (1.5.4)")
        for name, value in user:
            if "\0" in name or "\0" in value:
                raise MalformedPacket("a string with a NUL (1.5.4)")
        properties = Properties(
            response_topic, packet.correlation_data, content_type, packet.message_expiry_interval, tuple(user)
        )
        message = Message(topic, packet.payload, 0 if packet_id is None else 1, packet.retain, properties)
        return Received(message, packet_id, packet.duplicate, self._connection)


def _lengthened(packet: bytes, more: int) -> bytes:
    """The head of a packet that `more` bytes are to follow; ValueError if MQTT cannot carry that."""
    start = 1
    while packet[start] >= 0x80:
        start += 1
    rest = packet[start + 1 :]
    return b"".join((packet[:1], variable_length(len(rest) + more), rest))


def _read_otherwise(inbox: Inbox, problem: IndexError | ValueError) -> Packet | None:
    """The packet that mqtt5 could not read: it is not whole, or we know better. Raises MalformedPacket."""
    try:
        found = inbox.next_packet()
    except Oversize as oversize:
        raise MalformedPacket(f"{oversize}; at most {inbox.largest:,} bytes were announced") from oversize
    if found is None:
        return None
    first, body = found
    if first == PUBACK:
        return PubAck(*decode_puback(body))
    if first == CONNACK and len(body) == 2 and body[1]:
        return Refused(UNSUPPORTED_VERSION if body[1] == 1 else FAILURE, f"code {body[1]} of MQTT 3.1.1")
    raise MalformedPacket(str(problem)) from problem


def _connack(packet: mqtt5.ConnAckPacket) -> Connected | Refused:
    if packet.reason_code.value >= FAILURE:
        return Refused(packet.reason_code.value, packet.reason_str or _words(packet.reason_code))
    limits = BrokerLimits(
        receive_maximum=packet.receive_max,
        maximum_packet_size=packet.max_packet_size,
        retain_available=packet.retain_available,
        shared_subscriptions=packet.shared_subscription_available,
        keepalive_s=packet.server_keep_alive,
    )
    return Connected(packet.session_present, limits)


def _words(code: IntEnum) -> str:
    """SERVER_SHUTTING_DOWN -> Server shutting down."""
    return code.name.replace("_", " ").capitalize()
