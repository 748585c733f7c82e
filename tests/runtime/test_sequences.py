"""Sequences: a state moves on once for each answer, in order, and never otherwise."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.backends.base import Threaded
from edge_sdk.backends.registry import load_engine
from edge_sdk.errors import InvalidTensor, Malformed, QueueFull, SequenceOutOfStep, SequenceUnknown
from edge_sdk.runtime.batching import BatchPlanner, QueueLimits
from edge_sdk.runtime.messages import Answer, Request
from edge_sdk.runtime.sequences import Sequences, rounds
from edge_sdk.runtime.served import ServedModel
from edge_sdk.runtime.service import Service
from edge_sdk.runtime.worker import Worker
from edge_sdk.sequence import SequenceRules
from edge_sdk.spec import Serving
from edge_sdk.tasks.base import Decoded, Payload, SequencePart
from edge_sdk.tasks.oip import encode_json_request, encode_request
from edge_sdk.tensors import TensorSpec
from tests import packages
from tests.runtime.requests import FOREVER, response, statuses

RULES = SequenceRules.model_validate(
    {"states": [{"input": "state", "output": "new_state", "batch_axis": 1}], "timeout_s": 10, "max_sequences": 3}
)
INPUTS = (TensorSpec("sample", "float32", ("batch", 2)), TensorSpec("state", "float32", ("batch", 1, 2)))
TICKETS = itertools.count(1)


def part(
    value: float = 0.0,
    sequence: str = "a",
    *,
    client: str = "me",
    start: bool = False,
    end: bool = False,
    step: int | None = None,
    id: str | None = None,
    deadline: float = FOREVER,
    priority: int = 4,
) -> Request:
    """A request of a sequence whose model adds up what it is sent."""
    ticket = next(TICKETS)
    body = encode_request({"sample": np.full((1, 2), value, np.float32)})
    payload = Payload(
        body.data, body.content_type, body.header_length, sequence=SequencePart(sequence, start, end, step)
    )
    return Request(
        ticket, "sums", payload, 0.0, deadline, client=client, priority=priority, id=f"#{ticket}" if id is None else id
    )


class Sums:
    """The pure table with a model that adds: `ask` gives the total behind a request, or raises."""

    def __init__(self) -> None:
        self.table = Sequences(RULES, INPUTS)
        self.now = 0.0

    def ask(self, request: Request, *, fails: bool = False) -> float:
        decoded = Decoded({"sample": np.full((1, 2), float(request.ticket), np.float32)}, 1)
        feeds = self.table.resume(request, decoded, self.now)
        total = feeds["state"] + feeds["sample"][:, np.newaxis]
        if fails:
            self.table.let_go(request, decoded)
        else:
            self.table.keep(request, decoded, feeds, {"total": total[:, 0], "new_state": total}, self.now)
        return float(total[0, 0, 0])


# The table


def test_a_sequence_goes_on_from_its_last_answer() -> None:
    sums = Sums()
    first, second, third = part(start=True), part(), part()

    assert first.ticket == sums.ask(first)
    assert first.ticket + second.ticket == sums.ask(second)
    sums.ask(part(), fails=True)
    assert first.ticket + second.ticket + third.ticket == sums.ask(third), "a failure left it where it was"


def test_two_clients_may_use_one_id() -> None:
    sums = Sums()
    mine, yours, more = part(start=True), part(client="you", start=True), part()
    sums.ask(mine)
    sums.ask(yours)

    assert mine.ticket + more.ticket == sums.ask(more)


def test_what_is_not_known_is_refused() -> None:
    """Never started, ended, closed or timed out: there is no state to go on from, and none is made up."""
    sums = Sums()
    with pytest.raises(SequenceUnknown, match="sequence-start"):
        sums.ask(part())
    sums.ask(part(start=True, end=True))
    with pytest.raises(SequenceUnknown):
        sums.ask(part())
    sums.ask(part(start=True))
    sums.table.close(part(end=True), Decoded({}, 0), sums.now)
    with pytest.raises(SequenceUnknown):
        sums.ask(part())
    sums.ask(part(start=True))
    sums.now = 9.0
    sums.ask(part())
    sums.now += 10.0
    with pytest.raises(SequenceUnknown, match="10 s"):
        sums.ask(part())

    assert 0 == len(sums.table)


def test_a_request_that_comes_again_does_not_count_twice() -> None:
    """By its id, also where the sequence was started anew; and by its step, where the client counts."""
    sums = Sums()
    first, second = part(start=True, step=0), part(step=1)
    sums.ask(first)
    sums.ask(second)
    for again in (first, second, part(step=1), part(step=3)):
        with pytest.raises(SequenceOutOfStep):
            sums.ask(again)
    sums.ask(part(start=True))
    with pytest.raises(SequenceOutOfStep, match="computed before"):
        sums.ask(second)


def test_there_is_room_for_so_many() -> None:
    """The next one is told to come back; one that ends, fails to begin or is idle makes room."""
    sums = Sums()
    sums.ask(part(sequence="x", start=True), fails=True)
    for name in "abc":
        sums.ask(part(sequence=name, start=True))
    with pytest.raises(QueueFull) as refused:
        sums.ask(part(sequence="d", start=True))

    assert (refused.value.retry_after_ms or 0) > 0
    sums.ask(part(sequence="a", start=True))  # which is open already
    sums.ask(part(sequence="b", end=True))
    sums.ask(part(sequence="d", start=True))
    sums.now += 10
    sums.ask(part(sequence="e", start=True))
    assert 1 == len(sums.table)


def test_those_that_begin_together_count() -> None:
    """A batch of starts does not get past the bound because none of them is answered yet."""
    table = Sequences(RULES, INPUTS)
    decoded = Decoded({"sample": np.zeros((1, 2), np.float32)}, 1)
    for name in "abc":
        table.resume(part(sequence=name, start=True), decoded, 0.0)
    with pytest.raises(QueueFull):
        table.resume(part(sequence="d", start=True), decoded, 0.0)


def test_the_context_comes_again_before_what_is_new() -> None:
    rules = SequenceRules.model_validate({"context": {"input": "sample", "samples": 2}})
    table = Sequences(rules, (TensorSpec("sample", "float32", ("batch", 5)),))
    seen = []
    for number, request in enumerate([part(start=True), part(), part()]):
        decoded = Decoded({"sample": np.arange(3, dtype=np.float32)[np.newaxis] + 3 * number}, 1)
        feeds = table.resume(request, decoded, 0.0)
        table.keep(request, decoded, feeds, {}, 0.0)
        seen.append(feeds["sample"][0].tolist())

    assert [[0, 0, 0, 1, 2], [1, 2, 3, 4, 5], [4, 5, 6, 7, 8]] == seen


def test_what_does_not_fit_behind_the_context_is_refused() -> None:
    """An axis that is free may have another size in another sequence, but not in the middle of one."""
    rules = SequenceRules.model_validate({"context": {"input": "sample", "samples": 2}})
    table = Sequences(rules, (TensorSpec("sample", "float32", ("batch", "time", "width")),))
    first, other, more = (Decoded({"sample": np.ones((1, 4, width), np.float32)}, 1) for width in (3, 5, 3))
    begun = part(start=True)
    table.keep(begun, first, table.resume(begun, first, 0.0), {}, 0.0)
    with pytest.raises(InvalidTensor, match="size of its first one"):
        table.resume(part(), other, 0.0)

    assert (1, 6, 3) == table.resume(part(), more, 0.0)["sample"].shape


@given(
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.booleans(), st.booleans(), st.floats(0, 6), st.booleans()), max_size=40
    )
)
def test_a_state_is_the_sum_of_what_was_answered(moves: list[tuple[str, bool, bool, float, bool]]) -> None:
    """Whatever starts, ends, fails and waits: a total is that of a plain dictionary, or it is refused."""
    sums = Sums()
    expected: dict[str, tuple[float, float]] = {}  # total, last used
    for name, start, end, pause, fails in moves:
        sums.now += pause
        expected = {key: kept for key, kept in expected.items() if sums.now - kept[1] < 10}
        request = part(sequence=name, start=start, end=end)
        try:
            total = sums.ask(request, fails=fails)
        except SequenceUnknown:
            assert name not in expected
            assert not start
            continue
        except QueueFull:
            assert 3 == len(expected)
            assert name not in expected
            continue
        before = 0.0 if start else expected[name][0]

        assert before + request.ticket == total
        if name in expected:
            expected[name] = (expected[name][0], sums.now)
        if not fails:
            expected[name] = (total, sums.now)
            if end:
                del expected[name]
    assert len(sums.table) <= 3


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.integers(0, 1)), max_size=30),
    st.integers(1, 5),
)
def test_rounds_keep_order_and_mix_no_sequence(moves: list[tuple[str, str, int]], room: int) -> None:
    """Everything once; no key twice, no two shapes and no more rows than fit in a round; each key in its order."""
    keys, shapes, rows = ([move[column] for move in moves] for column in range(3))
    groups = rounds(keys, shapes, [int(wanted) for wanted in rows], room)

    assert sorted(index for group in groups for index in group) == list(range(len(moves)))
    for group in groups:
        assert len(group) == len({keys[index] for index in group})
        assert 1 == len({shapes[index] for index in group})
        assert len(group) <= room
        assert len(group) == 1 or all(rows[index] for index in group)
    for key in set(keys):
        order = [index for group in groups for index in group if keys[index] == key]
        assert sorted(order) == order


# The planner


def test_priorities_do_not_turn_a_sequence_round() -> None:
    """Of one client, in the order in which it came; between clients the one whose turn is more urgent."""
    planner = BatchPlanner(batch=8, limits=QueueLimits(), in_order=True)
    mine = [part(priority=priority) for priority in (4, 9, 0)]
    urgent = part(client="you", priority=9)
    for request in [*mine, urgent]:
        planner.offer(request, 0.0)
    batch = planner.take(0.0).batch

    assert mine == [request for request in batch if request.client == "me"]
    assert urgent is batch[0]
    planner.offer(mine[0], 0.0)

    assert (mine[0],) == planner.clear()
    assert 0 == len(planner)


# The worker

Hire = Callable[..., Worker]


@pytest.fixture
def hire(tmp_path: Path) -> Hire:
    """A worker for the model that adds up."""

    def hired(
        orders: list[dict[str, Any]] | None = None, *, clock: Callable[[], float] = lambda: 0.0, **package: Any
    ) -> Worker:
        model = packages.stateful()
        backend = packages.BACKEND
        if orders is not None:
            packages.order(model, orders)
            backend = "reference"
        made = packages.make_package(tmp_path / "sums", model, backend=backend, sequence=RULES, **package)
        return Worker.load(made, clock=clock)

    return hired


def totals(answers: list[Answer]) -> list[float | int]:
    """The total of each answer, or its status where it is an error."""
    return [
        answer.status if answer.status != 200 else float(response(answer).outputs["total"][0, 0]) for answer in answers
    ]


def test_sequences_share_batches_and_keep_apart(hire: Hire) -> None:
    """One request of each is computed together; a second of the same waits for the first; answers come in order."""
    worker = hire()
    answers = worker.run_batch(
        [part(1, "a", start=True), part(2, "a"), part(10, "b", start=True), part(20, "b"), part(100, "c", start=True)]
    )

    assert [1, 3, 10, 30, 100] == totals(answers)
    assert [3, 2, 3, 2, 3] == [answer.timing.batch for answer in answers if answer.timing]
    assert ["total"] == list(response(answers[0]).outputs), "the state stays here"


def test_who_names_no_sequence_is_told(hire: Hire) -> None:
    worker = hire()
    body = encode_request({"sample": np.ones((1, 2), np.float32)})
    request = Request(1, "sums", Payload(body.data, body.content_type, body.header_length), 0.0, FOREVER)
    (answer,) = worker.run_batch([request])

    assert isinstance(answer.result, Malformed)
    assert "sequence-id" in str(answer.result)


def test_the_body_may_name_it_too(hire: Hire) -> None:
    """As Triton's clients do, and whoever has no properties."""
    worker = hire()
    answers = []
    for parameters in ({"sequence_id": 7, "sequence_start": True}, {"sequence_id": 7, "sequence_end": True}):
        body = encode_json_request({"sample": np.ones((1, 2), np.float32)}, parameters=parameters)
        answers += worker.run_batch([Request(next(TICKETS), "sums", Payload(body.data), 0.0, FOREVER)])

    assert [1, 2] == totals(answers)
    assert worker.sequences is not None
    assert 0 == len(worker.sequences)


def test_nothing_to_compute_closes_a_sequence(hire: Hire) -> None:
    worker = hire()
    closing = Request(
        next(TICKETS), "sums", Payload(b"", sequence=SequencePart("a", end=True)), 0.0, FOREVER, client="me"
    )
    answers = worker.run_batch([part(1, start=True), closing, part(2)])

    assert [200, 200, 409] == statuses(answers)
    assert {} == response(answers[1]).outputs


def test_only_the_request_at_fault_stands_still(hire: Hire) -> None:
    """A batch that fails is computed again one by one: the others' states move on once, its own does not."""
    worker = hire([{"do": "raise", "when": 13.0}])
    worker.run_batch([part(1, "a", start=True), part(10, "b", start=True)])

    assert [500, 12] == totals(worker.run_batch([part(13, "a"), part(2, "b")]))
    assert [3, 14] == totals(worker.run_batch([part(2, "a"), part(2, "b")]))


def test_an_answer_that_cannot_be_given_moves_nothing(hire: Hire) -> None:
    """What JSON cannot carry is an error, and whoever gets one may send the step again."""
    worker = hire()
    worker.run_batch([part(1, start=True)])
    body = encode_json_request({"sample": np.full((1, 2), 3e38, np.float32)})
    for _ in range(2):  # the second sum is infinite
        asked = Request(
            next(TICKETS), "sums", Payload(body.data, sequence=SequencePart("a")), 0.0, FOREVER, client="me"
        )
        (answer,) = worker.run_batch([asked])

    assert 500 == answer.status
    assert [0.0] == totals(worker.run_batch([part(-3e38)]))


def test_who_comes_too_late_moves_nothing(hire: Hire) -> None:
    """The deadline passed while it was computed: it is answered 408, and the sequence stands where it stood."""
    moments = itertools.count()
    worker = hire(clock=lambda: float(next(moments)))
    worker.run_batch([part(1, start=True)])

    assert [408] == totals(worker.run_batch([part(10, deadline=0.5)]))
    assert [3] == totals(worker.run_batch([part(2)]))


@pytest.mark.parametrize("stateful", [True, False], ids=["it was said", "only the worker knows"])
def test_what_waited_while_the_model_was_loading_comes_first(tmp_path: Path, stateful: bool) -> None:
    """And in its order, before what came later; nothing drops out of the middle where newer requests win elsewhere."""
    answers: list[Answer] = []
    served = ServedModel(
        "sums", "1", limits=QueueLimits(), newest_wins=stateful, stateful=stateful, on_answer=answers.append,
        clock=lambda: 0.0,
    )  # fmt: skip
    package = packages.make_package(tmp_path / "sums", packages.stateful(), sequence=RULES, max_batch=1)
    for value in (1, 2, 4):
        served.submit(part(value, start=value == 1))
    served.put_in_service(Worker.load(package, clock=lambda: 0.0), quick=True)
    for value in (8, 16):
        served.submit(part(value))
    while served.run_once():
        pass

    assert [1, 3, 7, 15, 31] == totals(answers)
    served.retire()


def test_a_service_knows_what_it_loads(tmp_path: Path) -> None:
    """From the package, before the first worker: newer requests win, and not in a sequence."""
    packages.make_package(tmp_path / "sums", packages.stateful(), sequence=RULES, max_batch=1)
    answers: list[Answer] = []
    service = Service(tmp_path, on_answer=answers.append, on_change=lambda: None, newest_wins=True)
    service._adopt()  # without the loader, which would be there at any moment
    for value in (1, 2):
        service.submit(part(value, start=value == 1))

    assert ([], 2) == (answers, service.waiting())


def test_wrapped_engines_are_what_they_were(tmp_path: Path) -> None:
    """Turns on the cores and the books of memory see through to the threads and to the process of a stateful model."""
    serving = Serving(isolation="process")
    package = packages.make_package(tmp_path / "sums", packages.stateful(), sequence=RULES, serving=serving)
    with contextlib.closing(Worker.load(package)) as worker:
        alone = contextlib.closing(load_engine(packages.make_package(tmp_path / "double", packages.scaling())).engine)
        with alone as plain:
            assert isinstance(plain, Threaded)
            assert isinstance(worker.loaded.engine, Threaded)
            assert plain.threads == worker.loaded.engine.threads
        assert 10 << 20 < worker.elsewhere_bytes


def test_another_engine_of_the_package_goes_on(tmp_path: Path) -> None:
    """A reload of the same package keeps its sequences; another package has states of its own."""
    answers: list[Answer] = []
    served = ServedModel(
        "sums", "1", limits=QueueLimits(), newest_wins=True, on_answer=answers.append, clock=lambda: 0.0
    )
    package = packages.make_package(tmp_path / "sums", packages.stateful(), sequence=RULES)
    served.put_in_service(Worker.load(package, clock=lambda: 0.0), quick=True)
    served.submit(part(1, start=True))
    served.submit(part(2))
    served.run_once()
    served.put_in_service(Worker.load(package, clock=lambda: 0.0), quick=True)
    served.submit(part(4))
    served.run_once()

    assert [1, 3, 7] == totals(answers), "and newest-wins drops nothing out of the middle"
    assert 1 == served.sequences
    other = packages.make_package(tmp_path / "sums", packages.stateful(), sequence=RULES, build_key="another")
    served.put_in_service(Worker.load(other, clock=lambda: 0.0), quick=True)
    served.submit(part(8))
    served.run_once()

    assert 409 == answers[-1].status
    served.retire()
