"""Any backend's engine in a process of its own: what ends that process ends nobody else's work.

A runtime that crashes, leaks, or holds the interpreter's lock while it computes is better not in the daemon itself.
`IsolatedEngine` is an engine like any other; what it computes is computed in a child (`isolated_child`), which loads
the same package with the same backend. A batch lies in memory that both see, so a request is copied no more often than
without the boundary; arrays that are no such batch go through the pipe.

If the child ends while it computes, another takes its place and is given the same batch, once: a child that somebody
killed loses nothing. If that one ends, too, the batch is at fault, and is an EngineFailed: whoever put it together
computes each request alone, and so finds the one that does it. Children that end one after the other come back more and
more slowly. One whose memory has grown far beyond what it had is replaced between two batches, which gives the memory
back for sure.

The child ends when this process does, however that ends; SIGTERM is not meant for it, as a daemon that stops has work
to finish.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk import host
from edge_sdk.backends.base import Engine
from edge_sdk.errors import DeviceLost, EdgeSdkError, EngineFailed
from edge_sdk.package import EnginePackage
from edge_sdk.tensors import Array, Feeds, Outputs, TensorSpec

log = logging.getLogger(__name__)

_CHILD = "edge_sdk.backends.isolated_child"
_ALIGNMENT = 64
"""Bytes: what vector instructions load at a time."""
_QUICK_DEATHS = 3
"""So many children may end one behind the other before the next one is waited with."""
_STARTS = 5
"""So many times a child is started for a batch before that fails."""
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 5.0
_LOOK_EVERY = 256
"""Batches between two looks at the child's memory."""
_GROWTH_BYTES = 256 << 20
_GONE_S = 5.0
"""How long a child may take to end by itself once it is let go."""

_GONE = (EOFError, ConnectionError, BrokenPipeError)


@dataclass(frozen=True)
class Place:
    """Where an array begins in the memory that both processes see, and what it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Stillborn(EngineFailed):
    """A child ended before it could compute anything."""


class IsolatedEngine:
    """An engine in a child process, behind the Engine protocol."""

    def __init__(
        self,
        package: EnginePackage,
        backend: str,
        *,
        store: Path | None = None,
        growth_bytes: int = _GROWTH_BYTES,
        look_every: int = _LOOK_EVERY,
    ) -> None:
        """Loads the package in a child; raises what loading raises there.

        A child with `growth_bytes` more than it had after its first `look_every` batches is replaced.
        """
        self._package = package
        self._backend = backend
        self._store = store
        self._growth_bytes = growth_bytes
        self._look_every = look_every
        self._shared: _Shared | None = None
        self._child: _Child | None = None
        self._closed = False
        self._deaths = 0
        """Of children that ended one behind the other, with no batch computed in between."""
        self.started = 0
        """How many children there have been."""
        self._child = self._new_child()
        self._inputs, self._outputs, self._threads = self._child.inputs, self._child.outputs, self._child.threads

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    @property
    def threads(self) -> int:
        return self._threads

    @property
    def pid(self) -> int | None:
        """Of the child; None while there is none."""
        return self._child.process.pid if self._child is not None else None

    def elsewhere_bytes(self) -> int:
        """What the child holds, without what it shares or has from files."""
        return self._child.memory_bytes()[1] if self._child is not None else 0

    def twin(self) -> Engine:
        """Another child, with weights of its own."""
        return IsolatedEngine(
            self._package,
            self._backend,
            store=self._store,
            growth_bytes=self._growth_bytes,
            look_every=self._look_every,
        )

    def arrays(self, feeds: Feeds, outputs: Outputs) -> tuple[Feeds, Outputs]:
        """Arrays like these that the child sees, too."""
        self._forget_arrays()
        self._shared = _Shared(feeds, outputs)
        if self._child is not None:
            self._child.map(self._shared)
        return self._shared.feeds, self._shared.outputs

    def infer(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> Outputs:
        if self._closed:
            raise EngineFailed("This engine was closed; it cannot infer any more.", fix="Load the package again.")
        shapes = self._shared.shapes_of(feeds, out) if self._shared is not None and out is not None else None
        order = ("run", shapes) if shapes is not None else ("infer", dict(feeds))
        outputs = self._computed(order)
        if out is None:
            return outputs
        if shapes is None:
            for name, array in out.items():
                np.copyto(array, outputs[name])
        return dict(out)

    def close(self) -> None:
        self._closed = True
        if self._child is not None:
            self._child.let_go()
            self._child = None
        self._forget_arrays()

    def _forget_arrays(self) -> None:
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def _computed(self, order: tuple[Any, ...]) -> Outputs:
        """The child's answer; that of another one if it ended over it. Raises what the engine raised."""
        for attempt in (1, 2):
            child = self._child or self._successor()
            try:
                answer = child.ask(order)
                if isinstance(answer, DeviceLost):  # a new process is what helps
                    raise EOFError
            except _GONE:
                self._bury(child, final=attempt == 2)
                continue
            self._deaths = 0
            self._look_at(child)
            if isinstance(answer, BaseException):
                raise answer
            computed: Outputs = answer
            return computed
        raise EngineFailed(f"The process that computes {self._package.name} ended twice over this batch.")

    def _successor(self) -> _Child:
        """Another child, after a pause if those before it ended quickly. One that ends as it loads has not seen the
        batch, which is not at fault then."""
        for attempt in range(1, _STARTS + 1):
            if self._deaths > _QUICK_DEATHS:
                time.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (self._deaths - _QUICK_DEATHS - 1)))
            try:
                self._child = self._new_child()
                return self._child
            except _Stillborn as exc:
                self._deaths += 1
                if attempt == _STARTS:
                    raise
                log.warning("%s Another one is started.", exc)
            except EdgeSdkError as exc:  # it did load before: this is about now
                self._deaths += 1
                raise EngineFailed(f"The process that computes {self._package.name} did not start: {exc}") from exc
        raise AssertionError("the last start gives a child or raises")

    def _new_child(self) -> _Child:
        self.started += 1
        child = _Child(self._package, self._backend, self._store)
        if self._shared is not None:
            try:
                child.map(self._shared)
            except _GONE as exc:
                child.end()
                raise _Stillborn(f"The process that computes {self._package.name} ended as it began.") from exc
        return child

    def _bury(self, child: _Child, *, final: bool) -> None:
        self._deaths += 1
        self._child = None
        how = child.end()
        log.warning(
            "The process that computes %s ended over a batch (%s); %s.",
            self._package.name, how, "the batch fails" if final else "another one is given the batch",
        )  # fmt: skip

    def _look_at(self, child: _Child) -> None:
        """Replace a child that has grown."""
        child.batches += 1
        if child.batches % self._look_every:
            return
        resident, _ = child.memory_bytes()
        if not child.usual_bytes:
            child.usual_bytes = resident
        elif resident > child.usual_bytes + self._growth_bytes:
            log.warning(
                "The process that computes %s has grown from %d to %d MB; another one takes its place.",
                self._package.name, child.usual_bytes >> 20, resident >> 20,
            )  # fmt: skip
            self._child = None
            child.let_go()


class _Shared:
    """Arrays in memory that a child is given by its descriptor."""

    def __init__(self, feeds: Feeds, outputs: Outputs) -> None:
        places, size = [], 0
        for name, array in (*feeds.items(), *outputs.items()):
            places.append(Place(name, array.dtype.str, array.shape, size))
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        descriptor = os.memfd_create("edge-sdk batch", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, max(size, 1))
            memory = mmap.mmap(descriptor, max(size, 1))
        except OSError as exc:
            os.close(descriptor)
            raise EngineFailed(f"A batch of {size:,} bytes cannot be shared with a process: {exc}.") from exc
        self.descriptor = descriptor
        self.size = max(size, 1)
        self.places = (tuple(places[: len(feeds)]), tuple(places[len(feeds) :]))
        self.feeds, self.outputs = (views(side, memory) for side in self.places)
        self._whole = {**self.feeds, **self.outputs}
        self._known: dict[tuple[int, ...], tuple[dict[str, tuple[int, ...]], tuple[Array, ...]]] = {}

    def close(self) -> None:
        """No other child will see them; the arrays live as long as somebody holds one."""
        os.close(self.descriptor)

    def shapes_of(
        self, feeds: Mapping[str, Array], out: Mapping[str, Array]
    ) -> dict[str, tuple[int, ...]] | None:  # fmt: skip
        """The shapes of these arrays if each begins where one of ours does; None if they lie elsewhere."""
        arrays = (*feeds.values(), *out.values())
        key = tuple(map(id, arrays))
        if (known := self._known.get(key)) is not None:
            return known[0]
        named = {**feeds, **out}
        if named.keys() != self._whole.keys() or any(
            array.ctypes.data != self._whole[name].ctypes.data for name, array in named.items()
        ):
            return None
        shapes = {name: array.shape for name, array in named.items()}
        self._known[key] = shapes, arrays  # holding the arrays keeps their ids from being used again
        return shapes


class _Child:
    """One process, with the package loaded."""

    def __init__(self, package: EnginePackage, backend: str, store: Path | None) -> None:
        self.batches = 0
        self.usual_bytes = 0
        """What it had resident once it had computed a while; 0 before that."""
        self._pipe, theirs = Pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", _CHILD, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                start_new_session=True, env=_environment(),
            )  # fmt: skip
        except OSError as exc:
            self._pipe.close()
            raise EngineFailed(f"A process for {package.name} could not be started: {exc}.") from exc
        finally:
            theirs.close()
        try:
            answer = self.ask((package.path.absolute(), package.digest, backend, store))
        except _GONE as exc:
            raise _Stillborn(
                f"The process that was to compute {package.name} ended as it loaded it ({self.end()})."
            ) from exc
        if isinstance(answer, BaseException):
            self.end()
            raise answer
        self.inputs: tuple[TensorSpec, ...] = answer[0]
        self.outputs: tuple[TensorSpec, ...] = answer[1]
        self.threads: int = answer[2]

    def ask(self, order: tuple[Any, ...]) -> Any:
        """What it says to `order`, which may be an exception; one of _GONE is raised if it ended."""
        self._pipe.send(order)
        return self._pipe.recv()

    def map(self, shared: _Shared) -> None:
        """Let it see `shared`, too."""
        self._pipe.send(("map", shared.size, *shared.places))
        send_handle(self._pipe, shared.descriptor, self.process.pid)
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer

    def memory_bytes(self) -> tuple[int, int]:
        """What is resident, and how much of that is its own alone; zeros where it is gone."""
        return host.memory_of(self.process.pid)

    def let_go(self) -> None:
        """Let it end by itself, which it does as soon as it finds the pipe closed."""
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_GONE_S)
        self.end()

    def end(self) -> str:
        """End it; how it ended, in words."""
        self._pipe.close()
        self.process.kill()
        code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def views(places: tuple[Place, ...], memory: mmap.mmap, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Feeds:
    """The arrays at `places` in `memory`, with other shapes if such are given: the first rows of an array, say."""
    return {
        place.name: np.ndarray(
            shapes[place.name] if shapes is not None else place.shape, np.dtype(place.dtype), memory, place.offset
        )
        for place in places
    }


def _environment() -> dict[str, str]:
    """Ours, and in it the places where we find modules, which may be relative."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
