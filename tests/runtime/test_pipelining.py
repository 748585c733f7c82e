"""Engines that work on several batches at once: kept busy, in order, and never disturbed by what happens meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.backends.base import Pipelined
from edge_sdk.backends.registry import Loaded
from edge_sdk.runtime.batching import QueueLimits
from edge_sdk.runtime.messages import Answer, Request
from edge_sdk.runtime.served import ServedModel
from edge_sdk.runtime.worker import Worker
from edge_sdk.tasks.registry import task_of
from tests.brokers import eventually
from tests.packages import make_package, scaling
from tests.runtime.pipelined import POISON, UNSTARTABLE, StandInPipelinedEngine
from tests.runtime.requests import request, response

BATCH = 4


class Plant:
    """A model in service on stand-in engines, whose answers are listed in the order in which they came."""

    def __init__(self, folder: Path) -> None:
        self.package = make_package(folder / "m", scaling(), name="m", max_batch=BATCH)
        self.answers: list[Answer] = []
        self.engines: list[StandInPipelinedEngine] = []
        self.model = ServedModel(
            "m", "1", limits=QueueLimits(), on_answer=self.answers.append, clock=lambda: 0.0
        )  # fmt: skip

    def hire(self, factor: float = 2.0, *, slots: int = 2, quick: bool = False) -> StandInPipelinedEngine:
        """An engine, put in service."""
        engine = StandInPipelinedEngine(factor, slots=slots)
        self.engines.append(engine)
        worker = Worker(self.package, Loaded(engine, "stand-in"), task_of(self.package), clock=lambda: 0.0)
        self.model.put_in_service(worker, quick=quick)
        return engine

    def submit(self, *values: float, rows: int = 1) -> list[Request]:
        requests = [request(value, model="m", rows=rows) for value in values]
        for each in requests:
            self.model.submit(each)
        return requests

    def until_answered(self, requests: list[Request]) -> list[Answer]:
        """The answers to `requests`, once all are there, in the order of the requests."""
        tickets = [each.ticket for each in requests]
        eventually(lambda: len(self.answers) >= len(tickets), "every answer")
        found = {answer.ticket: answer for answer in self.answers}

        assert len(found) == len(self.answers)
        return [found[ticket] for ticket in tickets]


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    made = Plant(tmp_path)
    yield made
    for engine in made.engines:
        engine.resume()
    made.model.retire()
    made.model.join(10.0)

    assert [[]] * len(made.engines) == [engine.faults for engine in made.engines]


def factor(answer: Answer) -> float:
    """What a request of ones was multiplied by."""
    return float(response(answer).outputs["y"][0, 0])


def test_the_stand_in_is_what_the_seam_calls_pipelined() -> None:
    """Otherwise nothing below says anything."""
    engine = StandInPipelinedEngine()

    assert isinstance(engine, Pipelined)
    engine.close()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_as_many_batches_are_under_way_as_there_are_slots(plant: Plant, slots: int) -> None:
    """With the device held, each slot is filled and started, and nothing more; let go, all answers are right and come
    in the order of the requests."""
    engine = plant.hire(slots=slots)
    engine.pause()
    requests = plant.submit(*map(float, range(5 * BATCH)))
    eventually(lambda: engine.in_flight == slots, "every slot under way")

    assert [] == plant.answers
    engine.resume()
    answers = plant.until_answered(requests)
    assert [2.0 * n for n in range(5 * BATCH)] == [factor(answer) for answer in answers]
    assert [each.ticket for each in requests] == [answer.ticket for answer in plant.answers]
    assert slots == engine.most_in_flight


@pytest.mark.parametrize("bad", [POISON, UNSTARTABLE])
def test_one_poisonous_request_gets_the_500_alone(plant: Plant, bad: float) -> None:
    """A batch that fails, as it is started or as it is finished, is computed again one by one; the batch behind it,
    under way in another slot, is not touched."""
    engine = plant.hire()
    engine.pause()
    requests = plant.submit(1.0, bad, *[1.0] * (3 * BATCH - 2))
    eventually(lambda: engine.in_flight >= 1, "a batch under way")
    engine.resume()
    answers = plant.until_answered(requests)

    assert [200, 500, *[200] * (3 * BATCH - 2)] == [answer.status for answer in answers]
    assert {2.0} == {factor(answer) for answer in answers if answer.status == 200}
    assert [each.ticket for each in requests] == [answer.ticket for answer in plant.answers]


def test_a_model_that_goes_finishes_what_is_under_way(plant: Plant) -> None:
    """Retired with every slot busy: those requests are answered, what waits is 503, and the engine is closed last."""
    engine = plant.hire()
    engine.pause()
    requests = plant.submit(*[1.0] * (4 * BATCH))
    eventually(lambda: engine.in_flight == 2, "both slots under way")
    started = sum(engine.batches)
    plant.model.retire()

    assert not engine.closed
    engine.resume()
    answers = plant.until_answered(requests)
    eventually(lambda: engine.closed, "the engine is closed")
    assert [200] * started + [503] * (4 * BATCH - started) == [answer.status for answer in answers]


def test_a_swap_waits_for_what_is_under_way(plant: Plant) -> None:
    """Each request is answered by one engine; the old one is closed when its last batch is done."""
    old = plant.hire(2.0)
    old.pause()
    before = plant.submit(*[1.0] * (4 * BATCH))
    eventually(lambda: old.in_flight == 2, "both slots under way")
    started = sum(old.batches)
    new = plant.hire(3.0)

    assert not old.closed
    old.resume()
    answers = plant.until_answered(before)
    eventually(lambda: old.closed, "the old engine is closed")
    assert [2.0] * started + [3.0] * (4 * BATCH - started) == [factor(answer) for answer in answers]
    assert not new.closed


def test_swapping_under_traffic_loses_and_mixes_nothing(plant: Plant) -> None:
    """Engines change while requests of several rows pour in: one right answer for each, from one engine."""
    plant.hire(2.0)
    requests: list[Request] = []
    done = threading.Event()

    def pour() -> None:
        while not done.is_set():
            if len(plant.answers) + 100 > len(requests):
                requests.extend(plant.submit(1.0, rows=len(requests) % 3 + 1))
            else:
                done.wait(0.001)

    pouring = threading.Thread(target=pour)
    pouring.start()
    for swap in range(3, 9):
        seen = len(plant.answers)
        eventually(lambda seen=seen: len(plant.answers) > seen + 20, "answers from this engine")  # type: ignore[misc]
        plant.hire(float(swap))
    done.set()
    pouring.join()
    answers = plant.until_answered(requests)
    factors = [set(response(answer).outputs["y"].ravel().tolist()) for answer in answers]

    assert {1} == set(map(len, factors))
    assert set.union(*factors) <= {float(factor) for factor in range(2, 9)}
    eventually(lambda: sum(engine.closed for engine in plant.engines) == 6, "every former engine is closed")


def test_a_quick_model_uses_one_slot(plant: Plant) -> None:
    """On the network's thread a batch is computed from beginning to end before that thread does anything else."""
    engine = plant.hire(quick=True)
    requests = plant.submit(*[1.0] * (3 * BATCH))
    while plant.model.run_once():
        pass

    assert len(requests) == len(plant.answers)
    assert 1 == engine.most_in_flight


def test_warming_up_touches_every_slot(plant: Plant) -> None:
    """What a device prepares when a slot is first used is prepared before the first request."""
    engine = StandInPipelinedEngine()
    plant.engines.append(engine)
    worker = Worker(plant.package, Loaded(engine, "stand-in"), task_of(plant.package))
    worker.warm_up()

    assert 2 * 3 * [BATCH] == engine.batches
    worker.close()
    assert [500] == [answer.status for answer in worker.run_batch([request(1.0, model="m")])]


def test_requests_of_many_rows_go_through_a_slot_one_after_the_other(plant: Plant) -> None:
    """A batch of requests whose rows exceed the engine's is several batches for the engine, and one for the slot."""
    plant.hire()
    requests = plant.submit(*map(float, range(9)), rows=BATCH - 1)
    answers = plant.until_answered(requests)

    assert [2.0 * n for n in range(9)] == [factor(answer) for answer in answers]
