"""From the second-best engine of a package to the one that was built for it meanwhile.

A new engine is not believed. Before the second-best one goes into service it answers a few requests, the package's
golden ones; the new one has to answer the same before it takes over between two batches. If it does not, or there is
none, the other goes on and the model says why. That is not tried again by itself: the next attempt would fail in the
same way, and take as long. A reload loads such a model anew, and so tries again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edge_sdk.backends.base import Progress
from edge_sdk.backends.registry import check_store, discard, preferred_version, prefers_compiled, rebuild
from edge_sdk.errors import BackendUnavailable, DeviceLost, EdgeSdkError, EngineFailed, EngineUnfit, ModelError
from edge_sdk.package import EnginePackage
from edge_sdk.runtime.building import Builder, Wish
from edge_sdk.runtime.served import ServedModel
from edge_sdk.runtime.trial import Trial
from edge_sdk.runtime.worker import Worker
from edge_sdk.tensors import Feeds, Outputs, signal_to_noise_db, zeros

log = logging.getLogger(__name__)

MIN_SNR_DB = 20.0
"""What a new engine has to reach: a noise of 10 %. Kernels in INT8 and FP16 round in other places than the CPU's, and
stay well above it; a wrong layout, scale or layer is far below."""
_YARDSTICK_S = 2.0
"""So long at most a model waits for its yardstick before it is put into service."""


@dataclass(frozen=True)
class Yardstick:
    """A few requests of a package, and what its second-best engine answers to them."""

    feeds: Sequence[Feeds]
    answers: Sequence[Outputs]

    @classmethod
    def of(cls, worker: Worker, *, clock: Callable[[], float] = time.monotonic) -> Yardstick:
        """Asked of a worker that is not in service: with the package's golden requests, or zeros where it has none.

        Raises EngineFailed, or InvalidTensor where zeros cannot stand for a request.
        """
        feeds = list(worker.package.golden()) or [_request_of_zeros(worker.package)]
        answers: list[Outputs] = []
        deadline = clock() + _YARDSTICK_S
        while len(answers) < len(feeds) and (not answers or clock() < deadline):
            answers.append(worker.ask(feeds[len(answers)]))
        return cls(feeds[: len(answers)], answers)

    def check(self, worker: Worker) -> None:
        """Raise EngineUnfit unless another worker of the package answers the same."""
        found = [worker.ask(each) for each in self.feeds]
        if (snr_db := signal_to_noise_db(self.answers, found)) < MIN_SNR_DB:
            reason = f"{snr_db:g} dB of signal to noise over {len(found)} requests, {MIN_SNR_DB:g} are needed"
            raise EngineUnfit(f"It answers otherwise than the graph does: {reason}.", reasons=(reason,))


def _request_of_zeros(package: EnginePackage) -> Feeds:
    """Free axes have the size that a compiled engine is made fastest for; 1 where nothing is said."""
    best = {name: axis.best for name, axis in package.manifest.axes.items()}
    return zeros(
        [
            replace(spec, shape=tuple(best.get(str(axis), axis) for axis in spec.shape))
            for spec in package.manifest.inputs
        ]
    )


class Successions:
    """What is under way to better engines, for all models. Used by the thread that loads packages, but for `stop`."""

    def __init__(
        self,
        *,
        store: Path | None,
        hire: Callable[[EnginePackage], Worker],
        take_over: Callable[[ServedModel, Worker], None],
        later: Callable[[Callable[[], None]], None],
        on_change: Callable[[], None],
        on_lost: Callable[[DeviceLost], None],
        clock: Callable[[], float],
    ) -> None:
        """`hire` loads a worker and warms it up, `take_over` puts one in service, and `later` has something done on
        the thread that loads packages, so that none of them meets another on the way."""
        self._store = store
        self._hire = hire
        self._take_over = take_over
        self._later = later
        self._on_change = on_change
        self._on_lost = on_lost
        self._clock = clock
        self._builder = Builder(self._build, clock=clock)

    def recover(self, package: EnginePackage) -> str:
        """Take away an engine that an earlier process had built and not proven when it ended.

        Gives back why none is to be built now; empty if one may be.
        """
        if not prefers_compiled(package):
            return ""
        trial = Trial(package, self._store)
        if why := trial.given_up(preferred_version(package, store=self._store)):
            return f"No engine is built, it came to nothing before: {why} A reload tries again."
        stage = trial.interrupted()
        if stage is None:
            return ""
        self._forget(package)
        if stage == "building":
            return ""
        return "The engine that was built last ended the process that tried it. A reload builds another one."

    def prepare(self, worker: Worker) -> Yardstick | None:
        """What a better engine than that of a worker, which is not in service yet, will be measured with.

        None where there will be no better one. Raises DeviceLost.
        """
        if not worker.loaded.better_can_be_built:
            return None
        try:
            return Yardstick.of(worker, clock=self._clock)
        except DeviceLost:
            raise
        except EdgeSdkError as exc:
            log.error("No engine is built for %s: there is nothing to compare it with. %s", worker.package, exc)
            return None

    def begin(self, model: ServedModel, worker: Worker, yardstick: Yardstick) -> None:
        """Build a better engine than that of `worker`, which is in service now, and put it in its place."""

        def progress(percent: int) -> None:
            model.note_building(worker, percent)
            self._on_change()

        def built() -> None:
            self._later(lambda: self._succeed(model, worker, yardstick))

        def failed(error: EdgeSdkError) -> None:
            if isinstance(error, ModelError):
                self._give_up(worker.package, str(error))
            self._keep(model, worker, f"No engine could be built: {error}")

        self._builder.wish(model.key, Wish(worker.package, progress=progress, built=built, failed=failed))

    def cancel(self, model: ServedModel) -> None:
        """The model goes, or gets another package: nothing is built for it any more."""
        self._builder.cancel(model.key)

    def stop(self) -> None:
        self._builder.stop()

    def _build(self, package: EnginePackage, progress: Progress) -> None:
        if why_not := check_store(self._store):
            raise BackendUnavailable(why_not)  # known before the build, which takes minutes
        trial = Trial(package, self._store)
        trial.note("building")
        try:
            rebuild(package, store=self._store, progress=progress)
        except BaseException:
            trial.end()
            raise
        try:
            progress(1.0)  # it may have been cancelled since the last one, and then nobody proves what was built
        except BaseException:
            self._forget(package)
            raise

    def _succeed(self, model: ServedModel, former: Worker, yardstick: Yardstick) -> None:
        """Put the engine that was built for `former`'s package in its place."""
        if model.worker is not former:
            self._forget(former.package)
            return
        trial = Trial(former.package, self._store)
        trial.note("proving")
        try:
            worker = self._proven(former, yardstick)
        except DeviceLost as exc:
            self._on_lost(exc)
        except EdgeSdkError as exc:
            self._forget(former.package)
            if isinstance(exc, EngineUnfit):
                self._give_up(former.package, str(exc))
            self._keep(model, former, f"The engine that was built is not used: {exc}")
        except Exception as exc:
            log.exception("A defect of edge-sdk: the engine of %s could not be taken over.", former.package)
            self._forget(former.package)
            self._keep(model, former, f"Taking over the engine that was built met a defect of edge-sdk: {exc!r}.")
        else:
            self._take_over(model, worker)
            trial.end()

    def _proven(self, former: Worker, yardstick: Yardstick) -> Worker:
        """The worker of the engine that was built. Raises EngineUnfit where another one like it would do no better,
        EngineFailed, among others, where it is not to be used either."""
        worker = self._hire(former.package)
        try:
            if worker.package.digest != former.package.digest:
                raise EngineFailed("The package was replaced meanwhile, and not reloaded.")
            if why := worker.loaded.second_best:  # it does not load, has no room, or does not compute
                raise EngineUnfit(why, reasons=(why,))
            yardstick.check(worker)
        except DeviceLost:
            raise
        except Exception:
            worker.close()
            raise
        return worker

    def _forget(self, package: EnginePackage) -> None:
        """Take away an engine that nobody has proven: the next start would believe it."""
        discard(package, store=self._store)
        Trial(package, self._store).end()

    def _give_up(self, package: EnginePackage, why: str) -> None:
        """What would fail in the same way again is not tried again at every start."""
        Trial(package, self._store).give_up(preferred_version(package, store=self._store), why)

    def _keep(self, model: ServedModel, worker: Worker, reason: str) -> None:
        """Go on with a worker that is second best, and say why."""
        reason = f"{worker.loaded.backend} answers. {reason}"
        log.error("%s: %s", worker.package, reason)
        model.note_not_built(worker, reason)
        self._on_change()
