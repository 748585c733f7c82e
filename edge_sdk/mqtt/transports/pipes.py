"""Pipes: the way of bytes to a broker and back, and nothing about what they mean.

    pipe = open_pipe(options, timeout_s=5)         # reached, TLS shaken hands, never blocking; or BrokerError
    count = pipe.receive(room)                     # bytes; None: nothing here now; 0: the other side hung up
    count = pipe.send(outbox)                      # bytes taken; None: no room now

`open_pipe` is the one place that knows which kinds there are: `Pipe` is TCP as it is, `TlsPipe` enciphers, and a
WebSocket (`websocket`) goes over either. All raise OSError for what becomes of the line. A pipe is waited for by its
`fileno`.
"""

from __future__ import annotations

import socket
import ssl
import struct
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, NamedTuple, Union

from edge_sdk.errors import BrokerError
from edge_sdk.mqtt.transports import tls
from edge_sdk.mqtt.transports.base import ConnectOptions

if sys.platform == "linux":
    import fcntl
    import termios

Piece = Union[bytes, memoryview]
"""What is sent: a packet, or a part of one."""

_GATHERED = 64
"""Pieces handed to one sendmsg; Linux takes up to 1,024."""

_TCPI_BYTES_ACKED = 120
"""Where `struct tcp_info` of Linux has tcpi_bytes_acked, 64 bits (linux/tcp.h; since 4.1)."""


class Progress(NamedTuple):
    """How far the bytes of a connection have come; with TLS, what they were enciphered to."""

    given: int
    """The kernel has taken them from us."""
    taken: int
    """The other side's TCP has acknowledged them."""


class Pipe:
    """TCP, without delay and without blocking."""

    tells_empty = True
    """Whether fewer bytes than there was room for mean that nothing is left."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def fileno(self) -> int:
        return self.sock.fileno()

    def receive(self, room: memoryview) -> int | None:
        """Put what has come at the start of `room`."""
        try:
            return self.sock.recv_into(room)
        except BlockingIOError:
            return None

    def send(self, outbox: deque[Piece]) -> int | None:
        """Hand over the head of `outbox`, of which nothing is removed."""
        try:
            if len(outbox) == 1:
                return self.sock.send(outbox[0])
            return self.sock.sendmsg([outbox[i] for i in range(min(len(outbox), _GATHERED))])
        except (BlockingIOError, TimeoutError):
            return None

    def progress(self) -> Progress | None:
        """What the kernel knows of the way to the broker; None where it does not tell. TLS has the same descriptor."""
        if sys.platform != "linux":
            return None
        try:
            (waiting,) = struct.unpack("=i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_BYTES_ACKED + 8)
            (taken,) = struct.unpack_from("=Q", info, _TCPI_BYTES_ACKED)
        except (OSError, struct.error):
            return None
        return Progress(taken + waiting, taken)

    def block(self, timeout_s: float) -> None:
        """From now on let `send` wait so long for room. For the last words of a connection."""
        self.sock.settimeout(timeout_s)

    def linger(self, give_up_at: float) -> None:
        """Wait for the broker to hang up: closing on unread bytes would reset, and DISCONNECT might be lost with it."""
        self.sock.shutdown(socket.SHUT_WR)
        self.sock.settimeout(max(0.01, min(0.5, give_up_at - time.monotonic())))
        while time.monotonic() < give_up_at and self.sock.recv(65_536):
            pass

    def close(self) -> None:
        self.sock.close()


class TlsPipe(Pipe):
    """TLS over TCP."""

    tells_empty = False  # a record at a time, and more of them may be in its own buffer

    def receive(self, room: memoryview) -> int | None:
        try:
            return self.sock.recv_into(room)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except ssl.SSLError as err:
            raise ConnectionError(tls.alert(err)) from err

    def send(self, outbox: deque[Piece]) -> int | None:
        try:
            return self.sock.send(outbox[0] if len(outbox) == 1 else gather(outbox))
        except (BlockingIOError, TimeoutError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except OSError as err:
            if (told := self._last_words()) is not None:
                raise told from err
            raise

    def _last_words(self) -> ConnectionError | None:
        """Why the other side hung up, if it said so before: a broker that refuses our certificate does."""
        try:
            self.sock.setblocking(False)
            self.sock.recv(1)
        except ssl.SSLError as err:
            return ConnectionError(said) if (said := tls.alert(err)) != str(err) else None
        except OSError:
            pass
        return None


def open_pipe(options: ConnectOptions, timeout_s: float) -> Pipe:
    """A pipe to the broker; BrokerError if it cannot be reached in time, naming it and saying what to check.

    SettingsError for files of ours that are missing, or wrong.
    """
    give_up_at = time.monotonic() + timeout_s
    context = tls.client_context(options) if options.tls else None
    sock = _connected(options, give_up_at)
    try:
        # Without it a PUBACK waits for the peer's delayed ACK: 44 ms a request instead of 0.24.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pipe = Pipe(sock) if context is None else _enciphered(sock, context, options, give_up_at)
        if options.websocket_path is not None:
            pipe = _upgraded(pipe, options.websocket_path, options, give_up_at)
        pipe.sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return pipe


def _enciphered(sock: socket.socket, context: ssl.SSLContext, options: ConnectOptions, give_up_at: float) -> TlsPipe:
    try:
        sock.settimeout(max(0.001, give_up_at - time.monotonic()))
        return TlsPipe(context.wrap_socket(sock, server_hostname=options.host))
    except (OSError, ValueError) as err:
        raise BrokerError(
            f"No TLS connection to the MQTT broker at {options.host}:{options.port}: {_why(err)}.",
            fix="Check the certificate authority (ca_file), the host name, and that this is the broker's TLS port.",
        ) from err


def _upgraded(pipe: Pipe, path: str, options: ConnectOptions, give_up_at: float) -> Pipe:
    from edge_sdk.mqtt.transports.websocket import upgraded

    host = f"[{options.host}]" if ":" in options.host else options.host
    try:
        return upgraded(pipe, host=f"{host}:{options.port}", path=path, give_up_at=give_up_at)
    except OSError as err:
        raise BrokerError(
            f"No WebSocket to the MQTT broker at {options.host}:{options.port}: {_why(err)}.",
            fix="Check the path in the broker's URL, and that this is the broker's port for WebSockets.",
        ) from err


def _connected(options: ConnectOptions, give_up_at: float) -> socket.socket:
    try:
        addresses = _addresses(options.host, options.port, give_up_at - time.monotonic())
        return _reach(addresses, give_up_at)
    except (OSError, ValueError, OverflowError) as err:  # ValueError: names such as `a..b` that no resolver takes
        raise BrokerError(
            f"The MQTT broker at {options.host}:{options.port} cannot be reached: {_why(err)}.",
            fix="Check the address, and that the broker is running and listens there.",
        ) from err


def _addresses(host: str, port: int, timeout_s: float) -> list[Any]:
    """What getaddrinfo finds, or gaierror; within `timeout_s`.

    It has no limit of its own (5 s and more for each name server that is silent) and cannot be interrupted: it runs on
    a thread that is left behind. The next attempt waits for that same look-up, and takes what it found meanwhile.
    """
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # a name
    lookup = _lookups.get((host, port))
    if lookup is None or (lookup.done() and lookup.exception() is not None):
        lookup = _lookups[host, port] = Future()
        threading.Thread(target=_look_up, args=(lookup, host, port), name=f"look-up of {host}", daemon=True).start()
    try:
        found = lookup.result(timeout_s)
    except FutureTimeoutError:
        problem = f"no name server answered within {timeout_s:.1f} s"
        raise socket.gaierror(socket.EAI_AGAIN, problem) from None
    _lookups.pop((host, port), None)
    return found


_lookups: dict[tuple[str, int], Future[list[Any]]] = {}


def _look_up(lookup: Future[list[Any]], host: str, port: int) -> None:
    try:
        lookup.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except Exception as err:
        lookup.set_exception(err)


def _reach(addresses: list[Any], give_up_at: float) -> socket.socket:
    """A connection to the first address that answers; each may take its share of the time that is left."""
    problem: OSError = TimeoutError()
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        left_s = (give_up_at - time.monotonic()) / (len(addresses) - index)
        if left_s <= 0:
            break
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as err:  # a family that this kernel does not have
            problem = err
            continue
        try:
            sock.settimeout(left_s)
            sock.connect(address)
        except OSError as err:
            sock.close()
            problem = err
        else:
            return sock
    raise problem


def _why(err: Exception) -> str:
    if isinstance(err, TimeoutError):
        return "it did not answer in time"
    if isinstance(err, ssl.SSLError) and (told := tls.alert(err)) != str(err):
        return told
    return getattr(err, "strerror", None) or getattr(err, "reason", None) or str(err) or type(err).__name__


def gather(outbox: deque[Piece], limit: int = 16_384) -> Piece:
    """TLS has no sendmsg: join small pieces into one record rather than send a record each."""
    if len(outbox[0]) >= limit:
        return outbox[0]
    pieces: list[Piece] = []
    size = 0
    for piece in outbox:
        pieces.append(piece)
        size += len(piece)
        if size >= limit:
            break
    return b"".join(pieces)[:limit] if size > limit else b"".join(pieces)
