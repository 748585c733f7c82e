"""The checker: a history in which all is well keeps every invariant, and each of them can be violated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.checker import INVARIANTS, check
from tests.faults.history import (
    Accepted,
    Answered,
    Asked,
    Availability,
    Event,
    Fault,
    History,
    Life,
    Link,
    Promised,
    Said,
    Sampled,
    SentAgain,
    read,
)

PROMISED = Promised(0.0, rss_bytes=100, threads=5, fds=10, disk_bytes=50, recovery_s=2.0, availability_s=3.0)
STARTED = Life(0.1, pid=7, what="started")
ONLINE = Availability(0.2, "online")
ASKED = Asked(1.0, id="a/1", client="a", reference="ref", timeout_s=5.0)
TAKEN = Accepted(1.1, id="a/1", code=0)
ANSWER = Answered(1.2, id="a/1", client="a", status=200, body="body", outputs="ref")
STOPPED = Life(20.0, pid=7, what="ended", code=0, expected=(0,))
OFFLINE = Availability(20.1, "offline")
END = Link(40.0, client="a", up=True)

WELL: list[Event] = [PROMISED, STARTED, ONLINE, ASKED, TAKEN, ANSWER, STOPPED, OFFLINE, END]


def violated(*events: Event) -> list[str]:
    """The invariants that a history does not keep, in order, each as often as it is violated."""
    return [violation.invariant for violation in check(events).violations]


def without(*gone: Event) -> list[Event]:
    return [event for event in WELL if event not in gone]


def test_when_all_is_well_every_invariant_holds() -> None:
    report = check(WELL)

    assert report.kept, str(report)
    assert (1, 1, 1) == (report.counts["requests"], report.counts["answered"], report.counts["daemons"])
    assert all(f"{invariant} holds" in str(report) for invariant in INVARIANTS)


VIOLATIONS: dict[str, tuple[list[Event], list[str]]] = {
    "no answer": (without(ANSWER), ["I1"]),
    "no answer to what was never accepted": (without(ANSWER, TAKEN), ["I1"]),
    "accepted and the history ends": ([PROMISED, ASKED, TAKEN], ["I1"]),
    "an answer too late": ([*without(ANSWER), replace(ANSWER, at=7.1)], ["I1"]),
    "two ends for one caller": (
        [*without(ANSWER), replace(ANSWER, on_wire=False), replace(ANSWER, on_wire=False, at=1.3)],
        ["I1"],
    ),
    "another result": ([*without(ANSWER), replace(ANSWER, outputs="other")], ["I2"]),
    "an error for a good question": ([*without(ANSWER), replace(ANSWER, status=500)], ["I2"]),
    "an answer to another's question": ([*WELL, replace(ANSWER, client="b", at=1.3)], ["I3"]),
    "an answer to nobody's question": ([*WELL, replace(ANSWER, id="a/2", at=1.3)], ["I3"]),
    "an id used twice": ([*WELL, replace(ASKED, at=1.05)], ["I3"]),
    "a repetition for no reason": ([*WELL, replace(ANSWER, at=1.3)], ["I4"]),
    "a repetition when all is well again": (
        [*WELL, Fault(0.3, "x", "begins"), Fault(0.9, "x", "ends"), replace(ANSWER, at=1.3)],
        ["I4"],
    ),
    "a repetition with other bytes": (
        [*WELL, SentAgain(1.25, id="a/1"), replace(ANSWER, at=1.3, body="other")],
        ["I4"],
    ),
    "too much memory": ([*WELL, Sampled(2.0, pid=7, rss_bytes=101, threads=1, fds=1)], ["I5"]),
    "too many threads": ([*WELL, Sampled(2.0, pid=7, rss_bytes=1, threads=6, fds=1)], ["I5"]),
    "too many descriptors": ([*WELL, Sampled(2.0, pid=7, rss_bytes=1, threads=1, fds=11)], ["I5"]),
    "too much disk": ([*WELL, Sampled(2.0, pid=7, rss_bytes=1, threads=1, fds=1, disk_bytes=51)], ["I5"]),
    "no recovery": (
        [*WELL, Fault(2.0, "x", "begins"), Fault(3.0, "x", "ends"), Asked(3.1, "a/2", "a", "ref", 90.0)],
        ["I6"],
    ),
    "a slow recovery": (
        [
            *WELL,
            Fault(2.0, "x", "begins"),
            Fault(3.0, "x", "ends"),
            Asked(3.1, "a/2", "a", "ref", 5.0),
            replace(ANSWER, id="a/2", at=5.2),
        ],
        ["I6"],
    ),
    "still online when stopped": (without(OFFLINE), ["I7"]),
    "never online": ([*without(ONLINE), Availability(0.2, "offline")], ["I7"]),
    "a crash": ([*without(STOPPED), replace(STOPPED, code=-6)], ["I8"]),
    "an end that nobody asked for": ([*without(STOPPED), replace(STOPPED, expected=())], ["I8"]),
    "a traceback": ([*WELL, Said(2.0, "Traceback (most recent call last):")], ["I8"]),
}


@pytest.mark.parametrize(("history", "expected"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_each_invariant_can_fail(history: list[Event], expected: list[str]) -> None:
    """Every kind of violation is found, and nothing else with it."""

    assert expected == violated(*history)


ALLOWED: dict[str, list[Event]] = {
    "a repetition after the client asked again": [*WELL, SentAgain(1.25, id="a/1"), replace(ANSWER, at=1.3)],
    "a repetition after a lost connection": [*WELL, Link(1.15, "a", up=False), replace(ANSWER, at=1.3)],
    "a repetition while something is wrong": [
        *WELL,
        Fault(0.9, "x", "begins"),
        replace(ANSWER, at=1.3),
        Fault(1.4, "x", "ends"),
    ],
    "a repetition after a kill": [
        *WELL,
        Life(1.15, pid=8, what="ended", code=-9, expected=(-9,)),
        Life(1.16, pid=9, what="started"),
        replace(ANSWER, at=1.3),
    ],
    "an error that the question allows": [
        *without(ASKED, ANSWER),
        replace(ASKED, expected=(429,)),
        replace(ANSWER, status=429, outputs=""),
    ],
    "not accepted, and not late yet": [PROMISED, ASKED],
    "nobody asked after the fault": [*WELL, Fault(2.0, "x", "begins"), Fault(3.0, "x", "ends")],
    "the next fault came first": [
        *WELL,
        Fault(2.0, "x", "begins"),
        Fault(3.0, "x", "ends"),
        Asked(3.1, "a/2", "a", "ref", 5.0),
        Fault(4.0, "x", "begins"),
        Fault(5.0, "x", "ends"),
        replace(ANSWER, id="a/2", at=5.5),
    ],
}


@pytest.mark.parametrize("history", ALLOWED.values(), ids=ALLOWED.keys())
def test_what_is_allowed_is_no_violation(history: list[Event]) -> None:
    assert [] == violated(*history)


@pytest.mark.parametrize(("what", "expected"), [("rss_bytes", ["I5"]), ("threads", ["I5"]), ("fds", ["I5"])])
def test_growth_is_a_violation_long_before_the_bound(what: str, expected: list[str]) -> None:
    """A leak shows over the life of one daemon, though every sample is within what is allowed."""
    promised = Promised(0.0, rss_bytes=10**9, threads=10**6, fds=10**6)
    steps = {"rss_bytes": 1_000_000, "threads": 1, "fds": 1}
    leaking: list[Event] = [promised]
    steady: list[Event] = [promised]
    for second in range(60):
        held = {"rss_bytes": 10**8, "threads": 5, "fds": 20}
        steady.append(Sampled(float(second), pid=7, **held))
        leaking.append(Sampled(float(second), pid=7, **{**held, what: held[what] + second * steps[what]}))

    assert expected == violated(*leaking)
    assert [] == violated(*steady)


def test_a_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    """The file holds everything the checker needs, to the last digit."""
    with History(tmp_path / "history.jsonl", recovery_s=2.0) as history:
        history.note(Asked, id="a/1", client="a", reference="ref", timeout_s=5.0, expected=(200, 429))
        history.note(Life, pid=7, what="ended", code=-9, expected=(-9,))

    assert history.events == list(read(tmp_path / "history.jsonl"))
