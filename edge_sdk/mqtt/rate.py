"""How many requests of one client are taken a second: pure, the time passed in.

    limits = ClientRates(rate=5.0, burst=10)
    wait_s = limits.take("camera", now)      # 0.0: taken; otherwise how long until one would be

A client may send `burst` requests at once and `rate` a second from then on: a token bucket, kept as the one moment at
which it will be full again. What is refused costs its sender nothing, so the wait is the same however often it asks.

A client is whoever it says it is, in its reply topic. Only the broker's access control makes that true, by letting each
client read no answers but its own (docs/security.md); without it a client that changes its name starts afresh. So the
table is bounded, and a name that falls out of it starts afresh as well.
"""

from __future__ import annotations

from collections import OrderedDict

MAX_CLIENTS = 4096
"""Names that are remembered; the one that was heard longest ago goes first. About 150 bytes each."""


class ClientRates:
    """The buckets of all clients."""

    def __init__(self, rate: float, burst: int, *, max_clients: int = MAX_CLIENTS) -> None:
        """`rate` is in requests a second; `burst`, at least 1, is what a client that was silent may send at once."""
        self._interval_s = 1.0 / rate
        self._tolerance_s = (burst - 1) * self._interval_s
        self._max_clients = max_clients
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, client: str, now: float) -> float:
        """0.0 if a request of `client` may pass, which is counted; otherwise the seconds until one may."""
        full_at = max(self._full_at.get(client, now), now)
        wait_s = max(0.0, full_at - self._tolerance_s - now)
        self._full_at[client] = full_at if wait_s else full_at + self._interval_s
        self._full_at.move_to_end(client)
        if len(self._full_at) > self._max_clients:
            self._full_at.popitem(last=False)
        return wait_s

    def __len__(self) -> int:
        """How many clients are remembered."""
        return len(self._full_at)
