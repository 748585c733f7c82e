"""The invariants, decided from a history alone: pure, no clock, no process.

    report = check(read(path))
    report.kept                     # whether all of them hold
    print(report)                   # counts, and each violation with its moment

I1  every request got exactly one answer that ends it, in time
I2  every answer is the reference's for that input, or an error that the question allows
I3  no answer reached another client
I4  a second message for one id comes only after a kill, a lost connection or a resend, and has the same bytes
I5  memory, threads, descriptors and disk are bounded
I6  after a fault ends, answers come again in time
I7  availability says what is the case, in time
I8  every daemon ended with the code it should, and its log holds nothing that is a defect
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.faults.history import (
    Accepted,
    Answered,
    Asked,
    Availability,
    Event,
    Fault,
    Life,
    Link,
    Promised,
    Said,
    Sampled,
    SentAgain,
)

INVARIANTS = ("I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8")

LATE_S = 1.0
"""A deadline is the client's; what its thread needs to say so is not held against anybody."""
WARM_S = 3.0
"""A daemon's first seconds are loading, and say nothing about growth."""
GROWTH_BYTES = 16_000_000
"""What the resident size of one daemon may grow by in any case: arenas, caches, a queue that was full once."""
FEWEST_SAMPLES = 20
"""Growth is judged over a daemon's life from this many samples on."""


@dataclass(frozen=True)
class Violation:
    invariant: str
    at: float
    text: str

    def __str__(self) -> str:
        return f"{self.invariant} at {self.at:.3f} s: {self.text}"


@dataclass(frozen=True)
class Report:
    """What a history shows."""

    violations: tuple[Violation, ...]
    counts: dict[str, int]
    slowest_recovery_s: float
    """From the end of a fault to the next answer."""
    slowest_answer_s: float
    most: Sampled | None
    """The most of each resource that was seen."""
    lasted_s: float

    @property
    def kept(self) -> bool:
        return not self.violations

    def of(self, invariant: str) -> list[Violation]:
        """The violations of one invariant."""
        return [violation for violation in self.violations if violation.invariant == invariant]

    def __str__(self) -> str:
        lines = [
            f"{self.lasted_s:.1f} s: " + ", ".join(f"{count} {what}" for what, count in self.counts.items()),
            f"slowest answer {self.slowest_answer_s:.2f} s, slowest recovery {self.slowest_recovery_s:.2f} s",
        ]
        if self.most is not None:
            lines.append(
                f"at most {self.most.rss_bytes / 1e6:.0f} MB resident, {self.most.threads} threads, "
                f"{self.most.fds} descriptors, {self.most.disk_bytes} bytes of disk"
            )
        for invariant in INVARIANTS:
            found = self.of(invariant)
            lines.append(f"{invariant} {'holds' if not found else f'is violated {len(found)} times'}")
            lines += [f"   {violation}" for violation in found[:20]]
        return "\n".join(lines)


@dataclass
class _Request:
    """Everything about one id."""

    asked: Asked
    answers: list[Answered] = field(default_factory=list)
    sent_again: list[float] = field(default_factory=list)
    accepted_at: float | None = None


def check(events: Iterable[Event]) -> Report:
    """Decide all eight. The first event says what was promised; without it, the defaults of Promised hold."""
    story = sorted(events, key=lambda event: event.at)
    promised = next((event for event in story if isinstance(event, Promised)), Promised(0.0))
    requests, strays = _gather(story)
    end = story[-1].at if story else 0.0
    violations = [
        *_one_answer(requests, end),
        *_right_answers(requests),
        *strays,
        *_duplicates(requests, story),
        *_bounds(story, promised),
        *_recovery(story, requests, promised, end),
        *_availability(story, promised, end),
        *_ends(story),
    ]
    return Report(
        tuple(sorted(violations, key=lambda violation: (violation.invariant, violation.at))),
        _counts(story, requests),
        max(_recoveries(story).values(), default=0.0),
        max((r.answers[0].at - r.asked.at for r in requests.values() if r.answers), default=0.0),
        _most(story),
        end,
    )


def _gather(story: list[Event]) -> tuple[dict[str, _Request], list[Violation]]:
    """Requests by id, and I3: answers that somebody else asked for, or nobody."""
    requests: dict[str, _Request] = {}
    strays: list[Violation] = []
    for event in story:
        if isinstance(event, Asked):
            if event.id in requests:
                strays.append(Violation("I3", event.at, f"{event.client} used the id {event.id} twice"))
            else:
                requests[event.id] = _Request(event)
        elif isinstance(event, SentAgain) and event.id in requests:
            requests[event.id].sent_again.append(event.at)
        elif isinstance(event, Accepted) and event.id in requests:
            if event.code < 0x80 and requests[event.id].accepted_at is None:
                requests[event.id].accepted_at = event.at
        elif isinstance(event, Answered):
            request = requests.get(event.id)
            if request is None:
                strays.append(Violation("I3", event.at, f"{event.client} heard {event.id!r}, which nobody asked"))
            elif request.asked.client != event.client:
                strays.append(
                    Violation("I3", event.at, f"{event.client} heard {event.id}, which {request.asked.client} asked")
                )
            else:
                request.answers.append(event)
    return requests, strays


def _one_answer(requests: dict[str, _Request], end: float) -> Iterable[Violation]:
    """I1. Of messages on the wire a repetition is I4's affair; the caller of a client library sees no repetition."""
    for request in requests.values():
        asked = request.asked
        due = asked.at + asked.timeout_s + LATE_S
        if not request.answers:
            if end >= due:
                taken = "never accepted" if request.accepted_at is None else f"accepted at {request.accepted_at:.3f}"
                yield Violation("I1", due, f"{asked.id} of {asked.client} got no answer; {taken}")
            elif request.accepted_at is not None:
                yield Violation("I1", end, f"the history ends, and {asked.id} was accepted and is not answered")
            continue
        first = request.answers[0]
        if first.at > due:
            yield Violation("I1", first.at, f"{asked.id} was answered {first.at - due + LATE_S:.2f} s too late")
        visible = [answer for answer in request.answers if not answer.on_wire]
        if len(visible) > 1:
            yield Violation("I1", visible[1].at, f"{asked.id} ended {len(visible)} times for its caller")


def _right_answers(requests: dict[str, _Request]) -> Iterable[Violation]:
    """I2."""
    for request in requests.values():
        for answer in request.answers:
            if answer.status not in request.asked.expected:
                allowed = " or ".join(map(str, request.asked.expected))
                yield Violation(
                    "I2", answer.at, f"{answer.id} got {answer.status} instead of {allowed}. {answer.detail}".rstrip()
                )
            elif answer.status == 200 and answer.outputs != request.asked.reference:
                yield Violation("I2", answer.at, f"{answer.id} got another result than the reference's")


def _duplicates(requests: dict[str, _Request], story: list[Event]) -> Iterable[Violation]:
    """I4."""
    breaks = _breaks(story)
    for request in requests.values():
        seen = [answer for answer in request.answers if answer.on_wire]
        for earlier, later in itertools.pairwise(seen):
            broken = any(begin <= later.at and end >= request.asked.at for begin, end in breaks)
            if not broken and not request.sent_again:
                yield Violation("I4", later.at, f"{later.id} was answered again, though nothing had gone wrong")
            if earlier.body != later.body:
                yield Violation("I4", later.at, f"{later.id} was answered again, with other bytes")


def _breaks(story: list[Event]) -> list[tuple[float, float]]:
    """When something was wrong: faults from their beginning to their end, and moments at which a connection ended."""
    breaks: list[tuple[float, float]] = []
    begun: dict[str, float] = {}
    for event in story:
        if isinstance(event, Fault) and event.phase == "begins":
            begun[event.name] = event.at
        elif isinstance(event, Fault):
            breaks.append((begun.pop(event.name, event.at), event.at))
        elif isinstance(event, Life) or (isinstance(event, Link) and not event.up):
            breaks.append((event.at, event.at))
    return [*breaks, *((at, float("inf")) for at in begun.values())]


def _bounds(story: list[Event], promised: Promised) -> Iterable[Violation]:
    """I5: never more than promised, and no growth over the life of one daemon."""
    samples: dict[int, list[Sampled]] = defaultdict(list)
    for event in story:
        if isinstance(event, Sampled):
            samples[event.pid].append(event)
            for what in ("rss_bytes", "threads", "fds", "disk_bytes"):
                if (found := getattr(event, what)) > (allowed := getattr(promised, what)):
                    yield Violation("I5", event.at, f"{what} of {event.pid} is {found:,}; {allowed:,} is allowed")
    for pid, taken in samples.items():
        warm = [sample for sample in taken if sample.at >= taken[0].at + WARM_S]
        if len(warm) < FEWEST_SAMPLES:
            continue
        fifth = len(warm) // 5
        before, after = warm[:fifth], warm[-fifth:]
        least, now = min(sample.rss_bytes for sample in before), min(sample.rss_bytes for sample in after)
        if now > least * (1 + promised.rss_growth) + GROWTH_BYTES:
            yield Violation("I5", after[0].at, f"{pid} grew from {least / 1e6:.0f} to {now / 1e6:.0f} MB")
        for what, spare in (("threads", 1), ("fds", 2)):
            first = max(getattr(sample, what) for sample in before)
            last = min(getattr(sample, what) for sample in after)
            if last > first + spare:
                yield Violation("I5", after[0].at, f"{what} of {pid} grew from {first} to {last}")


def _recoveries(story: list[Event]) -> dict[float, float]:
    """When each fault ended -> how long until the next good answer; only where no other fault came first."""
    good = [event.at for event in story if isinstance(event, Answered) and event.status == 200]
    begins = [event.at for event in story if isinstance(event, Fault) and event.phase == "begins"]
    recoveries = {}
    for event in story:
        if isinstance(event, Fault) and event.phase == "ends":
            following = bisect_left(good, event.at)
            next_fault = bisect_left(begins, event.at)
            answered_at = good[following] if following < len(good) else float("inf")
            if next_fault == len(begins) or begins[next_fault] > answered_at:
                recoveries[event.at] = answered_at - event.at
    return {at: took for at, took in recoveries.items() if took != float("inf")}


def _recovery(story: list[Event], requests: dict[str, _Request], promised: Promised, end: float) -> Iterable[Violation]:
    """I6. A fault is judged if nothing else went wrong for `recovery_s` after it, and somebody waited for an answer."""
    recoveries = _recoveries(story)
    begins = [event.at for event in story if isinstance(event, Fault) and event.phase == "begins"]
    spans = [(request.asked.at, request.answers[0].at if request.answers else end) for request in requests.values()]
    for event in story:
        if not isinstance(event, Fault) or event.phase != "ends":
            continue
        due = event.at + promised.recovery_s
        took = recoveries.get(event.at)
        if end < due or (took is not None and took <= promised.recovery_s):
            continue
        left_alone = not any(event.at <= at < due for at in begins)
        if left_alone and any(asked < due and answered > event.at for asked, answered in spans):
            text = "none at all" if took is None else f"the first after {took:.2f} s"
            yield Violation("I6", due, f"after `{event.name}`, answers within {promised.recovery_s:g} s: {text}")


def _availability(story: list[Event], promised: Promised, end: float) -> Iterable[Violation]:
    """I7: what was said last, `availability_s` after a daemon came or went for good."""
    lives = [event for event in story if isinstance(event, Life)]
    told = [event for event in story if isinstance(event, Availability)]
    disturbed = [event.at for event in story if isinstance(event, (Life, Fault))]
    for life in lives:
        due = life.at + promised.availability_s
        if not told or end < due or any(life.at < at < due for at in disturbed):
            continue
        heard = [event.payload for event in told if event.at <= due]
        right = "online" if life.what == "started" else "offline"
        if not heard or heard[-1] != right:
            said = heard[-1] if heard else "nothing"
            yield Violation("I7", due, f"the daemon {life.what} at {life.at:.3f}, and availability is {said}")


def _ends(story: list[Event]) -> Iterable[Violation]:
    """I8."""
    for event in story:
        if isinstance(event, Life) and event.what == "ended" and event.code not in event.expected:
            right = " or ".join(map(str, event.expected)) or "not to end"
            yield Violation("I8", event.at, f"the daemon {event.pid} ended with {event.code}; expected was {right}")
        elif isinstance(event, Said):
            yield Violation("I8", event.at, f"the log says: {event.line}")


def _counts(story: list[Event], requests: dict[str, _Request]) -> dict[str, int]:
    kinds = Counter(type(event) for event in story)
    faults = Counter(event.name for event in story if isinstance(event, Fault) and event.phase == "begins")
    return {
        "requests": len(requests),
        "accepted on the wire": sum(request.accepted_at is not None for request in requests.values()),
        "answered": sum(bool(request.answers) for request in requests.values()),
        "sent again": kinds[SentAgain],
        "answered again": sum(max(0, len(request.answers) - 1) for request in requests.values()),
        "clients": len({request.asked.client for request in requests.values()}),
        "daemons": sum(isinstance(event, Life) and event.what == "started" for event in story),
        **{f"x {name}": count for name, count in faults.items()},
    }


def _most(story: list[Event]) -> Sampled | None:
    samples = [event for event in story if isinstance(event, Sampled)]
    if not samples:
        return None
    return Sampled(
        at=0.0,
        pid=0,
        rss_bytes=max(sample.rss_bytes for sample in samples),
        threads=max(sample.threads for sample in samples),
        fds=max(sample.fds for sample in samples),
        disk_bytes=max(sample.disk_bytes for sample in samples),
    )
