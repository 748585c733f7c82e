"""Models in service: requests in, answers out, packages loaded, swapped and retired while both go on.

    service = Service(engines, on_answer=..., on_change=...)
    service.start()                    # loads in the background; `models` tells how far it is
    service.submit(request)            # exactly one answer comes through `on_answer`, whatever happens
    service.run_quick()                # compute what waits for quick models, on this thread
    service.reload()                   # look at the folder again; no request is lost
    service.stop(limit_s)              # finish what was accepted

Where a model computes is decided by how long it takes. A *quick* one (its warm-up batch took at most `inline_ms`) runs
on the thread that submits, when that thread says so: handing a request to another thread and its answer back costs more
than a small model does, and requests that arrive meanwhile wait in the socket, where they form the next batch. Any
other model has a thread of its own, so that it never holds up the network or another model. Nor do big pictures, which
are decoded on threads of their own.

A package that fails to load is UNAVAILABLE with its reason and harms nobody; if an older package of the same model is
being served, it stays in service.

Models share the memory of the box within a budget. Where they do not all fit, those used longest ago leave, stay READY,
and are brought back by a request, which waits for that; nothing fails (see `memory` and `residence`).

A package without a compiled engine that fits answers at once, with the next backend that runs its graph. Meanwhile an
engine is built in the background; once it answers as the graph does, it takes over between two batches. If it cannot be
built, or answers otherwise, the graph goes on answering and the model says why. Nothing is ever built inside a request.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk import host
from edge_sdk.backends.registry import check_store, discard, prefers_compiled
from edge_sdk.errors import (
    DeviceLost,
    EdgeSdkError,
    EngineFailed,
    InvalidTensor,
    ModelNotFound,
    OutOfMemory,
    PackageError,
    RequestError,
    VersionNotFound,
)
from edge_sdk.package import EnginePackage
from edge_sdk.profiles import DeviceProfile, Machine
from edge_sdk.runtime.batching import QueueLimits
from edge_sdk.runtime.catalog import Entry, Key, newest_first, scan, to_load
from edge_sdk.runtime.decoding import Decoders
from edge_sdk.runtime.memory import MIN_TURN_S, Books
from edge_sdk.runtime.messages import SELF_TEST, Answer, Request
from edge_sdk.runtime.pipelines import Elsewhere, Pipeline, Pipelines, is_internal
from edge_sdk.runtime.recorder import FlightRecorder
from edge_sdk.runtime.residence import NoRoomNow, Residence
from edge_sdk.runtime.self_test import SelfTests
from edge_sdk.runtime.served import UNLOADED, ServedModel, ignore_loss
from edge_sdk.runtime.statistics import Statistics
from edge_sdk.runtime.succession import Successions
from edge_sdk.runtime.turns import Turns
from edge_sdk.runtime.worker import Worker
from edge_sdk.tasks.base import Payload

if TYPE_CHECKING:  # only a daemon that starts after a crash has one
    from edge_sdk.runtime.solitary import Solitary

log = logging.getLogger(__name__)

_LOOK_FOR_ROOM_S = 0.02
"""How often is tried again what found no room because everybody was in use."""


class Service:
    """The models of one engines folder. See the module for what it promises."""

    def __init__(
        self,
        engines: Path,
        *,
        on_answer: Callable[[Answer], None],
        on_change: Callable[[], None],
        machine: Machine | None = None,
        profile: DeviceProfile | None = None,
        limits: QueueLimits = QueueLimits(),
        newest_wins: bool = False,
        inline_ms: float = 10.0,
        on_lost: Callable[[DeviceLost], None] = ignore_loss,
        on_due: Callable[[], None] = lambda: None,
        store: Path | None = None,
        building: bool = True,
        budget_bytes: int | None = None,
        recorder: FlightRecorder | None = None,
        self_test_s: float = 0.0,
        elsewhere: Elsewhere | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """What is called is called from any thread, and all but `on_lost` must only take note.

        `on_due`: `run_quick` may have something to do, although nothing was submitted.

        `elsewhere` asks for stages of pipelines that live on other devices.

        `budget_bytes` is what models may hold together; None: whatever they like.

        `on_lost` is told that a device is in a state which only a new process ends. What was being computed gets no
        answer. `store` is the folder for engines that are built here (None: the user's own), if `building` allows it.
        `recorder` is told of what is being computed, and knows what former processes ended with. `self_test_s` is how
        long a model may be left alone before `test_itself` asks it something.
        """
        self.statistics = Statistics()
        self._engines = engines
        self._on_answer = on_answer
        self._tell_change = on_change
        self._on_lost = on_lost
        self._on_due = on_due
        self._decoders = Decoders()
        self._turns = Turns()
        self._machine = machine or Machine.read()
        self._profile = profile
        self._limits = limits
        self._newest_wins = newest_wins
        self._inline_s = inline_ms / 1000
        self._clock = clock
        self._self_tests = SelfTests(self_test_s)
        self._recorder = recorder or FlightRecorder()
        self._solitary: Solitary | None = None
        if self._recorder.quarantine:
            from edge_sdk.runtime.solitary import Solitary

            self._solitary = Solitary(self._recorder, limits=limits, on_answer=self._finish, on_change=on_change)
        # Both are replaced as a whole and never changed, so readers need no lock.
        self._models: dict[Key, ServedModel] = {}
        self._by_name: dict[str, list[ServedModel]] = {}
        self._counting = threading.Lock()
        self._unloaded: set[Key] = set()
        """What `unload` took out of service. Only the loader's thread touches it."""
        self._stopping = False
        self._followed = False  # whether the folder has been read and loaded once
        self._store = store
        self._successions = Successions(
            store=store,
            hire=self._hire,
            take_over=self._take_over,
            later=self._do_later,
            on_change=self._on_change,
            on_lost=on_lost,
            clock=clock,
        )  # fmt: skip
        self._building = building
        self._residence = Residence(Books(budget_bytes), lambda: self._models.values(), self._hire, clock)
        self._called: dict[Key, ServedModel] = {}  # to be brought back, in the order in which they were called
        self._crowded: dict[Key, Callable[[], None]] = {}  # what found no room; the loader's alone
        self._pipelines = Pipelines(
            submit=self.submit,
            find=self._model_for,
            on_answer=self._finish,
            on_due=on_due,
            limits=limits,
            elsewhere=elsewhere,
            clock=clock,
        )
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loader = threading.Thread(target=self._follow_orders, name="edge-sdk-loader", daemon=True)

    def start(self) -> None:
        """Learn what is in the folder, and begin to load it. Requests that come meanwhile wait for their model."""
        found = self._adopt()
        compiled = any(entry.package is not None and prefers_compiled(entry.package) for entry in found)
        if self._building and compiled and (why_not := check_store(self._store)):
            log.warning("%s Until then, engines are not built here.", why_not)
        self._orders.put(lambda: self._load_all(found))
        self._loader.start()

    def reload(self) -> None:
        """Look at the folder again, in the background: load what is new or changed, retire what is gone.

        A model that is not on the backend its package prefers is loaded anew: an engine may fit now, or be built.
        """
        self._orders.put(lambda: self._load_all(self._adopt()))

    def load(self, model: str | None = None, version: str | None = None) -> Future[dict[str, str]]:
        """Look at the folder again, and put back what `unload` took away, of one model or of all; in the background.

        Gives the state of each version of the model, or of every model; ModelNotFound, VersionNotFound.
        """
        return self._in_turn(lambda found: self._put_back(found, model, version))

    def unload(self, model: str, version: str | None = None) -> Future[dict[str, str]]:
        """Take a model, or one version of it, out of service until `load`: its requests are answered 503, memory is
        given back. Gives the states, as `load` does."""
        return self._in_turn(lambda found: self._take_away(found, model, version))

    def submit(self, request: Request) -> None:
        """Take a request. Its answer comes through `on_answer`, perhaps before this returns."""
        try:
            model = self._find(request)
            # Of a pipeline what it asks of its models is under suspicion, and comes here again.
            solitary = None if isinstance(model, Pipeline) else self._solitary
            if solitary is None or not solitary.takes(model, request):
                model.submit(request)
        except RequestError as exc:
            self._finish(Answer(request.ticket, exc))

    def run_quick(self) -> bool:
        """Compute a batch of each quick model that has one due, on this thread; whether any had.

        Requests that wait for a model that is being loaded expire here.
        """
        worked = False
        for model in self._models.values():
            if model.waiting and (model.quick or model.worker is None):
                worked |= model.run_once()
        return worked

    def test_itself(self, now: float) -> None:
        """Ask a model that nobody asks, where one is due. For the thread that submits, about once a second."""
        former = self._self_tests.ailing
        model = self._self_tests.choose(self._models.values(), now)
        if model is not None:
            try:
                model.submit(self._self_tests.request_for(model, now))
            except RequestError as exc:
                self._self_tests.note(Answer(SELF_TEST, exc))
        if (ailing := self._self_tests.ailing) != former:
            if ailing:
                log.error("%s answered before, and gives no answer to zeros any more.", ailing)
            else:
                log.info("%s answers again.", former)

    @property
    def ailing(self) -> str:
        """Which models answered before, and do not any more; empty while there is none."""
        return self._self_tests.ailing

    @property
    def self_test(self) -> str:
        """What the self-tests have shown: `untested`, `ok` or `failed`."""
        return self._self_tests.state

    def wake_at(self) -> float | None:
        """When `run_quick` will next have something to do; None: not before something is submitted."""
        due: float | None = None
        for model in self._models.values():  # asked at each turn of the daemon: most of them have nothing
            if model.quick and model.waiting and (moment := model.wake_at()) is not None:
                due = moment if due is None else min(due, moment)
        return due

    def models(self) -> list[ServedModel]:
        """Every model and version, by name, the newest version first."""
        return [model for versions in self._by_name.values() for model in versions]

    def by_name(self) -> dict[str, list[ServedModel]]:
        """The versions of each model, the newest first."""
        return self._by_name

    @property
    def settled(self) -> bool:
        """Whether a model answers, or none will: the folder was read and nothing is loading any more."""
        models = self._models.values()
        return any(model.answers for model in models) or (
            self._followed and not any(model.state == "LOADING" for model in models)
        )

    def waiting(self) -> int:
        """How many requests wait or are being computed."""
        models: Iterable[ServedModel] = (*self._models.values(), *self._pipelines.served.values())
        waiting = sum(model.waiting for model in models)
        return waiting if self._solitary is None else waiting + len(self._solitary)

    def snapshot(self) -> dict[str, Any]:
        """Counts and timings, of everything and of each model; JSON-ready."""
        models = {
            f"{model.model}/{model.version}": {
                **model.statistics.snapshot(),
                "waiting": model.waiting,
                **({} if model.sequences is None else {"sequences": model.sequences}),
                "state": model.state,
                **({} if isinstance(model, Pipeline) else {"memory": self._residence.figures(model)}),
            }
            for model in self.models()
        }
        quarantine = {} if self._solitary is None else {"quarantine": self._solitary.snapshot()}
        return {**self.statistics.snapshot(), "waiting": self.waiting(), **quarantine, "models": models}

    @property
    def moves(self) -> int:
        """How often a model left memory or came back, so far."""
        return self._residence.books.evictions + self._residence.books.reloads

    def memory(self) -> dict[str, Any]:
        """Who holds what, in bytes; JSON-ready."""
        models = self.models()
        alone_bytes = 0 if self._solitary is None else self._solitary.waiting_bytes
        return {
            **self._residence.snapshot(),
            "refusals": sum(model.called_in_vain for model in models),
            "queue_bytes": sum(model.waiting_bytes for model in models) + alone_bytes,
        }

    def stop(self, limit_s: float) -> bool:
        """Finish what was accepted, for at most `limit_s`, and close every model; whether all of it was finished."""
        deadline = self._clock() + limit_s
        while self.waiting() and self._clock() < deadline:
            if not self.run_quick():
                time.sleep(0.002)
        finished = not self.waiting()
        self._stopping = True
        self._successions.stop()
        self._decoders.stop()
        self._pipelines.stop()
        self._orders.put(None)
        if self._solitary is not None:
            self._solitary.stop()
        for model in self._models.values():
            model.retire()
        for model in self._models.values():
            model.join(max(0.0, deadline - self._clock()))
        self._pipelines.join(max(0.0, deadline - self._clock()))
        self._loader.join(max(0.0, deadline - self._clock()))
        return finished

    def _find(self, request: Request) -> ServedModel:
        """The model a request is for: the version it names, or the newest that is ready."""
        versions = self._by_name.get(request.model)
        if not versions:
            raise ModelNotFound(f"This device has no model {request.model[:64]!r}.")
        if request.version is None:
            return next((model for model in versions if model.package is not None), versions[0])
        if (named := next((model for model in versions if model.version == request.version), None)) is None:
            raise _no_version(request.model, request.version, versions)
        return named

    def _model_for(self, model: str, version: str | None) -> ServedModel | None:
        """What a stage of a pipeline asks; None where there is none."""
        try:
            return self._find(Request(0, model, Payload(b""), 0.0, 0.0, version))
        except RequestError:
            return None

    def _on_change(self) -> None:
        self._pipelines.refresh()
        self._tell_change()

    def _finish(self, answer: Answer) -> None:
        if answer.ticket <= SELF_TEST:  # nobody's request
            (self._pipelines.take if is_internal(answer.ticket) else self._self_tests.note)(answer)
            return
        with self._counting:
            self.statistics.count(answer)
        self._on_answer(answer)

    def _follow_orders(self) -> None:
        """The life of the loader's thread."""
        while not self._stopping:
            try:
                order = self._orders.get(timeout=_LOOK_FOR_ROOM_S if self._crowded else None)
            except queue.Empty:
                order = self._look_for_room
            if order is None:
                return
            try:
                order()
            except Exception:
                log.exception("A defect of edge-sdk: the engines folder could not be followed.")
            if not self._followed:
                self._followed = True
                self._on_change()

    def _load_all(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if self._stopping:
                return
            self._load(entry, self._models[entry.key])
            self._bring_back()
        host.trim()  # for those that are gone

    def _call(self, model: ServedModel) -> float:
        """Somebody asks for a model that is out of memory: in how many seconds it will be back, about. Any thread."""
        key = model.key
        expected_s = MIN_TURN_S if key in self._crowded else 0.0
        if key not in self._called and key not in self._crowded:
            self._called[key] = model
            self._orders.put(self._bring_back)
        for ahead in list(self._called.values()):
            expected_s += self._residence.expected_s(ahead)
            if ahead is model:
                break
        return expected_s

    def _bring_back(self) -> None:
        """Load those that were called."""
        for key in list(self._called):
            if self._stopping:
                return
            model = self._called[key]
            self._attempt(model, partial(self._return, model))
            self._called.pop(key, None)
            if key not in self._crowded and model.calls:  # came as this one was given up, and was taken for its reason
                self._call(model)

    def _return(self, model: ServedModel) -> None:
        """Bring one back. NoRoomNow if somebody still waits for it; who cannot wait any longer is told so."""
        package = model.package
        if package is None or not model.is_absent:  # it is back already, or gone
            return
        try:
            worker = self._residence.admit(model, package)
        except NoRoomNow:
            if model.give_up_hopeless(self._residence.expected_s(model)):
                raise
            return
        self._employ(model, worker)
        model.digest = worker.package.digest
        log.debug("%s is back in memory.", worker.package)
        self._on_due()

    def _look_for_room(self) -> None:
        crowded, self._crowded = self._crowded, {}
        for again in crowded.values():
            again()

    def _in_turn(self, act: Callable[[Future[dict[str, str]]], None]) -> Future[dict[str, str]]:
        """Have the loader's thread do it, which gives the future its result; what it raises is the future's, too."""
        found: Future[dict[str, str]] = Future()

        def order() -> None:
            try:
                act(found)
            except Exception as exc:
                found.set_exception(exc)

        self._orders.put(order)
        return found

    def _put_back(self, found: Future[dict[str, str]], model: str | None, version: str | None) -> None:
        self._unloaded -= {key for key in self._unloaded if model in (None, key[0]) and version in (None, key[1])}
        self._load_all(self._adopt())
        found.set_result(_states(self.models() if model is None else self._named(model, version)))

    def _take_away(self, found: Future[dict[str, str]], model: str, version: str | None) -> None:
        self._unloaded |= {served.key for served in self._named(model, version)}
        others = self._adopt()
        found.set_result(_states(self._named(model, version)))
        self._load_all(others)

    def _named(self, model: str, version: str | None) -> list[ServedModel]:
        """The versions of a model, or one of them; raises ModelNotFound, VersionNotFound."""
        versions = self._by_name.get(model)
        if not versions:
            raise ModelNotFound(f"This device has no model {model[:64]!r}.")
        named = [served for served in versions if version in (None, served.version)]
        if not named:
            raise _no_version(model, version or "", versions)
        return named

    def _adopt(self) -> Sequence[Entry]:
        """Make the models in service those of the folder; gives back what has to be loaded for it."""
        places = {model.package.path: key for key, model in self._models.items() if model.package is not None}
        wanted = scan(self._engines, self._machine, self._profile, places)
        stay = {
            key: model
            for key, model in self._models.items()
            if key in wanted and model.is_retired == (key in self._unloaded)
        }
        served = {key: model.digest for key, model in stay.items() if model.is_at_its_best}
        gone = [model for key, model in self._models.items() if key not in stay]
        self._models = {key: stay.get(key) or self._new_model(key, entry.package) for key, entry in wanted.items()}
        self._pipelines.follow(self._engines, self._unloaded)
        served_all: dict[Key, ServedModel] = {**self._pipelines.served, **self._models}
        self._by_name = {
            name: [served_all[name, version] for version in newest_first(v for n, v in served_all if n == name)]
            for name in sorted({name for name, _ in served_all})
        }
        if not wanted:
            log.warning("There is no package in %s; `edge-sdk build-engine` makes one.", self._engines.absolute())
        for model in gone:
            if model.is_retired:  # the place of one that had been unloaded
                continue
            why = "was unloaded" if model.key in self._unloaded else "is gone from the folder"
            log.info("%s %s %s; it is retired.", model.model, model.version, why, extra=_about(model))
            self._successions.cancel(model)
            self._crowded.pop(model.key, None)
            model.retire()
            self._residence.dismiss(model)
        self._on_change()
        return [entry for entry in to_load(served, wanted) if entry.key not in self._unloaded]

    def _new_model(self, key: Key, package: EnginePackage | None) -> ServedModel:
        model = ServedModel(
            *key,
            limits=self._limits,
            newest_wins=self._newest_wins,
            stateful=package is not None and package.manifest.sequence is not None,
            on_answer=self._finish,
            on_lost=self._on_lost,
            decoders=self._decoders,
            on_due=self._on_due,
            on_called=self._call,
            clock=self._clock,
            recorder=self._recorder,
            gate=None if self._solitary is None else self._solitary.gate,
        )
        if key in self._unloaded:  # a place that says so
            model.fail(UNLOADED)
            model.retire()
        return model

    def _load(self, entry: Entry, model: ServedModel) -> None:
        """Bring one package into service, or note why it is not."""
        self._successions.cancel(model)
        self._crowded.pop(model.key, None)
        self._attempt(model, lambda: self._bring_in(entry, model))

    def _bring_in(self, entry: Entry, model: ServedModel) -> None:
        if entry.package is None:
            raise PackageError(entry.problem)
        why_none = self._successions.recover(entry.package)
        worker = self._residence.admit(model, entry.package)
        yardstick = self._successions.prepare(worker) if self._building and not why_none else None
        self._put_in_service(model, worker, why_none)
        if yardstick is not None:
            self._successions.begin(model, worker, yardstick)
        self._on_change()

    def _attempt(self, model: ServedModel, bring: Callable[[], None]) -> None:
        """Bring a model in, now or as soon as there is room; what keeps it out otherwise is said by the model."""
        try:
            bring()
        except NoRoomNow as exc:
            log.debug("%s", exc)
            # A package that is to be loaded is not forgotten for one that is only to be brought back.
            self._crowded.setdefault(model.key, lambda: self._attempt(model, bring))
        except DeviceLost as exc:
            self._on_lost(exc)
        except EdgeSdkError as exc:
            log.error("%s %s did not load: %s", model.model, model.version, exc, extra=_about(model))
            model.fail(str(exc))
            self._on_change()
        except Exception as exc:
            log.exception("A defect of edge-sdk: %s %s did not load.", model.model, model.version, extra=_about(model))
            model.fail(f"loading it met a defect of edge-sdk ({type(exc).__name__}); the log has the details")
            self._on_change()

    def _hire(self, package: EnginePackage) -> Worker:
        """A worker of the package, warmed up.

        An engine that loads and then does not run is passed over, as one is that does not load.
        """
        worker = None
        try:
            worker = self._load_worker(package)
            worker.warm_up()
            return worker
        except (EngineFailed, InvalidTensor, OutOfMemory) as exc:
            last_resort = package.manifest.backend.name == package.profile().backends[-1]
            if worker is not None:
                worker.close()
                last_resort = last_resort or bool(worker.loaded.second_best)
            if isinstance(exc, DeviceLost) or last_resort:
                raise
            if isinstance(exc, EngineFailed):
                discard(package, store=self._store)
            why_not = exc.problem
        worker = self._load_worker(package, why_not)
        worker.warm_up()
        return worker

    def _load_worker(self, package: EnginePackage, why_not: str = "") -> Worker:
        return Worker.load(package, self._machine, store=self._store, why_not_preferred=why_not, clock=self._clock)

    def _take_over(self, model: ServedModel, worker: Worker) -> None:
        """An engine that was built meanwhile takes the place of the graph on the CPU."""
        self._put_in_service(model, worker)
        self._residence.moved(model)
        self._on_change()

    def _put_in_service(self, model: ServedModel, worker: Worker, why_none: str = "") -> None:
        """`why_none` is why no better engine is built, where that is not the worker's to know."""
        reason = ""
        if worker.loaded.second_best:
            reason = f"{worker.loaded.backend} answers. {why_none or worker.loaded.second_best}"
            log.warning("%s: %s", worker.package, reason, extra=_about(model))
        self._employ(model, worker, reason)
        model.digest = worker.package.digest
        log.info(
            "%s is ready on %s; a batch takes %.2f ms.", worker.package, worker.loaded.backend, worker.batch_s * 1000,
            extra=_about(model),
        )  # fmt: skip

    def _employ(self, model: ServedModel, worker: Worker, reason: str = "") -> None:
        """Let `worker` compute for `model`: on the network thread, or in its turn with others on one of its own."""
        quick = worker.batch_s <= self._inline_s and not worker.in_background
        if not quick:
            worker.turnstile.close(self._turns, model.model)
        model.put_in_service(worker, quick=quick, reason=reason)

    def _do_later(self, order: Callable[[], None]) -> None:
        self._orders.put(order)


def _about(model: ServedModel) -> dict[str, object]:
    """What a line of the log is about, for those who search it."""
    return {"model": model.model, "version": model.version}


def _states(models: Sequence[ServedModel]) -> dict[str, str]:
    """`model/version` to its state."""
    return {f"{model.model}/{model.version}": model.state for model in models}


def _no_version(model: str, version: str, versions: Sequence[ServedModel]) -> VersionNotFound:
    listed = ", ".join(served.version for served in versions)
    return VersionNotFound(f"The model {model!r} has no version {version[:64]!r}; it has {listed}.")
