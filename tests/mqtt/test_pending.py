"""The client's decisions, with the time passed in: no socket, no thread, no waiting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import BrokerError, EdgeSdkError, NoAnswer, QueueFull
from edge_sdk.mqtt.pending import FIRST_RESEND_S, SETTLE_S, Fail, PendingRequest, PendingRequests, Send
from edge_sdk.mqtt.transports.base import NO_MATCHING_SUBSCRIBERS


def table(window: int = 64, **more: object) -> PendingRequests:
    """A connected table whose jitter adds nothing."""
    pending = PendingRequests(**{"chance": lambda: 0.5, "first_key": 1, **more})  # type: ignore[arg-type]
    pending.subscribed_to_availability(-SETTLE_S)
    pending.connected(window)
    return pending


def perform(pending: PendingRequests, now: float) -> tuple[list[PendingRequest], list[EdgeSdkError]]:
    """Do what is due: what was sent (under its key as a handle), and what failed."""
    sent, failed = [], []
    for action in pending.due(now):
        if isinstance(action, Send):
            pending.sent(action.request, action.request.key)
            sent.append(action.request)
        else:
            failed.append(action.error)
    return sent, failed


def test_the_window_is_kept() -> None:
    """No more than the window is unacknowledged; each acknowledgement lets one follow."""
    pending = table(window=2)
    requests = [pending.add("dev", "m", deadline=30, now=0) for _ in range(4)]

    first, _ = perform(pending, 0)
    nothing, _ = perform(pending, 0)
    pending.acknowledged(requests[0].key, 0, 0)
    second, _ = perform(pending, 0)

    assert (requests[:2], [], requests[2:3]) == (first, nothing, second)


def test_each_table_has_keys_of_its_own() -> None:
    """Two clients in turn under one name do not ask under the same keys; a key, and many after it, fits 8 bytes."""
    first, second = (PendingRequests().add("dev", "m", deadline=1, now=0).key for _ in range(2))
    keys = [pending.add("dev", "m", deadline=1, now=0).key for pending in [table(first_key=2**62 - 1)] for _ in "ab"]

    assert first != second
    assert [2**62 - 1, 2**62] == keys


def test_an_unanswered_request_is_sent_again_ever_more_rarely() -> None:
    """After 3 s, then 6, then 12, and every 15 from then on."""
    pending = table()
    request = pending.add("dev", "m", deadline=60, now=0)
    times: list[float] = []

    for tenth in range(600):
        now = tenth / 10
        for each in perform(pending, now)[0]:
            times.append(now)
            pending.acknowledged(each.key, 0, now)

    assert [0, FIRST_RESEND_S, 3 * FIRST_RESEND_S, 7 * FIRST_RESEND_S, 36, 51] == times
    assert 6 == request.sends


def test_a_reconnect_sends_everything_again() -> None:
    """Acknowledged or not: what has no answer goes out once more, under its key."""
    pending = table()
    requests = [pending.add("dev", "m", deadline=30, now=0) for _ in range(3)]
    perform(pending, 0)
    pending.acknowledged(requests[0].key, 0, 0)
    pending.answered(requests[2].key)

    pending.disconnected()
    while_away, _ = perform(pending, 1)
    pending.connected(64)
    again, _ = perform(pending, 2)

    assert ([], requests[:2]) == (while_away, again)
    assert [2, 2] == [request.sends for request in again]


def test_the_deadline_ends_everything() -> None:
    """Sent or not, acknowledged or not, connected or not: at the deadline there is an error that says which."""
    pending = table(window=2)
    accepted, sent, waiting = (pending.add("dev", "m", deadline=5, now=0) for _ in range(3))
    perform(pending, 0)
    pending.acknowledged(accepted.key, 0, 0)
    pending._window = 1

    _, early = perform(pending, 4.9)
    _, failed = perform(pending, 5)

    assert [] == early
    assert 3 == len(failed)
    assert 0 == len(pending)
    assert {"No answer", "The deadline"} == {" ".join(str(error).split()[:2]) for error in failed}
    assert (sent.sends, waiting.sends) == (1, 0)


def test_an_unknown_device_is_given_up_soon() -> None:
    """Nobody listens, and this client never saw anybody: the patience is SETTLE_S."""
    pending = table()
    request = pending.add("dev", "m", deadline=30, now=0)
    perform(pending, 0)
    pending.acknowledged(request.key, 0x10, 0)

    failures = [(tenth / 10, error) for tenth in range(20) for error in _turn(pending, tenth / 10)]

    ((when, error),) = failures
    assert SETTLE_S <= when < SETTLE_S + 0.3
    assert isinstance(error, NoAnswer)
    assert "'dev' is not listening" in str(error)


def _turn(pending: PendingRequests, now: float) -> list[EdgeSdkError]:
    """Whatever is sent finds nobody."""
    failed = []
    for action in pending.due(now):
        if isinstance(action, Fail):
            failed.append(action.error)
        else:
            pending.sent(action.request, action.request.key)
            pending.acknowledged(action.request.key, 0x10, now)
    return failed


@pytest.mark.parametrize(
    ("device", "knows_listeners", "is_said"), [(None, True, True), ("dev", False, True), ("dev", True, False)]
)
def test_what_may_not_be_seen_is_said(device: str | None, knows_listeners: bool, is_said: bool) -> None:
    """Where only availability can tell who listens, its refusal is the reason; not where PUBACK told."""
    pending = table(knows_listeners=knows_listeners)
    pending.subscribed_to_availability(-SETTLE_S, BrokerError("It refused a/b/+/availability.", fix="Allow it."))
    pending.add(device, "m", deadline=30, now=0)

    ((_, error),) = [(tenth, error) for tenth in range(20) for error in _turn(pending, tenth / 10)]

    assert isinstance(error, NoAnswer)
    assert is_said == ("a/b/+/availability. Allow it." in str(error))


def test_a_known_device_is_waited_for() -> None:
    """One that was online may be restarting: it has wait_for_device_s, and its return ends the wait at once."""
    pending = table(wait_for_device_s=10)
    pending.heard("dev", True)
    pending.heard("dev", False)
    request = pending.add("dev", "m", deadline=30, now=0)

    failed = [error for tenth in range(90) for error in _turn(pending, tenth / 10)]
    pending.heard("dev", True)
    sent, _ = perform(pending, 9)

    assert [] == failed
    assert [request] == sent


def test_a_group_that_had_members_is_waited_for() -> None:
    """Who is in a group only the broker knows: a group where nobody ever was fails fast, one whose members were all
    killed has the patience of a device that was online."""
    pending = table(wait_for_device_s=10)

    def patience(now: float) -> float:
        pending.add(None, "m", deadline=now + 60, now=now, group="g")
        for tenth in range(600):
            sent, failed = perform(pending, now + tenth / 10)
            for each in sent:
                pending.acknowledged(each.key, NO_MATCHING_SUBSCRIBERS, now + tenth / 10)
            if failed:
                assert "Nobody in group 'g'" in str(failed[0])
                return tenth / 10
        raise AssertionError("it never fails")

    stranger = patience(0)
    answered = pending.add(None, "m", deadline=130, now=100, group="g")
    perform(pending, 100)
    pending.acknowledged(answered.key, 0, 100)
    pending.answered(answered.key)

    assert stranger < 1
    assert 10 <= patience(200) < 11


def test_without_knowledge_of_listeners_availability_decides() -> None:
    """On MQTT 3.1.1 nothing is sent to a device that is not known to be online."""
    pending = table(knows_listeners=False)
    pending.add("dev", "m", deadline=30, now=0)

    before, _ = perform(pending, 0)
    pending.heard("dev", True)
    after, _ = perform(pending, 0.1)

    assert (0, 1) == (len(before), len(after))


def test_put_off_means_a_new_request() -> None:
    """After 429 the request comes back under a new key, when the device said; answers to the old key are duplicates."""
    pending = table()
    request = pending.add("dev", "m", deadline=30, now=0)
    perform(pending, 0)
    old = request.key
    assert request is pending.answered(old)

    pending.put_off(request, QueueFull("full", retry_after_ms=1000), 0)
    early, _ = perform(pending, 0.9)
    later, _ = perform(pending, 1.3)

    assert ([], [request]) == (early, later)
    assert old != request.key
    assert None is pending.answered(old)
    assert 1 == pending.duplicates


def test_many_answered_requests_leave_nothing() -> None:
    """What is answered is forgotten: the table does not grow with the number of requests served."""
    pending = table()
    for n in range(10_000):
        now = n / 1000
        request = pending.add("dev", "m", deadline=now + 30, now=now)
        perform(pending, now)
        pending.acknowledged(request.key, 0, now)
        pending.answered(request.key)

    assert 0 == len(pending)
    assert len(pending._timers) < 5_000
    assert 0 == len(pending._ready)


EVENTS = st.lists(st.tuples(st.sampled_from("adrpoxun"), st.integers(0, 9), st.floats(0, 2)), max_size=60)


@given(EVENTS)
def test_every_request_ends_once(events: list[tuple[str, int, float]]) -> None:
    """Whatever happens in whatever order, each request is answered or failed once, at the latest at its deadline."""
    pending = table(window=3)
    live: dict[PendingRequest, float] = {}
    now = 0.0

    def turn() -> None:
        for action in pending.due(now):
            if isinstance(action, Send):
                assert action.request in live
                pending.sent(action.request, action.request.key)
            else:
                del live[action.request]

    for what, which, pause_s in events:
        now += pause_s
        chosen = list(live)[which % len(live)] if live else None
        if what == "a":
            request = pending.add("dev" if which else None, "m", deadline=now + 5, now=now)
            live[request] = now + 5
        elif what == "d":
            pending.disconnected()
        elif what == "r":
            pending.subscribed_to_availability(now)
            pending.connected(3)
        elif what in "ou":
            pending.heard("dev", what == "o")
        elif chosen is not None:
            if what == "p":
                pending.acknowledged(chosen.key, [0, 0x10, 0x97, 0x87][which % 4], now)
            elif what == "x" and pending.answered(chosen.key) is not None:
                del live[chosen]
            elif what == "n" and pending.answered(chosen.key) is not None:
                pending.put_off(chosen, QueueFull("full"), now)
        turn()
        assert all(deadline > now for deadline in live.values())
    for _ in range(3):
        now += 6
        turn()

    assert {} == live
    assert 0 == len(pending)


@pytest.mark.parametrize("code", [0x80, 0x87, 0x90])
def test_a_broker_s_refusal_is_final(code: int) -> None:
    """What the broker will not take is an error at once, with its reason code."""
    pending = table()
    request = pending.add("dev", "m", deadline=30, now=0)
    perform(pending, 0)

    pending.acknowledged(request.key, code, 0)
    _, (error,) = perform(pending, 0)

    assert f"0x{code:02x}" in str(error)
