"""One model in service: the worker under it may change at any moment, and each one is closed when it is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.backends.base import Engine
from edge_sdk.backends.registry import load_engine
from edge_sdk.errors import DeviceLost, EngineFailed, QueueFull, Unavailable
from edge_sdk.runtime.batching import QueueLimits
from edge_sdk.runtime.messages import Answer
from edge_sdk.runtime.served import ServedModel
from edge_sdk.runtime.worker import Worker
from edge_sdk.tasks.registry import task_of
from tests.brokers import eventually
from tests.packages import make_package, misbehaving, scaling
from tests.runtime.requests import request, response


class Place:
    """A served model whose answers are listed; `during` happens while a batch is being computed."""

    def __init__(self, folder: Path, *, max_requests: int = 100) -> None:
        self.folder = folder
        self.answers: list[Answer] = []
        self.during: Callable[[], object] = lambda: None
        limits = QueueLimits(max_requests=max_requests)
        self.model = ServedModel("m", "1", limits=limits, on_answer=self._take, clock=lambda: 0.0)

    def _take(self, answer: Answer) -> None:
        self.answers.append(answer)
        self.during()

    def hire(self, factor: float) -> tuple[Worker, Engine]:
        package = make_package(self.folder / str(factor), scaling(factor), name="m")
        loaded = load_engine(package)
        return Worker(package, loaded, task_of(package), clock=lambda: 0.0), loaded.engine


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def is_closed(engine: Engine) -> bool:
    try:
        engine.infer({"x": np.zeros((1, 4), np.float32)})
    except EngineFailed:
        return True
    return False


def test_requests_wait_for_a_model_that_loads(place: Place) -> None:
    """They are computed once it is there; were it never there, they would be answered 503."""
    place.model.submit(request(3.0))

    assert (False, None, 1) == (place.model.run_once(), place.model.wake_at(), place.model.waiting)

    place.model.put_in_service(place.hire(2.0)[0], quick=True)
    assert (True, 0) == (place.model.run_once(), place.model.waiting)
    assert [[6.0] * 4] == response(place.answers[0]).outputs["y"].tolist()


def test_requests_that_waited_in_vain_are_answered(place: Place) -> None:
    """A model that does not load says so to everybody who waited, and takes nobody any more."""
    place.model.submit(request())
    place.model.fail("its graph is cut off")

    assert ("UNAVAILABLE", [503]) == (place.model.state, [answer.status for answer in place.answers])
    with pytest.raises(Unavailable, match="did not load"):
        place.model.submit(request())


@pytest.mark.parametrize("busy", [False, True])
def test_a_swapped_worker_is_closed_when_it_is_done(place: Place, busy: bool) -> None:
    """At once where it rests, after its batch where it works; what waits is computed by its successor."""
    first, old = place.hire(2.0)
    second, new = place.hire(3.0)
    place.model.put_in_service(first, quick=True)
    place.model.submit(request(1.0, rows=8))
    place.model.submit(request(1.0, rows=8))

    def swap() -> None:
        place.during = lambda: None
        place.model.put_in_service(second, quick=True)
        assert busy is not is_closed(old)

    if busy:
        place.during = swap
    else:
        swap()
    while place.model.run_once():
        pass
    factors = [float(response(answer).outputs["y"].mean()) for answer in place.answers]

    assert ([2.0, 2.0] if busy else [3.0, 3.0]) == factors  # both were in the batch that was being computed
    assert (True, False) == (is_closed(old), is_closed(new))


@pytest.mark.parametrize("busy", [False, True])
def test_a_retired_model_closes_its_worker(place: Place, busy: bool) -> None:
    """What is being computed is finished, what waits is 503, and a worker that comes too late is closed as well."""
    worker, engine = place.hire(2.0)
    late, late_engine = place.hire(3.0)
    place.model.put_in_service(worker, quick=True)
    place.model.submit(request(1.0))

    def retire() -> None:
        place.during = lambda: None
        place.model.retire()
        place.model.put_in_service(late, quick=True)

    if busy:
        place.during = retire
        place.model.run_once()
    else:
        retire()

    assert [200 if busy else 503] == [answer.status for answer in place.answers]
    assert (True, True) == (is_closed(engine), is_closed(late_engine))
    with pytest.raises(Unavailable, match="out of service"):
        place.model.submit(request())


def test_a_failed_successor_leaves_the_model_in_service(place: Place) -> None:
    """Its reason can be read while the older one goes on."""
    place.model.put_in_service(place.hire(2.0)[0], quick=True)
    place.model.fail("its graph is cut off")
    place.model.submit(request(1.0))
    place.model.run_once()

    assert ("READY", "its graph is cut off", 200) == (place.model.state, place.model.reason, place.answers[0].status)


def test_the_queue_has_a_limit_while_the_model_loads(tmp_path: Path) -> None:
    """Nobody waits without bound for a model that may never come."""
    place = Place(tmp_path, max_requests=2)
    place.model.submit(request())
    place.model.submit(request())
    with pytest.raises(QueueFull):
        place.model.submit(request())


@pytest.mark.parametrize("quick", [True, False])
def test_a_lost_device_is_nobodys_answer(tmp_path: Path, quick: bool) -> None:
    """The loss is told once, where it happened; neither that request nor one behind it gets a wrong answer, and the
    engine is left alone."""
    losses: list[DeviceLost] = []
    answers: list[Answer] = []
    model = ServedModel(
        "m", "1", limits=QueueLimits(), on_answer=answers.append, on_lost=losses.append, clock=lambda: 0.0
    )  # fmt: skip
    orders = [{"do": "lose-device", "when": 666.0}]
    package = make_package(tmp_path / "m", misbehaving(orders), name="m", backend="reference", max_batch=1)
    loaded = load_engine(package)
    model.put_in_service(Worker(package, loaded, task_of(package), clock=lambda: 0.0), quick=quick)
    for value in (1.0, 666.0, 1.0):
        model.submit(request(value))
    while quick and model.run_once():
        pass
    eventually(lambda: losses, "the loss is told")
    if not quick:
        model.join(10.0)

    assert [200] == [answer.status for answer in answers]
    assert 1 == len(losses)
    assert not model.run_once()
    assert not is_closed(loaded.engine)
