"""Who may stay in a device's memory, against a model of it that remembers everything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge_sdk.backends.residency import Needs, Residency
from edge_sdk.errors import OutOfMemory

BUDGET = 100
KEYS = st.sampled_from("abcdef")
BYTES = st.integers(0, 60)
NEEDS = st.builds(Needs, own=BYTES, kept=st.integers(0, 10), shared=BYTES)


def test_what_fits_evicts_nobody() -> None:
    """Scratch memory is shared: it counts once, as the largest wish for it."""
    residency = Residency[str](BUDGET)

    assert () == residency.admit("a", Needs(own=30, shared=20))
    assert () == residency.admit("b", Needs(own=40, shared=30))
    assert (100, 30) == (residency.held_bytes, residency.shared_bytes)


def test_the_longest_unused_goes_first() -> None:
    """Use decides the order, not arrival; no more of them go than it takes."""
    residency = Residency[str](BUDGET)
    for key in "abc":
        residency.admit(key, Needs(own=30))
    residency.use("a")
    residency.rest("a")

    assert ("b",) == residency.admit("d", Needs(own=30))
    assert ("c", "a") == residency.admit("e", Needs(own=70))
    assert 100 == residency.held_bytes


def test_who_is_in_use_stays() -> None:
    """Somebody in use is passed over, and if only such are left, the arithmetic says so and nothing changes."""
    residency = Residency[str](BUDGET)
    for key in "ab":
        residency.admit(key, Needs(own=50))
    residency.use("a")

    assert ("b",) == residency.admit("c", Needs(own=40))

    residency.use("c")
    with pytest.raises(OutOfMemory, match=r"needs 60 bytes.*may use 100 bytes; those in use now leave 10") as refused:
        residency.admit("d", Needs(own=50, shared=10))

    assert "<90 of 100 bytes, 2 in use, 0 idle>" == repr(residency)
    assert refused.value.retryable
    assert (90, True) == (residency.held_bytes, residency.may_fit(Needs(own=50, shared=10)))


def test_what_is_kept_outlives_eviction() -> None:
    """Arrays that a caller holds are not given back by an eviction, only by leaving."""
    residency = Residency[str](BUDGET)
    residency.admit("a", Needs(own=50, kept=20))

    assert ("a",) == residency.admit("b", Needs(own=80))
    assert (Needs(kept=20), 100) == (residency.needs("a"), residency.held_bytes)

    residency.leave("a")

    assert 80 == residency.held_bytes


def test_evicting_the_largest_gives_its_scratch_memory_back() -> None:
    """The shared piece is as large as those who stay need it."""
    residency = Residency[str](BUDGET)
    residency.admit("a", Needs(own=10, shared=60))
    residency.admit("b", Needs(own=10, shared=5))

    assert ("a",) == residency.admit("c", Needs(own=60))
    assert 5 == residency.shared_bytes


def test_more_than_there_ever_is() -> None:
    """What exceeds the budget by itself is told apart from what only has to wait."""
    residency = Residency[str](BUDGET)

    assert not residency.may_fit(Needs(own=80, shared=30))
    with pytest.raises(OutOfMemory, match="needs 110 bytes"):
        residency.admit("a", Needs(own=80, shared=30))


@given(st.lists(st.tuples(KEYS, NEEDS)))
def test_an_idle_device_takes_whatever_may_fit(arrivals: list[tuple[str, Needs]]) -> None:
    """While nobody is in use and nothing is kept, `may_fit` alone decides."""
    residency = Residency[str](BUDGET)
    for key, needs in arrivals:
        needs = Needs(needs.own, 0, needs.shared)
        if residency.may_fit(needs):
            residency.admit(key, needs)

            assert needs == residency.needs(key)


class Device(RuleBasedStateMachine):
    """Every order of calls, beside a list of who was used when."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency[str](BUDGET)
        self.booked: dict[str, Needs] = {}
        self.users: dict[str, int] = {}
        self.order: list[str] = []

    def touched(self, key: str) -> None:
        self.order = [other for other in self.order if other != key] + [key]

    @rule(key=KEYS, needs=NEEDS)
    def admit(self, key: str, needs: Needs) -> None:
        before = dict(self.booked)
        try:
            victims = self.residency.admit(key, needs)
        except OutOfMemory:
            busy = [need for other, need in before.items() if other != key and self.users.get(other)]
            kept = sum(need.kept for other, need in before.items() if other != key and not self.users.get(other))
            own = sum(need.own + need.kept for need in busy) + kept
            shared = max([need.shared for need in busy] + [needs.shared])

            assert own + shared + needs.own + needs.kept > BUDGET  # it really could not be
            return

        idle = [k for k in self.order if k != key and not self.users.get(k) and (before[k].own or before[k].shared)]
        assert idle[: len(victims)] == list(victims)
        for victim in victims:
            self.booked[victim] = Needs(kept=before[victim].kept)
        if victims:  # one fewer would not have done
            spared = {**self.booked, victims[-1]: before[victims[-1]], key: needs}
            assert total(spared) > BUDGET
        self.booked[key] = needs
        self.touched(key)

    @rule(key=KEYS)
    def use(self, key: str) -> None:
        self.residency.use(key)
        self.users[key] = self.users.get(key, 0) + 1
        self.booked.setdefault(key, Needs())
        self.touched(key)

    @rule(key=KEYS)
    def rest(self, key: str) -> None:
        if self.users.get(key):
            self.residency.rest(key)
            self.users[key] -= 1
            self.touched(key)

    @rule(key=KEYS)
    def leave(self, key: str) -> None:
        if not self.users.get(key):
            self.residency.leave(key)
            self.booked.pop(key, None)
            self.order = [other for other in self.order if other != key]

    @rule(key=KEYS)
    def evict(self, key: str) -> None:
        self.residency.evict(key)
        if key in self.booked:
            self.booked[key] = Needs(kept=self.booked[key].kept)

    @invariant()
    def within_the_budget_and_nothing_lost(self) -> None:
        assert total(self.booked) == self.residency.held_bytes <= BUDGET
        assert self.booked == {key: self.residency.needs(key) for key in self.booked}


def total(booked: dict[str, Needs]) -> int:
    needs = booked.values()
    return sum(need.own + need.kept for need in needs) + max((need.shared for need in needs), default=0)


TestDevice = Device.TestCase
