"""A build, started in a process of its own and watched until there is a plan or a reason why there is none.

TensorRT takes whatever memory and time it takes, and a defect of it is a crash. None of that may reach a daemon that is
answering requests, so a limit that is exceeded, a crash, a cancelled build are an error each, and the process is gone
before the error is raised. It does not outlive its parent either.

Its memory is watched, not limited by the kernel: RLIMIT_AS counts address space, of which CUDA reserves hundreds of
gigabytes without using them. What is watched is the memory that it has resident; what a driver holds for it elsewhere -
on a GPU, and on a Jetson beside the processes - is not in there.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from edge_sdk.backends.base import Progress
from edge_sdk.backends.tensorrt.builder import PlanOrder, Setting
from edge_sdk.backends.tensorrt.child import ERRORS, Job, memory_bytes
from edge_sdk.backends.tensorrt.logs import readable
from edge_sdk.backends.tensorrt.refusals import STILL_RUNS
from edge_sdk.backends.tensorrt.sidecar import PLAN
from edge_sdk.errors import EdgeSdkError, EngineFailed
from edge_sdk.profiles import Machine

__all__ = ["Plan", "PlanOrder", "compile_plan"]

_CHILD = "edge_sdk.backends.tensorrt.child"
_LOOK_EVERY_S = 0.1
_SHARE_OF_MEMORY = 0.6
"""Of the machine's, where the profile sets no limit: less than systemd lets the service have, with the daemon."""
_BEFORE_THE_END = 0.99
"""TensorRT is done before the plan is written."""
_TAIL_BYTES = 4096
_TAIL_LINES = 6


@dataclass(frozen=True)
class Plan:
    """A compiled plan, and what it took."""

    file: Path
    seconds: float
    peak_bytes: int
    """The most memory that the building process had resident."""
    flavour: str
    version: str
    settings: Mapping[str, Setting]
    """As they were used."""
    notes: tuple[str, ...]


def compile_plan(graph: bytes, order: PlanOrder, folder: Path, *, progress: Progress, considerate: bool) -> Plan:
    """The plan for `order`, as a file in `folder`.

    `progress` is told about ten times a second how much is done, and once, at the end, 1; whatever it raises ends the
    build and is raised here. A `considerate` build leaves processor and disk to whoever else wants them.

    Raises ModelError where TensorRT does not take the graph, ProfileError where it cannot do what the order asks,
    BackendUnavailable where it is not to be had, EngineFailed where it fails, crashes, or exceeds a limit.
    """
    started = time.monotonic()
    folder = folder.absolute()
    staged = folder / f".{PLAN}.{secrets.token_hex(4)}"
    job = Job(order, staged, os.getpid(), considerate)
    try:
        with _started(job, graph) as build:
            while build.listen(_LOOK_EVERY_S):
                build.check_limits()
                progress(build.done)
            told = build.result()
        file = folder / PLAN
        staged.replace(file)
    finally:
        staged.unlink(missing_ok=True)
    progress(1.0)
    return Plan(
        file=file,
        seconds=round(time.monotonic() - started, 3),
        peak_bytes=max(build.peak_bytes, told["peak_bytes"]),
        flavour=order.flavour,
        version=told["version"],
        settings={name: tuple(value) if isinstance(value, list) else value for name, value in told["settings"].items()},
        notes=tuple(told["notes"]),
    )


@dataclass
class _Build:
    """A building process, as far as it has told and been seen."""

    process: subprocess.Popen[bytes]
    order: PlanOrder
    events: IO[bytes]
    log: IO[bytes]
    most_bytes: int
    """What it may have resident; 0: as much as there is."""
    started: float = field(default_factory=time.monotonic)
    done: float = 0.0
    peak_bytes: int = 0
    told: dict[str, Any] | None = None
    """The last thing that it had to say: what it made, or an error."""
    _unfinished: bytes = b""

    def listen(self, timeout_s: float) -> bool:
        """Take in what it tells, waiting for it up to `timeout_s`; False once it tells no more."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.events, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return self.process.poll() is None
        chunk = os.read(self.events.fileno(), 1 << 16)
        *lines, self._unfinished = (self._unfinished + chunk).split(b"\n")
        for line in lines:
            facts = json.loads(line)
            if "progress" in facts:
                self.done = max(self.done, min(facts["progress"], _BEFORE_THE_END))
            else:
                self.told = facts
        return bool(chunk)

    def check_limits(self) -> None:
        """Raise EngineFailed if it took more memory or time than the order allows."""
        pid = self.process.pid
        self.peak_bytes = max(self.peak_bytes, memory_bytes("VmHWM", pid))
        resident = memory_bytes("VmRSS", pid)
        if 0 < self.most_bytes < resident:
            raise EngineFailed(
                f"Compiling the model took {_mib(resident)} of memory at {self.done:.0%}, more than its limit of "
                f"{_mib(self.most_bytes)}, and was ended.",
                fix="Raise build_memory_bytes in the profile's [tensorrt] table, or lower its optimization_level or "
                f"workspace_bytes. {STILL_RUNS}",
            )
        limit_s = self.order.options.build_time_s
        if time.monotonic() - self.started > limit_s:
            raise EngineFailed(
                f"Compiling the model was {self.done:.0%} done after {limit_s:g} s, the most it may take, "
                "and was ended.",
                fix="Raise build_time_s in the profile's [tensorrt] table, or lower its optimization_level. "
                f"{STILL_RUNS}",
            )

    def result(self) -> dict[str, Any]:
        """What it made; the error that it told, or the one that its end is."""
        code = self.process.wait()
        if self.told is None:
            raise self._crashed(code)
        if "error" in self.told:
            raise ERRORS[self.told["error"]](self.told["problem"], fix=self.told["fix"])
        return self.told

    def _crashed(self, code: int) -> EdgeSdkError:
        how = f"the exit code {code}" if code >= 0 else signal.Signals(-code).name
        problem = f"{self.order.flavour} ended the building process with {how} at {self.done:.0%}"
        if code == -signal.SIGKILL:
            problem += f". Most likely the kernel needed its memory: it had {_mib(self.peak_bytes)}"
        last = readable(self._tail())
        return EngineFailed(f"{problem}. Its last lines: {last or 'none'}.", fix=STILL_RUNS)

    def _tail(self) -> list[str]:
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return self.log.read().decode("utf-8", "replace").splitlines()[-_TAIL_LINES:]


@contextlib.contextmanager
def _started(job: Job, graph: bytes) -> Iterator[_Build]:
    """A process at work on `job`; gone when the block ends, however it ends."""
    with contextlib.ExitStack() as stack:
        try:
            handed = stack.enter_context(tempfile.TemporaryFile(dir=job.plan.parent))
            handed.write(job.encode())
            handed.write(graph)
            handed.seek(0)
        except OSError as exc:
            raise EngineFailed(
                f"{job.plan.parent} cannot be written: {exc.strerror or exc}.", fix="Free some space there."
            ) from exc
        log = stack.enter_context(tempfile.TemporaryFile())
        reading, writing = os.pipe()
        events = stack.enter_context(os.fdopen(reading, "rb", buffering=0))
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", _CHILD, str(writing)],
                stdin=handed, stdout=log, stderr=log, pass_fds=(writing,), start_new_session=True,
                cwd=job.plan.parent, env=_environment(),
            )  # fmt: skip
        finally:
            os.close(writing)
        try:
            yield _Build(process, job.order, events, log, _most_bytes(job.order))
        finally:
            process.kill()
            process.wait()


def _most_bytes(order: PlanOrder) -> int:
    if (limit := order.options.build_memory_bytes) is not None:
        return limit
    return round(_SHARE_OF_MEMORY * Machine.read(gpus=False).memory_bytes)


def _environment() -> dict[str, str]:
    """Ours, and in it the places where we find modules: those may be relative, and the child is in another folder."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
