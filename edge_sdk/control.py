"""Commands carried out: pinged, told, loaded, unloaded, drained, tested.

The daemon hands over what comes on its command topics, and calls `perform` each turn. Nothing here takes long: what
does is done elsewhere, and answered when it is done. Loading is the loader's thread's; a self-test is a request to each
model, which waits in its queue and is computed as any other, so that it shows what a client would see.

Each command has one answer, by the same session that sees to the answers of requests: acknowledged after the broker
took the answer, recognised when it comes again. A command that was being carried out when the daemon died is carried
out again; all of them may be.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from edge_sdk import __version__
from edge_sdk.errors import EdgeSdkError, Malformed, RequestError
from edge_sdk.mqtt import commands
from edge_sdk.mqtt.commands import Command, CommandName, Outcome
from edge_sdk.mqtt.session import Session
from edge_sdk.mqtt.topics import Topics
from edge_sdk.mqtt.transports.base import Received
from edge_sdk.runtime.messages import Answer
from edge_sdk.runtime.self_test import question_of_zeros
from edge_sdk.runtime.service import Service

log = logging.getLogger(__name__)

SELF_TEST_S = 20.0
"""How long a model may take to answer its self-test, what waits before it included."""


@dataclass
class _SelfTest:
    """One that is going on: what each model said, and the tickets of those that have not."""

    ticket: int
    command: Command
    until: float
    open: dict[int, str] = field(default_factory=dict)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)


class Control:
    """Carries out the commands to one device. It belongs to the thread that owns the session."""

    def __init__(
        self,
        topics: Topics,
        session: Session,
        service: Service,
        tickets: Iterator[int],
        *,
        info: Callable[[], Mapping[str, Any]],
        drain: Callable[[], Mapping[str, Any]],
        resume: Callable[[], Mapping[str, Any]],
        wake: Callable[[], None],
    ) -> None:
        """`tickets` are the session's, of which self-tests take theirs; `wake` may be called from any thread."""
        self.heard = 0
        """Commands that came, again or for the first time."""
        self._topics = topics
        self._session = session
        self._service = service
        self._tickets = tickets
        self._info = info
        self._drain = drain
        self._resume = resume
        self._wake = wake
        self._done: deque[tuple[int, Command, Outcome]] = deque()  # appended by any thread
        self._self_tests: list[_SelfTest] = []

    def take(self, event: Received, now: float) -> bool:
        """Whether the message was a command; then it is answered, now or later. A retained one is an old one."""
        name = self._topics.parse_command(event.message.topic)
        if name is None or event.message.retain:
            return False
        self.heard += 1
        command = commands.read(event, name)
        intake = self._session.received(event, commands.route(command, self._topics), now)
        if intake.fate in ("joined", "replayed"):
            return True
        log.info("Command %s%s.", name, f": {command.problem}" if command.problem else "")
        try:
            if intake.fate == "reused":
                raise Malformed("This transaction was used before, with another payload.")
            if command.problem:
                raise Malformed(command.problem)
            self._begin(name, intake.ticket, command, now)  # type: ignore[arg-type]  # `read` knows the names
        except EdgeSdkError as exc:
            self._finish(intake.ticket, command, Outcome(error=str(exc)))
        return True

    def note(self, answer: Answer) -> None:
        """An answer that is no client's: a model's to its self-test, or one that came too late."""
        for test in self._self_tests:
            if (model := test.open.pop(answer.ticket, None)) is not None:
                test.found[model] = _judged(answer)

    def perform(self, now: float) -> None:
        """Answer what has ended meanwhile."""
        for test in [test for test in self._self_tests if not test.open or test.until <= now]:
            for model in test.open.values():
                test.found[model] = {"ok": False, "error": f"It gave no answer within {SELF_TEST_S:g} s."}
            self._self_tests.remove(test)
            self._finish(test.ticket, test.command, _verdict(test.found))
        while self._done:
            ticket, command, outcome = self._done.popleft()
            self._session.answered(ticket, commands.phrase(command, outcome, self._topics), now)

    @property
    def has_news(self) -> bool:
        """Whether `perform` has something to answer."""
        return bool(self._done) or any(not test.open for test in self._self_tests)

    def _begin(self, name: CommandName, ticket: int, command: Command, now: float) -> None:
        """Raises EdgeSdkError for what cannot be done."""
        if name == "ping":
            self._finish(ticket, command, Outcome({"version": __version__}))
        elif name == "info":
            self._finish(ticket, command, Outcome(self._info()))
        elif name == "drain":
            self._finish(ticket, command, Outcome(self._drain()))
        elif name == "resume":
            self._finish(ticket, command, Outcome(self._resume()))
        elif name == "load":
            self._await(ticket, command, self._service.load(command.text("model"), command.text("version")))
        elif name == "unload":
            model = command.text("model")
            if model is None:
                raise Malformed("`unload` names no `model`.")
            self._await(ticket, command, self._service.unload(model, command.text("version")))
        elif name == "selftest":
            self._test(ticket, command, now)
        else:
            raise Malformed(
                "Models cannot be deployed over MQTT in this release.",
                fix="Put the package into the engines folder and send `load`.",
            )

    def _test(self, ticket: int, command: Command, now: float) -> None:
        """Ask each model that answers one question of zeros."""
        test = _SelfTest(ticket, command, now + SELF_TEST_S)
        self._self_tests.append(test)
        for model in self._service.models():
            name = f"{model.model}/{model.version}"
            if (package := model.package) is None:
                # A pipeline that answers has no engine of its own: its models are asked here, or where they live.
                wrong = {} if model.answers else {"error": model.reason or f"It is {model.state}."}
                test.found[name] = {"ok": model.answers, **wrong}
                continue
            own = next(self._tickets)
            test.open[own] = name
            self._service.submit(question_of_zeros(model, package, own, now, test.until))

    def _await(self, ticket: int, command: Command, states: Future[dict[str, str]]) -> None:
        states.add_done_callback(partial(self._loaded, ticket, command))

    def _loaded(self, ticket: int, command: Command, states: Future[dict[str, str]]) -> None:
        """On the loader's thread."""
        error = states.exception()
        if error is None:
            self._finish(ticket, command, Outcome({"models": states.result()}))
        elif isinstance(error, EdgeSdkError):
            self._finish(ticket, command, Outcome(error=str(error)))
        else:
            log.error("A defect of edge-sdk: the command %s failed.", command.name, exc_info=error)
            self._finish(ticket, command, Outcome(error=f"a defect of edge-sdk ({type(error).__name__}); see the log"))
        self._wake()

    def _finish(self, ticket: int, command: Command, outcome: Outcome) -> None:
        self._done.append((ticket, command, outcome))


def _judged(answer: Answer) -> dict[str, Any]:
    if isinstance(answer.result, RequestError):
        return {"ok": False, "error": str(answer.result)}
    timing = {"infer_ms": round(answer.timing.infer_ms, 3)} if answer.timing is not None else {}
    return {"ok": True, **timing}


def _verdict(found: Mapping[str, Mapping[str, Any]]) -> Outcome:
    failed = sorted(name for name, result in found.items() if not result["ok"])
    error = f"{len(failed)} of {len(found)} models failed: {', '.join(failed)}." if failed else None
    return Outcome({"models": dict(sorted(found.items()))}, error)
