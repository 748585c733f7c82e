"""The seam between our session and an MQTT client library: one connection, driven by one thread.

A transport opens one connection, tells what happened on it and does what it is told. It decides nothing: when to
reconnect, what to resend, which acknowledgement may go out, how many messages may be in flight - all of that is
`edge_sdk.mqtt.session`, which never sees a socket.

    transport.open(timeout_s=5)
    while running:
        for event in transport.poll(timeout_s=0.1):
            ...                                  # Connected | Refused | Received | Acknowledged | Subscribed | Closed

Rules every transport keeps, and the contract suite (tests/transports) checks:

* One thread owns it. Only `wake` and `reach` may be called from another. `wake` makes a `poll` in progress return.
* `poll` returns when something happened, at `timeout_s`, or when woken; it hands out *everything* that can be read
  without waiting (up to a bound), so that requests which waited together can be answered together. It never raises for
  what the network does: that is a Closed event, the last of its connection.
* Nothing is resent and nothing is acknowledged by the transport itself. `publish` with QoS 1 gives a handle that comes
  back in Acknowledged or is void with Closed. `acknowledge` of a message of an earlier connection does nothing.
* `publish`, `acknowledge` and `subscribe` only queue; what was queued leaves together at the next `poll` (or `close`),
  in order. Without a connection they queue nothing and their handle never returns.
* TCP_NODELAY is set. Keepalive pings are the transport's, from within `poll`: a silent broker is Closed within twice
  the keepalive. One that slowly takes what we sent before the ping is not silent, as long as some of it is acknowledged
  by its TCP in each keepalive; a ping that its TCP has taken it must answer within one.
* `open` after Closed opens the next connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, Union

MqttVersion = Literal[4, 5]
"""4 is MQTT 3.1.1, as in the CONNECT packet."""

NO_MATCHING_SUBSCRIBERS = 0x10
WITH_WILL = 0x04
"""Of a DISCONNECT that lets the will be published (3.14.2.1)."""
FAILURE = 0x80
"""Reason codes from here on are refusals; of SUBSCRIBE in 3.1.1, the only one."""
UNSUPPORTED_VERSION = 0x84
BAD_CREDENTIALS = 0x86
NOT_AUTHORIZED = 0x87
SESSION_TAKEN_OVER = 0x8E
QUOTA_EXCEEDED = 0x97
"""The reason codes that somebody of ours acts on, by their names in MQTT 5 (2.4)."""


class Properties(NamedTuple):
    """The MQTT 5 properties of a PUBLISH that the wire contract uses. All empty on 3.1.1."""

    response_topic: str | None = None
    correlation_data: bytes | None = None
    content_type: str | None = None
    message_expiry_s: int | None = None
    user: tuple[tuple[str, str], ...] = ()

    def user_value(self, key: str) -> str | None:
        """The first user property called `key`."""
        for name, value in self.user:
            if name == key:
                return value
        return None


NO_PROPERTIES = Properties()


class Message(NamedTuple):
    """One PUBLISH, in either direction."""

    topic: str
    payload: bytes
    qos: Literal[0, 1] = 1
    retain: bool = False
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True)
class Will:
    """What the broker publishes when the connection is lost. The delay needs MQTT 5; 3.1.1 publishes at once."""

    message: Message
    delay_s: int = 0


@dataclass(frozen=True)
class ConnectOptions:
    """Everything CONNECT carries, and where to."""

    host: str
    port: int
    client_id: str
    version: MqttVersion = 5
    clean_start: bool = False
    session_expiry_s: int = 0
    """MQTT 5: how long the broker keeps the session after the connection is lost. 0: it dies with the socket."""
    keepalive_s: int = 30
    receive_maximum: int = 64
    """MQTT 5: how many unacknowledged QoS 1 messages the broker may have on the way to us."""
    maximum_packet_size: int | None = None
    """MQTT 5: the broker is asked to drop larger packets rather than to send them, and a larger one closes the
    connection. MQTT 3.1.1 cannot ask: the payload of a larger message is skipped (see `Received.skipped_bytes`), for
    if the connection were closed the broker would send the message again, for ever."""
    username: str | None = None
    password: str | None = None
    tls: bool = False
    tls_ca_file: str | None = None
    """None: the system's certificate authorities."""
    tls_client_cert: str | None = None
    """Our own certificate, for a broker that asks for one; read anew for each connection, as are all these files."""
    tls_client_key: str | None = None
    """None: it is in the certificate's file."""
    tls_client_key_password: str | None = None
    websocket_path: str | None = None
    """MQTT inside a WebSocket at that path; None: as it is."""
    will: Will | None = None

    def __repr__(self) -> str:
        scheme = ("mqtt" if self.websocket_path is None else "ws") + "s" * self.tls
        user = f"{self.username}@" if self.username else ""
        return f"<ConnectOptions {scheme}://{user}{self.host}:{self.port} {self.client_id!r} v{self.version}>"


@dataclass(frozen=True)
class BrokerLimits:
    """What the broker's CONNACK allows us; a 3.1.1 broker says nothing, and these defaults hold."""

    receive_maximum: int = 65_535
    maximum_packet_size: int | None = None
    retain_available: bool = True
    shared_subscriptions: bool = True
    keepalive_s: int | None = None


@dataclass(frozen=True)
class Connected:
    """The broker accepted the connection."""

    session_present: bool
    limits: BrokerLimits


@dataclass(frozen=True)
class Refused:
    """The broker answered CONNECT with a refusal; no Closed follows. `code` is the reason code of MQTT 5."""

    code: int
    reason: str


class Received(NamedTuple):
    """A message came. `packet_id` is None for QoS 0; otherwise hand the event to `acknowledge` when it is done."""

    message: Message
    packet_id: int | None
    duplicate: bool
    connection: int
    """Which connection it came on: counted up by `open`."""
    skipped_bytes: int = 0
    """Not 0: the packet had this many bytes, over our `maximum_packet_size`; topic and packet id are right, the
    payload is empty."""


class Acknowledged(NamedTuple):
    """The broker took a message of ours. `code` 0 is success, 0x10 nobody listens, 0x80 and up a failure."""

    handle: int
    code: int


@dataclass(frozen=True)
class Subscribed:
    """The broker answered SUBSCRIBE or UNSUBSCRIBE; `codes` in the order asked, 0x80 and up are refusals."""

    handle: int
    codes: tuple[int, ...]


@dataclass(frozen=True)
class Closed:
    """The connection is gone. `code` is the broker's DISCONNECT reason code, None if there was no DISCONNECT."""

    reason: str
    code: int | None = None


Event = Union[Connected, Refused, Received, Acknowledged, Subscribed, Closed]


class Reached(Protocol):
    """The way to a broker, before anything was said. It is given to `open`, or closed."""

    def close(self) -> None: ...


class Transport(Protocol):
    """One MQTT connection at a time. See the module for the rules."""

    def open(self, options: ConnectOptions, *, timeout_s: float, reached: Reached | None = None) -> None:
        """Connect the socket and send CONNECT; Connected, Refused or Closed follows from `poll` by the same time-out.

        Raises BrokerError if the address cannot be reached in time, naming it and saying what to check. `reached` is
        what a transport of this kind reached with the same options: then nothing is waited for.
        """
        ...

    def reach(self, options: ConnectOptions, *, timeout_s: float) -> Reached:
        """All of `open` that waits, and nothing that changes the transport. From any thread; raises as `open` does."""
        ...

    def poll(self, timeout_s: float) -> Sequence[Event]: ...

    def publish(self, message: Message) -> int:
        """Queue a PUBLISH; for QoS 1 the handle that Acknowledged will carry, for QoS 0 a handle that never returns.

        Raises TooLarge if it is over the broker's maximum packet size (paho would send it, lose the connection, and
        send it again); ValueError for a topic or property that MQTT cannot carry.
        """
        ...

    def acknowledge(self, received: Received) -> None: ...

    def subscribe(self, filters: Sequence[str], *, qos: Literal[0, 1] = 1, retained: bool = True) -> int:
        """`retained` False asks an MQTT 5 broker not to send retained messages."""
        ...

    def unsubscribe(self, filters: Sequence[str]) -> int: ...

    def wake(self) -> None:
        """From any thread: let `poll` return now."""
        ...

    def attend(self, other: Transport) -> None:
        """Let `poll` return also when something arrives for `other`, a transport of the same kind on the same thread.

        What it is, `other.poll` tells; and as nobody else looks after `other`'s keepalive, it has to be polled a few
        times in each of them.
        """
        ...

    def close(self, *, send_will: bool = False) -> None:
        """Send what is queued (for a second at most), then DISCONNECT, and close the socket. No event follows.

        `send_will`: the broker publishes the will all the same (3.1.1: by leaving without DISCONNECT).
        """
        ...
