"""When the next connection is opened, and in which version: decided without a socket or a clock."""

from __future__ import annotations

import math

import pytest

from edge_sdk.mqtt.backoff import Backoff
from edge_sdk.mqtt.reconnection import DOUBT_S, LASTING_S, Reconnection
from edge_sdk.mqtt.transports.base import SESSION_TAKEN_OVER


@pytest.fixture
def reconnection() -> Reconnection:
    return Reconnection("auto", backoff=Backoff(chance=lambda: 1.0))


def test_one_attempt_at_a_time(reconnection: Reconnection) -> None:
    """The first is due at once; while it is under way, and while the connection stands, none is."""
    due = [reconnection.due(0.0), reconnection.due(1.0)]
    reconnection.connected(2.0)

    assert due == [True, False]
    assert not reconnection.due(1e9)
    assert math.isinf(reconnection.next_at)


def test_pauses_grow_and_are_bounded(reconnection: Reconnection) -> None:
    """A broker that cannot be reached is asked less and less often, but at least every five seconds."""
    pauses = [reconnection.failed(0.0) for _ in range(10)]

    assert pauses == sorted(pauses)
    assert pauses[0] < 0.5
    assert pauses[-1] == 5.0


def test_a_connection_that_lasted_starts_the_pauses_over(reconnection: Reconnection) -> None:
    for _ in range(10):
        reconnection.failed(0.0)
    reconnection.connected(0.0)

    assert reconnection.closed(None, LASTING_S) < 0.5


def test_a_connection_that_is_lost_again_and_again_is_not_hurried_back(reconnection: Reconnection) -> None:
    """Two clients with one id: each throws the other out, and not every broker says so."""
    pauses = []
    now = 0.0
    for _ in range(10):
        reconnection.connected(now)
        pauses.append(reconnection.closed(None, now + 0.1))
        now += 0.1 + pauses[-1]

    assert pauses[-1] == 5.0


def test_a_taken_over_session_is_left_alone_for_a_minute(reconnection: Reconnection) -> None:
    reconnection.connected(0.0)

    assert reconnection.closed(SESSION_TAKEN_OVER, 1.0) >= 60.0


def test_bad_credentials_are_not_tried_in_a_tight_loop(reconnection: Reconnection) -> None:
    assert reconnection.refused(0x86, 0.0) >= 2.5


def test_another_version_is_tried_at_once(reconnection: Reconnection) -> None:
    """A broker that does not know MQTT 5 is asked in 3.1.1, without a pause."""
    first = reconnection.version
    pause_s = reconnection.refused(0x84, 0.0)

    assert (first, reconnection.version) == (5, 4)
    assert pause_s == 0.0
    assert reconnection.due(0.0)


def test_a_hang_up_at_the_start_is_not_remembered_for_ever(reconnection: Reconnection) -> None:
    """A broker that was just starting hung up on MQTT 5: 3.1.1 lasts for that connection, the next begins with 5."""
    reconnection.closed(None, 0.0)
    first = reconnection.version
    reconnection.connected(1.0)
    during = reconnection.version
    reconnection.closed(None, 100.0)

    assert [4, 4, 5] == [first, during, reconnection.version]
    assert reconnection.patience_s(10) < 10


def test_a_refusal_in_so_many_words_is_remembered(reconnection: Reconnection) -> None:
    reconnection.refused(0x84, 0.0)
    reconnection.connected(1.0)
    reconnection.closed(None, 100.0)

    assert 4 == reconnection.version


def test_a_set_version_stays() -> None:
    """Who says 3.1.1 gets 3.1.1, whatever happens."""
    pinned = Reconnection("3.1.1")
    pinned.closed(None, 0.0)
    pinned.connected(1.0)
    pinned.closed(None, 100.0)

    assert 4 == pinned.version


def test_what_a_hang_up_led_to_is_doubted_once(reconnection: Reconnection) -> None:
    """In 3.1.1 because MQTT 5 was hung up on, by a broker that lives all the same: 5 is tried once more, soon."""
    reconnection.due(0.0)
    reconnection.closed(None, 0.1)
    reconnection.connected(1.0)
    early, due = (reconnection.doubts(1.0 + after_s) for after_s in (DOUBT_S / 2, DOUBT_S))
    reconnection.ask_again(3.0)
    again = reconnection.version, reconnection.due(3.0)
    reconnection.closed(None, 3.1)
    believed = reconnection.version
    reconnection.connected(3.2)

    assert (False, True) == (early, due)
    assert (5, True) == again
    assert 4 == believed
    assert not reconnection.doubts(1e9)


def test_a_hang_up_on_both_versions_is_about_neither(reconnection: Reconnection) -> None:
    """A proxy without its broker hangs up on everybody: what connects when that is back is doubted."""
    for moment in range(3):  # 5, 3.1.1, 5
        reconnection.due(1e9)
        reconnection.closed(None, moment)
    reconnection.connected(10.0)

    assert 4 == reconnection.version
    assert reconnection.doubts(10.0 + DOUBT_S)


def test_silence_and_refusals_are_believed(reconnection: Reconnection) -> None:
    """A broker that thought about MQTT 5 until patience ended was not going away; one that refused it said so."""
    reconnection.due(0.0)
    reconnection.closed(None, reconnection.patience_s(10))
    reconnection.connected(3.0)
    silent = reconnection.doubts(100.0)
    other = Reconnection("auto")
    other.due(0.0)
    other.refused(0x84, 0.1)
    other.connected(0.2)

    assert 4 == reconnection.version == other.version
    assert not silent
    assert not other.doubts(100.0)
