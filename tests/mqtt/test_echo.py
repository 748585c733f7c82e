"""The self-test of a connection, in a time that is passed in and against brokers that swallow."""

from __future__ import annotations

import pytest

from edge_sdk.mqtt.echo import Echo
from edge_sdk.mqtt.topics import Topics
from edge_sdk.mqtt.transports.base import NOT_AUTHORIZED, Message, MqttVersion

TOPICS = Topics("edge/v1", "dev")


class Broker:
    """Brings back what is published, but for what it swallows."""

    def __init__(self, version: MqttVersion = 5, *, swallows: str = "none", self_test_s: float = 30.0) -> None:
        self.echo = Echo(TOPICS, "boot", self_test_s=self_test_s)
        self.swallows = swallows
        self.published: list[tuple[float, str]] = []
        self.received = 0
        self.echo.connected(version, 0.0)

    def until(self, end: float, begin: float = 0.0) -> Broker:
        """The daemon's look, once a second."""
        now = begin
        while now <= end:
            message = self.echo.due(now, self.received)
            while message is not None:
                self.published.append((now, message.topic))
                back, message = message, None
                if self.swallows not in back.topic:
                    message = self.echo.heard(back, now)
            now += 1.0
        return self


@pytest.mark.parametrize("version", [4, 5])
def test_what_comes_back_is_asked_seldom(version: MqttVersion) -> None:
    """At the connection, and then every five minutes; on 3.1.1 with an answer each."""
    broker = Broker(version).until(700)
    pings = [now for now, topic in broker.published if "/infer/" in topic]
    pongs = [now for now, topic in broker.published if "/result/" in topic]

    assert [0.0, 300.0, 600.0] == pings
    assert (pings if version == 4 else []) == pongs
    assert "" == broker.echo.trouble
    assert {"ok"} == set(broker.echo.states.values())


@pytest.mark.parametrize("version", [4, 5])
def test_requests_that_do_not_arrive_are_told_in_time(version: MqttVersion) -> None:
    """Within 30 s, after several attempts; and not before."""
    broker = Broker(version, swallows="/infer/")
    before = broker.until(14).echo.trouble
    after = broker.until(30, begin=15).echo.trouble

    assert "" == before
    assert after.startswith("requests do not arrive")
    assert "edge/v1/dev/models/+/infer" in after
    assert "failed" == broker.echo.states["requests"]
    assert 3 <= len(broker.published) <= 6


def test_answers_that_do_not_leave_are_told_on_311() -> None:
    """The request came back, its answer did not. MQTT 5 says that itself."""
    trouble = {version: Broker(version, swallows="/result/").until(30).echo.trouble for version in (4, 5)}

    assert trouble[4].startswith("answers do not leave")
    assert "write edge/v1/dev/models/+/result/#" in trouble[4]
    assert "" == trouble[5]


def test_trouble_ends_when_it_comes_back() -> None:
    """It goes on asking, and sees that the rights are right."""
    broker = Broker(swallows="/infer/").until(60)
    during = broker.echo.trouble
    broker.swallows = "none"
    broker.until(120, begin=61)

    assert during
    assert "" == broker.echo.trouble
    assert {"requests": "ok"} == broker.echo.states


def test_rights_that_are_taken_away_are_noticed() -> None:
    broker = Broker().until(10)
    broker.swallows = "/infer/"
    broker.until(350, begin=11)

    assert broker.echo.trouble


def test_requests_of_others_prove_as_much() -> None:
    """A device that is asked need not ask itself."""
    broker = Broker(swallows="/infer/")
    broker.received = 1
    broker.until(40)

    assert "" == broker.echo.trouble
    assert [] == broker.published


@pytest.mark.parametrize("self_test_s", [30.0, 0.2])
def test_nothing_is_missed_before_it_was_sent(self_test_s: float) -> None:
    """Whoever looks late, or seldom, is no reason for an alarm."""
    broker = Broker(self_test_s=self_test_s).until(100, begin=60)

    assert 60.0 == broker.published[0][0]
    assert "" == broker.echo.trouble
    assert {"requests": "ok"} == broker.echo.states


def test_where_the_device_may_not_ask_itself_nothing_is_claimed() -> None:
    """MQTT 5 says that the request was refused: not even that it was tried."""
    broker = Broker(swallows="/infer/").until(3)
    broker.echo.refused(broker.echo.ping, NOT_AUTHORIZED, 3.0)
    broker.until(100, begin=4)

    assert "" == broker.echo.trouble
    assert {"requests": "untested"} == broker.echo.states


def test_it_can_be_switched_off() -> None:
    assert [] == Broker(swallows="/infer/", self_test_s=0.0).until(100).published


def test_what_is_ours() -> None:
    """Those of a former process, too: they are nobody's requests. A client's are not ours."""
    echo = Echo(TOPICS, "boot", self_test_s=30.0)
    former = Echo(TOPICS, "former", self_test_s=30.0)
    heard = echo.heard(Message(former.ping, b""), 0.0)

    assert [True, True, True, False, False] == [
        echo.owns(topic)
        for topic in (
            echo.ping, former.ping, former.pong,
            "edge/v1/dev/models/-/infer", "edge/v1/dev/models/digits/infer/c/1",
        )
    ]  # fmt: skip
    assert heard is None
    assert {"requests": "untested"} == echo.states
