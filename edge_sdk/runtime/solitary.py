"""Requests under suspicion, each computed alone: one at a time, with nothing else under way in the process.

Only so does a second crash name the one that did it. The rest of the daemon goes on meanwhile: the network is read, and
whoever asks waits for as long as the suspect takes. Only a process that starts after a crash has any of this.

As many suspects wait as requests may wait for one model. Beyond that, each is told when to come back.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edge_sdk.errors import InferenceFailed, QueueFull, RequestError
from edge_sdk.runtime.batching import QueueLimits
from edge_sdk.runtime.messages import Answer, Request, stopping
from edge_sdk.runtime.recorder import FlightRecorder

if TYPE_CHECKING:
    from edge_sdk.runtime.served import ServedModel

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.05
"""How often a suspect asks for its model while that is still loading."""
_NEWS = 0.3
"""How much of what is expected of the next suspect is what the last one took; more of it while there were few."""


class Gate:
    """Lets batches through side by side, or one suspect all alone."""

    def __init__(self) -> None:
        self.closed = False
        """Whether a suspect is being computed, or waits for the others to finish."""
        self._changed = threading.Condition()
        self._inside = 0

    def enter(self, *, wait: bool) -> bool:
        """Go in, to compute something; False if the gate is closed and one does not want to `wait`."""
        with self._changed:
            while self.closed:
                if not wait:
                    return False
                self._changed.wait()
            self._inside += 1
            return True

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until everybody has left; nobody enters before the block ends."""
        with self._changed:
            self.closed = True
            while self._inside:
                self._changed.wait()
        try:
            yield
        finally:
            with self._changed:
                self.closed = False
                self._changed.notify_all()


class Solitary:
    """The suspects that wait, and the thread that computes them."""

    def __init__(
        self,
        recorder: FlightRecorder,
        *,
        limits: QueueLimits,
        on_answer: Callable[[Answer], None],
        on_change: Callable[[], None],
    ) -> None:
        """`on_change` is told when what had to wait for a suspect may go on."""
        self.gate = Gate()
        self.refused = 0
        """Requests that were answered with an error because they are barred."""
        self.waiting_bytes = 0
        """What the suspects that wait hold, as `limits` count it."""
        self._recorder = recorder
        self._limits = limits
        self._on_answer = on_answer
        self._on_change = on_change
        self._waiting: deque[tuple[ServedModel, Request]] = deque()
        self._arrived = threading.Condition()
        self._ended = False
        self._began = math.inf
        """Since when one is being computed, or waits to be alone."""
        self._computed = 0
        self._each_s = _LOOK_AGAIN_S
        """How long a suspect takes, from those that were computed."""
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def takes(self, model: ServedModel, request: Request) -> bool:
        """Whether `request` is a suspect, and so no longer the caller's. Raises InferenceFailed if it is barred, and
        QueueFull, with an honest moment to come back, where it may not wait; Unavailable after `stop`."""
        quarantine, now = self._recorder.quarantine, time.monotonic()
        match quarantine.verdict(request.key, now):
            case "clear":
                return False
            case "barred":
                self.refused += 1
                raise _barred(model, request, quarantine.ends(request.key), quarantine.barred_s(request.key, now))
        with self._arrived:
            if self._ended:
                raise stopping()
            size = len(request.payload.data)
            if len(self) >= self._limits.max_requests or self.waiting_bytes + size > self._limits.max_bytes:
                raise self._full(now)
            self.waiting_bytes += size
            self._waiting.append((model, request))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="edge-sdk-solitary", daemon=True)
                self._thread.start()
            self._arrived.notify()
        log.warning("The last process ended while it computed request %d of %s; it is computed alone.",
                    request.ticket, model.model)  # fmt: skip
        return True

    def snapshot(self) -> dict[str, int]:
        """How many requests are under suspicion, how many barred, and how often one of those was refused."""
        quarantine, now = self._recorder.quarantine, time.monotonic()
        return {
            "suspects": quarantine.count("suspect", now),
            "barred": quarantine.count("barred", now),
            "refused": self.refused,
        }

    def stop(self) -> None:
        """Compute no other; those that wait are answered 503."""
        with self._arrived:
            self._ended = True
            self._arrived.notify()

    def _work(self) -> None:
        while True:
            with self._arrived:
                while not self._waiting and not self._ended:
                    self._arrived.wait()
                if self._ended:
                    break
                model, request = self._waiting[0]
                self._began = began = time.monotonic()
            done = self._compute(model, request)
            with self._arrived:
                self._began = math.inf
                self._waiting.popleft()
                if done:
                    self.waiting_bytes -= len(request.payload.data)
                    self._computed += 1
                    self._each_s += max(_NEWS, 1 / self._computed) * (time.monotonic() - began - self._each_s)
                else:  # another suspect's model may be there already
                    self._waiting.append((model, request))
                    self._arrived.wait(_LOOK_AGAIN_S)
            if done:
                self._on_change()
        while self._waiting:  # nobody adds to it any more
            model, request = self._waiting.popleft()
            self.waiting_bytes -= len(request.payload.data)
            self._on_answer(Answer(request.ticket, stopping(), model.version))

    def _compute(self, model: ServedModel, request: Request) -> bool:
        """Whether it was answered; not while its model is loading."""
        try:
            if not model.has_worker_for(request):
                return False  # and nobody has to wait for that
            with self.gate.alone():
                if not model.run_alone(request):
                    return False
        except RequestError as exc:
            self._on_answer(Answer(request.ticket, exc, model.version))
            return True
        self._recorder.quarantine.acquit(request.key)
        self._recorder.write_down()
        return True

    def _full(self, now: float) -> QueueFull:
        each_s = max(self._each_s, now - self._began)  # the one at work may take longer than any before it
        return QueueFull(
            f"{len(self)} requests wait to be computed alone, as the last process ended while it computed them.",
            fix="Try again later.",
            retry_after_ms=math.ceil(len(self) * each_s * 1000),
        )


def _barred(model: ServedModel, request: Request, ends: int, left_s: float) -> InferenceFailed:
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time.time() + left_s))
    log.error(
        "Request %d of %s ended the process %d times; it is answered 500, and not computed again before %s.",
        request.ticket, model.model, ends, until,
    )  # fmt: skip
    return InferenceFailed(
        f"This request ended the device's process {ends} times while it was computed; it is not tried again before "
        f"{until}.",
        fix="Send other data, or look into the device's log.",
    )
