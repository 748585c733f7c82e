"""Models that nobody asks are asked zeros: whose turn it is, and what follows from the answers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_sdk.runtime.messages import Answer, Request
from edge_sdk.runtime.service import Service
from tests.brokers import eventually
from tests.packages import make_package, misbehaving, scaling
from tests.runtime.requests import request

EVERY_S = 0.02


class Idle:
    """A service that is asked nothing but what a test asks; `odd` fails once for each time that `spoil` is called."""

    def __init__(self, folder: Path, *, inline_ms: float, every_s: float = EVERY_S) -> None:
        self.mark = folder / "mark"
        self.mark.parent.mkdir(parents=True, exist_ok=True)
        self.mark.touch()
        make_package(folder / "double", scaling(), name="double")
        odd = misbehaving([{"do": "raise", "once": str(self.mark)}])
        make_package(folder / "odd", odd, name="odd", backend="reference")
        self.answers: list[Answer] = []
        self.service = Service(
            folder,
            on_answer=self.answers.append,
            on_change=lambda: None,
            inline_ms=inline_ms,
            building=False,
            self_test_s=every_s,
        )
        self.service.start()
        eventually(lambda: all(model.state == "READY" for model in self.service.models()), "ready")

    def look(self) -> None:
        self.service.test_itself(time.monotonic())
        self.service.run_quick()

    def spoil(self) -> None:
        self.mark.unlink(missing_ok=True)

    def until(self, condition: Callable[[], bool], what: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        def step() -> bool:
            meanwhile()
            self.look()
            return condition()

        eventually(step, what)


Start = Callable[..., Idle]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[Idle] = []

    def make(inline_ms: float = 0.0, **options: float) -> Idle:
        made.append(Idle(tmp_path / str(len(made)), inline_ms=inline_ms, **options))
        return made[-1]

    yield make
    for each in made:
        each.service.stop(1.0)


@pytest.mark.parametrize("inline_ms", [0.0, 1000.0], ids=["own threads", "network thread"])
def test_a_model_that_stops_answering_is_noticed(start: Start, inline_ms: float) -> None:
    """One failure may be anybody's; after two in a row it is named, until it answers again. Nothing is counted."""
    idle = start(inline_ms)
    idle.until(lambda: idle.service.self_test == "ok", "passed")
    idle.until(lambda: bool(idle.service.ailing), "noticed", meanwhile=idle.spoil)
    ailing = idle.service.ailing
    idle.until(lambda: not idle.service.ailing, "answers again")
    figures = idle.service.snapshot()

    assert "odd/1" == ailing
    assert "ok" == idle.service.self_test
    assert [] == idle.answers
    assert {} == figures["answers"]
    assert [0, 0] == [model["batches"] for model in figures["models"].values()]


def test_who_answers_everybody_else_is_not_ill(start: Start) -> None:
    """A model that is asked all the time is never left alone, so no test can find that it recovered: its answers do."""
    idle = start(1000.0, every_s=1.0)

    def ask() -> None:
        idle.service.submit(request(1.0, model="odd", deadline=time.monotonic() + 60))

    idle.until(lambda: idle.service.self_test == "ok", "passed")
    idle.until(lambda: bool(idle.service.ailing), "noticed", meanwhile=idle.spoil)
    idle.mark.touch()
    ask()
    idle.until(lambda: not idle.service.ailing, "answers", meanwhile=ask)

    assert {200} == {answer.status for answer in idle.answers}


def test_a_verdict_falls_with_the_engine_it_was_about(start: Start) -> None:
    """A model that left memory is not ill; the engine that comes back is tested anew, and may fall ill by itself."""
    idle = start(1000.0)
    odd = next(model for model in idle.service.models() if model.model == "odd")
    clock = itertools.count(time.monotonic() + 3600.0)
    told: list[str] = []

    def look(*, spoilt: bool) -> str:
        if spoilt:
            idle.spoil()
        now = next(clock)
        idle.service.test_itself(now)
        idle.service.run_quick()
        idle.service.test_itself(now)  # what came of it, and nothing new
        return idle.service.ailing

    eventually(lambda: look(spoilt=False) == "" and idle.service.self_test == "ok", "passed")
    told.append(eventually(lambda: look(spoilt=True), "noticed"))
    left = odd.sleep()
    told.append(look(spoilt=False))
    idle.service.submit(request(1.0, model="odd", deadline=time.monotonic() + 60))
    idle.until(lambda: bool(idle.answers), "it is back")
    told.append(look(spoilt=False))
    told.append(eventually(lambda: look(spoilt=True), "noticed again"))

    assert "gone" == left
    assert ["odd/1", "", "", "odd/1"] == told
    assert [200] == [answer.status for answer in idle.answers]


def test_each_model_has_its_turn(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = start()
    asked: set[str] = set()
    for model in idle.service.models():
        submit = model.submit

        def noted(sent: Request, submit: Callable[[Request], None] = submit) -> None:
            asked.add(sent.model)
            submit(sent)

        monkeypatch.setattr(model, "submit", noted)
    idle.until(lambda: len(asked) == 2, "both were asked")

    assert {"double", "odd"} == asked


def test_a_model_that_never_passed_is_not_called_ill(start: Start) -> None:
    """Zeros need not make sense to every model."""
    idle = start()
    failures = 0

    def spoil() -> None:
        nonlocal failures
        failures += idle.mark.exists()
        idle.spoil()

    idle.until(lambda: failures > 8, "it fails", meanwhile=spoil)

    assert "" == idle.service.ailing


def test_a_model_that_is_asked_is_not_tested(start: Start) -> None:
    """A request that it answers shows as much; nor is its place in memory kept by tests."""
    idle = start(every_s=3600.0)
    idle.service.submit(request(1.0))
    eventually(lambda: idle.answers, "answered")
    used = {model.model: model.last_used for model in idle.service.models()}
    for _ in range(5):
        idle.look()

    assert "untested" == idle.service.self_test
    assert used == {model.model: model.last_used for model in idle.service.models()}


def test_tests_do_not_make_a_model_used(start: Start) -> None:
    """The one that was used longest ago makes room for others: tests are no use."""
    idle = start()
    used = {model.model: model.last_used for model in idle.service.models()}
    idle.until(lambda: idle.service.self_test == "ok", "passed")

    assert used == {model.model: model.last_used for model in idle.service.models()}


def test_it_can_be_switched_off(start: Start) -> None:
    idle = start(every_s=0.0)
    for _ in range(10):
        idle.look()

    assert "untested" == idle.service.self_test
    assert 0 == idle.service.waiting()
