"""One connection to the broker, kept up, with the session that lives on it.

    link.keep_up(now)                       # opens the next connection when its time has come
    for event in link.poll(timeout_s):
        if isinstance(event, Received):
            ...                             # the caller's, who tells link.session
        else:
            link.note(event)
    link.perform()                          # what the session says may be done now

When to connect is `reconnection`'s to decide, what may be sent and acknowledged `session`'s; here it is done, and where
there is no connection, the reason is told. Nothing here waits: to reach a broker that is slow, or silent, takes
seconds, in which the owner of a link may have models to compute and another connection to serve (see `reaching`). One
thread owns a link; only `wake` may be called from another.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from edge_sdk.errors import EdgeSdkError, TooLarge
from edge_sdk.mqtt.negotiation import ProtocolSetting
from edge_sdk.mqtt.reaching import Reaching
from edge_sdk.mqtt.reconnection import Reconnection
from edge_sdk.mqtt.session import Acknowledge, Publish, Record, Session
from edge_sdk.mqtt.transports.base import (
    FAILURE,
    SESSION_TAKEN_OVER,
    Acknowledged,
    BrokerLimits,
    Closed,
    Connected,
    ConnectOptions,
    Event,
    Message,
    MqttVersion,
    Refused,
    Subscribed,
    Transport,
)
from edge_sdk.mqtt.transports.packets import publish_size
from edge_sdk.seldom import Seldom

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 5.0

QoS = Literal[0, 1]


class Link:
    """A connection, its session, and what is known of both."""

    def __init__(
        self,
        transport: Transport,
        *,
        protocol: ProtocolSetting,
        options: Callable[[MqttVersion], ConnectOptions],
        subscriptions: Mapping[str, QoS],
        too_large: Callable[[Message, int], Message],
        durable: bool = False,
        numbers: Iterator[int] | None = None,
        on_connected: Callable[[], None],
        on_trouble: Callable[[], None],
        on_refused: Callable[[str, int], None] | None = None,
        write_down: Callable[[Record], None] | None = None,
    ) -> None:
        """`options` gives what each connection is opened with; `on_trouble` is told of each change of `trouble`,
        `on_refused` of the topic of an announcement that the broker did not take, and why.

        `subscriptions` says which topics are read, and with what QoS; `numbers` is where the session's tickets come
        from. `write_down` keeps what a `durable` session wants written before anything after it is done.
        """
        self.trouble = ""
        """Why there is no connection; empty while there is one, and before the first attempt."""
        self.refused: dict[str, int] = {}
        """The topics that the broker does not let us read on this connection, with its reason codes."""
        self.session = Session(
            packet_size=lambda message: publish_size(message, self._reconnection.version),
            too_large=too_large,
            durable=durable,
            numbers=numbers,
        )
        self._transport = transport
        self._reconnection = Reconnection(protocol)
        self._options = options
        self._subscriptions = dict(subscriptions)
        self._asked: dict[int, list[str]] = {}
        self._on_connected = on_connected
        self._on_trouble = on_trouble
        self._on_refused = on_refused
        self._write_down = write_down
        self._reaching: Reaching | None = None
        self._limits = BrokerLimits()
        self._client_id = self._broker = ""
        self._unpublished = Seldom()

    @property
    def is_connected(self) -> bool:
        return self._reconnection.is_connected

    @property
    def is_listening(self) -> bool:
        """Whether the broker has granted everything that we want to read."""
        return self.is_connected and not self._asked and not self.refused

    @property
    def may_retain(self) -> bool:
        return self._limits.retain_available

    @property
    def version(self) -> MqttVersion:
        return self._reconnection.version

    @property
    def may_share(self) -> bool:
        """Whether the broker has shared subscriptions for us."""
        return self.version == 5 and self._limits.shared_subscriptions

    @property
    def next_at(self) -> float:
        """When the next connection is to be opened; infinity while one stands or is on its way."""
        return 0.0 if self._reaching is not None and self._reaching.done else self._reconnection.next_at

    def keep_up(self, now: float) -> None:
        """Open the next connection if it is due. A thread of its own waits for TCP and TLS, and wakes us after that."""
        if self._reconnection.doubts(now):
            log.info("The broker hung up on MQTT 5 and took 3.1.1; it is asked in MQTT 5 once more.")
            self.session.closed()
            self._transport.close()
            self._reconnection.ask_again(now)
        reaching = self._reaching
        if not (self._reconnection.due(now) if reaching is None else reaching.done):
            return
        self._reaching = None
        timeout_s = self._reconnection.patience_s(OPEN_TIMEOUT_S)
        try:
            if reaching is not None:
                self._transport.open(reaching.options, timeout_s=timeout_s, reached=reaching.result())
                return
            options = self._options(self._reconnection.version)
            self._client_id, self._broker = options.client_id, f"{options.host}:{options.port}"
            self._reaching = Reaching(self._transport, options, timeout_s=timeout_s)
        except EdgeSdkError as exc:
            self._tell(f"waiting for the broker: {exc.problem}", self._reconnection.failed(time.monotonic()))

    def listen(self, subscriptions: Mapping[str, QoS]) -> None:
        """Read these topics from now on, on this connection and the next ones, and no others."""
        former, self._subscriptions = self._subscriptions, dict(subscriptions)
        if self.is_connected:
            if gone := [name for name in former if name not in subscriptions]:
                self._transport.unsubscribe(gone)
            self._subscribe([name for name in subscriptions if name not in former])

    def look(self, name: str) -> None:
        """Have what is retained under a filter sent, and on this connection whatever is published there, until `leave`.
        If it may not be read, nothing comes."""
        self._transport.subscribe([name], qos=0, retained=True)

    def leave(self, name: str) -> None:
        """Read nothing more under a filter that was looked at."""
        self._transport.unsubscribe([name])

    def rest(self) -> None:
        """Leave the broker, and stay away until `resume`."""
        self.session.closed()
        self.close(send_will=False)
        self._reconnection.rest()
        self.trouble = ""

    def resume(self, now: float) -> None:
        self._reconnection.resume(now)

    def poll(self, timeout_s: float) -> Sequence[Event]:
        return self._transport.poll(timeout_s)

    def wake(self) -> None:
        """From any thread: let `poll` return now."""
        self._transport.wake()

    def note(self, event: Event) -> None:
        """Take in what happened to the connection, and to what was sent."""
        match event:
            case Acknowledged():
                announcement = self.session.acknowledged(event)
                if announcement is not None and event.code >= FAILURE and self._on_refused is not None:
                    self._on_refused(announcement.topic, event.code)
            case Connected():
                self._connected(event)
            case Subscribed():
                self._subscribed(event)
            case Refused():
                self._refused(event)
            case Closed():
                self._closed(event)

    def perform(self) -> None:
        """Do, in order, what the session says may be done now."""
        for action in self.session.due():
            match action:
                case Record():
                    if self._write_down is not None:
                        self._write_down(action)
                case Publish():
                    handle = self.publish(action.message)
                    if handle is None:
                        self.session.unsendable(action)
                    else:
                        self.session.published(action, handle)
                case Acknowledge():
                    self._transport.acknowledge(action.received)

    def publish(self, message: Message) -> int | None:
        """Publish past the session. The handle; None where the broker takes nothing of the kind, not even empty."""
        try:
            return self._transport.publish(message)
        except TooLarge as exc:
            self._tell_unpublished(message.topic, exc)
        try:
            return self._transport.publish(Message(message.topic, b"", qos=message.qos, retain=message.retain))
        except TooLarge:
            return None

    def close(self, *, send_will: bool) -> None:
        """Send what is queued, then leave; `send_will` lets the broker publish the will all the same."""
        if self._reaching is not None:
            self._reaching.abandon()
            self._reaching = None
        self._transport.close(send_will=send_will)

    def _connected(self, event: Connected) -> None:
        self._reconnection.connected(time.monotonic())
        log.info("Connected to %s as %s, MQTT %s.", self._broker, self._client_id, self._reconnection.version_name)
        self.session.connected(event.limits, remembered=event.session_present)
        self._limits = event.limits
        self.trouble = ""
        self._on_trouble()
        self.refused.clear()
        self._asked.clear()
        self._subscribe(list(self._subscriptions))
        self._on_connected()

    def _subscribe(self, filters: Sequence[str]) -> None:
        for qos in (0, 1):
            if wanted := [name for name in filters if self._subscriptions[name] == qos]:
                self._asked[self._transport.subscribe(wanted, qos=qos, retained=False)] = wanted

    def _subscribed(self, event: Subscribed) -> None:
        codes = zip(self._asked.pop(event.handle, ()), event.codes)
        if refused := {name: code for name, code in codes if code >= FAILURE}:
            self.refused |= refused
            log.error(
                "The broker refused a subscription (reason %#04x), so requests will not arrive: allow %s to read %s.",
                next(iter(refused.values())), self._client_id, ", ".join(refused),
            )  # fmt: skip
            self._on_trouble()

    def _refused(self, event: Refused) -> None:
        if pause_s := self._reconnection.refused(event.code, time.monotonic()):
            self._tell(f"the broker refused the connection: {event.reason}", pause_s)

    def _closed(self, event: Closed) -> None:
        self.session.closed()
        reason = f"the connection was lost: {event.reason}"
        if event.code == SESSION_TAKEN_OVER:
            reason = f"another client uses the id {self._client_id}; give each daemon its own `device`"
        elif self._reconnection.may_have_a_rival:
            reason += f" (again and again: does another client use the id {self._client_id}?)"
        if pause_s := self._reconnection.closed(event.code, time.monotonic()):
            self._tell(reason, pause_s)

    def _tell(self, why: str, pause_s: float) -> None:
        """Say why there is no connection: to the log, and to whoever is told of trouble."""
        log.warning("%s; trying again in %.1f s.", why[0].upper() + why[1:], pause_s)
        self.trouble = why
        self._on_trouble()

    def _tell_unpublished(self, topic: str, exc: TooLarge) -> None:
        if self._unpublished.happened(time.monotonic()):
            log.error("%s was not published: %s", topic, exc, extra={"topic": topic, "code": exc.code})
