"""Deadlines at the turnstile: what nobody waits for any more when its turn comes is not computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from edge_sdk.runtime.admission import Claim
from edge_sdk.runtime.messages import Answer, Request
from edge_sdk.runtime.service import Service
from edge_sdk.runtime.turns import Turns
from edge_sdk.runtime.worker import Worker
from edge_sdk.spec import Serving
from tests.brokers import eventually
from tests.packages import make_package, misbehaving, scaling, stateful, total
from tests.runtime.requests import FOREVER, payload, request, response, statuses
from tests.runtime.test_sequences import RULES, part


class Waiting:
    """A worker whose batches find the one core of the device taken, until `let_in`. Its clock stands still."""

    def __init__(self, folder: Path, model: ModelProto, **package: Any) -> None:
        self.now = 0.0
        self.worker = Worker.load(make_package(folder, model, **package), clock=lambda: self.now)
        self.worker.warm_up()
        self._turns = Turns(cores=1)
        self._other = Claim("other", 1)
        self._turns.enter(self._other)
        self.worker.turnstile.close(self._turns, "waiting")

    def run(self, sent: list[Request], *, until: float) -> list[Answer]:
        """The answers to a batch whose turn comes at `until`; everything afterwards takes no time."""
        answers: list[Answer] = []
        thread = threading.Thread(target=lambda: answers.extend(self.worker.run_batch(sent)), daemon=True)
        thread.start()
        eventually(self.worker.turnstile.is_crowded, "a batch that waits")
        self.now = until
        self._turns.leave(self._other, 1.0)
        thread.join(20.0)
        return answers


@pytest.fixture
def wait(tmp_path: Path) -> Iterator[Callable[..., Waiting]]:
    made: list[Waiting] = []

    def waiting(model: ModelProto, **package: Any) -> Waiting:
        made.append(Waiting(tmp_path / "package", model, **package))
        return made[-1]

    yield waiting
    for each in made:
        each.worker.close()


@pytest.mark.parametrize("serving", [Serving(), Serving(instances=2)], ids=["one", "two instances"])
def test_who_came_too_late_for_his_turn_is_not_computed(wait: Callable[..., Waiting], serving: Serving) -> None:
    """The others of the batch are, without him; answers are in the order of the requests. To wait is no computing."""
    waiting = wait(scaling(), serving=serving)
    answers = waiting.run([request(1.0), request(2.0, deadline=3.0), request(5.0)], until=3.0)

    assert [200, 408, 200] == statuses(answers)
    assert [2.0, 10.0] == [response(answer).outputs["y"][0, 0] for answer in answers if answer.status == 200]
    assert [(3000.0, 0.0, 2)] * 2 == [t[:3] for answer in answers if (t := answer.timing) is not None]
    assert "waited 3000 ms for its turn" in str(answers[1].result)


@pytest.mark.parametrize("serving", [Serving(), Serving(instances=2)], ids=["one", "two instances"])
def test_a_batch_that_nobody_waits_for_is_not_computed(wait: Callable[..., Waiting], serving: Serving) -> None:
    """It would fail; and the next batch is not confused by it."""
    waiting = wait(misbehaving([{"do": "raise", "when": 1.0}]), backend="reference", serving=serving)
    late = waiting.run([request(1.0, deadline=3.0), request(1.0, deadline=2.0)], until=3.0)
    (next_one,) = waiting.worker.run_batch([request(4.0)])

    assert [408, 408] == statuses(late)
    assert 8.0 == response(next_one).outputs["y"][0, 0]


def test_sizes_that_only_the_request_knows_are_no_exception(wait: Callable[..., Waiting]) -> None:
    waiting = wait(total(), max_batch=1)
    sent = [request(payload(x=np.ones(length, np.float32)), deadline=deadline)
            for length, deadline in ((2, 1.0), (3, FOREVER), (4, 1.0))]  # fmt: skip

    assert [408, 200, 408] == statuses(waiting.run(sent, until=1.0))


def test_a_sequence_that_was_late_stays_where_it_was(wait: Callable[..., Waiting]) -> None:
    """Who is told that he came too late may ask again."""
    waiting = wait(stateful(), sequence=RULES)
    late = waiting.run([part(5.0, start=True, deadline=1.0), part(7.0, "b", start=True)], until=1.0)
    again = waiting.worker.run_batch([part(2.0, start=True), part(1.0, "b")])

    assert [408, 200] == statuses(late)
    assert [2.0, 8.0] == [float(response(answer).outputs["total"][0, 0]) for answer in again]


def test_models_that_wait_for_each_other_compute_nothing_expired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three slow models on one core: who waited for another longer than he could is told so; what he could wait is
    told as waiting, not as computing."""
    monkeypatch.setattr("edge_sdk.runtime.turns.physical_cores", lambda: 1)
    took_s, patience_s = 0.4, 0.3
    for name in ("one", "two", "three"):
        slow = misbehaving([{"do": "sleep", "seconds": took_s, "when": 5.0, "once": str(tmp_path / f"{name}.began")}])
        make_package(tmp_path / name, slow, name=name, backend="reference")
    answers: dict[int, Answer] = {}
    service = Service(
        tmp_path,
        on_answer=lambda answer: answers.update({answer.ticket: answer}),
        on_change=lambda: None,
        inline_ms=0.0,
        building=False,
    )
    service.start()
    try:
        eventually(lambda: all(model.state == "READY" for model in service.models()), "ready")
        now = time.monotonic()
        first = request(5.0, model="one", received=now)
        service.submit(first)
        eventually((tmp_path / "one.began").exists, "the first one computes")
        late = request(5.0, model="two", received=now, deadline=now + patience_s)
        patient = request(5.0, model="three", received=now)
        service.submit(late)
        service.submit(patient)
        eventually(lambda: len(answers) == 3, "three answers")
    finally:
        service.stop(1.0)
    timing = answers[patient.ticket].timing
    assert timing is not None

    assert [200, 408, 200] == [answers[sent.ticket].status for sent in (first, late, patient)]
    assert not (tmp_path / "two.began").exists()
    assert timing.queue_ms > 100, "it waited for most of what the first one took"
    assert timing.infer_ms > took_s * 1000 * 0.9
