"""Models that share the cores of a device: never more than there are, each in its turn, and nobody for ever."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.runtime.admission import Admission, Claim
from edge_sdk.runtime.turns import Turns, Turnstile

PATIENCE_S = 20.0


@given(
    cores=st.integers(1, 4),
    steps=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.booleans()), max_size=40),
)
def test_cores_are_never_shared_and_never_idle(cores: int, steps: list[tuple[str, int, bool]]) -> None:
    """Whatever comes and goes: who computes fits the cores, everybody is granted once, those of a model in order, and
    nobody waits on a device where nothing is computed."""
    admission = Admission(cores)
    asked: list[Claim] = []
    granted: list[Claim] = []
    computing: list[Claim] = []

    def grant() -> None:
        turns = admission.granted()
        granted.extend(turns)
        computing.extend(turns)
        assert sum(min(claim.cores, cores) for claim in computing) == cores - admission.free <= cores
        assert computing or not admission.waiting

    for model, wanted, finish in steps:
        if finish and computing:
            admission.give_back(computing.pop(0), 0.1)
        else:
            asked.append(Claim(model, wanted))
            admission.ask(asked[-1])
        grant()
    while computing:
        admission.give_back(computing.pop(0), 0.1)
        grant()

    assert len(asked) == len(granted)
    for model in "abc":
        assert [c for c in asked if c.model == model] == [c for c in granted if c.model == model]


def core_seconds(admission: Admission, batches: dict[str, tuple[int, float]], until: float) -> dict[str, float]:
    """What each model had of a device on which all of them want to compute all the time: model -> cores, seconds."""
    had: dict[str, float] = dict.fromkeys(batches, 0.0)
    running: list[tuple[float, float, Claim]] = []
    now = 0.0
    for model, (cores, _) in batches.items():
        admission.ask(Claim(model, cores))
    while now < until:
        running += [(now + batches[claim.model][1], now, claim) for claim in admission.granted()]
        running.sort(key=lambda each: each[0])
        now, began, claim = running.pop(0)
        had[claim.model] += min(claim.cores, admission.cores) * (now - began)
        admission.give_back(claim, now - began)
        admission.ask(Claim(claim.model, claim.cores))
    return had


@settings(max_examples=40)
@given(
    cores=st.integers(1, 4),
    batches=st.dictionaries(
        st.sampled_from("abcdef"), st.tuples(st.integers(1, 4), st.sampled_from([0.001, 0.01, 0.1])), min_size=2
    ),
)
def test_the_device_is_shared_evenly(cores: int, batches: dict[str, tuple[int, float]]) -> None:
    """Among models that always want to compute, by core seconds, however long their batches are, as far as a model's
    own batches, one at a time here, can use them: nobody has less than a share, but for a batch or so of each."""
    admission = Admission(cores)
    until = 10.0
    had = core_seconds(admission, batches, until)
    largest = max(min(wanted, cores) * seconds for wanted, seconds in batches.values())
    most = max(min(wanted, cores) for wanted, _ in batches.values())

    for model, (wanted, _) in batches.items():
        # While whoever is first waits for room, cores stay free: at most one less than it wants.
        share = until * min(min(wanted, cores), (cores - most + 1) / len(batches))
        assert had[model] >= share - 4 * largest * len(batches)


def test_a_newcomer_neither_waits_nor_takes_all() -> None:
    """One that was idle for long begins beside the others: its turn is the next, and then they alternate."""
    admission = Admission(1)
    for _ in range(1000):
        claim = Claim("old", 1)
        admission.ask(claim)
        assert [claim] == admission.granted()
        admission.give_back(claim, 1.0)
    for model in ("old", "new") * 3:
        admission.ask(Claim(model, 1))
    order = []
    while turns := admission.granted():
        order.append(turns[0].model)
        admission.give_back(turns[0], 1.0)

    assert ["new", "old"] * 3 == order


def test_who_comes_back_is_ahead_by_a_little() -> None:
    """After an hour in which it asked for nothing: as far as a second of the cores goes, and no further."""
    admission = Admission(1)
    for model, times in (("idle", 1), ("busy", 3600)):
        for _ in range(times):
            claim = Claim(model, 1)
            admission.ask(claim)
            assert [claim] == admission.granted()
            admission.give_back(claim, 1.0)
    for model in ("busy", "idle") * 8:
        admission.ask(Claim(model, 1))
    order = []
    while turns := admission.granted():
        order.append(turns[0].model)
        admission.give_back(turns[0], 0.5)

    assert ["idle"] * 4 == order[:4]
    assert {"idle", "busy"} == set(order[4:6])
    assert 4 == order[4:12].count("idle")


def test_one_that_wants_everything_is_not_starved() -> None:
    """While it is first and does not fit, nobody overtakes, so the cores come free."""
    admission = Admission(2)
    small = [Claim("small", 1) for _ in range(3)]
    big = Claim("big", 8)
    admission.ask(small[0])
    assert [small[0]] == admission.granted()
    admission.give_back(small[0], 1.0)
    admission.ask(small[1])
    assert [small[1]] == admission.granted()
    admission.ask(big)
    admission.ask(small[2])

    assert [] == admission.granted()
    admission.give_back(small[1], 1.0)
    assert [big] == admission.granted()
    admission.give_back(big, 1.0)
    assert [small[2]] == admission.granted()


def test_threads_pass_the_gate_as_many_as_there_are_cores() -> None:
    """Real threads, of models that want one core or two: never more than two cores, and everybody gets through."""
    turns = Turns(cores=2)
    inside = 0
    most = 0
    passed: Counter[str] = Counter()
    lock = threading.Lock()

    def compute(model: str, cores: int) -> None:
        nonlocal inside, most
        turnstile = Turnstile(threads=cores)
        turnstile.close(turns, model)
        for _ in range(50):
            with turnstile:
                with lock:
                    inside += cores
                    most = max(most, inside)
                sum(range(500))
                with lock:
                    inside -= cores
                    passed[model] += 1

    threads = [threading.Thread(target=compute, args=(f"m{n}", n % 2 + 1), daemon=True) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)

    assert {f"m{n}": 50 for n in range(10)} == passed
    assert (2, 0) == (most, inside)


def test_who_holds_the_cores_for_too_long_keeps_nobody_waiting() -> None:
    """What is written off is free for others, once; when it is given back after all, nothing is free twice."""
    admission = Admission(2)
    hung, quick = Claim("hung", 2), Claim("quick", 1)
    admission.ask(hung)
    first = admission.granted()
    admission.ask(quick)
    before = admission.granted()
    admission.write_off(hung)
    admission.write_off(hung)
    after = admission.granted()
    admission.give_back(quick, 0.1)
    admission.give_back(hung, 600.0)

    assert [hung] == first
    assert [] == before
    assert [quick] == after
    assert 2 == admission.free


def test_a_batch_that_hangs_lets_others_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """One waits for it for a while, those behind it do not wait again."""
    monkeypatch.setattr("edge_sdk.runtime.turns.HELD_S", 0.1)
    turns = Turns(cores=1)
    turns.enter(Claim("hung", 1))
    computed: list[int] = []

    def compute(number: int) -> None:
        claim = Claim("quick", 1)
        turns.enter(claim)
        computed.append(number)
        turns.leave(claim, 0.01)

    others = [threading.Thread(target=compute, args=(number,), daemon=True) for number in range(20)]
    for other in others:
        other.start()
    for other in others:
        other.join(PATIENCE_S)

    assert list(range(20)) == sorted(computed)
