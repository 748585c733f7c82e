"""What stands still: told by looking again and again, the time passed in.

Everything that should move shows a mark that is another one once it moved: the number of a batch, of a turn of a loop.
What shows the same mark at look after look stands still. Only the time between two looks counts, and of that no more
than `STEP_S`: when a process was stopped as a whole, or the machine slept, none of its parts was at fault.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

STEP_S = 6.0
"""The most that counts between two looks; who looks does so more often."""


@dataclass(frozen=True)
class Mark:
    """What something shows now, and for how long it may."""

    token: Hashable
    limit_s: float
    name: str


class Standstill:
    """How long each mark has been seen."""

    def __init__(self) -> None:
        self._seen_s: dict[Hashable, float] = {}
        self._looked_at: float | None = None

    def look(self, marks: Iterable[Mark], now: float) -> list[Mark]:
        """Those of `marks`, everything that is there now, that have been there for longer than they may."""
        step_s = 0.0 if self._looked_at is None else min(STEP_S, max(0.0, now - self._looked_at))
        self._looked_at = now
        former, self._seen_s = self._seen_s, {}
        late = []
        for mark in marks:
            seen_s = former[mark.token] + step_s if mark.token in former else 0.0
            self._seen_s[mark.token] = seen_s
            if seen_s >= mark.limit_s:
                late.append(mark)
        return late
