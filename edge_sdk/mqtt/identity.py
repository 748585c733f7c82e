"""What tells one request from another across the end of a process: pure.

As the session does it, by topic, reply topic, correlation data and payload; but in 64 bits that are the same in every
process, and so cheap that each request can have them. Half of them say whose request it is, and half what it holds.
"""

from __future__ import annotations

from zlib import crc32

from edge_sdk.mqtt.session import ReplyRoute
from edge_sdk.mqtt.transports.base import Message

_SAMPLE_BYTES = 1024
"""Of a long payload whose sender gave it an id only so much is looked at, at either end. CRC-32 tells any two ids of up
to four bytes apart, and longer ones all but once in four thousand million."""


def key_of(message: Message, route: ReplyRoute) -> int:
    """64 bits for the request in `message`, which is answered on `route`; never 0."""
    payload = message.payload
    whose = crc32(route.correlation_data or b"", crc32(route.topic.encode(), crc32(message.topic.encode())))
    if not route.identifies or len(payload) <= 2 * _SAMPLE_BYTES:
        return (whose << 32 | crc32(payload, len(payload))) or 1
    return (whose << 32 | crc32(payload[-_SAMPLE_BYTES:], crc32(payload[:_SAMPLE_BYTES], len(payload)))) or 1
