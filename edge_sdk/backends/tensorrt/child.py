"""The process in which TensorRT compiles: `python -m edge_sdk.backends.tensorrt.child`.

`process` starts it. Its standard input is a file with the order, a line of JSON, and behind it the graph. What it has
to tell goes, a line of JSON each, into the pipe whose number it is given: how far it is, and at the end what it made,
or an error. The plan goes into a file. Its standard output and error are whatever TensorRT and CUDA make of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import platform
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from edge_sdk.backends.tensorrt.builder import PlanOrder, compiled
from edge_sdk.backends.tensorrt.shapes import ShapeRange
from edge_sdk.errors import BackendUnavailable, EdgeSdkError, EngineFailed, ModelError, ProfileError
from edge_sdk.profiles import TensorRTOptions

ERRORS: Mapping[str, type[EdgeSdkError]] = {
    error.__name__: error for error in (ModelError, ProfileError, BackendUnavailable, EngineFailed)
}
"""The errors that cross to the parent; any other is an EngineFailed."""

_PR_SET_PDEATHSIG = 1
_SYS_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_IDLE = 3 << 13
_OOM_SCORE = 800
"""Of 1000: the kernel, when it needs memory, takes this process before the daemon that started it."""

_TELLING_EVERY_S = 0.1


@dataclass(frozen=True)
class Job:
    """What the parent asks for."""

    order: PlanOrder
    plan: Path
    parent: int
    considerate: bool

    def encode(self) -> bytes:
        order = self.order
        data = {
            "flavour": order.flavour,
            "targets": order.targets,
            "options": order.options.model_dump(mode="json"),
            "shapes": {name: asdict(sizes) for name, sizes in order.shapes.items()},
            "timing_cache": str(order.timing_cache) if order.timing_cache is not None else None,
            "plan": str(self.plan),
            "parent": self.parent,
            "considerate": self.considerate,
        }
        return json.dumps(data).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> Job:
        data = json.loads(line)
        order = PlanOrder(
            flavour=data["flavour"],
            targets=tuple(data["targets"]),
            options=TensorRTOptions.model_validate(data["options"]),
            shapes={
                name: ShapeRange(*(tuple(sizes[key]) for key in ("smallest", "best", "largest")))
                for name, sizes in data["shapes"].items()
            },
            timing_cache=Path(data["timing_cache"]) if data["timing_cache"] is not None else None,
        )
        return cls(order, Path(data["plan"]), data["parent"], data["considerate"])


class Telling:
    """The pipe to the parent."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._told_at = 0.0

    def progress(self, done: float) -> None:
        """From any of TensorRT's threads, thousands of times; told a few times a second."""
        now = time.monotonic()
        if now - self._told_at >= _TELLING_EVERY_S:
            self._told_at = now
            self.say(progress=done)

    def say(self, **facts: Any) -> None:
        with self._lock:
            self._pipe.write(json.dumps(facts).encode() + b"\n")
            self._pipe.flush()


def main() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.DEBUG, format="%(message)s")
    telling = Telling(os.fdopen(int(sys.argv[1]), "wb"))
    job = Job.decode(sys.stdin.buffer.readline())
    _die_with(job.parent)
    _stand_back(job.considerate)
    try:
        made = compiled(sys.stdin.buffer.read(), job.order, telling.progress)
        _write(job.plan, made.plan)
    except EdgeSdkError as exc:
        kind = type(exc).__name__ if type(exc).__name__ in ERRORS else EngineFailed.__name__
        telling.say(error=kind, problem=exc.problem, fix=exc.fix)
    except Exception as exc:  # TensorRT's bindings raise what they like; the trace is for the log
        traceback.print_exc()
        telling.say(error=EngineFailed.__name__, problem=_of_bindings(exc), fix="")
    else:
        telling.say(
            version=made.version, settings=made.settings, notes=made.notes, peak_bytes=memory_bytes("VmHWM")
        )  # fmt: skip
    os._exit(0)  # TensorRT's destructors have nothing left to do that the kernel does not


def _write(file: Path, plan: memoryview) -> None:
    try:
        file.write_bytes(plan)
    except OSError as exc:
        raise EngineFailed(
            f"The engine of {plan.nbytes:,} bytes cannot be written: {exc.strerror or exc}.", fix="Free some space."
        ) from exc


def memory_bytes(row: str, process: int | str = "self") -> int:
    """How much memory a process has in use (`VmRSS`) or had at most (`VmHWM`); 0 if it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = re.search(rf"^{row}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _of_bindings(exc: Exception) -> str:
    first = (str(exc).strip().splitlines() or [""])[0]
    return f"TensorRT's bindings failed with {type(exc).__name__}: {first[:400] or 'nothing more'}."


def _die_with(parent: int) -> None:
    """Whatever ends the parent, SIGKILL too, ends this process."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


def _stand_back(considerate: bool) -> None:
    """Let the kernel take this process first when memory runs out; and, if considerate, serve everybody else first."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE), encoding="ascii")
    except OSError:  # without /proc, or where policy forbids it, the kernel chooses as it likes
        pass
    if not considerate:
        return
    with contextlib.suppress(OSError):  # where policy forbids it, a build is better than none
        os.nice(19)
    if (number := _SYS_IOPRIO_SET.get(platform.machine())) is not None:
        ctypes.CDLL(None, use_errno=True).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)


if __name__ == "__main__":
    main()
