"""Pipelines at work: each request goes from stage to stage inside the daemon.

    pipelines = Pipelines(submit=service.submit, find=..., on_answer=..., ...)
    pipelines.follow(folder)                # the ServedModels of its pipelines, by key
    pipelines.take(answer)                  # of a request whose ticket is `internal`

One thread of its own does what is decided here, one event after the other, and computes nothing but cuts and boxes:
models are asked through the service, on whatever threads they have, and their answers come back as events. So nobody
waits for anybody, whatever the stages share. Deadline, priority and client of a request are those of everything that is
asked for it. A stage that fails is the answer, with its name.

A file that is no pipeline has a place all the same, which says why: that of a model which did not load.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Union
from zlib import crc32

import numpy as np

from edge_sdk.errors import (
    DeadlineExceeded,
    EdgeSdkError,
    InferenceFailed,
    PackageError,
    QueueFull,
    RequestError,
    Unavailable,
    UnsupportedType,
)
from edge_sdk.runtime.batching import QueueLimits
from edge_sdk.runtime.catalog import NO_VERSION, Key, called_like
from edge_sdk.runtime.messages import Answer, Request, Timing, stopping
from edge_sdk.runtime.served import UNLOADED, ServedModel
from edge_sdk.stages import REQUEST, PipelinePackage, Stage, pipeline_folders
from edge_sdk.tasks.base import BINARY, JPEG, PNG, Body, Payload
from edge_sdk.tasks.oip import decode_response, encode_request, encode_response
from edge_sdk.tasks.tensors import sniff
from edge_sdk.tensors import Array, Outputs

log = logging.getLogger(__name__)

Outcome = Union[Outputs, RequestError]
Elsewhere = Callable[[Stage, Payload, float, Callable[[Outcome], None]], None]
"""Asks the model of a stage that does not live here, within so many seconds, and calls back once, on any thread."""

Value = Union[Array, list[bytes]]


def is_internal(ticket: int) -> bool:
    """Whether a request was made here, for a stage: everybody else's tickets are positive."""
    return ticket < 0


class Pipeline(ServedModel):
    """A pipeline as the service sees a model: it takes requests, and has a state."""

    def __init__(
        self,
        pipeline: PipelinePackage,
        *,
        limits: QueueLimits,
        on_answer: Callable[[Answer], None],
        begin: Callable[[Pipeline, Request], None],
        find: Callable[[str, str | None], ServedModel | None],
        clock: Callable[[], float],
    ) -> None:
        super().__init__(pipeline.spec.name, pipeline.spec.version, limits=limits, on_answer=on_answer, clock=clock)
        self.pipeline = pipeline
        self.digest = pipeline.digest
        self.open = 0
        self.open_bytes = 0
        """Requests that are under way, and the bytes that they brought. Counted with `_lock` held."""
        self._limits = limits
        self._begin = begin
        self._find = find

    @property
    def content_types(self) -> tuple[str, ...]:
        return (JPEG, PNG)

    @property
    def waiting(self) -> int:
        return self.open

    @property
    def is_at_its_best(self) -> bool:
        return True

    def refresh(self) -> None:
        """Look at the stages' models again: all of them have to be there, and to take and give what is wired."""
        if self._retired:
            return
        problems = [problem for stage in self.pipeline.spec.stage if (problem := self._problem(stage))]
        loading = any(problem.endswith(" is loading") for problem in problems)
        self.reason = "; ".join(problems)
        self.state = "READY" if not problems else "LOADING" if loading else "UNAVAILABLE"

    def submit(self, request: Request) -> None:
        self.refresh()
        if not self.answers and not self._retired:
            raise Unavailable(
                f"The pipeline {self.model!r} lacks a stage: {self.reason}.",
                retry_after_ms=1000 if self.state == "LOADING" else None,
                retryable=self.state == "LOADING",
            )
        with self._lock:
            if self._retired:
                raise self._unavailable()
            size = len(request.payload.data)
            if self.open >= self._limits.max_requests or self.open_bytes + size > self._limits.max_bytes:
                raise QueueFull(f"The pipeline {self.model} has {self.open} requests under way.", retry_after_ms=100)
            self.open += 1
            self.open_bytes += size
            self._begin(self, request)  # before anybody retires it: what comes after that is not begun

    def finish(self, request: Request, answer: Answer) -> None:
        """The answer to a request that was begun."""
        with self._lock:
            self.open -= 1
            self.open_bytes -= len(request.payload.data)
        self._finish(answer._replace(model_version=self.version))

    def _problem(self, stage: Stage) -> str:
        """What keeps a stage from working; empty if nothing does."""
        if stage.model is None or stage.is_elsewhere:  # who lives elsewhere is seen when he is asked
            return ""
        found = self._find(stage.model, stage.version)
        where = f"stage {stage.name!r}: the model {stage.model!r}"
        if found is None:
            return f"{where} is not on this device"
        if isinstance(found, Pipeline):
            return f"{where} is a pipeline itself"
        if not found.answers or (package := found.package) is None:
            return f"{where} is {'loading' if found.state == 'LOADING' else 'unavailable'}"
        if stage.picture is not None:
            if JPEG not in found.content_types:
                return f"{where} takes no pictures; its spec needs a [preprocess] table"
        elif set(stage.inputs) != (asked := {spec.name for spec in package.manifest.asked}):
            return f"{where} takes {', '.join(sorted(asked))}, and is wired with {', '.join(sorted(stage.inputs))}"
        given = {spec.name for spec in package.manifest.answered}
        if stage.picture is not None and package.manifest.task == "image-classification":
            given = {"classification"}
        if missing := sorted(self.pipeline.spec.used_of(stage.name) - given):
            return f"{where} has no output {missing[0]!r}; it has {', '.join(sorted(given))}"
        return ""


@dataclass
class _Asked:
    """A stage that is being computed: one request, or one for each picture."""

    stage: Stage
    started: float
    missing: int
    outputs: list[Outputs]
    """Of each, in their order; empty where it is missing."""


@dataclass(eq=False)
class _Run:
    """A request on its way through its pipeline."""

    pipeline: Pipeline
    request: Request
    began: float
    values: dict[str, Value] = field(default_factory=dict)
    """By source: what is there."""
    left: list[Stage] = field(default_factory=list)
    """The stages that have not begun, in the order of the spec."""
    running: int = 0
    stages_ms: list[tuple[str, float]] = field(default_factory=list)
    over: bool = False


class Pipelines:
    """All pipelines of one service. `follow` is the loader's, the rest may be called by any thread."""

    def __init__(
        self,
        *,
        submit: Callable[[Request], None],
        find: Callable[[str, str | None], ServedModel | None],
        on_answer: Callable[[Answer], None],
        on_due: Callable[[], None],
        limits: QueueLimits,
        elsewhere: Elsewhere | None,
        clock: Callable[[], float],
    ) -> None:
        """`on_due`: a quick model may have something to compute."""
        self._elsewhere = elsewhere
        self._submit = submit
        self._find = find
        self._on_answer = on_answer
        self._on_due = on_due
        self._limits = limits
        self._clock = clock
        self._served: dict[Key, ServedModel] = {}
        self._runs: set[_Run] = set()  # under way; each is put once and taken once
        self._tickets: Iterator[int] = itertools.count(-1, -1)
        self._asked: dict[int, tuple[_Run, _Asked, int]] = {}  # by internal ticket; each is put once and taken once
        self._events: queue.SimpleQueue[tuple[_Run, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def served(self) -> Mapping[Key, ServedModel]:
        """Each a Pipeline, but for those whose files are none."""
        return self._served

    def follow(self, folder: Path, unloaded: Set[Key] = frozenset()) -> None:
        """Serve the pipelines that lie in the folder now; those that did not change go on. Of those that are
        `unloaded`, there is a place that says so, and of those that are broken one that says why."""
        found: dict[Key, ServedModel] = {}
        former = {each.pipeline.path: each.pipeline for each in self._served.values() if isinstance(each, Pipeline)}
        for path in pipeline_folders(folder):
            try:
                package = PipelinePackage.open(path)
            except PackageError as exc:
                log.error("%s", exc)
                if path not in former:
                    key = called_like(path), NO_VERSION
                    found.setdefault(key, self._broken(key, str(exc), away=key in unloaded))
                    continue
                package = former[path]  # it goes on as it was
            key = package.spec.name, package.spec.version
            known = self._served.get(key)
            away = key in unloaded
            if known is None or known.digest != package.digest or known.is_retired != away:
                known = self._new(package)
                if away:
                    known.fail(UNLOADED)
                    known.retire()
            found[key] = known
        gone = [each for key, each in self._served.items() if found.get(key) is not each]
        self._served = found
        if found and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="edge-sdk-pipelines", daemon=True)
            self._thread.start()
        for each in gone:
            each.retire()

    def refresh(self) -> None:
        """Models have changed; pipelines may have, too."""
        for each in self._served.values():
            if isinstance(each, Pipeline):
                each.refresh()

    def take(self, answer: Answer) -> None:
        """The answer to a request that was made here."""
        run, asked, place = self._asked.pop(answer.ticket)
        self._events.put((run, lambda: self._take(run, asked, place, answer.result)))

    def stop(self) -> None:
        """Begin nothing more, and answer 503 to what is under way; `join` waits for that."""
        for each in self._served.values():
            each.retire()
        self._events.put(None)

    def join(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _broken(self, key: Key, problem: str, *, away: bool) -> ServedModel:
        """The place of a file that is no pipeline."""
        place = ServedModel(*key, limits=self._limits, on_answer=self._on_answer, clock=self._clock)
        place.fail(UNLOADED if away else problem)
        if away:
            place.retire()
        return place

    def _new(self, package: PipelinePackage) -> Pipeline:
        return Pipeline(
            package,
            limits=self._limits,
            on_answer=self._on_answer,
            begin=self._put,
            find=self._find,
            clock=self._clock,
        )

    def _put(self, pipeline: Pipeline, request: Request) -> None:
        run = _Run(pipeline, request, self._clock(), left=list(pipeline.pipeline.spec.stage))
        self._runs.add(run)
        self._events.put((run, lambda: self._start(run)))

    def _work(self) -> None:
        while (event := self._events.get()) is not None:
            run, act = event
            try:
                act()
            except Exception:
                log.exception("A defect of edge-sdk: a request of the pipeline %s could not go on.", run.pipeline.model)
                if not run.over:
                    self._end(run, InferenceFailed("The pipeline failed; the device's log has the reason."))
        for run in tuple(self._runs):  # what they wait for may never come
            self._end(run, stopping())

    # On the thread

    def _start(self, run: _Run) -> None:
        data = run.request.payload.data
        try:
            if (kind := sniff(data)) not in (JPEG, PNG):
                raise UnsupportedType(f"The pipeline {run.pipeline.model} takes a JPEG or PNG picture; {kind} came.")
        except RequestError as exc:
            self._end(run, exc)
            return
        run.values[REQUEST] = [data]
        self._go_on(run)

    def _go_on(self, run: _Run) -> None:
        """Begin every stage whose sources are there; answer when nothing is left."""
        begun = True
        while begun and not run.over:
            begun = False
            for stage in [each for each in run.left if all(source in run.values for source in each.sources)]:
                run.left.remove(stage)
                begun = True
                try:
                    self._begin(run, stage)
                except RequestError as exc:
                    self._end(run, _of_stage(stage, exc))
                    return
        if not run.over and not run.left and not run.running:
            self._answer(run)

    def _begin(self, run: _Run, stage: Stage) -> None:
        started = self._clock()
        if run.request.deadline <= started:
            raise DeadlineExceeded("The deadline passed before its turn came.")
        if stage.op is not None:
            for name, value in _operated(stage, run.values).items():
                run.values[f"{stage.name}.{name}"] = value
            run.stages_ms.append((stage.name, (self._clock() - started) * 1000))
            return
        payloads = _payloads(stage, run.values)
        if not payloads:
            for name in run.pipeline.pipeline.spec.used_of(stage.name):
                run.values[f"{stage.name}.{name}"] = self._nothing(stage, name)
            return
        asked = _Asked(stage, started, len(payloads), [{}] * len(payloads))
        run.running += 1
        if stage.is_elsewhere:
            self._ask_elsewhere(run, asked, payloads)
            return
        for place, payload in enumerate(payloads):
            ticket = next(self._tickets)
            self._asked[ticket] = run, asked, place
            # With a key of its own: if one of them ends the process, that one is known by it.
            key = run.request.key and (run.request.key ^ crc32(f"{stage.name}:{place}".encode()) or 1)
            request = run.request._replace(ticket=ticket, model=stage.model or "", version=stage.version, key=key)
            self._submit(request._replace(payload=payload, received=started, id=None))
        self._on_due()

    def _nothing(self, stage: Stage, name: str) -> Array:
        """What a model says of no picture at all: as many rows."""
        found = self._find(stage.model or "", stage.version)
        package = found.package if found is not None else None
        spec = next((spec for spec in package.manifest.answered if spec.name == name), None) if package else None
        return np.empty(0, object if spec is None or spec.dtype == "string" else spec.dtype)

    def _ask_elsewhere(self, run: _Run, asked: _Asked, payloads: Sequence[Payload]) -> None:
        if self._elsewhere is None:
            raise Unavailable("Its model lives elsewhere, and there is no way to ask.", retryable=False)
        left_s = max(0.0, run.request.deadline - self._clock())
        for place, payload in enumerate(payloads):

            def done(outcome: Outcome, place: int = place) -> None:
                self._events.put((run, lambda: self._land(run, asked, place, outcome)))

            self._elsewhere(asked.stage, payload, left_s, done)

    def _take(self, run: _Run, asked: _Asked, place: int, result: Body | RequestError) -> None:
        if isinstance(result, Body):
            self._land(run, asked, place, decode_response(result.data, result.header_length).outputs)
        else:
            self._land(run, asked, place, result)

    def _land(self, run: _Run, asked: _Asked, place: int, outcome: Outcome) -> None:
        """The answer to a stage, or to one picture of it."""
        if run.over:
            return
        if isinstance(outcome, RequestError):
            self._end(run, _of_stage(asked.stage, outcome))
            return
        if missing := sorted(run.pipeline.pipeline.spec.used_of(asked.stage.name) - set(outcome)):
            self._end(run, _of_stage(asked.stage, InferenceFailed(f"Its answer has no output {missing[0]!r}.")))
            return
        asked.outputs[place] = outcome
        asked.missing -= 1
        if asked.missing:
            return
        try:
            self._gather(run, asked)
        except ValueError:  # of unlike shapes
            error = InferenceFailed("Its answers to the parts of the picture are of different sizes.")
            self._end(run, _of_stage(asked.stage, error))
        else:
            self._go_on(run)

    def _gather(self, run: _Run, asked: _Asked) -> None:
        """Everything of a stage is there: for those that read it."""
        run.running -= 1
        run.stages_ms.append((asked.stage.name, (self._clock() - asked.started) * 1000))
        for name in run.pipeline.pipeline.spec.used_of(asked.stage.name):
            arrays = [each[name] for each in asked.outputs]
            run.values[f"{asked.stage.name}.{name}"] = np.stack(arrays) if asked.stage.fans_out else arrays[0]

    def _answer(self, run: _Run) -> None:
        spec, accept = run.pipeline.pipeline.spec, run.request.payload.accept
        outputs = {name: np.asarray(run.values[source]) for name, source in spec.outputs.items()}
        try:
            body = encode_response(
                outputs, model_name=spec.name, model_version=spec.version, binary=accept == BINARY
            )  # fmt: skip
        except EdgeSdkError as exc:
            self._end(run, exc if isinstance(exc, RequestError) else InferenceFailed("The answer cannot be written."))
            return
        self._end(run, body)

    def _end(self, run: _Run, result: Body | RequestError) -> None:
        run.over = True
        self._runs.discard(run)
        waited_ms, whole_ms = (
            (until - since) * 1000 for since, until in ((run.request.received, run.began), (run.began, self._clock()))
        )
        timing = None
        if isinstance(result, Body):
            timing = Timing(waited_ms, whole_ms, stages=tuple(run.stages_ms))
        run.pipeline.finish(run.request, Answer(run.request.ticket, result, timing=timing))


def _payloads(stage: Stage, values: Mapping[str, Value]) -> list[Payload]:
    if stage.picture is not None:
        return [Payload(picture, accept=BINARY) for picture in values[stage.picture]]
    body = encode_request({name: np.asarray(values[source]) for name, source in stage.inputs.items()})
    return [Payload(body.data, body.content_type, body.header_length)]


def _operated(stage: Stage, values: Mapping[str, Value]) -> dict[str, Value]:
    from edge_sdk.tasks.boxes import crops, fastestdet_boxes

    tensors = {name: np.asarray(values[source]) for name, source in stage.inputs.items()}
    if stage.op == "crop":
        (picture,) = values[stage.picture or REQUEST]
        return {"pictures": crops(picture, tensors["boxes"])}
    head = tensors["head"]
    found = fastestdet_boxes(
        head, min_score=stage.min_score, max_overlap=stage.max_overlap, at_most=stage.at_most
    )  # fmt: skip
    labels = np.empty(len(found.classes), object)
    names: Sequence[str] = stage.labels if isinstance(stage.labels, tuple) else ()
    labels[:] = [(names[index] if index < len(names) else str(index)).encode() for index in found.classes.tolist()]
    return {"boxes": found.boxes, "scores": found.scores, "classes": found.classes, "labels": labels}


def _of_stage(stage: Stage, error: RequestError) -> RequestError:
    """The same error, with the name of the stage it is from."""
    kind = type(error)
    return kind(
        f"Stage {stage.name!r}: {error.problem}",
        fix=error.fix,
        retry_after_ms=error.retry_after_ms,
        retryable=error.retryable,
    )
