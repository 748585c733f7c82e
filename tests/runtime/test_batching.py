"""The planner: everything offered comes out once, in order, in time, and never more than may."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import QueueFull
from edge_sdk.runtime.batching import BatchPlanner, Plan, QueueLimits, pack, pack_alike
from edge_sdk.runtime.messages import DEFAULT_PRIORITY, Request
from edge_sdk.tasks.base import Payload


def request(
    ticket: int,
    *,
    received: float = 0.0,
    deadline: float = 100.0,
    size: int = 1,
    client: str = "",
    priority: int = DEFAULT_PRIORITY,
) -> Request:
    return Request(ticket, "m", Payload(bytes(size)), received, deadline, client=client, priority=priority)


def order_of(planner: BatchPlanner, now: float = 0.0) -> list[int]:
    """The tickets as they would be computed one by one."""
    tickets = []
    while plan := planner.take(now).batch:
        tickets += [each.ticket for each in plan]
    return tickets


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


def test_clients_take_turns() -> None:
    """One with a thousand requests delays another's only one by a single place; each one's own keep their order."""
    planner = BatchPlanner(batch=1, limits=QueueLimits(max_requests=2000))
    for ticket in range(1000):
        planner.offer(request(ticket, client="busy"), 0.0)
    planner.offer(request(1000, client="a"), 0.0)
    planner.offer(request(1001, client="b"), 0.0)
    order = order_of(planner)

    assert [0, 1000, 1001, 1] == order[:4]
    assert list(range(1000)) == [ticket for ticket in order if ticket < 1000]


def test_the_higher_priority_comes_first() -> None:
    planner = BatchPlanner(batch=1)
    for ticket, priority in enumerate((4, 0, 9, 4)):
        planner.offer(request(ticket, priority=priority), 0.0)

    assert [2, 0, 3, 1] == order_of(planner)


def test_nothing_waits_for_ever_behind_urgent_requests() -> None:
    """Each second of waiting is worth one level: after nine, the least urgent request is as urgent as any new one."""
    planner = BatchPlanner(batch=1)
    planner.offer(request(0, priority=0), 0.0)
    taken = []
    for second in range(12):
        planner.offer(request(100 + second, received=float(second), priority=9, client="urgent"), float(second))
        taken += [each.ticket for each in planner.take(float(second)).batch]

    assert [100 + second for second in range(9)] == taken[:9]
    assert 0 in taken[9:11]


def test_who_holds_the_most_of_a_full_queue_makes_room() -> None:
    """Its newest and least urgent request is answered 429; only whoever holds the most is refused."""
    planner = BatchPlanner(batch=1, limits=QueueLimits(max_requests=4))
    for ticket, priority in enumerate((4, 4, 1, 4)):
        planner.offer(request(ticket, client="greedy", priority=priority), 0.0)
    (displaced,) = planner.offer(request(10, client="modest"), 0.0)

    assert (2, 429) == (displaced.ticket, displaced.status)
    with pytest.raises(QueueFull):
        planner.offer(request(4, client="greedy"), 0.0)
    assert [3] == [answer.ticket for answer in planner.offer(request(11, client="modest"), 0.0)]
    with pytest.raises(QueueFull):  # now both hold two
        planner.offer(request(12, client="modest"), 0.0)
    assert {0, 1, 10, 11} == {each.ticket for each in planner.clear()}


def test_room_in_bytes_is_shared_too() -> None:
    planner = BatchPlanner(batch=1, limits=QueueLimits(max_bytes=100))
    for ticket in range(9):
        planner.offer(request(ticket, client="greedy", size=10), 0.0)
    displaced = planner.offer(request(10, client="modest", size=30), 0.0)

    assert [8, 7] == [answer.ticket for answer in displaced]
    with pytest.raises(QueueFull):
        planner.offer(request(11, client="modest", size=60), 0.0)
    with pytest.raises(QueueFull):
        planner.offer(request(12, client="huge", size=101), 0.0)


def test_the_newest_wins_where_that_is_wanted() -> None:
    """Of each client one request waits; those it overtook are told, and not asked to come again."""
    planner = BatchPlanner(batch=4, newest_wins=True)
    assert [] == planner.offer(request(1, client="camera"), 0.0)
    assert [] == planner.offer(request(2, client="other"), 0.0)
    (overtaken,) = planner.offer(request(3, client="camera", priority=9), 0.0)

    assert (1, 429) == (overtaken.ticket, overtaken.status)
    assert isinstance(overtaken.result, QueueFull)
    assert not overtaken.result.retryable
    assert {2, 3} == {each.ticket for each in planner.take(0.0).batch}


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(1, 40), st.integers(0, 3)), max_size=40),
    st.booleans(),
)
def test_nothing_is_lost_and_no_bound_broken(offers: list[tuple[str, int, int, int]], newest_wins: bool) -> None:
    """Every request is refused, displaced, expired or computed, exactly once; the queue stays within its limits, and
    among a client's requests of one priority the order is kept."""
    planner = BatchPlanner(batch=3, limits=QueueLimits(max_requests=6, max_bytes=100), newest_wins=newest_wins)
    ended: list[int] = []
    computed: list[Request] = []
    for ticket, (client, priority, size, patience) in enumerate(offers):
        now = float(ticket) / 4
        one = request(ticket, received=now, deadline=now + patience, size=size, client=client, priority=priority)
        try:
            ended += [answer.ticket for answer in planner.offer(one, now)]
        except QueueFull:
            ended.append(ticket)
        assert len(planner) <= 6
        if ticket % 5 == 4:
            plan = planner.take(now)
            computed += plan.batch
            ended += [each.ticket for each in (*plan.batch, *plan.expired)]
        if ticket % 7 == 6:
            ended += [each.ticket for each in planner.expire(now).expired]
    ended += [each.ticket for each in planner.clear()]

    assert list(range(len(offers))) == sorted(ended)
    assert (0, None) == (len(planner), planner.wake_at(0.0))
    for flow in {(each.client, each.priority) for each in computed}:
        tickets = [each.ticket for each in computed if (each.client, each.priority) == flow]
        assert sorted(tickets) == tickets


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


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), max_size=20), st.integers(1, 5))
def test_only_what_is_alike_is_packed_together(requests: list[tuple[str, int]], max_rows: int) -> None:
    """Every index once; a group has one shape, and of each shape the groups are those that it would have alone."""
    shapes, rows = [shape for shape, _ in requests], [count for _, count in requests]
    groups = pack_alike(shapes, rows, max_rows)

    assert list(range(len(rows))) == sorted(index for group in groups for index in group)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    for shape in set(shapes):
        indices = [index for index, other in enumerate(shapes) if other == shape]
        alone = [[indices[place] for place in group] for group in pack([rows[i] for i in indices], max_rows)]
        assert alone == [group for group in groups if shapes[group[0]] == shape]


def paced(*, each_s: float, **settings: Any) -> BatchPlanner:
    """One that has learned what a request takes."""
    planner = BatchPlanner(1, **settings)
    for _ in range(200):
        planner.computed(1, each_s)
    return planner


def test_who_would_wait_for_most_of_his_life_is_told_at_once() -> None:
    """Of requests with two seconds to live, as many wait as can be computed in 1.6 s; the next hears when to come."""
    planner = paced(each_s=0.1)
    for ticket in range(17):
        planner.offer(request(ticket, deadline=2.0), 0.0)
    with pytest.raises(QueueFull) as told:
        planner.offer(request(17, deadline=2.0), 0.0)

    assert 100 == told.value.retry_after_ms
    assert [] == planner.offer(request(18, deadline=3.0), 0.0)  # who has more time may wait
    assert [] == planner.offer(request(19, deadline=2.0, priority=9), 0.0)  # who comes first does not wait
    assert [] == planner.offer(request(20, deadline=2.0, client="another"), 0.0)  # whose turn comes after one


def test_nobody_is_turned_away_by_a_guess_or_alone() -> None:
    """Before anything was computed nobody knows how long it takes; and an empty queue is waited for by nobody."""
    planner = BatchPlanner(1)
    for ticket in range(50):
        planner.offer(request(ticket, deadline=0.1), 0.0)
    slow = paced(each_s=60.0)
    slow.offer(request(1, deadline=0.1), 0.0)

    assert 50 == len(planner)
    assert 1 == len(slow)


def test_the_newest_of_a_stream_takes_the_place_of_the_last() -> None:
    """However slow the model: it waits no longer than the one that leaves."""
    planner = paced(each_s=60.0, newest_wins=True)
    planner.offer(request(1, deadline=1.0), 0.0)

    assert [1] == [answer.ticket for answer in planner.offer(request(2, deadline=1.0), 0.0)]


def test_the_late_are_told_so_and_not_to_come_later() -> None:
    """A request whose time is over when it comes gets its 408, as any other that expires."""
    planner = paced(each_s=1.0)
    planner.offer(request(1, deadline=5.0), 0.0)
    planner.offer(request(2, deadline=0.0), 0.0)

    assert [2] == [late.ticket for late in planner.expire(0.0).expired]
