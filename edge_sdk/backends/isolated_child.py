"""The process in which an isolated engine computes: `python -m edge_sdk.backends.isolated_child`.

`isolated` starts it and holds the other end of its pipe, whose number is the argument. The first message says what to
load, each further one what to do; every one is answered, with an exception where it failed. When the pipe is closed,
and that is also when the other process has ended, this one ends.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any

from edge_sdk.backends.base import Engine, Threaded
from edge_sdk.backends.isolated import Place, views
from edge_sdk.backends.registry import backend as backend_named
from edge_sdk.errors import DeviceLost, EdgeSdkError, EngineFailed, PackageError
from edge_sdk.package import EnginePackage
from edge_sdk.tensors import Feeds, Outputs

_OOM_SCORE = 500
"""Of 1000: when the kernel needs memory, it takes this process, which comes back, before the one it computes for."""
_LOOK_AT_PARENT_S = 2.0


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # to the whole service; this one ends when its pipe does
        signal.signal(number, signal.SIG_IGN)
    _stand_first_in_line()
    pipe = Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        engine, answer = _loaded(*pipe.recv())
        pipe.send(answer)
        desk = _Desk(engine, pipe)
        while True:
            pipe.send(desk.answer(pipe.recv()))
    except (EOFError, ConnectionError):
        pass
    os._exit(0)  # whatever a runtime would tidy up, the kernel does as well


class _Desk:
    """The engine, and the arrays that lie in memory shared with the parent."""

    def __init__(self, engine: Engine, pipe: Connection) -> None:
        self._engine = engine
        self._pipe = pipe
        self._memory: mmap.mmap | None = None
        self._places: tuple[tuple[Place, ...], tuple[Place, ...]] = ((), ())
        self._views: dict[tuple[tuple[int, ...], ...], tuple[Feeds, Outputs]] = {}

    def answer(self, order: tuple[Any, ...]) -> object:
        try:
            match order:
                case ("run", shapes):
                    self._engine.infer(*self._at(shapes))
                    return None
                case ("infer", feeds):
                    return self._engine.infer(feeds)
                case ("map", size, inputs, outputs):
                    self._map(size, (inputs, outputs))
                    return None
            raise EngineFailed(f"An isolated engine knows no order {str(order[0])[:40]!r}.")
        except Exception as exc:
            return _portable(exc)

    def _at(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Feeds, Outputs]:
        """Always the same arrays for the same shapes, so that an engine may keep them bound."""
        key = tuple(shapes.values())
        if (known := self._views.get(key)) is None:
            assert self._memory is not None
            inputs, outputs = self._places
            known = self._views[key] = views(inputs, self._memory, shapes), views(outputs, self._memory, shapes)
        return known

    def _map(self, size: int, places: tuple[tuple[Place, ...], tuple[Place, ...]]) -> None:
        descriptor = recv_handle(self._pipe)
        try:
            self._memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self._places = places
        self._views.clear()


def _loaded(path: Path, digest: str, backend: str, store: Path | None) -> tuple[Any, object]:
    """The engine, and what to say of it; no engine and an exception if it does not load."""
    try:
        package = EnginePackage.open(path)
        if package.digest != digest:
            raise PackageError(f"The package {path} was replaced meanwhile, and not reloaded.")
        engine = backend_named(backend, store).load(package, package.profile())
    except Exception as exc:
        return None, _portable(exc)
    threads = engine.threads if isinstance(engine, Threaded) else 1
    return engine, (engine.inputs, engine.outputs, threads)


def _portable(exc: Exception) -> EdgeSdkError:
    """An error that the other process can read; a stranger's may not even be importable there."""
    if isinstance(exc, EdgeSdkError):
        return exc if isinstance(exc, DeviceLost) else exc.with_traceback(None)
    traceback.print_exc()
    return EngineFailed(f"The engine failed with {type(exc).__name__}: {str(exc)[:400]}")


def _stand_first_in_line() -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE), encoding="ascii")
    except OSError:  # where policy forbids it, the kernel chooses as it likes
        pass


def _end_with(parent: int) -> None:
    """End with the parent also in the middle of a batch that never ends."""
    try:
        life = select.poll()
        life.register(os.pidfd_open(parent), select.POLLIN)
        while os.getppid() == parent:
            life.poll()
    except OSError:  # before Linux 5.3; or it ended meanwhile
        waiting = threading.Event()
        while os.getppid() == parent:
            waiting.wait(_LOOK_AT_PARENT_S)
    os._exit(1)


if __name__ == "__main__":
    main()
