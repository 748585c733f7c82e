"""The planner: everything offered comes out once, in order, in time, and never more than may."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import QueueFull
from edge_sdk.runtime.batching import BatchPlanner, Plan, QueueLimits, pack
from edge_sdk.runtime.messages import Request
from edge_sdk.tasks.base import Payload


def request(ticket: int, *, received: float = 0.0, deadline: float = 100.0, size: int = 1) -> Request:
    return Request(ticket, "m", Payload(bytes(size)), received, deadline)


@given(
    batch=st.integers(1, 5),
    max_wait_s=st.sampled_from([0.0, 1.0, 3.0]),
    arrivals=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=30),  # pause before, patience
)
def test_everything_comes_out_once_and_in_time(batch: int, max_wait_s: float, arrivals: list[Any]) -> None:
    """Driven by `wake_at` alone: each request is taken once, in order, batched or expired as its deadline says, never
    more together than `batch`, and never earlier or later than `wake_at` promised."""
    planner = BatchPlanner(batch, max_wait_s)
    taken: list[Request] = []

    def take_until(now: float) -> None:
        """What a shell does that asks only when it was told to."""
        clock = moment
        while (wake_at := planner.wake_at(clock)) is not None and wake_at <= now:
            if wake_at > clock:
                assert Plan() == planner.take(clock)
                assert Plan() == planner.take((clock + wake_at) / 2)
            plan = planner.take(wake_at)
            assert plan.batch or plan.expired
            assert len(plan.batch) <= batch
            assert all(each.deadline > wake_at for each in plan.batch)
            assert all(each.deadline <= wake_at for each in plan.expired)
            assert all(wake_at <= each.received + max_wait_s or len(plan.batch) == batch for each in plan.batch[:1])
            taken.extend(sorted((*plan.batch, *plan.expired), key=lambda each: each.ticket))
            clock = wake_at

    moment = 0.0
    offered = []
    for ticket, (pause, patience) in enumerate(arrivals):
        later = moment + pause
        take_until(later - 0.5)  # arrivals come at whole seconds
        moment = later
        offered.append(request(ticket, received=moment, deadline=moment + patience))
        planner.offer(offered[-1], moment)
    take_until(1e9)

    assert offered == taken
    assert (0, None) == (len(planner), planner.wake_at(moment))


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(0, 9))
def test_expire_takes_only_what_is_too_late(deadlines: list[int], now: int) -> None:
    """While nothing can be computed, what passed its deadline leaves and the rest keeps its order and its room."""
    planner = BatchPlanner(batch=100, limits=QueueLimits(max_bytes=20))
    waiting = [request(ticket, deadline=float(deadline)) for ticket, deadline in enumerate(deadlines)]
    for each in waiting:
        planner.offer(each, 0.0)
    plan = planner.expire(float(now))

    assert () == plan.batch
    assert [each for each in waiting if each.deadline <= now] == list(plan.expired)
    kept = [each for each in waiting if each.deadline > now]
    more = [request(100 + n) for n in range(20 - len(kept))]
    for each in more:
        planner.offer(each, 0.0)
    with pytest.raises(QueueFull):
        planner.offer(request(200), 0.0)
    assert (*kept, *more) == planner.clear()


def test_a_full_batch_does_not_wait() -> None:
    """Company is waited for only while a place is free."""
    planner = BatchPlanner(batch=2, max_wait_s=5.0)
    planner.offer(request(1, received=10.0), 10.0)

    assert (15.0, Plan()) == (planner.wake_at(10.0), planner.take(14.9))

    planner.offer(request(2, received=11.0), 11.0)

    assert 11.0 == planner.wake_at(11.0)
    assert [1, 2] == [each.ticket for each in planner.take(11.0).batch]


def test_expired_requests_leave_their_places_to_others() -> None:
    """No time is spent on them, and the batch is filled with those behind."""
    planner = BatchPlanner(batch=2)
    for ticket, deadline in enumerate((1.0, 9.0, 2.0, 9.0, 9.0)):
        planner.offer(request(ticket, deadline=deadline), 0.0)
    plan = planner.take(5.0)

    assert [1, 3] == [each.ticket for each in plan.batch]
    assert [0, 2] == [each.ticket for each in plan.expired]


@pytest.mark.parametrize("limits", [QueueLimits(max_requests=2), QueueLimits(max_bytes=10)])
def test_a_full_queue_says_when_to_come_back(limits: QueueLimits) -> None:
    """QueueFull names the time what waits will take, as it was measured; nothing is lost, and room comes back."""
    planner = BatchPlanner(batch=1, limits=limits)
    for _ in range(200):
        planner.computed(4, 2.0)  # half a second each
    for ticket in (1, 2):
        planner.offer(request(ticket, size=5), 0.0)
    with pytest.raises(QueueFull, match="2 requests waiting") as caught:
        planner.offer(request(3, size=5), 0.0)

    assert 1000 == caught.value.retry_after_ms
    planner.take(0.0)
    planner.offer(request(4, size=5), 0.0)
    assert [2, 4] == [each.ticket for each in planner.clear()]
    assert (0, 1) == (len(planner), planner.backlog_ms())


@given(st.lists(st.integers(0, 6), max_size=20), st.integers(1, 5))
def test_pack_partitions_in_order(rows: list[int], max_rows: int) -> None:
    """Every index once and in order; a group fits a batch, or is one request; and no two neighbours would fit one."""
    groups = pack(rows, max_rows)

    assert list(range(len(rows))) == [index for group in groups for index in group]
    for group in groups:
        assert len(group) == 1 or (sum(rows[i] for i in group) <= max_rows and all(rows[i] for i in group))
    for one, next_one in itertools.pairwise(groups):
        together = [rows[i] for i in (*one, next_one[0])]
        assert sum(together) > max_rows or 0 in together
