"""What strangers can cause is told at most once a minute, with a number: a log is no place for their rate. Pure.

seldom = Seldom()
if seldom.happened(now):
    log.warning("A request failed. %d so far.", seldom.count)
"""

from __future__ import annotations

import math


class Seldom:
    """Counts one kind of event, and says when a line about it is due."""

    __slots__ = ("_again_at", "_every_s", "count")

    def __init__(self, every_s: float = 60.0) -> None:
        self.count = 0
        """How often it happened."""
        self._every_s = every_s
        self._again_at = -math.inf

    def happened(self, now: float) -> bool:
        """Count it; whether to tell of it: the first time, and then once in `every_s`. `now` is a monotonic clock's."""
        self.count += 1
        if now < self._again_at:
            return False
        self._again_at = now + self._every_s
        return True
