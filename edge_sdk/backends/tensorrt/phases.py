"""One number out of many: how far a build is, from the nested phases that TensorRT reports.

TensorRT says when a phase starts, within which other one and in how many steps, when each step is done, and when the
phase is finished. Phases start within a step of their parent, one after the other, and nobody knows how many will come;
each is given half of what is left of that step. So the number only grows, and is a guess like every progress bar.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

_LONG_STEP = 4
"""Of the six steps of a build the one that compiles kernels: it takes nearly all of the time."""
_STEPS_OF_A_BUILD = 6
_BEFORE = 0.02
"""The share of each step before the long one."""
_LONG_SHARE = 0.9


@dataclass
class _Phase:
    steps: int
    parent: _Phase | None
    done: int = 0
    within: float = 0.0
    """How much of the current step its finished sub-phases made up."""
    children: list[_Phase] = field(default_factory=list)
    """Those under way."""

    def fraction(self) -> float:
        within = self.within
        for child in self.children:
            within += (1 - within) / 2 * child.fraction()
        lower, upper = self._share(self.done), self._share(self.done + 1)
        return lower + (upper - lower) * within

    def _share(self, done: int) -> float:
        """How much of the phase is over after `done` steps."""
        if done >= self.steps:
            return 1.0
        if self.parent is None and self.steps == _STEPS_OF_A_BUILD:
            return _BEFORE * done if done <= _LONG_STEP else _BEFORE * _LONG_STEP + _LONG_SHARE
        return done / self.steps


class Phases:
    """What TensorRT reported so far, from any of its threads; `fraction` grows from 0 to 1 and never shrinks.

    `tell` is called with it whenever it grew, on the thread that reported.

    >>> phases = Phases()
    >>> phases.start("Building engine", None, 2)
    >>> phases.step("Building engine", 0)
    >>> phases.fraction
    0.5
    """

    def __init__(self, tell: Callable[[float], None] = lambda fraction: None) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._under_way: dict[str, _Phase] = {}
        self._root: _Phase | None = None
        self._fraction = 0.0

    @property
    def fraction(self) -> float:
        with self._lock:
            return self._fraction

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            above = self._under_way.get(parent) if parent is not None else None
            phase = _Phase(max(1, steps), above)
            if above is not None:
                above.children.append(phase)
            elif self._root is None:
                self._root = phase
            self._under_way[name] = phase
            self._advance()

    def step(self, name: str, step: int) -> None:
        """Step number `step` of the phase is done; the ones before it are too."""
        with self._lock:
            if (phase := self._under_way.get(name)) is not None and step >= phase.done:
                phase.done = min(step + 1, phase.steps)
                phase.within = 0.0
                phase.children.clear()
                self._advance()

    def finish(self, name: str) -> None:
        """The phase is over, whether or not every step of it was reported."""
        with self._lock:
            if (phase := self._under_way.pop(name, None)) is None:
                return
            phase.done = phase.steps
            above = phase.parent
            if above is not None and phase in above.children:
                above.children.remove(phase)
                above.within += (1 - above.within) / 2
            self._advance()

    def _advance(self) -> None:
        if self._root is not None and (fraction := min(1.0, self._root.fraction())) > self._fraction:
            self._fraction = fraction
            self._tell(fraction)
