"""Which library reads and writes the packets: `mqtt5` where MQTT 5 is spoken and it is installed, else `paho`.

    transport = new_transport("auto")

`mqtt5` is compiled and costs a fraction of the processor time; `paho` speaks MQTT 3.1.1 too, and runs on any Python.
The choice is made for each connection when it is opened: a broker that knows only 3.1.1 gets paho with the next one.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from edge_sdk.errors import BrokerError, SettingsError
from edge_sdk.mqtt.transports.base import ConnectOptions, MqttVersion

if TYPE_CHECKING:
    from edge_sdk.mqtt.transports.stream import PacketCodec, StreamTransport

Library = Literal["mqtt5", "paho"]
TransportSetting = Literal["auto", "mqtt5", "paho"]


def new_transport(wanted: TransportSetting = "auto") -> StreamTransport:
    """A transport whose connections each use the library that is chosen for them.

    Raises SettingsError if `wanted` is not installed. A connection in MQTT 3.1.1 is a BrokerError where it is `mqtt5`.
    """
    from edge_sdk.mqtt.transports.stream import StreamTransport

    if wanted == "mqtt5" and not has_mqtt5():
        raise SettingsError("The transport mqtt5 is not installed.", fix=f"{fast_fix()} `auto` does with paho.")

    def new_codec(options: ConnectOptions, connection: int) -> PacketCodec:
        match chosen(wanted, options.version):
            case "mqtt5":
                from edge_sdk.mqtt.transports.mqtt5 import Mqtt5Codec

                return Mqtt5Codec(options, connection)
            case "paho":
                from edge_sdk.mqtt.transports.paho import PahoCodec

                return PahoCodec(options, connection)

    return StreamTransport(new_codec)


def chosen(wanted: TransportSetting, version: MqttVersion) -> Library:
    """The library for a connection in `version`."""
    if wanted == "auto":
        return "mqtt5" if version == 5 and has_mqtt5() else "paho"
    if wanted == "mqtt5" and version == 4:
        raise BrokerError(
            "The transport mqtt5 speaks MQTT 5 alone.", fix="Set `transport` to auto, or `protocol` to 5."
        )
    return wanted


def has_mqtt5() -> bool:
    """Whether mqtt5 is installed; asking does not load it."""
    return find_spec("mqtt5") is not None


def fast_fix() -> str:
    """How to come by mqtt5."""
    if sys.version_info < (3, 11):
        return "mqtt5 needs Python 3.11 or later."
    return "pip install 'edge-sdk[fast]'."
