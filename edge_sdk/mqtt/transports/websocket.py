"""MQTT inside a WebSocket, for brokers that can be reached only through HTTP's ports and proxies; wsproto's one door.

    pipe = upgraded(pipe, host="broker.example", path="/mqtt", give_up_at=...)     # or WebSocketRefused

A stream of MQTT packets is cut into binary frames in any way (MQTT 5, 6.0.0), so nothing above the pipes notices. What
goes out is masked and framed in pieces of at most `FRAME_BYTES`; what comes in is handed on as it arrives, however long
its frame and in however many fragments, so a broker cannot make us hold more than the inbox does.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from edge_sdk.errors import SettingsError
from edge_sdk.mqtt.transports.pipes import Piece, Pipe, Progress, gather

if TYPE_CHECKING:
    from wsproto import WSConnection

SUBPROTOCOL = "mqtt"
FRAME_BYTES = 65_536
_CHUNK_BYTES = 65_536
_GOING_AWAY = (1000, 1001, 1005)
"""Close codes (RFC 6455, 7.4.1) that name no fault: the end, going away, and none given."""


class WebSocketRefused(OSError):
    """The other side speaks HTTP and does not take us to its broker, or is no web server."""


class WebSocketPipe(Pipe):
    """Frames over another pipe."""

    tells_empty = False  # a chunk of the inner pipe may hold many frames

    def __init__(self, inner: Pipe, connection: WSConnection) -> None:
        """`connection` is past its handshake; what came behind that is still in it."""
        super().__init__(inner.sock)
        self._inner = inner
        self._connection = connection
        self._chunk = memoryview(bytearray(_CHUNK_BYTES))
        self._arrived: deque[memoryview] = deque()
        self._unsent = b""
        self._framed = 0
        """How much of the outbox is in `_unsent`: it counts as sent once all of that is gone."""
        self._ended: str | None = None
        """Set once the other side has closed: its reason, empty where that is no fault."""
        self._take_events()

    def receive(self, room: memoryview) -> int | None:
        while not self._arrived:
            if self._ended is not None:
                if self._ended:
                    raise ConnectionError(self._ended)
                return 0
            count = self._inner.receive(self._chunk)
            if not count:
                return count
            self._connection.receive_data(bytes(self._chunk[:count]))
            self._take_events()
        filled = 0
        while self._arrived and filled < len(room):
            piece = self._arrived[0]
            count = min(len(piece), len(room) - filled)
            room[filled : filled + count] = piece[:count]
            filled += count
            if count < len(piece):
                self._arrived[0] = piece[count:]
            else:
                self._arrived.popleft()
        return filled

    def send(self, outbox: deque[Piece]) -> int | None:
        from wsproto.events import BytesMessage

        if self._ended is not None:
            # Nobody hears it. That the end has come is for `receive` to tell, behind what was said before.
            return sum(map(len, outbox))
        if not self._flush():
            return None
        if not self._framed:
            piece = gather(outbox, FRAME_BYTES)
            self._framed = min(len(piece), FRAME_BYTES)
            self._unsent = self._connection.send(BytesMessage(bytes(piece[: self._framed])))
            if not self._flush():
                return None
        framed, self._framed = self._framed, 0
        return framed

    def progress(self) -> Progress | None:
        return self._inner.progress()

    def linger(self, give_up_at: float) -> None:
        from wsproto.events import CloseConnection

        if self._ended is None:
            self._unsent += self._connection.send(CloseConnection(1000))
        self._flush()
        self._inner.linger(give_up_at)

    def _flush(self) -> bool:
        """Hand what is framed to the inner pipe; whether all of it is gone."""
        while self._unsent:
            sent = self._inner.send(deque((self._unsent,)))
            if sent is None:
                return False
            self._unsent = self._unsent[sent:]
        return True

    def _take_events(self) -> None:
        """Data to hand on, pings to answer, and the end."""
        from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
        from wsproto.utilities import LocalProtocolError

        for event in self._connection.events():
            if isinstance(event, BytesMessage):
                if event.data:  # nothing would look like the end
                    self._arrived.append(memoryview(event.data))
            elif isinstance(event, Ping):
                # It goes out at once, or with what is sent next: a broker that pings is also sent MQTT's own pings. One
                # that pings and does not read goes without (RFC 6455, 5.5.3, asks for the latest only).
                if len(self._unsent) <= 2 * FRAME_BYTES:
                    self._unsent += self._connection.send(event.response())
                    self._flush()
            elif isinstance(event, TextMessage):
                self._ended = "the broker sent text through the WebSocket, which MQTT never does (6.0.0)"
                return
            elif isinstance(event, CloseConnection):
                told = f" {event.reason}" if event.reason else ""
                fault = f"the broker closed the WebSocket: {event.code:d}{told}"
                self._ended = "" if event.code in _GOING_AWAY else fault
                try:
                    self._unsent += self._connection.send(event.response())
                    self._flush()
                except (LocalProtocolError, OSError):
                    pass  # it broke the protocol, or is gone: there is nobody to say goodbye to
                return


def check_installed() -> None:
    """SettingsError if nothing here speaks WebSocket."""
    try:
        import wsproto  # noqa: F401
    except ImportError as exc:
        raise SettingsError(
            "A broker at ws:// or wss:// needs wsproto, which is not installed.",
            fix="pip install 'edge-sdk[websockets]'.",
        ) from exc


def upgraded(inner: Pipe, *, host: str, path: str, give_up_at: float) -> WebSocketPipe:
    """A WebSocket over `inner`, which is to block; WebSocketRefused, or OSError for what becomes of the line."""
    check_installed()
    from wsproto import ConnectionType, WSConnection
    from wsproto.events import AcceptConnection, RejectConnection, Request
    from wsproto.utilities import ProtocolError

    connection = WSConnection(ConnectionType.CLIENT)
    inner.block(max(0.001, give_up_at - time.monotonic()))
    inner.sock.sendall(connection.send(Request(host=host, target=path, subprotocols=[SUBPROTOCOL])))
    try:
        while True:
            inner.block(max(0.001, give_up_at - time.monotonic()))
            data = inner.sock.recv(_CHUNK_BYTES)
            if not data:
                raise WebSocketRefused(f"it hung up when asked for a WebSocket at {path}")
            connection.receive_data(data)
            for event in connection.events():
                if isinstance(event, RejectConnection):
                    raise WebSocketRefused(f"it answered HTTP {event.status_code} when asked for a WebSocket at {path}")
                if isinstance(event, AcceptConnection):
                    if event.subprotocol != SUBPROTOCOL:
                        raise WebSocketRefused(f"there is a WebSocket at {path}, but not one for MQTT")
                    return WebSocketPipe(inner, connection)
    except ProtocolError as err:
        raise WebSocketRefused(f"what it answered is no WebSocket's: {err}") from err
