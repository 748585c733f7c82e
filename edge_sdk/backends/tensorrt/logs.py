"""What TensorRT says while it works, kept for error messages and said as a person would read it.

TensorRT reports through a logger that we hand it, and answers a failed call with None or False. So the reason of every
error is in the last lines of the log - between source paths of NVIDIA's build machine, line numbers and error codes.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterable
from typing import Any

from edge_sdk.backends.tensorrt.vendor import Severity

_log = logging.getLogger(__name__)

_ERRORS = ("INTERNAL_ERROR", "ERROR")
_VERBOSE = "VERBOSE"
"""Thousands of lines a build."""

_KEPT = 12
"""The errors of one call; there are rarely more than five."""

_NOISE = (
    r"\bIn (?:function )?[\w:~]+ at \S+?:\d+",  # In checkType at /_src/optimizer/common/nodeBase.cpp:456
    r"\[[\w./-]+\.(?:cpp|h|hpp|cu)[^\]]*\]",  # [checkMacros.cpp::catchCudaError::250]
    r"\b[\w./-]+\.(?:cpp|h|hpp|cu)(?:::\w+)*:\d*:?",  # ModelImporter.cpp:140:
    r"\bIn function \w+:",
    r"^\s*(?:\[\d+\]|\d+:)",  # an error's number, of the parser or of 8.6
    r"\b(?:ERROR|Error Code \d+):",
    r"^\s*I[A-Z]\w+::\w+:",  # IBuilder::buildSerializedNetwork:
    r"/_src/\S*",
)
_LEFT_OVER = ((r"\s{2,}", " "), (r"\s+([).,])", r"\1"), (r"\(\s+", "("), (r"\(\(", "("), (r"\)\)", ")"))
"""What is left where something was taken out."""
_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|bad_alloc|cudaErrorMemoryAllocation|cudaError 2\b|Requested amount of GPU memory", re.IGNORECASE
)
_NO_DRIVER = re.compile(r"cudaError 35\b|cudaErrorInsufficientDriver|cudaError 100\b|cudaErrorNoDevice")
"""Without a GPU the builder says so on occasion, and is none the worse for it."""


NEEDS_GPU = "It needs an NVIDIA GPU, and a driver that is new enough for it."


class Said:
    """The last errors and warnings that TensorRT logged since `clear`."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=_KEPT)
        self._warnings: deque[str] = deque(maxlen=_KEPT)

    def keep(self, severity: str, message: str) -> None:
        """A line from TensorRT, from any of its threads. Its errors become ours, so its log is for those who debug."""
        if severity == _VERBOSE:
            return
        _log.debug("%s: %s", severity, message)
        if severity in _ERRORS:
            self._errors.append(message)
        elif severity == "WARNING":
            self._warnings.append(message)

    def clear(self) -> None:
        self._errors.clear()
        self._warnings.clear()

    def mentions(self, text: str) -> bool:
        """Whether an error or a warning has `text` in it, in any case."""
        return any(text.lower() in line.lower() for line in (*self._errors, *self._warnings))

    @property
    def out_of_memory(self) -> bool:
        return any(_OUT_OF_MEMORY.search(line) for line in self._errors)

    @property
    def no_driver(self) -> bool:
        return any(_NO_DRIVER.search(line) for line in self._errors)

    def __str__(self) -> str:
        """The errors, or without any the warnings, in one line; `nothing` if there are neither."""
        return readable(self._errors) or readable(self._warnings) or "nothing"


def readable(messages: Iterable[str], limit: int = 700) -> str:
    """What TensorRT's lines say, without where in its sources they were said; at most `limit` characters."""
    lines = [line for message in messages for line in map(_without_noise, message.splitlines()) if line]
    telling = [line for line in lines if not _NO_DRIVER.search(line)] or lines
    text = "; ".join(dict.fromkeys(line.rstrip(".") for line in telling))
    return text if len(text) <= limit else f"{text[:limit]}..."


def _without_noise(line: str) -> str:
    for pattern in _NOISE:
        line = re.sub(pattern, "", line)
    for pattern, instead in _LEFT_OVER:
        line = re.sub(pattern, instead, line)
    line = line.strip()
    return line if re.search(r"[A-Za-z]{3}", line) else ""


def logger(trt: Any, said: Said) -> Any:
    """An ILogger of TensorRT's module `trt` that keeps what it is told in `said`."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the module is only known at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Severity, message: str) -> None:
            try:
                said.keep(severity.name, message)
            except Exception:  # it would end the process: TensorRT calls this from C++
                _log.exception("A line of TensorRT's log was lost.")

    return Logger()


def monitor(trt: Any, phases: Any) -> Any:
    """An IProgressMonitor of TensorRT's module `trt` that reports to `phases`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the module is only known at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            try:
                phases.start(phase_name, parent_phase, num_steps)
            except Exception:  # as above
                _log.exception("A phase of TensorRT's build was lost.")

        def step_complete(self, phase_name: str, step: int) -> bool:
            """True: go on."""
            try:
                phases.step(phase_name, step)
            except Exception:  # as above
                _log.exception("A step of TensorRT's build was lost.")
            return True

        def phase_finish(self, phase_name: str) -> None:
            try:
                phases.finish(phase_name)
            except Exception:  # as above
                _log.exception("The end of a phase of TensorRT's build was lost.")

    return Monitor()
