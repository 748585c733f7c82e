"""A device's place in its groups: a second connection, on which the broker divides the requests to a group.

    membership.invite(direct)                    # whenever the device's own connection is made
    ...
    for event in membership.poll():              # each turn; the requests among them are the caller's to take
        membership.note(event)
    membership.perform()
    ...
    membership.leave(); while not membership.has_left: ...

The connection is its own because its session must be another. A broker gives a member of a shared subscription its
share also while that member is away, as long as it keeps the member's session; so this session ends with the connection
(clean start, expiry 0), where the device's own lasts. It has a client id, a window and acknowledgements of its own.

What the broker has given to one member, it need not give to another when that one leaves: mosquitto 2.0 drops it, sent
or queued, and the client's resend is what saves it. So a member that leaves says so first (UNSUBSCRIBE), and goes on
answering until the broker has nothing left for it. That is so if nothing came between the answer to one UNSUBSCRIBE and
the answer to another: a broker writes in order.

Without a group the device serves on: where the broker has no shared subscriptions, or refuses this one, or speaks only
MQTT 3.1.1, the reason is told, and the next time the device connects is the next attempt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

from edge_sdk.mqtt.link import Link, QoS
from edge_sdk.mqtt.topics import Topics
from edge_sdk.mqtt.transports.base import (
    ConnectOptions,
    Event,
    Message,
    MqttVersion,
    Received,
    Subscribed,
    Transport,
)

log = logging.getLogger(__name__)

State = Literal["away", "joining", "joined", "leaving", "left"]


class Membership:
    """The second connection, and how far it is. It belongs to the thread that owns the first."""

    def __init__(
        self,
        transport: Transport,
        topics: Topics,
        groups: Sequence[str],
        *,
        options: Callable[[MqttVersion], ConnectOptions],
        qos: QoS,
        too_large: Callable[[Message, int], Message],
        numbers: Iterator[int],
        on_change: Callable[[], None],
    ) -> None:
        """`on_change` is told when `state` or `reason` may have changed."""
        self.groups = tuple(groups)
        self._transport = transport
        self._filters = [topics.group_subscription(group) for group in groups]
        self._link = Link(
            transport,
            protocol="5",
            options=options,
            subscriptions=dict.fromkeys(self._filters, qos),
            too_large=too_large,
            numbers=numbers,
            on_connected=lambda: None,  # that is half of it: the subscription is the other
            on_trouble=on_change,
        )
        self._link.rest()
        self._on_change = on_change
        self._state: State = "away"
        self._why_away = ""
        self._kept: Sequence[Event] = ()
        self._farewell: int | None = None
        """The handle of an UNSUBSCRIBE that has no answer yet."""
        self._came = False
        """Whether a request came since then."""

    @property
    def link(self) -> Link:
        return self._link

    @property
    def state(self) -> State:
        if self._state == "joining" and self._link.is_listening:
            return "joined"
        return self._state

    @property
    def reason(self) -> str:
        """Why the groups' requests do not come here; empty while they do."""
        return self._why_away or self._link.trouble

    def described(self) -> dict[str, Any]:
        """For whoever asks about the device; JSON-ready."""
        told = {"reason": self.reason} if self.reason else {}
        return {"names": list(self.groups), "state": self.state, **told}

    def counts(self) -> dict[str, Any]:
        return {**self.described(), **asdict(self._link.session.counts), "unsent": self._link.session.unsent}

    def invite(self, direct: Link, now: float) -> None:
        """The device's own connection was made: join, or try again, if this broker shares."""
        if self._state in ("leaving", "left"):
            return
        if direct.may_share:
            if self._state == "away":
                self._state, self._why_away = "joining", ""
                self._link.resume(now)
        elif direct.version == 5:
            self._stay_away("the broker has no shared subscriptions")
        else:
            self._stay_away("the broker speaks MQTT 3.1.1, which has no shared subscriptions")

    def keep_up(self, now: float) -> None:
        """Connect, if it is due."""
        self._link.keep_up(now)

    def poll(self) -> Sequence[Event]:
        """What has happened, without waiting."""
        self.look()
        events, self._kept = self._kept, ()
        return events

    def look(self) -> bool:
        """Whether `poll` has something. To look also sends what is to be sent."""
        if not self._kept:
            self._kept = self._link.poll(0.0)
        return bool(self._kept)

    def note(self, event: Event) -> None:
        """Take in what happened; of requests, that they came."""
        if isinstance(event, Received):
            self._came = True
        elif isinstance(event, Subscribed) and event.handle == self._farewell:
            self._farewell = None
        else:
            self._link.note(event)
            if self._link.refused and self._state == "joining":
                code = next(iter(self._link.refused.values()))
                self._stay_away(f"the broker refused the shared subscription (reason {code:#04x})")
            elif isinstance(event, Subscribed):
                self._on_change()

    def perform(self) -> None:
        """Do what the session says, send it, and see how far leaving is."""
        self._link.perform()
        if self._state == "leaving":
            self._go_on_leaving()
        self.look()

    @property
    def has_news(self) -> bool:
        """Whether the last look found something that no `poll` has given out yet."""
        return bool(self._kept)

    def leave(self) -> None:
        """Begin to leave. It is done once `has_left`."""
        if self._state in ("leaving", "left"):
            return
        self._state = "leaving"
        if self._link.is_connected:
            self._say_farewell()
        else:
            self._end()

    @property
    def has_left(self) -> bool:
        """Whether the broker has nothing more for us here, and we nothing more for it."""
        return self._state == "left"

    def come_back(self, direct: Link, now: float) -> None:
        """Undo `leave`."""
        if self._state == "leaving":
            self._end()
        self._state = "away"
        if direct.is_connected:
            self.invite(direct, now)

    def close(self) -> None:
        """Leave at once. What was not answered is the client's to send again."""
        self._end()

    def _stay_away(self, why: str) -> None:
        log.warning("The requests to %s do not come here: %s.", ", ".join(self.groups), why)
        self._link.rest()
        self._state, self._why_away = "away", why
        self._on_change()

    def _say_farewell(self) -> None:
        # Only one that follows our last acknowledgement can show that the broker has nothing left: each of those may
        # let it send another request.
        self._came = not self._link.session.idle
        self._farewell = self._transport.unsubscribe(self._filters)

    def _go_on_leaving(self) -> None:
        if not self._link.is_connected:
            self._end()
        elif self._farewell is None and self._link.session.idle and not self._kept:
            if self._came:
                self._say_farewell()
            else:
                self._end()

    def _end(self) -> None:
        self._link.rest()
        self._state, self._kept, self._farewell = "left", (), None
        self._on_change()
