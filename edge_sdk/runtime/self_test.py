"""Asking models that nobody asks, so that one which has stopped answering is known before somebody does.

A request of zeros goes the way of every request: queue, decoder, the thread that computes, encoder. One model is asked
at a time, in turn, and only one that is in memory, that nobody waits for, and that has given no answer for a while. It
costs at most one part in `_SHARE` of the time. Pure but for the models it looks at; the time is passed in.

What failures show falls with the engine that they are about: once that has left memory, the next one is tested anew.

    if (model := tests.choose(models, now)) is not None:
        model.submit(tests.request_for(model, now))
    tests.note(answer, now)
    tests.ailing            # which model answered before, and does not any more; empty while there is none
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from edge_sdk.errors import DeadlineExceeded, InferenceFailed, OutOfMemory, QueueFull, Unavailable
from edge_sdk.package import EnginePackage
from edge_sdk.runtime.messages import SELF_TEST, Answer, Request
from edge_sdk.runtime.served import ServedModel
from edge_sdk.tasks.base import BINARY, Payload, SequencePart
from edge_sdk.tasks.oip import encode_request
from edge_sdk.tensors import zeros

ANSWER_S = 30.0
"""How long a model may take to answer; what takes long by itself is not asked so often that this matters."""
_SHARE = 100
_FAILURES = 2
"""So many in a row are no accident."""
_WELL = 200  # status
_AGAIN = 4
"""A model that failed is asked again in this part of the usual time."""


@dataclass
class _Course:
    """What the tests of one model have shown."""

    asked: float = -math.inf
    has_passed: bool = False
    failures: int = 0
    answered: int = 0
    """Requests of others that it had answered well when it failed."""
    engine: float | None = None
    """Since when the engine that failed is in memory; None: it is not."""
    digest: str = ""
    """Of the package that has passed."""

    def follow(self, model: ServedModel) -> None:
        """Forget what was shown by an engine, or a package, that is not in service any more."""
        engine = model.since if model.worker is not None else None
        if engine != self.engine:
            self.engine, self.failures = engine, 0
        if model.digest != self.digest:  # zeros may make no sense to another one
            self.digest, self.has_passed = model.digest, False


class SelfTests:
    """Whose turn it is, and what came of it. For one thread, but for `note`, which only takes note."""

    def __init__(self, every_s: float) -> None:
        """`every_s` is how long a model may be left alone; 0: nobody is asked."""
        self._every_s = every_s or math.inf
        self._courses: dict[ServedModel, _Course] = {}
        self._next_at = -math.inf
        self._asked: ServedModel | None = None
        self._answer: Answer | None = None

    @property
    def ailing(self) -> str:
        """Only of models that have passed before: zeros need not make sense to all."""
        return ", ".join(
            f"{model.model}/{model.version}"
            for model, course in self._courses.items()
            if course.has_passed and course.failures >= _FAILURES
        )

    @property
    def state(self) -> str:
        """`failed`; `ok` once everybody who can be asked has passed; else `untested`."""
        if self.ailing:
            return "failed"
        passed = [course.has_passed for model, course in self._courses.items() if _can_be_asked(model)]
        return "ok" if passed and all(passed) else "untested"

    def choose(self, models: Collection[ServedModel], now: float) -> ServedModel | None:
        """Whom to ask now."""
        self._judge(now)
        for each, course in self._courses.items():
            course.follow(each)
            if course.failures and each.statistics.answers[_WELL] > course.answered:
                course.failures = 0  # whoever is asked all the time is not left alone, and has shown as much
        if now < self._next_at or self._asked is not None:
            return None
        self._courses = {model: self._courses.get(model) or _Course() for model in models}
        left_alone = [model for model in models if self._is_left_alone(model, now)]
        if not left_alone:
            return None
        model = min(left_alone, key=lambda each: (-self._courses[each].failures, self._courses[each].asked))
        worker = model.worker
        batch_s = worker.batch_s if worker is not None else 0.0
        self._next_at = now + max(self._every_s / (_AGAIN * len(models)), _SHARE * batch_s)
        return model

    def request_for(self, model: ServedModel, now: float) -> Request:
        """What `model` is asked; the test has begun."""
        package = model.package
        assert package is not None  # it is in memory
        self._asked, self._courses[model].asked = model, now
        return question_of_zeros(model, package, SELF_TEST, now, now + ANSWER_S, accept=BINARY)

    def note(self, answer: Answer) -> None:
        """The answer to the request, on whichever thread."""
        self._answer = answer

    def _judge(self, now: float) -> None:
        """That zeros are no good request shows that the model moves, too; that there was no room shows nothing."""
        if (model := self._asked) is None:
            return
        course = self._courses[model]
        answer, self._answer = self._answer, None
        if answer is None and now < course.asked + 2 * ANSWER_S:
            return
        self._asked = None
        if answer is None or isinstance(answer.result, (InferenceFailed, DeadlineExceeded)):
            course.failures += 1
            course.answered = model.statistics.answers[_WELL]
        elif not isinstance(answer.result, (Unavailable, QueueFull, OutOfMemory)):
            course.has_passed, course.failures = True, 0

    def _is_left_alone(self, model: ServedModel, now: float) -> bool:
        """Whether it can be asked, nobody waits for it, and it has given no answer for a while."""
        if not _can_be_asked(model) or model.waiting:
            return False
        course = self._courses[model]
        pause_s = self._every_s / (_AGAIN if course.failures else 1)
        return now - max(course.asked, model.last_used) >= pause_s


def question_of_zeros(
    model: ServedModel,
    package: EnginePackage,
    ticket: int,
    now: float,
    deadline: float,
    *,
    accept: str | None = None,
) -> Request:
    """What a client could ask `model`, which serves `package`; of one that keeps states, a sequence of its own."""
    body = encode_request(zeros(package.manifest.asked))
    alone = SequencePart("selftest", start=True, end=True) if package.manifest.sequence is not None else None
    return Request(
        ticket=ticket,
        model=model.model,
        version=model.version,
        payload=Payload(body.data, body.content_type, body.header_length, accept, alone),
        received=now,
        deadline=deadline,
        client="selftest",
    )


def _can_be_asked(model: ServedModel) -> bool:
    """Whether it is in memory, and it is known how long it takes."""
    worker = model.worker
    return worker is not None and model.answers and math.isfinite(worker.batch_s)
