"""Trying out, with a connection of its own, whether what a device is sent reaches it: for `doctor`.

It listens where the device would, under another client id, and sends what the device sends to itself (see `echo`). It
takes nothing away from a daemon that is running: its own copies of what arrives are thrown away.
"""

from __future__ import annotations

import os
import secrets
import time

from edge_sdk.errors import BrokerError
from edge_sdk.mqtt.access import BrokerAccess
from edge_sdk.mqtt.echo import Echo
from edge_sdk.mqtt.topics import Topics
from edge_sdk.mqtt.transports.base import (
    FAILURE,
    Acknowledged,
    Closed,
    Connected,
    Event,
    MqttVersion,
    Received,
    Refused,
    Transport,
)
from edge_sdk.mqtt.transports.paho import PahoTransport

_LOOK_S = 0.05


def what_is_lacking(
    url: str, topics: Topics, version: MqttVersion, *, access: BrokerAccess = BrokerAccess(), patience_s: float = 2.0
) -> str:
    """Why requests would not arrive, or answers not leave; empty where they do, or where that cannot be told.

    The broker at `url` has to be one that was reached a moment ago.
    """
    echo = Echo(topics, secrets.token_hex(8), self_test_s=2 * patience_s)
    options = access.options(url, client_id=f"edge-sdk-probe-{os.getpid()}", clean_start=True, version=version)
    transport = PahoTransport()
    try:
        transport.open(options, timeout_s=patience_s)
        _converse(transport, echo, topics, version, time.monotonic() + 3 * patience_s)
    except BrokerError:
        return ""
    finally:
        transport.close()
    return echo.trouble


def _converse(transport: Transport, echo: Echo, topics: Topics, version: MqttVersion, until: float) -> None:
    """Until everything has come back, or it is clear that it does not."""
    sent = None
    while (now := time.monotonic()) < until and not echo.trouble and "untested" in echo.states.values():
        if (ping := echo.due(now, 0)) is not None:
            sent = transport.publish(ping)
        for event in transport.poll(_LOOK_S):
            if isinstance(event, Connected):
                pongs = [echo.pongs] if version == 4 else []
                transport.subscribe([*topics.subscriptions(), *pongs], qos=0, retained=False)
                echo.connected(version, now)
            elif isinstance(event, Received) and echo.owns(event.message.topic):
                if (pong := echo.heard(event.message, now)) is not None:
                    transport.publish(pong)
            elif isinstance(event, (Refused, Closed)) or _is_refusal(event, sent):
                return


def _is_refusal(event: Event, handle: int | None) -> bool:
    return isinstance(event, Acknowledged) and event.handle == handle and event.code >= FAILURE
