"""Which MQTT version to try next, when the setting says `auto`. Pure: shared by the daemon and the client library.

MQTT 5 comes first. A broker that does not know it should refuse it (reason code 0x84, or 1 from before MQTT 5). Some
hang up instead, and some wait for ever (amqtt takes the properties for the length of a client id). But a broker that is
restarting, or a proxy in front of it, hangs up too, and 3.1.1 costs deadlines, limits and fail-fast. So once MQTT 5 has
worked, only a refusal in so many words leads away from it; and where a hang-up led to 3.1.1, that is for one
connection: the next begins with 5. With a broker that never answers (amqtt) each reconnection therefore costs the
patience again. Where that matters, set the protocol.

A connection in 3.1.1 may last, though, and over it a device gives no answer to those who ask in MQTT 5. So one that a
hang-up led to is `doubtful`, until MQTT 5 was hung up on again by a broker that had just answered in 3.1.1.
"""

from __future__ import annotations

from typing import Literal

from edge_sdk.mqtt.transports.base import UNSUPPORTED_VERSION, MqttVersion

ProtocolSetting = Literal["auto", "5", "3.1.1"]

_UNSUPPORTED = (UNSUPPORTED_VERSION, 0x01)

PATIENCE_S = 2.0
"""How long a broker of unknown version may think about MQTT 5. Over a slower link, set the protocol."""


class Negotiation:
    """The version to use for the next connection, told how each attempt ended.

        negotiation = Negotiation("auto")
        transport.open(replace(options, version=negotiation.version), timeout_s=negotiation.patience_s(10))
        ...
        negotiation.connected() | negotiation.refused(code) | negotiation.hung_up()
        ...
        negotiation.lost()                                   # after connected: that connection is over

    `refused` and `hung_up` say whether the next version is worth trying at once, without a back-off.
    """

    def __init__(self, protocol: ProtocolSetting = "auto") -> None:
        self._auto = protocol == "auto"
        self._version: MqttVersion = 4 if protocol == "3.1.1" else 5
        self._knows_5 = False
        self._refused_5 = False
        self._hung_up_on_5 = 0  # times, since the broker last hung up on 3.1.1, too

    @property
    def version(self) -> MqttVersion:
        return self._version

    @property
    def doubtful(self) -> bool:
        """Whether 3.1.1 is spoken because of a single hang-up, which may have had nothing to do with versions."""
        return self._auto and self._version == 4 and not self._refused_5 and self._hung_up_on_5 == 1

    def patience_s(self, timeout_s: float) -> float:
        """How long to wait for CONNACK, of at most `timeout_s`."""
        return min(timeout_s, PATIENCE_S) if self._auto and self._version == 5 and not self._knows_5 else timeout_s

    def connected(self) -> None:
        if self._version == 5:
            self._knows_5, self._refused_5, self._hung_up_on_5 = True, False, 0

    def lost(self) -> None:
        """An established connection ended."""
        if self._auto and not self._refused_5:
            self._version = 5

    def refused(self, code: int) -> bool:
        if code not in _UNSUPPORTED:
            return False
        if self._version == 5:
            self._knows_5, self._refused_5 = False, True
        return self._switch()

    def hung_up(self, *, silent: bool = False) -> bool:
        """The connection ended before CONNACK, or stayed `silent`: so did a broker that lives."""
        if self._version == 4:
            self._hung_up_on_5 = 0
        else:
            self._hung_up_on_5 += 2 if silent else 1
        return not self._knows_5 and self._switch()

    def _switch(self) -> bool:
        if not self._auto:
            return False
        self._version = 4 if self._version == 5 else 5
        return self._version == 4
