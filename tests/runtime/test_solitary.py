"""After a crash: suspects are computed alone, what is barred is not computed, everything else goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_sdk.errors import QueueFull
from edge_sdk.runtime.batching import QueueLimits
from edge_sdk.runtime.messages import Answer, Request
from edge_sdk.runtime.recorder import FlightRecorder
from edge_sdk.runtime.service import Service
from edge_sdk.runtime.solitary import Gate
from tests.brokers import eventually
from tests.packages import make_package, misbehaving, scaling
from tests.runtime.requests import request, response

SLOW_S = 0.3


class Served:
    """A service that starts after processes which ended with the keys `crashed`, each as often as it is named."""

    def __init__(
        self, folder: Path, *crashed: int, inline_ms: float = 0.0, limits: QueueLimits = QueueLimits()
    ) -> None:
        make_package(folder / "double", scaling(), name="double")
        odd = misbehaving([{"do": "sleep", "seconds": SLOW_S, "when": 5.0}, {"do": "raise", "when": 9.0}])
        make_package(folder / "odd", odd, name="odd", backend="reference")
        self.recorder = FlightRecorder()
        for key in crashed:
            self.recorder.quarantine.ended([key], time.monotonic())
        self.answers: dict[int, Answer] = {}
        self.order: list[int] = []
        self.service = Service(
            folder,
            on_answer=self._take,
            on_change=lambda: None,
            limits=limits,
            inline_ms=inline_ms,
            building=False,
            recorder=self.recorder,
        )
        self.service.start()

    def submit(self, value: float, *, model: str = "odd", key: int = 0) -> Request:
        sent = request(value, model=model, deadline=time.monotonic() + 60)._replace(key=key)
        self.service.submit(sent)
        return sent

    def answer(self, sent: Request) -> Answer:
        def look() -> Answer | None:
            self.service.run_quick()
            return self.answers.get(sent.ticket)

        found: Answer = eventually(look, f"an answer to {sent}")
        return found

    def doubled(self, sent: Request) -> float:
        return float(response(self.answer(sent)).outputs["y"][0, 0])

    def _take(self, answer: Answer) -> None:
        self.answers[answer.ticket] = answer
        self.order.append(answer.ticket)


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    made: list[Served] = []

    def make(*crashed: int, inline_ms: float = 0.0, limits: QueueLimits = QueueLimits()) -> Served:
        made.append(Served(tmp_path / str(len(made)), *crashed, inline_ms=inline_ms, limits=limits))
        return made[-1]

    yield make
    for each in made:
        each.service.stop(1.0)


@pytest.mark.parametrize("inline_ms", [0.0, 1000.0])
def test_suspects_are_answered_alone_and_acquitted(serve: Serve, inline_ms: float) -> None:
    """While one is computed nothing else is, of whichever model and thread; and before anything is loaded it waits."""
    place = serve(1, 2, inline_ms=inline_ms)
    together: list[list[int]] = []
    begin = place.recorder.begin

    def watched(*told: object) -> object:
        flight = begin(*told)  # type: ignore[arg-type]
        together.append([request.key for each in place.recorder.in_flight() for request in each.requests])
        return flight

    place.recorder.begin = watched  # type: ignore[method-assign, assignment]
    suspects = [place.submit(5.0, key=1), place.submit(2.0, key=2)]
    others = [place.submit(float(number), model=model) for number in range(3) for model in ("double", "odd")]
    found = [place.doubled(each) for each in (*suspects, *others)]

    assert [10.0, 4.0, 0.0, 0.0, 2.0, 2.0, 4.0, 4.0] == found
    assert [[1], [2]] == sorted(keys for keys in together if set(keys) != {0})
    assert not place.recorder.quarantine


def test_who_crashed_twice_is_refused(serve: Serve) -> None:
    """At once, with the moment from which it is tried again; and counted."""
    place = serve(1, 1)
    sent = place.submit(2.0, key=1)
    refused = place.answers[sent.ticket]
    fine = place.submit(2.0, key=3)

    assert 500 == refused.status
    assert "ended the device's process 2 times" in str(refused.result)
    assert " UTC" in str(refused.result)
    assert 4.0 == place.doubled(fine)
    assert {"suspects": 0, "barred": 1, "refused": 1} == place.service.snapshot()["quarantine"]


def test_a_suspect_that_merely_fails_is_acquitted(serve: Serve) -> None:
    """It gets its 500, and the process lives."""
    place = serve(1)

    assert 500 == place.answer(place.submit(9.0, key=1)).status
    assert not place.recorder.quarantine


SIZE = len(request(5.0).payload.data)


@pytest.mark.parametrize("limits", [QueueLimits(2), QueueLimits(max_bytes=2 * SIZE)], ids=["requests", "bytes"])
def test_no_more_suspects_wait_than_may(serve: Serve, limits: QueueLimits) -> None:
    """Who may not is told when to come back, which is when those before him are computed; and then he may."""
    place = serve(1, 2, 3, 4, limits=limits)
    first = place.answer(place.submit(5.0, key=1))
    waiting = [place.submit(5.0, key=2), place.submit(5.0, key=3)]
    held_bytes = place.service.memory()["queue_bytes"]
    refused = place.answers[place.submit(5.0, key=4).ticket].result
    found = [place.doubled(each) for each in waiting]
    again = place.doubled(place.submit(5.0, key=4))

    assert 200 == first.status
    assert 2 * SIZE == held_bytes
    assert isinstance(refused, QueueFull)
    assert refused.retryable
    assert refused.retry_after_ms is not None
    assert 1.9 * SLOW_S < refused.retry_after_ms / 1000 < 20 * SLOW_S
    assert [10.0, 10.0, 10.0] == [*found, again]
    assert 0 == place.service.memory()["queue_bytes"]


def test_suspects_that_wait_at_a_stop_are_answered(serve: Serve) -> None:
    """As what waits for a model: 503, and when to come back. The one that is being computed is finished."""
    place = serve(1, 2, 3)
    place.answer(place.submit(2.0, key=1))
    first, second = place.submit(5.0, key=2), place.submit(5.0, key=3)
    eventually(place.recorder.in_flight, "the first one is computed")
    place.service.stop(0.0)
    third = place.submit(2.0, key=3)

    assert [503, 503] == [place.answer(each).status for each in (second, third)]
    assert 10.0 == place.doubled(first)


def test_a_suspect_of_no_model_is_answered(serve: Serve) -> None:
    place = serve(1)

    assert 404 == place.answer(place.submit(1.0, model="none", key=1)).status


def test_a_daemon_without_a_crash_has_none_of_it(serve: Serve) -> None:
    place = serve()
    found = place.doubled(place.submit(2.0, key=1))

    assert 4.0 == found
    assert "quarantine" not in place.service.snapshot()


def test_the_gate_lets_nobody_in_beside_one_who_is_alone() -> None:
    """It waits for those inside, and those who come then wait for it or go away."""
    gate = Gate()
    gate.enter(wait=True)
    alone, done = threading.Event(), threading.Event()

    def be_alone() -> None:
        with gate.alone():
            alone.set()
            done.wait(10)

    thread = threading.Thread(target=be_alone)
    thread.start()
    eventually(lambda: gate.closed, "closed")
    before = alone.is_set()
    gate.leave()
    eventually(alone.is_set, "alone")
    refused = gate.enter(wait=False)
    done.set()
    let_in = gate.enter(wait=True)
    thread.join()

    assert not before
    assert not refused
    assert let_in
