"""Whether requests arrive and answers leave, tried out by asking ourselves: pure, the time passed in.

A broker may grant a subscription and deliver nothing, or take a message and drop it, and say neither: rights are
checked at each message, and MQTT 3.1.1 has no word for a refusal. So the device publishes an empty request to itself,
and expects it back through the subscription that brings everybody else's. On MQTT 3.1.1, where it is not told either
that its answers are dropped, it answers it, and expects the answer back.

    echo.connected(version, now)
    if (ping := echo.due(now, received)) is not None: ...       # publish it
    if echo.owns(message.topic): pong = echo.heard(message, now)    # publish that, unless it is None
    echo.refused(topic, code, now)                              # the broker did not take one of them, and said so
    echo.trouble                                                # what is wrong; empty while nothing is known to be

Where the device may not publish there, nothing is known, and nothing is claimed.
"""

from __future__ import annotations

import math
from typing import Literal

from edge_sdk.mqtt.topics import InferTopic, Topics
from edge_sdk.mqtt.transports.base import FAILURE, Message, MqttVersion, Properties

OWN = "-"
"""Stands for model and client in the topics of these messages; no client is called so."""
PATIENCE_S = 15.0
"""So long at most nothing may come back, through several attempts, before that is trouble."""
_ATTEMPTS = 3
_SELDOM = 10
"""Once it has come back: how many times `self_test_s` until the next attempt. Requests that arrive make it needless."""

State = Literal["untested", "ok", "failed"]


class Echo:
    """The self-test of one connection after another."""

    def __init__(self, topics: Topics, number: str, *, self_test_s: float) -> None:
        """`number` tells this process from another of the same name. `self_test_s` 0: nothing is tried out."""
        address = InferTopic(OWN, client=OWN, number=number)
        self.ping = topics.infer_from(OWN, OWN, number)
        self.pong = topics.result(address)
        self.pongs = topics.results_for(OWN)
        """Where a connection in MQTT 3.1.1 has to listen, too."""
        self.trouble = ""
        self._pings = self.ping.removesuffix(number)
        self._pong_topics = self.pong.removesuffix(number)
        self._topics = topics
        self._self_test_s = self_test_s
        self._patience_s = min(PATIENCE_S, self_test_s / 2)
        self._version: MqttVersion = 5
        self._next_at = math.inf
        self._since = math.inf  # the first of the attempts that nothing came back from
        self._received = 0
        self._requests: State = "untested"
        self._answers: State = "untested"
        self._ping_is_back = self._pong_is_back = False  # in this round of attempts

    @property
    def states(self) -> dict[str, str]:
        """What is known of requests and, on MQTT 3.1.1, of answers."""
        return {"requests": self._requests, **({"answers": self._answers} if self._version == 4 else {})}

    def connected(self, version: MqttVersion, now: float) -> None:
        """Begin anew, on another connection."""
        self._version = version
        self._requests = self._answers = "untested"
        self.trouble = ""
        self._begin()
        self._next_at = now if self._self_test_s else math.inf

    def closed(self) -> None:
        """There is no connection, which is somebody else's to tell."""
        self._next_at = math.inf
        self.trouble = ""

    def due(self, now: float, received: int) -> Message | None:
        """What to publish now. `received` is how many messages have come so far, others than ours."""
        if now < self._next_at:
            return None
        if self._all_is_back:
            self._begin()
        if received != self._received:  # somebody's request came: so may everybody's
            self._received = received
            self._note_ping()
            if self._all_is_back:
                self._rest(now)
                return None
        if now - self._since >= self._patience_s:
            self._fail()
        self._since = min(self._since, now)
        self._next_at = now + (self._self_test_s if self.trouble else self._patience_s / _ATTEMPTS)
        return Message(self.ping, b"", properties=Properties(message_expiry_s=max(1, round(self._patience_s))))

    def owns(self, topic: str) -> bool:
        """Whether a message there is one of these, of this process or of a former one."""
        return topic.startswith((self._pings, self._pong_topics))

    def heard(self, message: Message, now: float) -> Message | None:
        """One of ours has come; the answer to it, where it wants one."""
        if message.topic == self.ping:
            self._note_ping()
        elif message.topic == self.pong:
            self._pong_is_back, self._answers = True, "ok"
        if self._all_is_back:
            self._rest(now)
        if message.topic == self.ping and self._version == 4:
            return Message(self.pong, b"")
        return None

    def refused(self, topic: str, code: int, now: float) -> None:
        """The broker said what became of one of ours. If it may not be published, there is nothing to be learnt."""
        if topic == self.ping and code >= FAILURE:
            self._rest(now)

    @property
    def _all_is_back(self) -> bool:
        return self._ping_is_back and (self._version == 5 or self._pong_is_back)

    def _begin(self) -> None:
        """A round of attempts."""
        self._ping_is_back = self._pong_is_back = False
        self._since = math.inf

    def _note_ping(self) -> None:
        self._ping_is_back, self._requests = True, "ok"

    def _rest(self, now: float) -> None:
        """Nothing is to be tried out for a while."""
        self.trouble = ""
        self._ping_is_back = self._pong_is_back = True
        self._next_at = now + _SELDOM * self._self_test_s

    def _fail(self) -> None:
        if not self._ping_is_back:
            self._requests = "failed"
            may_write = "" if self._version == 5 else f", and to write {self.ping}, for this test"
            self.trouble = (
                f"requests do not arrive: what was published on {self.ping} did not come back. Allow this device to "
                f"read {', '.join(self._topics.subscriptions())}{may_write}"
            )
        else:
            self._answers = "failed"
            self.trouble = (
                f"answers do not leave: what was published on {self.pong} did not come back. Allow this device to "
                f"write {self.pong.partition('/-/')[0]}/+/result/#, and to read {self.pongs}, for this test"
            )
