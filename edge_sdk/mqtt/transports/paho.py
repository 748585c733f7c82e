"""The transport on paho-mqtt 2.x: MQTT 5 and 3.1.1, without paho's thread, timers and queues.

paho writes and reads the rare packets: CONNECT, SUBSCRIBE, UNSUBSCRIBE, DISCONNECT and what answers them. It believes
that it talks to a socket; it talks to `_Wire`, a pair of buffers. PUBLISH and PUBACK are ours (see `packets`). That
keeps paho's habits away rather than working against them one by one:

* it never holds a message, so it cannot resend one on reconnect, or past anybody's window;
* its PUBACKs cannot overtake CONNECT, and the broker's maximum packet size is checked before anything is queued;
* its callbacks only note a packet, and every connection has a new paho client, which never reconnects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from paho.mqtt.client import MQTT_CLEAN_START_FIRST_ONLY, Client, ConnectFlags, DisconnectFlags
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_sdk.mqtt.transports.base import (
    WITH_WILL,
    BrokerLimits,
    Closed,
    Connected,
    ConnectOptions,
    Message,
    Received,
    Refused,
)
from edge_sdk.mqtt.transports.packets import (
    CONNACK,
    DISCONNECT,
    PINGRESP,
    PUBACK,
    PUBLISH,
    SUBACK,
    UNSUBACK,
    Inbox,
    MalformedPacket,
    Oversize,
    decode_puback,
    decode_publish,
    decode_publish_head,
    encode_puback,
    encode_publish,
    variable_length,
)
from edge_sdk.mqtt.transports.stream import Packet, Pong, PubAck, StreamTransport, SubAck


class PahoTransport(StreamTransport):
    """The transport for any broker, and any Python."""

    def __init__(self) -> None:
        super().__init__(PahoCodec)


class PahoCodec:
    """The packets of one connection: the frequent ones by `packets`, the rare ones by paho."""

    def __init__(self, options: ConnectOptions, connection: int) -> None:
        self._options = options
        self._version = options.version
        self._connection = connection
        self._wire = _Wire()
        self._noted: list[Packet] = []
        """What paho's callbacks noted."""
        self._paho = self._client()

    # Writing

    def connect(self) -> bytes:
        options, properties = self._options, None
        clean_start: Any = MQTT_CLEAN_START_FIRST_ONLY
        if self._version == 5:
            clean_start = options.clean_start
            properties = _paho_properties(PacketTypes.CONNECT)
            properties.ReceiveMaximum = options.receive_maximum
            if options.session_expiry_s:
                properties.SessionExpiryInterval = options.session_expiry_s
            if options.maximum_packet_size is not None:
                properties.MaximumPacketSize = options.maximum_packet_size
        self._paho.connect(
            options.host, options.port, options.keepalive_s, clean_start=clean_start, properties=properties
        )
        return self._written()

    def publish(self, message: Message, packet_id: int | None) -> Sequence[bytes]:
        head = encode_publish(message, packet_id, self._version)
        return (head, message.payload) if message.payload else (head,)

    def puback(self, packet_id: int) -> bytes:
        return encode_puback(packet_id)

    def subscribe(self, filters: Sequence[str], *, qos: Literal[0, 1], retained: bool) -> tuple[int, bytes]:
        wanted: list[Any] = [(name, qos) for name in filters]
        if self._version == 5:
            options = SubscribeOptions(qos=qos)
            if not retained:
                options.retainHandling = SubscribeOptions.RETAIN_DO_NOT_SEND
            wanted = [(name, options) for name in filters]
        _, packet_id = self._paho.subscribe(wanted)
        return cast("int", packet_id), self._written()

    def unsubscribe(self, filters: Sequence[str]) -> tuple[int, bytes]:
        _, packet_id = self._paho.unsubscribe(list(filters))
        return cast("int", packet_id), self._written()

    def disconnect(self, *, with_will: bool) -> bytes:
        if with_will and self._version == 4:
            return b""
        self._paho.on_disconnect = None  # it would call that from within
        self._paho.disconnect(ReasonCode(PacketTypes.DISCONNECT, identifier=WITH_WILL) if with_will else None)
        return self._written()

    def _written(self) -> bytes:
        self._paho.loop_write()
        packet = b"".join(self._wire.outbound)
        self._wire.outbound.clear()
        return packet

    # Reading

    def read(self, inbox: Inbox) -> Packet | None:
        try:
            packet = inbox.next_packet()
        except Oversize as oversize:
            return self._skipped(inbox, oversize.size)
        if packet is None:
            return None
        first, body = packet
        kind = first & 0xF0
        if kind == PUBLISH:
            message, packet_id = decode_publish(first, body, self._version)
            return Received(message, packet_id, bool(first & 8), self._connection)
        if kind == PUBACK:
            return PubAck(*decode_puback(body))
        if kind == PINGRESP:
            return Pong()
        if kind in (CONNACK, SUBACK, UNSUBACK, DISCONNECT):
            return self._read_by_paho(first, body)
        raise MalformedPacket(f"a packet of type 0x{first:02x}, which no broker sends us")

    def _read_by_paho(self, first: int, body: memoryview) -> Packet:
        self._wire.put(first, body)
        while self._wire.inbound and not self._noted:
            if self._paho.loop_read() is not MQTTErrorCode.MQTT_ERR_SUCCESS:
                break  # after a refusal it reads nothing any more
        if not self._noted:
            raise MalformedPacket("the broker sent something that is not MQTT")
        return self._noted.pop(0)

    def _skipped(self, inbox: Inbox, size: int) -> Received | None:
        """Pass over a packet larger than we take, if it is a message of MQTT 3.1.1; None: too little of it is here."""
        first, body = inbox.peek()
        if first & 0xF0 != PUBLISH or self._version == 5:
            raise MalformedPacket(f"a packet of {size:,} bytes; at most {inbox.largest:,} were announced")
        head = decode_publish_head(first, body)
        if head is None:
            return None
        topic, packet_id = head
        inbox.skip(size)
        message = Message(topic, b"", 1 if packet_id is not None else 0, bool(first & 1))
        return Received(message, packet_id, bool(first & 8), self._connection, skipped_bytes=size)

    # paho

    def _client(self) -> _PahoClient:
        options, five = self._options, self._version == 5
        client = _PahoClient(
            CallbackAPIVersion.VERSION2,
            client_id=options.client_id,
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
            clean_session=None if five else options.clean_start,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.wire = self._wire
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_suback
        client.on_unsubscribe = self._on_suback
        # With this set, paho never writes from inside `subscribe` and the like: `_written` lets it.
        client.on_socket_register_write = lambda *_: None
        if options.username is not None:
            client.username_pw_set(options.username, options.password)
        if (will := options.will) is not None:
            properties = None
            if five:
                properties = _paho_properties(PacketTypes.WILLMESSAGE)
                if will.delay_s:
                    properties.WillDelayInterval = will.delay_s
                if will.message.properties.content_type is not None:
                    properties.ContentType = will.message.properties.content_type
            message = will.message
            client.will_set(message.topic, message.payload, message.qos, message.retain, properties)
        return client

    def _on_connect(
        self, _client: Client, _userdata: Any, flags: ConnectFlags, reason: ReasonCode, properties: Any
    ) -> None:
        if reason.is_failure:
            self._noted.append(Refused(reason.value, str(reason)))
        else:
            self._noted.append(Connected(bool(flags.session_present), _limits(properties)))

    def _on_disconnect(
        self, _client: Client, _userdata: Any, flags: DisconnectFlags, reason: ReasonCode, _properties: Any
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._noted.append(Closed(f"the broker ended the connection: {reason}", reason.value))

    def _on_suback(self, _client: Client, _userdata: Any, packet_id: int, codes: list[ReasonCode], _props: Any) -> None:
        self._noted.append(SubAck(packet_id, tuple(code.value for code in codes)))


class _Wire:
    """What paho takes for its socket: a buffer each way."""

    def __init__(self) -> None:
        self.inbound = bytearray()
        self.outbound: list[bytes] = []

    def put(self, first: int, body: memoryview) -> None:
        """A whole packet for paho to read. Its length is written anew, for the original is behind us."""
        self.inbound.append(first)
        self.inbound += variable_length(len(body))
        self.inbound += body

    def recv(self, size: int) -> bytes:
        if not self.inbound:
            raise BlockingIOError
        data = bytes(self.inbound[:size])
        del self.inbound[:size]
        return data

    def send(self, data: bytes | bytearray) -> int:
        self.outbound.append(bytes(data))
        return len(data)

    def fileno(self) -> int:
        return -1

    def setblocking(self, _blocking: bool) -> None:
        pass

    def close(self) -> None:
        pass


class _PahoClient(Client):
    """paho's client on a `_Wire`. `_create_socket` is the one private name we rely on; the contract suite notices."""

    wire: _Wire

    def _create_socket(self) -> Any:
        return self.wire


def _paho_properties(packet_type: int) -> Any:
    return PahoProperties(packet_type)  # type: ignore[no-untyped-call]  # paho left this class without types


def _limits(properties: Any) -> BrokerLimits:
    def value(name: str, default: Any) -> Any:
        return getattr(properties, name, default)

    return BrokerLimits(
        receive_maximum=value("ReceiveMaximum", 65_535),
        maximum_packet_size=value("MaximumPacketSize", None),
        retain_available=bool(value("RetainAvailable", 1)),
        shared_subscriptions=bool(value("SharedSubscriptionAvailable", 1)),
        keepalive_s=value("ServerKeepAlive", None),
    )
