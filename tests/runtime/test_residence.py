"""Models that make room for one another: nothing fails, and nobody who is being computed has to go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="what is measured is onnxruntime's memory")

from onnx import TensorProto, helper

from edge_sdk.errors import EngineFailed, Unavailable
from edge_sdk.package import GRAPH
from edge_sdk.runtime.batching import QueueLimits
from edge_sdk.runtime.messages import Answer
from edge_sdk.runtime.served import ServedModel
from edge_sdk.runtime.worker import Worker
from tests.packages import graph, make_package, misbehaving
from tests.runtime.requests import request, response
from tests.runtime.test_service import Site

WIDTH = 1400
"""Squared, in float32: 8 MB, of which two do not fit into the budget below."""
BUDGET_BYTES = 20_000_000


def heavy(folder: Path, factor: float) -> Path:
    """y = factor * x, by way of 8 MB of weights."""
    row = (TensorProto.FLOAT, ("batch", 4))
    nodes = [
        helper.make_node("MatMul", ["x", "widen"], ["wide"]),
        helper.make_node("MatMul", ["wide", "keep"], ["kept"]),
        helper.make_node("MatMul", ["kept", "narrow"], ["y"]),
    ]
    constants = {
        "widen": factor * np.eye(4, WIDTH, dtype=np.float32),
        "keep": np.eye(WIDTH, dtype=np.float32),
        "narrow": np.eye(WIDTH, 4, dtype=np.float32),
    }
    model = graph(nodes, {"x": row}, {"y": row}, constants)
    return make_package(folder, model, backend="onnxruntime", max_batch=4).path


@pytest.fixture
def open_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def opened(**options: Any) -> Site:
        sites.append(Site(tmp_path / "engines", **{"budget_bytes": BUDGET_BYTES, "inline_ms": 1e6, **options}))
        sites[-1].service.start()
        sites[-1].settle()
        return sites[-1]

    yield opened
    for site in sites:
        site.service.stop(limit_s=0.0)


def resident(site: Site) -> list[str]:
    return [model.model for model in site.service.models() if model.worker is not None]


def test_models_make_room_for_one_another(open_site: Callable[..., Site], tmp_path: Path) -> None:
    """Three models in the memory of one: each answers as if it were alone, and stays READY while it is away."""
    for factor in (2, 3, 4):
        heavy(tmp_path / "engines" / f"times-{factor}", float(factor))
    site = open_site()
    for _ in range(3):
        for factor in (2, 3, 4):
            assert float(factor) == site.factor(model=f"times-{factor}")
            assert [f"times-{factor}"] == resident(site)

    memory = site.service.memory()
    assert {"READY"} == set(site.states().values())
    assert (11, 9) == (memory["evictions"], memory["reloads"])
    assert 0 < memory["models_bytes"] <= BUDGET_BYTES


def test_requests_for_many_models_at_once_are_all_answered(open_site: Callable[..., Site], tmp_path: Path) -> None:
    """More are wanted at once than fit: they take turns, and each request gets its own model's answer."""
    factors = (2.0, 3.0)
    for factor in factors:
        heavy(tmp_path / "engines" / f"times-{factor:.0f}", factor)
    site = open_site(limits=QueueLimits(max_requests=1000))
    requests = [request(float(n), model=f"times-{factor:.0f}") for n in range(150) for factor in factors]
    answers = site.ask(*requests)

    expected = [n * factor for n in range(150) for factor in factors]
    assert expected == [float(response(answer).outputs["y"][0, 0]) for answer in answers]


def test_models_with_threads_of_their_own_move_as_well(open_site: Callable[..., Site], tmp_path: Path) -> None:
    """The thread of a model that was sent away waits for it to come back."""
    for factor in (2, 3):
        heavy(tmp_path / "engines" / f"times-{factor}", float(factor))
    site = open_site(inline_ms=-1.0)

    assert [2.0, 3.0] * 3 == [site.factor(model=f"times-{factor}") for factor in (2, 3) * 3]


def test_what_can_never_fit_is_unavailable_and_harms_nobody(open_site: Callable[..., Site], tmp_path: Path) -> None:
    """It says why, in numbers; the others serve."""
    heavy(tmp_path / "engines" / "double", 2.0)
    make_package(tmp_path / "engines" / "huge", misbehaving([], width=4000), backend="reference", max_batch=1024)
    site = open_site()
    huge = next(model for model in site.service.models() if model.model == "huge")

    assert "UNAVAILABLE" == huge.state
    assert "can never fit" in huge.reason
    assert f"{BUDGET_BYTES:,}" in huge.reason
    assert 2.0 == site.factor()


def test_a_package_that_broke_while_its_model_was_away(open_site: Callable[..., Site], tmp_path: Path) -> None:
    """The request that called for it is told so, and its model says why."""
    broken = heavy(tmp_path / "engines" / "double", 2.0)
    heavy(tmp_path / "engines" / "other", 3.0)
    site = open_site()
    assert ["other"] == resident(site)
    (broken / GRAPH).write_bytes(b"no graph any more")
    (answer,) = site.ask(request(1.0))

    assert 503 == answer.status
    assert "altered" in next(model.reason for model in site.service.models() if model.model == "double")
    assert 3.0 == site.factor(model="other")


def test_who_cannot_wait_is_told_when_to_come_back(open_site: Callable[..., Site], tmp_path: Path) -> None:
    """503 at once, with an honest moment; by then the model is there."""
    heavy(tmp_path / "engines" / "double", 2.0)
    heavy(tmp_path / "engines" / "other", 3.0)
    site = open_site()
    (answer,) = site.ask(request(1.0, deadline=time.monotonic() + 1e-4))

    assert isinstance(answer.result, Unavailable)
    assert 503 == answer.status
    assert answer.result.retryable
    assert 1 <= (answer.result.retry_after_ms or 0) < 20_000
    assert 1 == site.service.memory()["refusals"]
    site.until(lambda: resident(site) == ["double"])


def test_a_large_model_is_replaced(open_site: Callable[..., Site], tmp_path: Path) -> None:
    """Two of it do not fit: the former one goes, and requests wait for the new one. Nothing fails."""
    heavy(tmp_path / "engines" / "large", 2.0)
    site = open_site()
    before = site.factor(model="large")
    heavy(tmp_path / "engines" / "large", 3.0)
    site.service.reload()
    site.until(lambda: site.factor(model="large") == 3.0)

    assert (2.0, {200}) == (before, {answer.status for answer in site.answers})
    assert 0 < site.service.memory()["models_bytes"] <= BUDGET_BYTES


def test_who_calls_as_the_call_before_is_given_up_is_heard(open_site: Callable[..., Site], tmp_path: Path) -> None:
    """It was taken for part of a call that nobody waited for any more."""
    for factor in (2, 3):
        heavy(tmp_path / "engines" / f"times-{factor}", float(factor))
    site = open_site()
    (away,) = (model.model for model in site.service.models() if model.worker is None)
    late = request(1.0, model=away)

    def give_up(model: ServedModel) -> None:
        del site.service._return
        site.service.submit(late)

    site.service._return = give_up  # type: ignore[method-assign]
    site.submit(request(1.0, model=away))
    site.until(lambda: late.ticket in {answer.ticket for answer in site.answers})

    assert {200} == {answer.status for answer in site.answers}


class Place:
    """One model with a worker of its own, which nobody brings back unless the test does."""

    def __init__(self, folder: Path) -> None:
        self.answers: list[Answer] = []
        self.during: Callable[[], object] = lambda: None
        self.called = 0
        self.expected_s = 1.0
        self.folder = folder
        self.model = ServedModel(
            "m", "1", limits=QueueLimits(), on_answer=self._take, on_called=self._call, clock=lambda: 0.0
        )
        self.come_back()

    def come_back(self) -> None:
        package = make_package(self.folder / "m", misbehaving([]), backend="reference")
        self.worker = Worker.load(package)
        self.model.put_in_service(self.worker, quick=True)

    def _take(self, answer: Answer) -> None:
        self.answers.append(answer)
        self.during()

    def _call(self, model: ServedModel) -> float:
        self.called += 1
        return self.expected_s


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_who_is_waited_for_stays(place: Place) -> None:
    """A model with requests does not leave, unless its turn is over; then they wait for it, and it is called back."""
    place.model.submit(request(1.0))

    assert "stays" == place.model.sleep()
    assert "gone" == place.model.sleep(even_if_wanted=True)
    assert (1, True, "READY") == (place.called, place.model.is_absent, place.model.state)
    assert not place.model.run_once()
    place.come_back()
    assert place.model.run_once()
    assert [200] == [answer.status for answer in place.answers]


def test_what_is_being_computed_is_finished_first(place: Place) -> None:
    """Sent away in the middle of a batch, the model gives its answers, and only then its memory."""
    gone: list[str] = []
    place.during = lambda: gone.append(place.model.sleep(even_if_wanted=True))
    place.model.submit(request(1.0))
    place.model.run_once()

    assert ["leaving"] == gone
    assert [2.0] == [float(response(answer).outputs["y"][0, 0]) for answer in place.answers]
    assert not place.model.is_leaving
    with pytest.raises(EngineFailed, match="closed"):
        place.worker.ask({"x": np.zeros((1, 4), np.float32)})


def test_a_model_that_is_away_says_what_it_is(place: Place) -> None:
    """Its metadata does not depend on where it is."""
    there = place.model.package, place.model.backend, place.model.content_types, place.model.is_at_its_best
    assert "gone" == place.model.sleep()

    assert there == (
        place.model.package, place.model.backend, place.model.content_types, place.model.is_at_its_best
    )  # fmt: skip


def test_who_waits_and_cannot_any_longer_is_told_so(place: Place) -> None:
    """Those whose deadline comes before the model does get a 503 while there is time; the others wait on."""
    place.model.sleep()
    place.expected_s = 0.0
    place.model.submit(request(1.0, deadline=2.0))
    place.model.submit(request(1.0, deadline=9.0))

    assert place.model.give_up_hopeless(5.0)
    assert [(503, 5000)] == [
        (answer.status, getattr(answer.result, "retry_after_ms", None)) for answer in place.answers
    ]
    assert 1 == place.model.waiting


def test_a_model_that_is_away_can_be_retired(place: Place) -> None:
    """What waits for it is answered 503, and nobody calls for it any more."""
    place.model.sleep()
    place.model.submit(request(1.0))
    place.model.retire()

    assert [503] == [answer.status for answer in place.answers]
    with pytest.raises(Unavailable, match="taken out of service"):
        place.model.submit(request(1.0))
    assert 1 == place.called
