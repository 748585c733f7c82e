"""Engines built while the model is served: one at a time, on a thread of its own, for whoever wished for one.

    builder = Builder(build)
    builder.wish(key, Wish(package, progress=..., built=..., failed=...))
    builder.cancel(key)

The build itself runs in a process of its own, which leaves the processor to the service; this thread waits for it. A
model has one wish: a new one takes the place of the last.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_sdk.backends.base import Progress
from edge_sdk.errors import EdgeSdkError, EngineFailed
from edge_sdk.package import EnginePackage
from edge_sdk.runtime.catalog import Key

log = logging.getLogger(__name__)

SAY_AT_MOST_EVERY_S = 0.5
"""A percentage is retained on the broker: more would be wear, and nobody reads faster."""


class Cancelled(Exception):
    """Raised out of a build's progress: nobody wants the engine any more."""


@dataclass(frozen=True)
class Wish:
    """An engine that somebody wants. What is called must only take note; one call may still come after `cancel`."""

    package: EnginePackage
    progress: Callable[[int], None]
    """Told each new whole percent, at most about twice a second; 0 as soon as the wish is made."""
    built: Callable[[], None]
    failed: Callable[[EdgeSdkError], None]


@dataclass(eq=False)
class _Job:
    wish: Wish
    cancelled: bool = False
    percent: int = 0
    said_at: float = field(default=float("-inf"))


class Builder:
    """The one thread that builds, and what waits for it. Safe to use from any thread."""

    def __init__(
        self, build: Callable[[EnginePackage, Progress], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`build` gives up as soon as its progress raises."""
        self._build = build
        self._clock = clock
        self._changed = threading.Condition()  # guards everything below
        self._waiting: dict[Key, _Job] = {}
        self._current: tuple[Key, _Job] | None = None
        self._stopped = False
        self._thread: threading.Thread | None = None

    def wish(self, key: Key, wish: Wish) -> None:
        """Build for `wish` when those before it are done; an earlier wish for `key` is forgotten."""
        wish.progress(0)
        with self._changed:
            self._forget(key)
            if self._stopped:
                return
            self._waiting[key] = _Job(wish)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="edge-sdk-builder", daemon=True)
                self._thread.start()
            self._changed.notify()

    def cancel(self, key: Key) -> None:
        """Forget what was wished for `key`; a build that is under way is ended."""
        with self._changed:
            self._forget(key)

    def stop(self) -> None:
        """Cancel everything. The thread ends with the build that is under way."""
        with self._changed:
            self._stopped = True
            for key in [*self._waiting, *([self._current[0]] if self._current is not None else [])]:
                self._forget(key)
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _forget(self, key: Key) -> None:
        self._waiting.pop(key, None)
        if self._current is not None and self._current[0] == key:
            self._current[1].cancelled = True

    def _work(self) -> None:
        """The life of the thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                key = next(iter(self._waiting))
                job = self._waiting.pop(key)
                self._current = key, job
            error = self._error_of(job)
            with self._changed:
                self._current = None
                if job.cancelled:
                    continue
            try:
                if error is not None:
                    job.wish.failed(error)
                else:
                    job.wish.built()
            except Exception:  # this thread builds for others, too
                log.exception("A defect of edge-sdk: the end of a build could not be told.")

    def _error_of(self, job: _Job) -> EdgeSdkError | None:
        """Build; what went wrong, if something did."""
        package = job.wish.package
        log.info("Building an engine for %s, in the background.", package)
        started = self._clock()
        try:
            self._build(package, lambda done: self._note(job, done))
        except Cancelled:
            log.info("The engine for %s is not wanted any more.", package)
            return EngineFailed("It was cancelled.")
        except EdgeSdkError as exc:
            return exc
        except Exception as exc:
            log.exception("A defect of edge-sdk: building the engine for %s failed.", package)
            return EngineFailed(f"Building it met a defect of edge-sdk ({type(exc).__name__}); the log has it.")
        log.info("The engine for %s was built in %.1f s.", package, self._clock() - started)
        return None

    def _note(self, job: _Job, done: float) -> None:
        """A build's progress: say it on, if it is news."""
        if job.cancelled:
            raise Cancelled
        percent, now = min(99, int(done * 100)), self._clock()  # 100 is when it serves
        if percent > job.percent and now - job.said_at >= SAY_AT_MOST_EVERY_S:
            job.percent, job.said_at = percent, now
            job.wish.progress(percent)
