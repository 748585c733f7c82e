"""The daemon's session: each promise of its docstring by example, and all of them under any sequence of events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge_sdk.mqtt.session import Acknowledge, Intake, Publish, Record, ReplyRoute, Session
from edge_sdk.mqtt.transports.base import (
    FAILURE,
    NO_MATCHING_SUBSCRIBERS,
    Acknowledged,
    BrokerLimits,
    Message,
    Received,
)

ROUTE = ReplyRoute("edge/v1/reply/me", b"7")
OTHER = ReplyRoute("edge/v1/reply/me", b"8")


def size(message: Message) -> int:
    return len(message.payload)


def too_large(answer: Message, limit: int) -> Message:
    return Message(answer.topic, b"too large")


def make_session(**options: Any) -> Session:
    return Session(packet_size=size, too_large=too_large, **options)


class Broker:
    """The other end of a session: it numbers packets, takes what is published, and remembers what was acknowledged."""

    def __init__(self, session: Session | None = None, **limits: Any) -> None:
        self.session = session or make_session()
        self.connection = 0
        self.packet_id = 0
        self.handle = 0
        self.in_flight: dict[int, Message] = {}
        self.acknowledged: list[int] = []
        self.connect(**limits)

    def connect(self, **limits: Any) -> None:
        self.connection += 1
        self.session.connected(BrokerLimits(**limits))

    def lose_connection(self) -> None:
        self.session.closed()
        self.in_flight.clear()

    def send(
        self, payload: bytes = b"a", route: ReplyRoute | None = ROUTE, *, qos: int = 1, now: float = 0.0
    ) -> Intake:
        self.packet_id += 1
        event = Received(Message("t", payload), self.packet_id if qos else None, False, self.connection)
        return self.session.received(event, route, now)

    def perform(self) -> list[bytes]:
        """Do what is due, as the daemon does; what was published in it."""
        published = []
        for action in self.session.due():
            if isinstance(action, Publish):
                self.handle += 1
                self.in_flight[self.handle] = action.message
                self.session.published(action, self.handle)
                published.append(action.message.payload)
            else:
                assert isinstance(action, Acknowledge)
                assert action.received.packet_id is not None
                self.acknowledged.append(action.received.packet_id)
        return published

    def take(self, code: int = 0) -> None:
        """PUBACK everything that is in flight."""
        for handle in list(self.in_flight):
            del self.in_flight[handle]
            self.session.acknowledged(Acknowledged(handle, code))

    def answer(self, intake: Intake, payload: bytes = b"answer", *, now: float = 0.0) -> None:
        self.session.answered(intake.ticket, Message(ROUTE.topic, payload), now)


def test_a_request_is_acknowledged_after_the_broker_took_its_answer() -> None:
    """Not when it came, not when it was computed, not when its answer was sent."""
    broker = Broker()
    intake = broker.send()
    broker.perform()
    broker.answer(intake)
    published = broker.perform()
    broker.perform()

    assert ([b"answer"], []) == (published, broker.acknowledged)

    broker.take()
    broker.perform()
    assert ([1], True) == (broker.acknowledged, broker.session.idle)


def test_acknowledgements_keep_the_order_of_arrival() -> None:
    """A request that was answered first waits for those that came before it (MQTT 5, 4.6)."""
    broker = Broker()
    first, second, third = (broker.send(route=ReplyRoute("r", bytes([n]))) for n in range(3))
    for intake in (third, second):
        broker.answer(intake)
    broker.perform()
    broker.take()
    broker.perform()

    assert [] == broker.acknowledged

    broker.answer(first)
    broker.perform()
    broker.take()
    broker.perform()
    assert [1, 2, 3] == broker.acknowledged


def test_nothing_is_acknowledged_on_a_later_connection() -> None:
    """A packet id of a lost connection may be another message now; the broker sends the request again, and the same
    answer goes out for it."""
    broker = Broker()
    intake = broker.send()
    broker.lose_connection()
    broker.answer(intake)

    assert [] == broker.perform()

    broker.connect()
    again = broker.send()
    assert ([b"answer", b"answer"], "replayed") == (broker.perform(), again.fate)
    broker.take()
    broker.perform()
    assert ([2], True) == (broker.acknowledged, broker.session.idle)


def test_a_request_that_is_sent_again_while_it_computes_is_joined() -> None:
    """One computation, one answer, and an acknowledgement for each time it came - on this connection."""
    broker = Broker()
    first, second = broker.send(), broker.send()
    broker.lose_connection()
    broker.connect()
    third = broker.send()

    assert ["new", "joined", "joined"] == [first.fate, second.fate, third.fate]
    assert {first.ticket} == {second.ticket, third.ticket}

    broker.answer(first)
    assert [b"answer"] == broker.perform()
    broker.take()
    broker.perform()
    assert ([3], 2) == (broker.acknowledged, broker.session.counts.duplicates)


def test_a_request_that_was_answered_gets_the_same_bytes_again() -> None:
    """Marked as a repeat, for a while; afterwards it is computed anew."""
    broker = Broker(make_session(remembered_s=60.0))
    broker.answer(broker.send(now=0.0), now=0.0)
    broker.perform()
    broker.take()
    again, later = broker.send(now=59.0), broker.send(now=60.0)
    broker.perform()
    (repeat,) = broker.in_flight.values()

    assert ("replayed", "new") == (again.fate, later.fate)
    assert (b"answer", "1") == (repeat.payload, repeat.properties.user_value("duplicate"))


@pytest.mark.parametrize("answered_first", [True, False])
def test_an_id_with_another_payload_is_refused(answered_first: bool) -> None:
    """While the first is computed and after it was answered; the refusal is acknowledged like any answer, and harms
    neither the first nor what is remembered of it."""
    broker = Broker()
    first = broker.send(b"a")
    if answered_first:
        broker.answer(first)
    reused = broker.send(b"b")
    broker.answer(reused, b"409")
    if not answered_first:
        broker.answer(first)
    broker.perform()
    broker.take()
    broker.perform()

    assert "reused" == reused.fate
    assert [1, 2] == broker.acknowledged
    assert ("replayed", "reused") == (broker.send(b"a").fate, broker.send(b"b").fate)


@pytest.mark.parametrize("route", [ReplyRoute("t", None, identifies=False), None])
def test_without_an_id_nothing_is_the_same(route: ReplyRoute | None) -> None:
    """Two requests that cannot be told apart are two requests."""
    broker = Broker()
    intakes = [broker.send(route=route) for _ in range(2)]

    assert (["new"] * 2, 2) == ([each.fate for each in intakes], len({each.ticket for each in intakes}))


def test_without_a_way_back_a_request_is_acknowledged_in_its_turn() -> None:
    """Nothing is published for it."""
    broker = Broker()
    first, second = broker.send(), broker.send(route=None)
    broker.session.answered(second.ticket, None, 0.0)

    assert ([], []) == (broker.perform(), broker.acknowledged)

    broker.session.answered(first.ticket, None, 0.0)
    assert ([], [1, 2]) == (broker.perform(), broker.acknowledged)
    assert broker.session.idle


@pytest.mark.parametrize(("own", "brokers", "expected"), [(2, 65_535, 2), (64, 3, 3)])
def test_the_window_is_never_exceeded(own: int, brokers: int, expected: int) -> None:
    """Neither ours nor the broker's Receive Maximum, and the rest goes out as places come free, in order - also right
    after a reconnect, when what was in flight goes first."""
    broker = Broker(make_session(window=own), receive_maximum=brokers)
    for n in range(7):
        broker.answer(broker.send(route=ReplyRoute("r", bytes([n]))), bytes([n]))

    assert list(range(expected)) == [payload[0] for payload in broker.perform()]
    assert ([], 7 - expected) == (broker.perform(), broker.session.unsent)

    broker.lose_connection()
    broker.connect(receive_maximum=brokers)
    assert list(range(expected)) == [payload[0] for payload in broker.perform()]
    assert expected == broker.session.counts.resent
    broker.take()
    assert list(range(expected, min(7, 2 * expected))) == [payload[0] for payload in broker.perform()]


def test_an_answer_over_the_brokers_limit_is_replaced_once() -> None:
    """By what `too_large` makes of it, and the request is settled by that; announcements are left to the transport."""
    broker = Broker(maximum_packet_size=10)
    for route, payload in ((ROUTE, bytes(11)), (OTHER, bytes(10))):
        broker.answer(broker.send(route=route), payload)
    broker.session.announce(Message("info", bytes(99)))

    assert [b"too large", bytes(10), bytes(99)] == broker.perform()
    broker.take()
    broker.perform()
    assert (1, [1, 2], True) == (broker.session.counts.oversized, broker.acknowledged, broker.session.idle)


@pytest.mark.parametrize(
    ("code", "unheard", "refused"), [(0, 0, 0), (NO_MATCHING_SUBSCRIBERS, 1, 0), (FAILURE + 7, 0, 1)]
)
def test_a_refused_answer_is_counted_and_done_with(code: int, unheard: int, refused: int) -> None:
    """Sending it again would be refused again: its request is acknowledged."""
    broker = Broker()
    broker.answer(broker.send())
    broker.perform()
    broker.take(code)
    broker.perform()

    assert ([1], unheard, refused) == (
        broker.acknowledged,
        broker.session.counts.unheard,
        broker.session.counts.refused,
    )


def test_announcements_die_with_their_connection() -> None:
    """They describe a moment; answers that waited beside them do not."""
    broker = Broker(make_session(window=1))
    broker.session.announce(Message("availability", b"online"))
    broker.session.announce(Message("info", b"{}"))
    broker.answer(broker.send())

    assert [b"online"] == broker.perform()

    broker.lose_connection()
    broker.connect()
    assert [b"answer"] == broker.perform()


def test_a_request_of_qos_0_needs_no_acknowledgement() -> None:
    """It is answered like any other."""
    broker = Broker()
    broker.answer(broker.send(qos=0))

    assert [b"answer"] == broker.perform()
    broker.take()
    assert ([], [], True) == (broker.perform(), broker.acknowledged, broker.session.idle)


def test_what_is_remembered_is_bounded() -> None:
    """In bytes, the oldest first, counting what a small answer costs beside its payload; and one answer that is larger
    than everything allowed is not kept."""
    broker = Broker(make_session(remembered_bytes=1_000_000))
    routes = [ReplyRoute("r", n.to_bytes(2, "big")) for n in range(2000)]
    for route in routes:
        broker.answer(broker.send(route=route), bytes(100))
        broker.perform()
        broker.take()
    fates = [broker.send(route=route).fate for route in routes]
    kept = fates.count("replayed")

    assert fates == ["new"] * (2000 - kept) + ["replayed"] * kept
    assert 300 < kept < 1_000_000 / 100

    broker.answer(broker.send(route=OTHER), bytes(2_000_000))
    assert "new" == broker.send(route=OTHER).fate


def test_it_says_how_it_is() -> None:
    """One line for a log."""
    broker = Broker()
    broker.answer(broker.send())
    broker.send(route=OTHER)
    broker.perform()

    assert "<Session connected=True open=2 outbox=0 in_flight=1 unacknowledged=2>" == repr(broker.session)


KEYS = st.sampled_from([b"1", b"2", b"3", None])
PAYLOADS = st.sampled_from([b"a", b"b"])


class AnySequence(RuleBasedStateMachine):
    """A broker that loses connections and redelivers, a runtime that answers in any order: the promises hold."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.window = 0
        self.connected = False
        self.connection = 0
        self.packet_id = 0
        self.handle = 0
        self.undelivered: list[tuple[Message, ReplyRoute | None]] = []  # sent at QoS 1 and not acknowledged, in order
        self.ledger: list[tuple[Received, int]] = []  # of this connection: what came, and its ticket
        self.unanswered: dict[int, tuple[ReplyRoute | None, bytes]] = {}
        self.computing: dict[bytes, tuple[int, bytes]] = {}
        self.remembered: dict[bytes, tuple[bytes, float]] = {}
        self.answer_of: dict[int, bytes] = {}  # ticket -> the payload of its answer
        self.silent: set[int] = set()
        self.in_flight: dict[int, bytes] = {}
        self.taken: list[bytes] = []
        self.taken_before: dict[int, int] = {}  # replayed ticket -> how often its answer had been taken by then

    @initialize(own=st.integers(1, 4))
    def begin(self, own: int) -> None:
        self.own = own
        self.session = make_session(window=own, remembered_s=10.0)

    @precondition(lambda self: not self.connected)
    @rule(receive_maximum=st.integers(1, 5))
    def connect(self, receive_maximum: int) -> None:
        self.connected = True
        self.connection += 1
        self.window = min(self.own, receive_maximum)
        self.session.connected(BrokerLimits(receive_maximum=receive_maximum))
        redelivered, self.undelivered = self.undelivered, []
        for message, route in redelivered:
            self._receive(message, route, qos=1, duplicate=True)

    @precondition(lambda self: self.connected)
    @rule()
    def lose_connection(self) -> None:
        self.connected = False
        self.session.closed()
        self.ledger.clear()
        self.in_flight.clear()

    @precondition(lambda self: self.connected)
    @rule(key=KEYS, payload=PAYLOADS, qos=st.integers(0, 1), has_route=st.booleans())
    def receive(self, key: bytes | None, payload: bytes, qos: int, has_route: bool) -> None:
        route = ReplyRoute("r", key, identifies=key is not None) if has_route or key else None
        self._receive(Message("t", payload), route, qos=qos, duplicate=False)

    def _receive(self, message: Message, route: ReplyRoute | None, *, qos: int, duplicate: bool) -> None:
        self.packet_id += 1
        event = Received(message, self.packet_id if qos else None, duplicate, self.connection)
        key = route.correlation_data if route is not None else None
        expected = self._expected_fate(key, message.payload)
        intake = self.session.received(event, route, self.now)

        assert expected == intake.fate
        if intake.fate == "joined":
            assert key is not None
            assert self.computing[key][0] == intake.ticket
        elif intake.fate == "replayed":
            assert key is not None
            self.answer_of[intake.ticket] = b"answer to " + key + self.remembered[key][0]
            self.taken_before[intake.ticket] = self.taken.count(self.answer_of[intake.ticket])
        else:
            assert intake.ticket not in self.unanswered
            self.unanswered[intake.ticket] = (route if intake.fate == "new" else ReplyRoute("r"), message.payload)
            if intake.fate == "new" and key is not None:
                self.computing[key] = (intake.ticket, message.payload)
        if qos:
            self.undelivered.append((message, route))
            self.ledger.append((event, intake.ticket))

    def _expected_fate(self, key: bytes | None, payload: bytes) -> str:
        if key is None:
            return "new"
        if key in self.computing:
            return "joined" if self.computing[key][1] == payload else "reused"
        if key in self.remembered and self.remembered[key][1] > self.now:
            return "replayed" if self.remembered[key][0] == payload else "reused"
        return "new"

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data(), silently=st.booleans())
    def answer(self, data: st.DataObject, silently: bool) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.unanswered)))
        route, payload = self.unanswered.pop(ticket)
        key = next((key for key, (computed, _) in self.computing.items() if computed == ticket), None)
        if key is not None:
            del self.computing[key]
        if route is None or silently:
            self.silent.add(ticket)
            self.session.answered(ticket, None, self.now)
            return
        self.answer_of[ticket] = b"answer to " + key + payload if key is not None else b"answer %d" % ticket
        if key is not None:
            self.remembered[key] = (payload, self.now + 10.0)
        self.session.answered(ticket, Message("r", self.answer_of[ticket]), self.now)

    @rule()
    def perform(self) -> None:
        for action in self.session.due():
            assert self.connected
            assert not isinstance(action, Record)
            if isinstance(action, Publish):
                self.handle += 1
                self.in_flight[self.handle] = action.message.payload
                self.session.published(action, self.handle)
                assert len(self.in_flight) <= self.window
            else:
                event, ticket = self.ledger.pop(0)
                self.undelivered.pop(0)
                assert event.packet_id == action.received.packet_id
                assert not action.received.message.payload  # what waits for its turn holds no payload
                assert event.connection == self.connection
                assert ticket in self.silent or self.taken.count(self.answer_of[ticket]) > self.taken_before.get(
                    ticket, 0
                )
        if self.connected:
            assert len(self.in_flight) == self.window or not self.session.unsent

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), code=st.sampled_from([0, NO_MATCHING_SUBSCRIBERS, FAILURE]))
    def broker_takes(self, data: st.DataObject, code: int) -> None:
        handle = data.draw(st.sampled_from(sorted(self.in_flight)))
        self.taken.append(self.in_flight.pop(handle))
        self.session.acknowledged(Acknowledged(handle, code))

    @rule(handle=st.integers(0, 50))
    def broker_takes_what_it_never_had(self, handle: int) -> None:
        if handle not in self.in_flight:
            self.session.acknowledged(Acknowledged(handle, 0))

    @precondition(lambda self: self.connected)
    @rule()
    def announce(self) -> None:
        self.session.announce(Message("info", b"announcement"))

    @rule(seconds=st.sampled_from([1.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def nothing_is_due_without_a_connection(self) -> None:
        if not self.connected and self.connection:
            assert [] == self.session.due()

    def teardown(self) -> None:
        """In the end everything that was received is answered, taken and acknowledged."""
        if not self.connected:
            self.connect(5)
        while self.unanswered or self.in_flight or self.session.unsent or self.ledger:
            for ticket, (route, _) in self.unanswered.items():
                if route is None:
                    self.silent.add(ticket)
                else:
                    self.answer_of[ticket] = b"last %d" % ticket
                self.session.answered(ticket, Message("r", self.answer_of[ticket]) if route else None, self.now)
            self.unanswered.clear()
            self.perform()
            for handle in list(self.in_flight):
                self.taken.append(self.in_flight.pop(handle))
                self.session.acknowledged(Acknowledged(handle, 0))
            self.perform()

        assert self.session.idle
        assert [] == self.undelivered
        assert set(self.answer_of.values()) <= set(self.taken)


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
