"""A package, or a pipeline with its models, in this process: what the daemon does with a request, without a transport.

    with in_process(EnginePackage.open(folder)) as submit:     # or PipelinePackage
        body = submit(Payload(data)).result()

A pipeline is run by the very service that the daemon has. It is given a folder of links to the pipeline and to the
packages that it asks, so that whatever else lies beside them is neither loaded nor in the way.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from edge_sdk.backends.registry import usable_profile
from edge_sdk.errors import DeviceLost, PackageError, ProfileError, RequestError
from edge_sdk.package import EnginePackage
from edge_sdk.profiles import Machine
from edge_sdk.runtime.batching import QueueLimits
from edge_sdk.runtime.catalog import Entry, newest_first, scan
from edge_sdk.runtime.messages import Answer, Request
from edge_sdk.runtime.served import ServedModel
from edge_sdk.runtime.service import Service
from edge_sdk.runtime.worker import Worker
from edge_sdk.stages import PipelinePackage, Stage, folders_around
from edge_sdk.tasks.base import Body, Payload, SequencePart

_DEADLINE_S = 60.0
_STOP_S = 5.0
_NEVER_QUICK = -1.0
"""Milliseconds: each model computes on a thread of its own, for this one is the caller's."""

Submit = Callable[[Payload], "Future[Body]"]
"""From a payload to the future of its answer, whose exception is a RequestError or DeviceLost."""


def in_process(package: EnginePackage | PipelinePackage) -> AbstractContextManager[Submit]:
    """The runtime of one package, or of a pipeline and the models of its stages, which are looked for beside it.

    To a stateful model, a payload that names no sequence is one of its own, of a single request. PackageError where a
    pipeline's model is missing, does not load or does not fit, and where another device would have to be asked: only a
    daemon does that.
    """
    return _pipeline(package) if isinstance(package, PipelinePackage) else _model(package)


@contextmanager
def _model(package: EnginePackage) -> Iterator[Submit]:
    stateful = package.manifest.sequence is not None
    promised = _Promised()

    def submit(payload: Payload) -> Future[Body]:
        ticket, future = promised.another()
        if stateful and payload.sequence is None:
            payload = payload._replace(sequence=SequencePart(str(ticket), start=True, end=True))
        now = time.monotonic()
        try:
            served.submit(Request(ticket, package.name, payload, now, now + _DEADLINE_S))
        except RequestError as exc:
            promised.keep(Answer(ticket, exc))
        return future

    served = ServedModel(
        package.name,
        package.version,
        limits=QueueLimits(),
        on_answer=promised.keep,
        on_lost=promised.break_all,
        clock=time.monotonic,
    )
    worker = Worker.load(package)
    worker.warm_up()
    served.put_in_service(worker, quick=False)
    try:
        yield submit
    finally:
        served.retire()
        served.join(_STOP_S)


@contextmanager
def _pipeline(pipeline: PipelinePackage) -> Iterator[Submit]:
    machine = Machine.read()
    packages = _asked(pipeline, machine)
    for package in packages:
        package.verify()  # here it is still called by its own path
    promised, changed = _Promised(), threading.Event()

    def submit(payload: Payload) -> Future[Body]:
        ticket, future = promised.another()
        now = time.monotonic()
        name, version = pipeline.spec.name, pipeline.spec.version
        service.submit(Request(ticket, name, payload, now, now + _DEADLINE_S, version))
        return future

    def lose(loss: DeviceLost) -> None:
        promised.break_all(loss)
        changed.set()

    with tempfile.TemporaryDirectory(prefix="edge-sdk-") as folder:
        for number, path in enumerate([pipeline.path, *(package.path for package in packages)]):
            (Path(folder) / str(number)).symlink_to(path.absolute(), target_is_directory=True)
        service = Service(
            Path(folder),
            on_answer=promised.keep,
            on_change=changed.set,
            on_lost=lose,
            machine=machine,
            inline_ms=_NEVER_QUICK,
            building=False,
        )
        service.start()
        try:
            while any(model.state == "LOADING" for model in service.models()) and promised.broken is None:
                changed.wait()
                changed.clear()
            if promised.broken is not None:
                raise promised.broken
            _check(pipeline, service)
            yield submit
        finally:
            service.stop(_STOP_S if promised.broken is None else 0.0)


def _asked(pipeline: PipelinePackage, machine: Machine) -> list[EnginePackage]:
    """The packages that a pipeline asks, of the first folder around it that has them all; PackageError."""
    name = pipeline.spec.name
    for stage in pipeline.spec.stage:
        if stage.is_elsewhere:
            owner = f"the device {stage.device!r}" if stage.device is not None else f"the group {stage.group!r}"
            raise PackageError(
                f"The pipeline {name} asks {owner} for its stage {stage.name!r}, over MQTT, which only a daemon does.",
                fix=f"Serve it with `edge-sdk serve`, then ask with `edge-sdk infer {name}`, or measure with "
                f"`edge-sdk bench --broker URL {name}`.",
            )
    try:
        profile = usable_profile(machine)[0]
    except ProfileError:
        profile = None
    problem, folders = None, folders_around(pipeline.path)
    for folder in folders:
        entries = list(scan(folder, machine, profile).values())
        try:
            packages = [_newest(stage, entries, folders) for stage in pipeline.spec.stage if stage.model is not None]
        except PackageError as exc:
            problem = problem or exc
        else:
            return list({package.path: package for package in packages}.values())
    raise problem or PackageError(f"Nothing lies beside {pipeline.path}.", fix="Build its models there.")


def _newest(stage: Stage, entries: Sequence[Entry], folders: Sequence[Path]) -> EnginePackage:
    """The package of a stage's model, in the newest version where it names none; PackageError."""
    offered = {
        entry.version: entry
        for entry in entries
        if entry.model == stage.model and stage.version in (None, entry.version)
    }
    if not offered:
        version = f" in the version {stage.version}" if stage.version is not None else ""
        raise PackageError(
            f"The stage {stage.name!r} asks the model {stage.model!r}{version}, which is not in "
            f"{' or '.join(map(str, folders))}.",
            fix="Build it into that folder, or the pipeline into the folder of its models (--output).",
        )
    entry = offered[newest_first(offered)[0]]
    if entry.package is None:
        raise PackageError(entry.problem)
    return entry.package


def _check(pipeline: PipelinePackage, service: Service) -> None:
    """PackageError unless all models answer, and are what the pipeline was wired for."""
    name, models = pipeline.spec.name, service.models()
    for model in models:
        if not model.answers and model.model != name:
            raise PackageError(f"The model {model.model!r} of the pipeline {name} did not load: {model.reason}")
    for model in models:
        if not model.answers:
            raise PackageError(
                f"The pipeline {name} cannot be asked: {model.reason}.", fix="Wire it anew, or its models."
            )


class _Promised:
    """The answers that somebody waits for. Safe to use from any thread."""

    def __init__(self) -> None:
        self.broken: DeviceLost | None = None
        """Why there will be none any more."""
        self._futures: dict[int, Future[Body]] = {}
        self._last = 0
        self._lock = threading.Lock()

    def another(self) -> tuple[int, Future[Body]]:
        """A new ticket, and what its answer will be."""
        future: Future[Body] = Future()
        with self._lock:
            self._last += 1
            if self.broken is None:
                self._futures[self._last] = future
            else:
                future.set_exception(self.broken)
            return self._last, future

    def keep(self, answer: Answer) -> None:
        with self._lock:
            future = self._futures.pop(answer.ticket, None)
        if future is None:
            return  # it was broken
        if isinstance(answer.result, RequestError):
            future.set_exception(answer.result)
        else:
            future.set_result(answer.result)

    def break_all(self, loss: DeviceLost) -> None:
        """There are no answers any more, neither to those who wait nor to those who come."""
        with self._lock:
            self.broken = loss
            futures = [*self._futures.values()]
            self._futures.clear()
        for future in futures:
            future.set_exception(loss)
