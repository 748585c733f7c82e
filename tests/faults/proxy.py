"""A TCP proxy between a daemon and its broker that does to the bytes what networks do.

    with Proxy(broker.port) as proxy:
        ...                          # connect to proxy.port
        proxy.reset()                # every connection ends with an RST
        proxy.half_open()            # the connections of now are dead, and nothing says so; new ones work
        proxy.room = None            # of `Proxy(broker.port, room=1)`: who is more than one waits for ever, until now
        proxy.to_broker.bytes_per_second = 1000

Each direction of each connection has a thread that reads, waits as it is told, and writes. The settings of a direction
hold for all connections and take effect with the next bytes. The proxy's own buffers are small where `buffer_bytes`
says so: otherwise the kernel takes a whole message from its sender at once, and nobody feels how slow the line is.
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
_SEND_LIMIT_S = 0.1
"""How long a thread of a connection waits before it looks whether the connection is to end."""
_CUT_S = 0.05
"""Between the last bytes before a cut and the reset: a reset takes back what the other side has not read yet."""
_Pair = tuple[socket.socket, socket.socket]
_RST_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER with no time to linger: closing sends RST at once."""


@dataclass
class Direction:
    """What happens to bytes on their way."""

    latency_s: float = 0.0
    """Each piece is this late, and nothing else moves on its connection meanwhile."""
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

    def __init__(
        self,
        upstream_port: int,
        *,
        upstream_host: str = "127.0.0.1",
        seed: int = 0,
        buffer_bytes: int | None = None,
        room: int | None = None,
    ) -> None:
        self.to_broker = Direction()
        self.to_daemon = Direction()
        self.upstream = (upstream_host, upstream_port)
        self.accepted = 0
        """How many connections have been taken so far."""
        self.room = room
        """How many are taken at all. Those beyond find a queue that is full: nothing refuses and nothing answers."""
        self._random = random.Random(seed)
        self._refusing = False
        self._closing = False
        self._lock = threading.Lock()
        self._pairs: list[_Pair] = []
        self._dead: set[_Pair] = set()
        self._deaf: set[_Pair] = set()
        """Dead, and one end has given up; the other still waits."""
        self._chunk = min(_CHUNK, buffer_bytes or _CHUNK)
        self._buffer_bytes = buffer_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._shorten(self._listener)  # what it accepts inherits it, and the window is agreed on in the handshake
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

    def half_open(self) -> int:
        """Of the connections of now nothing arrives any more, either way; new ones are not touched. How many."""
        with self._lock:
            self._dead.update(self._pairs)
            return len(self._dead)

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
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # close alone does not end an accept() that waits
        self._listener.close()
        self.reset()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _listen(self) -> None:
        crowd: list[socket.socket] = []
        while not self._closing:
            while self.room is not None and self.accepted >= self.room and not self._closing:
                time.sleep(0.005)
            while crowd:
                crowd.pop().close()
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            if self.accepted == self.room:
                crowd = self._crowd()
            if self._refusing:
                _end(near, abruptly=True)
                continue
            far = socket.socket()
            self._shorten(far)
            try:
                far.settimeout(5)
                far.connect(self.upstream)
            except OSError:
                far.close()
                _end(near, abruptly=True)
                continue
            for end in (near, far):
                end.settimeout(_SEND_LIMIT_S)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = (near, far)
            with self._lock:
                self._pairs.append(pair)
            for source, target, direction in ((near, far, self.to_broker), (far, near, self.to_daemon)):
                threading.Thread(target=self._carry, args=(pair, source, target, direction), daemon=True).start()

    def _crowd(self) -> list[socket.socket]:
        """Connections that fill the queue of those that nobody has taken yet."""
        self._listener.listen(0)
        crowd = [socket.socket() for _ in range(3)]
        for waiting in crowd:
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", self.port))
        return crowd

    def _shorten(self, end: socket.socket) -> None:
        if self._buffer_bytes is not None:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer_bytes)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer_bytes)

    def _carry(self, pair: _Pair, source: socket.socket, target: socket.socket, way: Direction) -> None:
        """The life of one direction's thread; whichever direction ends first ends both."""
        abruptly = True
        try:
            while pair in self._pairs:
                try:
                    data = source.recv(self._chunk)
                except TimeoutError:
                    continue
                if not data:
                    abruptly = False
                    break
                while way.hold and pair in self._pairs:
                    time.sleep(0.005)
                self._delay(way, len(data))
                if way.swallow or pair in self._dead or pair in self._deaf:
                    continue
                if way.cut_after is not None and len(data) >= way.cut_after:
                    self._send(pair, target, data[: way.cut_after])
                    way.cut_after = None
                    time.sleep(_CUT_S)
                    break
                self._send(pair, target, data)
                way.passed += len(data)
                if way.cut_after is not None:
                    way.cut_after -= len(data)
        except OSError:
            pass
        with self._lock:
            deaf = pair in self._dead and pair in self._pairs
            ours = pair in self._pairs and not deaf
            if ours:
                self._pairs.remove(pair)
            if deaf:
                self._dead.remove(pair)
                self._deaf.add(pair)
        if deaf:
            _end(source, abruptly=False)  # the other side of a dead line is not told
        elif ours:
            for end in pair:
                _end(end, abruptly=abruptly)

    def _send(self, pair: _Pair, target: socket.socket, data: bytes) -> None:
        """All of it, however long the other side takes to read, while the connection stands."""
        rest = memoryview(data)
        while rest and pair in self._pairs:
            try:
                rest = rest[target.send(rest) :]
            except TimeoutError:
                continue

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
