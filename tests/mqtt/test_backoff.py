"""When to connect again."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.mqtt.backoff import LONGEST_S, REFUSED_S, SHORTEST_S, TAKEN_OVER_S, Backoff
from edge_sdk.mqtt.transports.base import SESSION_TAKEN_OVER

CHANCES = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5)


def backoff(chances: list[float]) -> Backoff:
    drawn = itertools.cycle(chances)
    return Backoff(lambda: next(drawn))


@given(CHANCES)
def test_pauses_double_up_to_a_limit(chances: list[float]) -> None:
    """Each pause is between half and all of a limit that doubles, never nothing and never beyond LONGEST_S."""
    pausing = backoff(chances)
    limits = [min(LONGEST_S, SHORTEST_S * 2**n) for n in range(1, 12)]

    for limit in limits:
        assert limit / 2 <= pausing.pause_s() <= limit


@given(CHANCES)
def test_a_connection_starts_over(chances: list[float]) -> None:
    """After a connection that stood, the next one is tried soon."""
    pausing = backoff(chances)
    for _ in range(10):
        pausing.pause_s()
    pausing.connected()

    assert pausing.pause_s() <= 2 * SHORTEST_S


@given(CHANCES)
def test_a_refusal_is_not_worth_hurrying_for(chances: list[float]) -> None:
    """Credentials do not become right within milliseconds."""

    assert REFUSED_S / 2 <= backoff(chances).pause_s(refused=True) <= max(REFUSED_S, LONGEST_S)


@given(CHANCES, st.booleans())
def test_whoever_was_evicted_stays_away(chances: list[float], refused: bool) -> None:
    """Two daemons of one name do not evict each other in turns: a minute at least, and not the same for both."""
    pausing = backoff(chances)

    assert TAKEN_OVER_S <= pausing.pause_s(refused=refused, code=SESSION_TAKEN_OVER) <= 2 * TAKEN_OVER_S
    assert pausing.pause_s() <= 2 * SHORTEST_S


def test_a_fleet_does_not_return_in_step() -> None:
    """Without being told the chance, two devices draw their own."""
    pauses = {Backoff().pause_s() for _ in range(20)}

    assert len(pauses) > 10
