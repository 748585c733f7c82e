"""Who may stay in memory: the books, without a model or a clock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import host
from edge_sdk.errors import OutOfMemory
from edge_sdk.profiles import load_profile
from edge_sdk.runtime.memory import MIN_TURN_S, Books, Estimate, Tenant, budget_for

MB = 1_000_000


def key(number: int) -> tuple[str, str]:
    return f"m{number}", "1"


class Box:
    """Books and who is really there, brought in and sent away as the loader does."""

    def __init__(self, budget_bytes: int | None) -> None:
        self.books = Books(budget_bytes)
        self.there: dict[tuple[str, str], float] = {}  # -> since
        self.used: dict[tuple[str, str], float] = {}
        self.wanted: set[tuple[str, str]] = set()
        self.pinned: set[tuple[str, str]] = set()
        self.real: dict[tuple[str, str], int] = {}
        self.gone: list[tuple[str, str]] = []

    def tenants(self) -> list[Tenant]:
        return [
            Tenant(one, self.used[one], since, wanted=one in self.wanted, pinned=one in self.pinned)
            for one, since in self.there.items()
        ]

    def send_away(self, victims: tuple[Tenant, ...]) -> None:
        for tenant in victims:
            assert tenant.key not in self.pinned
            del self.there[tenant.key]
            self.gone.append(tenant.key)
            self.books.leave(tenant.key, evicted=True)

    def bring(self, number: int, declared: int, real: int, now: float) -> bool:
        """Whether it is in memory afterwards."""
        one = key(number)
        self.books.declare(one, Estimate(declared))
        try:
            self.books.check(one)
        except OutOfMemory:
            return False
        victims = self.books.make_room(one, self.tenants(), now)
        if victims is None:
            return False
        self.send_away(victims)
        self.books.arrive(one)
        self.books.settle(one, real, 0.01)
        victims = self.books.overflow(one, self.tenants(), now)
        fits = self.books.budget_bytes is None or self.books.account(one).booked_bytes <= self.books.budget_bytes  # type: ignore[union-attr]
        if victims is None or not fits:
            self.books.abandon(one)
            return False
        self.send_away(victims)
        self.there[one], self.used[one] = now, now
        return True


Steps = st.lists(
    st.tuples(
        st.integers(0, 7), st.integers(1, 60), st.integers(1, 90), st.sampled_from(["use", "want", "rest", "pin"])
    ),
    max_size=60,
)


@given(Steps, st.integers(20, 200))
def test_never_above_the_budget_and_never_somebody_in_use(steps: list[tuple[int, int, int, str]], budget: int) -> None:
    """Whatever comes, wants and takes more than it said: what is held stays within the budget, those that are in use
    stay for their turn, pinned ones for good, and the books hold what is there."""
    box = Box(budget)
    now = 0.0
    for number, declared, real, act in steps:
        now += 0.1
        one = key(number)
        if one not in box.there:
            before = {other for other in box.there if other in box.wanted and now - box.there[other] < MIN_TURN_S}
            box.bring(number, declared, real, now)

            assert before <= box.there.keys()
        if one in box.there:
            box.used[one] = now
            if act == "want":
                box.wanted.add(one)
            elif act == "rest":
                box.wanted.discard(one)
            elif act == "pin":
                box.pinned.add(one)

        assert box.books.held_bytes <= budget
        held = {other for other in map(key, range(8)) if (a := box.books.account(other)) and a.held_bytes}
        assert held == box.there.keys()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_who_goes_was_used_longest_ago(asked: list[int]) -> None:
    """With models of one size and nobody in use, the books evict as a cache of the last four would."""
    box = Box(30 + Estimate(10).loading_bytes)
    expected: list[int] = []
    for now, number in enumerate(asked):
        if key(number) not in box.there:
            assert box.bring(number, 10, 10, float(now))
        box.used[key(number)] = float(now)
        expected = [*[other for other in expected if other != number][-3:], number]

        assert {key(other) for other in expected} == box.there.keys()


def test_room_is_kept_for_the_load_itself() -> None:
    """A runtime holds the file beside what it makes of it: room for that is made too, as far as the budget goes."""
    box = Box(100)
    for number in range(3):
        assert box.bring(number, 20, 20, float(number))

    assert box.bring(3, 20, 20, 3.0), "60 are held, 45 are needed for a moment"
    assert [key(0)] == box.gone
    assert box.bring(4, 90, 90, 4.0), "which alone would need 202"
    assert {key(4)} == box.there.keys()


def test_what_was_measured_counts_the_next_time() -> None:
    """A model that takes more than it says sends others away as soon as that is known, and is believed no more."""
    box = Box(100)
    assert box.bring(0, 30, 30, 0.0)
    assert box.bring(1, 10, 80, 1.0)

    assert {key(1)} == box.there.keys()
    assert 80 == box.books.held_bytes
    box.wanted.add(key(1))
    assert not box.bring(0, 30, 30, 1.1)
    assert 80 == box.books.held_bytes


def test_a_measurement_that_was_disturbed_is_not_believed() -> None:
    """A model takes half of its graph's size at least, whatever the process seems to have grown by."""
    books = Books(100)
    books.declare(key(0), Estimate(40))
    books.arrive(key(0))
    books.settle(key(0), -3, 0.1)

    assert 20 == books.held_bytes


def test_what_can_never_fit_is_refused_with_the_sum() -> None:
    """The reason names what it needs, for what, and what there is."""
    books = Books(100 * MB)
    books.declare(key(0), Estimate(80 * MB, 10 * MB, 40 * MB))

    with pytest.raises(
        OutOfMemory, match=r"130,000,000 bytes \(80,000,000 for its graph.*may use 100,000,000"
    ) as caught:
        books.check(key(0))
    assert not caught.value.retryable


def test_those_in_use_take_turns() -> None:
    """Where more are wanted than fit, one that had its turn goes, of ten times what a load takes; before, nobody."""
    box = Box(30)
    assert box.bring(0, 20, 20, 0.0)
    box.wanted.add(key(0))

    assert not box.bring(1, 20, 20, MIN_TURN_S - 0.01)
    assert box.bring(1, 20, 20, MIN_TURN_S)
    assert [key(0)] == box.gone
    assert 1 == box.books.evictions


def test_without_a_budget_everybody_stays() -> None:
    """None: whatever they like."""
    box = Box(None)

    assert all(box.bring(number, 1 << 40, 1 << 40, float(number)) for number in range(8))
    assert 8 == len(box.there)


@pytest.mark.parametrize(
    ("profile", "machine", "limit", "own", "expected"),
    [
        ("cpu-x86", 1000 * MB, None, 50 * MB, 750 * MB),
        ("cpu-x86", 1000 * MB, 500 * MB, 50 * MB, 350 * MB),
        ("raspberry-pi-5", 2000 * MB, None, 0, 1400 * MB),
        ("desktop-rtx-30", 1000 * MB, None, 0, 800 * MB),
        ("cpu-x86", 1000 * MB, 50 * MB, 80 * MB, 0),
        ("cpu-x86", 0, None, 0, None),
        (None, 1000 * MB, None, 0, 800 * MB),
    ],
)
def test_the_budget_follows_from_the_machine(
    profile: str | None, machine: int, limit: int | None, own: int, expected: int | None
) -> None:
    """The profile's share of what there is, a control group's limit included, less what the daemon holds itself."""
    found = budget_for(
        load_profile(profile) if profile is not None else None,
        machine_bytes=machine,
        limit_bytes=limit,
        own_bytes=own,
    )

    assert expected == found


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/system.slice/edge.service\n", {"system.slice/edge.service/memory.max": "400\n"}, 400),
        ("0::/a/b\n", {"a/memory.max": "300\n", "a/b/memory.max": "max\n"}, 300),
        ("0::/\n", {"memory.max": "200\n"}, 200),
        ("0::/of/the/host\n", {"memory.max": "250\n"}, 250),
        ("4:memory:/docker/x\n0::/\n", {"memory/docker/x/memory.limit_in_bytes": "100\n"}, 100),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("0::/\n", {}, None),
        ("", {}, None),
    ],
)
def test_limits_of_control_groups_are_found(
    tmp_path: Path, groups: str, limits: dict[str, str], expected: int | None
) -> None:
    """Version 2 and 1, the group's own or one above it, in a container or outside."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in limits.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    assert expected == host.limit_bytes(tmp_path)


def test_memory_of_this_process_can_be_read() -> None:
    """What the kernel says of us: more than the libraries alone, less than the machine has."""

    assert 0 < host.private_bytes() < host.resident_bytes()
    host.trim()


def test_what_replaces_itself_may_not_fit_twice() -> None:
    """Beside what it holds, if everybody left who may: one that is pinned does not."""
    books = Books(100 * MB)
    for number, size in ((1, 40), (2, 30)):
        books.declare(key(number), Estimate(size * MB))
        books.arrive(key(number))
        books.settle(key(number), size * MB, 0.1)
    other = Tenant(key(2), 0.0, 0.0)

    assert books.fits_beside(key(1), [other])
    assert not books.fits_beside(key(1), [replace(other, pinned=True)])
    books.leave(key(1))
    assert books.fits_beside(key(1), [replace(other, pinned=True)]), "it holds nothing"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"sys/fs/cgroup/a.service/memory.events": "oom 3\noom_kill 2\n", "proc/vmstat": "oom_kill 9\n"}, 2),
        ({"sys/fs/cgroup/unified/a.service/memory.events": "oom_kill 1\n"}, 1),
        ({"proc/vmstat": "pgpgin 5\noom_kill 9\nnr_free 1\n"}, 9),
        ({}, 0),
    ],
    ids=["own group", "both versions", "machine", "nothing"],
)
def test_what_the_kernel_killed_for_memory(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    """Of our own control group, where it counts; else of the whole machine."""
    for name, text in {"proc/self/cgroup": "0::/a.service\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert expected == host.memory_kills(tmp_path)
