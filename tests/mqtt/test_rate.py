"""What a client may send in any stretch of time, and what it is told when that was too much."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.mqtt.rate import ClientRates

RATES = st.floats(0.1, 1000.0)
BURSTS = st.integers(1, 50)
PAUSES = st.lists(st.floats(0.0, 3.0), min_size=1, max_size=60)


def test_a_burst_and_then_the_rate() -> None:
    """Three at once, and from then on one every half second; the wait is until the next one passes."""
    rates = ClientRates(rate=2.0, burst=3)
    waits = [rates.take("a", 10.0) for _ in range(5)]

    assert [0.0, 0.0, 0.0, 0.5, 0.5] == waits
    assert [0.25, 0.0, 0.5] == [rates.take("a", now) for now in (10.25, 10.5, 10.5)]


@given(rate=RATES, burst=BURSTS, pauses=PAUSES)
def test_no_stretch_of_time_holds_more_than_is_allowed(rate: float, burst: int, pauses: list[float]) -> None:
    """However they arrive: between any two that passed there are at most `burst` and what the rate gives."""
    rates = ClientRates(rate, burst)
    now, passed = 0.0, []
    for pause in pauses:
        now += pause
        if not rates.take("a", now):
            passed.append(now)

    for first, begin in enumerate(passed):
        for last in range(first, len(passed)):
            assert last - first + 1 <= burst + rate * (passed[last] - begin) + 1e-6


@given(rate=RATES, burst=BURSTS, pauses=PAUSES)
def test_the_wait_is_honest(rate: float, burst: int, pauses: list[float]) -> None:
    """Whoever is told to wait passes after that long, and not much sooner; asking meanwhile costs nothing."""
    rates = ClientRates(rate, burst)
    now = 0.0
    for pause in pauses:
        now += pause
        if wait_s := rates.take("a", now):
            assert wait_s <= 1 / rate + 1e-6
            assert rates.take("a", now + wait_s * 0.9) > 0.0
            now += wait_s + 1e-6
            assert 0.0 == rates.take("a", now)


@given(rate=RATES, burst=BURSTS, pauses=PAUSES)
def test_who_keeps_to_the_rate_is_never_refused(rate: float, burst: int, pauses: list[float]) -> None:
    """Also after having been silent for any time, and whatever another client does."""
    rates = ClientRates(rate, burst)
    now, waits = 0.0, []
    for pause in pauses:
        now += 1 / rate + 1e-9 + pause
        for _ in range(3):
            rates.take("greedy", now)
        waits.append(rates.take("a", now))

    assert {0.0} == set(waits)


def test_the_table_is_bounded() -> None:
    """Names made up by the thousand are forgotten, the longest silent first; one that keeps asking stays refused."""
    rates = ClientRates(rate=0.001, burst=1, max_clients=8)
    waits = []
    for number in range(1000):
        rates.take(f"made-up-{number}", 0.0)
        if number % 4 == 0:
            waits.append(rates.take("greedy", 0.0))

    assert 8 == len(rates)
    assert (0.0, {1000.0}) == (waits[0], set(waits[1:]))
    assert 0.0 == rates.take("made-up-0", 0.0)
