"""A loaded model: its engine, its task, and the arrays they share.

`run_batch` is the whole of it: decode the requests, compute them together, phrase the answers. Whatever goes wrong with
one request is the answer to that request; a batch that fails is computed again one by one, so that only the request at
fault gets an error.

Inputs are copied once, into a slab of `max_rows` rows that lives as long as the worker, and outputs land in another; a
batch of n is the first n rows of both. So the same arrays meet the engine every time and nothing is allocated.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edge_sdk.backends.base import Engine
from edge_sdk.backends.registry import load_engine
from edge_sdk.errors import EdgeSdkError, InferenceFailed, PackageError, RequestError, TooLarge
from edge_sdk.package import EnginePackage
from edge_sdk.profiles import Machine
from edge_sdk.runtime.batching import pack
from edge_sdk.runtime.messages import Answer, Request, Timing
from edge_sdk.tasks.base import Body, Decoded, Task
from edge_sdk.tasks.registry import task_of
from edge_sdk.tensors import Array, Feeds, Outputs, allocate, is_batchable, zeros

log = logging.getLogger(__name__)


@dataclass
class Slab:
    """Input and output arrays of `rows` rows, kept; `at` gives the views for a smaller batch, always the same ones."""

    inputs: Feeds
    outputs: Outputs
    batchable: bool
    """Whether a request may take any number of the rows; otherwise it takes the arrays as they are."""

    def __post_init__(self) -> None:
        self._views: dict[int, tuple[Feeds, Outputs]] = {}

    @classmethod
    def of(cls, engine: Engine, rows: int) -> Slab | None:
        """None where a size is known only at run time: then arrays are the engine's own, made anew each time."""
        batchable = is_batchable(engine.inputs, engine.outputs)
        if not batchable and any(spec.has_free_axes for spec in (*engine.inputs, *engine.outputs)):
            return None
        inputs, outputs = allocate(engine.inputs, rows), allocate(engine.outputs, rows)
        return None if inputs is None or outputs is None else cls(inputs, outputs, batchable)

    def at(self, rows: int) -> tuple[Feeds, Outputs]:
        if not self.batchable:
            return self.inputs, self.outputs
        if rows not in self._views:
            self._views[rows] = (
                {name: array[:rows] for name, array in self.inputs.items()},
                {name: array[:rows] for name, array in self.outputs.items()},
            )
        return self._views[rows]


class Worker:
    """An engine at work. One thread at a time may use it."""

    def __init__(
        self, package: EnginePackage, engine: Engine, task: Task, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.package = package
        self.task = task
        self.max_rows = package.manifest.batching.max_batch
        self._engine = engine
        self._clock = clock
        self._slab = Slab.of(engine, self.max_rows)

    @classmethod
    def load(
        cls, package: EnginePackage, machine: Machine | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> Worker:
        """The worker of a package; raises what `load_engine` raises.

        A build may put a new package in the place of this one while it is being read, whose files then do not match
        the manifest that was opened. So it is looked at once more, and the new one is loaded.
        """
        try:
            task = task_of(package)
            return cls(package, load_engine(package, machine).engine, task, clock=clock)
        except PackageError:
            current = EnginePackage.open(package.path)
            if current.digest == package.digest:
                raise
            task = task_of(current)
            return cls(current, load_engine(current, machine).engine, task, clock=clock)

    def warm_up(self) -> float:
        """Compute a best batch of zeros, and give back the seconds that it takes once it is warm.

        Raises EngineFailed. A model whose sizes are known only at run time is asked with every free axis at 1, which
        need not make sense to it, so its failure is none; it counts as slow.
        """
        if self._slab is None:
            with contextlib.suppress(EdgeSdkError):
                self._engine.infer(zeros(self._engine.inputs))
            return float("inf")
        for array in self._slab.inputs.values():
            array.fill(0)
        feeds, out = self._slab.at(self.package.manifest.batching.best_batch)
        seconds = []
        for _ in range(3):
            started = self._clock()
            self._engine.infer(feeds, out)
            seconds.append(self._clock() - started)
        return min(seconds)

    def run_batch(self, requests: Sequence[Request]) -> list[Answer]:
        """Exactly one answer for each of `requests`."""
        started = self._clock()
        answers: list[Answer] = []
        accepted: list[tuple[Request, Decoded]] = []
        for request in requests:
            decoded = self._decode(request)
            if isinstance(decoded, RequestError):
                answers.append(self._answer(request, decoded))
            else:
                accepted.append((request, decoded))
        for group in pack([decoded.rows for _, decoded in accepted], self.max_rows):
            answers += self._compute([accepted[index] for index in group], started)
        return answers

    def close(self) -> None:
        self._slab = None
        self._engine.close()

    def _decode(self, request: Request) -> Decoded | RequestError:
        try:
            decoded = self.task.decode(request.payload)
        except RequestError as exc:
            return exc
        except Exception:
            log.exception("A defect of edge-sdk: decoding %r failed.", request)
            return InferenceFailed("The request could not be decoded; the device's log has the reason.")
        if decoded.rows > self.max_rows:
            return TooLarge(f"The request has a batch of {decoded.rows}; the model takes at most {self.max_rows}.")
        return decoded

    def _compute(self, group: Sequence[tuple[Request, Decoded]], started: float) -> list[Answer]:
        """Compute a group together; if that fails, each of it alone."""
        before = self._clock()
        try:
            outputs = self._infer([decoded for _, decoded in group])
        except Exception as exc:
            if len(group) > 1:
                return [answer for one in group for answer in self._compute([one], started)]
            if isinstance(exc, EdgeSdkError):
                log.warning("%s failed on a request: %s", self.package.name, exc)
            else:
                log.exception("A defect of edge-sdk: %s could not be asked.", self.package.name)
            return [self._answer(request, _as_request_error(exc)) for request, _ in group]
        infer_ms = (self._clock() - before) * 1000
        answers = []
        first = 0
        for request, decoded in group:
            rows = _rows_of(outputs, first, decoded.rows)
            first += decoded.rows
            timing = Timing((started - request.received) * 1000, infer_ms, len(group))
            answers.append(self._answer(request, self._encode(rows, decoded), timing))
        return answers

    def _infer(self, group: Sequence[Decoded]) -> Outputs:
        if self._slab is None:
            return self._engine.infer(
                {name: _joined([decoded.feeds[name] for decoded in group]) for name in group[0].feeds}
            )
        feeds, out = self._slab.at(sum(decoded.rows for decoded in group))
        for name, slot in feeds.items():
            _fill(slot, [decoded.feeds[name] for decoded in group])
        return self._engine.infer(feeds, out)

    def _encode(self, outputs: Outputs, decoded: Decoded) -> Body | RequestError:
        try:
            return self.task.encode(outputs, decoded)
        except RequestError as exc:
            return exc
        except Exception:
            log.exception("A defect of edge-sdk: an answer of %s could not be phrased.", self.package.name)
            return InferenceFailed("The answer could not be phrased; the device's log has the reason.")

    def _answer(self, request: Request, result: Body | RequestError, timing: Timing | None = None) -> Answer:
        return Answer(request.ticket, result, self.package.version, timing)


def _fill(slot: Array, arrays: Sequence[Array]) -> None:
    """Copy `arrays` one after the other along the first axis of `slot`."""
    if len(arrays) == 1:
        np.copyto(slot, arrays[0])
    else:
        np.concatenate(arrays, axis=0, out=slot)


def _joined(arrays: Sequence[Array]) -> Array:
    return np.asarray(arrays[0], order="C") if len(arrays) == 1 else np.concatenate(arrays, axis=0)


def _rows_of(outputs: Outputs, first: int, rows: int) -> Outputs:
    return {name: array[first : first + rows] for name, array in outputs.items()} if rows else outputs


def _as_request_error(exc: Exception) -> RequestError:
    """What a stranger is told: a runtime's own text may hold paths and names that are not his."""
    return exc if isinstance(exc, RequestError) else InferenceFailed("The model failed while it computed this request.")
