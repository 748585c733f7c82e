"""When to connect again: pure, the time and the chance passed in.

Doubling with jitter, so that a fleet does not return to a broker in step. Two refusals are not worth hurrying for: a
broker that says no to our credentials, and one that gave our session to somebody with the same client id - two daemons
that both hurry back evict each other for ever.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from edge_sdk.mqtt.transports.base import SESSION_TAKEN_OVER

SHORTEST_S = 0.1
LONGEST_S = 5.0
REFUSED_S = 5.0
TAKEN_OVER_S = 60.0


class Backoff:
    """The pauses between attempts; `pause` gives the next one, `connected` starts over."""

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        self._chance = chance
        self._next_s = SHORTEST_S

    def connected(self) -> None:
        self._next_s = SHORTEST_S

    def pause_s(self, *, refused: bool = False, code: int | None = None) -> float:
        """Seconds until the next attempt, after a connection that was lost, could not be made, or was `refused`."""
        if code == SESSION_TAKEN_OVER:
            return TAKEN_OVER_S * (1 + self._chance())
        self._next_s = min(LONGEST_S, self._next_s * 2)
        longest = max(self._next_s, REFUSED_S) if refused else self._next_s
        return longest * (0.5 + 0.5 * self._chance())
