"""Bytes that come as a socket brings them: in pieces."""

from __future__ import annotations

from collections.abc import Iterator

from edge_sdk.mqtt.transports.packets import Inbox


def in_pieces(inbox: Inbox, data: bytes, size: int) -> Iterator[None]:
    """Put `data` into `inbox`, at most `size` bytes at a time; after each piece, the caller reads what is whole."""
    while data:
        room = inbox.room()
        count = min(len(room), size, len(data))
        room[:count] = data[:count]
        data = data[count:]
        inbox.filled(count)
        yield
