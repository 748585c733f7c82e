"""A TCP proxy between a daemon and its broker that does to the bytes what networks do.

    with Proxy(broker.port) as proxy:
        ...                          # connect to proxy.port
        proxy.reset()                # every connection ends with an RST
        proxy.to_broker.swallow = True   # half-open: what the daemon sends goes nowhere, and nothing says so

Each direction of each connection has a thread that reads, waits as it is told, and writes. The settings of a direction
hold for all connections and take effect with the next bytes.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

_CHUNK = 16 * 1024
_RST_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER with no time to linger: closing sends RST at once."""


@dataclass
class Direction:
    """What happens to bytes on their way."""

    latency_s: float = 0.0
    """Each piece is this late; the pieces behind it wait too, as they do on a real line."""
    bytes_per_second: float | None = None
    swallow: bool = False
    """Bytes are taken and thrown away; neither side is told."""
    hold: bool = False
    """Bytes are not even taken: the sender's buffers fill up."""
    stall_chance: float = 0.0
    """How often a piece is held up for `stall_s`: what losses and retransmissions look like from above TCP."""
    stall_s: float = 0.2
    cut_after: int | None = None
    """After so many more bytes the connection is reset, in the middle of whatever was being said."""
    passed: int = 0
    """Bytes delivered so far."""


class Proxy:
    """Listens on a free port of the loopback interface; a context manager."""

    def __init__(self, upstream_port: int, *, upstream_host: str = "127.0.0.1", seed: int = 0) -> None:
        self.to_broker = Direction()
        self.to_daemon = Direction()
        self.upstream = (upstream_host, upstream_port)
        self.accepted = 0
        """How many connections have been taken so far."""
        self._random = random.Random(seed)
        self._refusing = False
        self._closing = False
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, name="proxy", daemon=True).start()

    def refuse(self, refusing: bool) -> None:
        """Whether new connections are reset as soon as they are made."""
        self._refusing = refusing

    def reset(self) -> int:
        """End every connection with an RST, on both sides; how many there were."""
        return self._end_all(abruptly=True)

    def close_connections(self) -> int:
        """End every connection in good order, on both sides; how many there were."""
        return self._end_all(abruptly=False)

    def heal(self) -> None:
        """Be an ordinary wire again."""
        for direction in (self.to_broker, self.to_daemon):
            passed = direction.passed
            direction.__init__(passed=passed)  # type: ignore[misc]  # every setting back to its default
        self._refusing = False

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        with self._lock:
            return len(self._pairs)

    def close(self) -> None:
        self._closing = True
        self._listener.close()
        self.reset()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _listen(self) -> None:
        while not self._closing:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            if self._refusing:
                _end(near, abruptly=True)
                continue
            try:
                far = socket.create_connection(self.upstream, timeout=5)
            except OSError:
                _end(near, abruptly=True)
                continue
            for end in (near, far):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = (near, far)
            with self._lock:
                self._pairs.append(pair)
            for source, target, direction in ((near, far, self.to_broker), (far, near, self.to_daemon)):
                threading.Thread(target=self._carry, args=(pair, source, target, direction), daemon=True).start()

    def _carry(
        self, pair: tuple[socket.socket, socket.socket], source: socket.socket, target: socket.socket, way: Direction
    ) -> None:
        """The life of one direction's thread; whichever direction ends first ends both."""
        abruptly = True
        try:
            while True:
                while way.hold and not self._closing:
                    time.sleep(0.005)
                data = source.recv(_CHUNK)
                if not data:
                    abruptly = False
                    break
                self._delay(way, len(data))
                if way.swallow:
                    continue
                if way.cut_after is not None and len(data) >= way.cut_after:
                    target.sendall(data[: way.cut_after])
                    way.cut_after = None
                    break
                target.sendall(data)
                way.passed += len(data)
                if way.cut_after is not None:
                    way.cut_after -= len(data)
        except OSError:
            pass
        with self._lock:
            ours = pair in self._pairs
            if ours:
                self._pairs.remove(pair)
        if ours:
            for end in pair:
                _end(end, abruptly=abruptly)

    def _delay(self, way: Direction, size: int) -> None:
        pause = way.latency_s
        if way.bytes_per_second:
            pause += size / way.bytes_per_second
        if way.stall_chance and self._random.random() < way.stall_chance:
            pause += way.stall_s
        if pause:
            time.sleep(pause)

    def _end_all(self, *, abruptly: bool) -> int:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                _end(end, abruptly=abruptly)
        return len(pairs)


def _end(end: socket.socket, *, abruptly: bool) -> None:
    with suppress(OSError):
        if abruptly:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
        else:
            end.shutdown(socket.SHUT_RDWR)
    # A thread of ours may be reading it: shutdown wakes that thread, close alone would not.
    with suppress(OSError):
        end.shutdown(socket.SHUT_RD)
    end.close()
