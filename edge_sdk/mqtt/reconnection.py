"""When to open the next connection, and in which version of MQTT: pure, the time passed in. Daemon and client share it.

    if reconnection.due(now):
        transport.open(options(reconnection.version), timeout_s=reconnection.patience_s(5))   # or failed(now)
    ...
    reconnection.connected(now) | reconnection.refused(code, now) | reconnection.closed(code, now)

Between attempts lie the pauses of `Backoff`, unless another version of MQTT is worth trying at once (`Negotiation`). A
connection starts the pauses over only if it lasted: two clients with one id throw each other out again and again, and
not every broker says that this is what happened.
"""

from __future__ import annotations

import math

from edge_sdk.mqtt.backoff import Backoff
from edge_sdk.mqtt.negotiation import PATIENCE_S, Negotiation, ProtocolSetting
from edge_sdk.mqtt.transports.base import MqttVersion

LASTING_S = 10.0
DOUBT_S = 1.0
"""How long a connection lasts whose version is doubtful. By then a broker that was starting has started."""
_SUSPICIOUS = 5
"""So many connections in a row that did not last are more than a bad line: perhaps two clients share an id, of which
not every broker tells them."""


class Reconnection:
    """The state of one connection that is to be kept up."""

    def __init__(self, protocol: ProtocolSetting, *, backoff: Backoff | None = None) -> None:
        self.next_at = 0.0
        """When the next attempt is due; infinity while one is under way or the connection stands."""
        self._negotiation = Negotiation(protocol)
        self._backoff = backoff or Backoff()
        self._begun_at = math.inf
        self._connected_at: float | None = None
        self._short_lived = 0

    @property
    def may_have_a_rival(self) -> bool:
        """Whether connections keep ending soon after they were made."""
        return self._short_lived >= _SUSPICIOUS

    @property
    def is_connected(self) -> bool:
        return self._connected_at is not None

    @property
    def version(self) -> MqttVersion:
        return self._negotiation.version

    @property
    def version_name(self) -> str:
        return "5" if self.version == 5 else "3.1.1"

    def patience_s(self, timeout_s: float) -> float:
        """How long to wait for CONNACK, of at most `timeout_s`."""
        return self._negotiation.patience_s(timeout_s)

    def due(self, now: float) -> bool:
        """Whether to open now; if so, the attempt counts as begun."""
        if now < self.next_at:
            return False
        self.next_at, self._begun_at = math.inf, now
        return True

    def doubts(self, now: float) -> bool:
        """Whether to leave this connection and `ask_again`: a hang-up led to its version, and may mean nothing."""
        connected_at = self._connected_at
        return connected_at is not None and self._negotiation.doubtful and now - connected_at >= DOUBT_S

    def ask_again(self, now: float) -> None:
        """The connection was left; the next one, at once, is in MQTT 5."""
        self._negotiation.lost()
        self._connected_at, self.next_at = None, now

    def rest(self) -> None:
        """The connection was given up, and none is due until `resume`."""
        self._connected_at, self.next_at = None, math.inf

    def resume(self, now: float) -> None:
        self.next_at = now

    def connected(self, now: float) -> None:
        self._connected_at = now
        self._negotiation.connected()

    def failed(self, now: float) -> float:
        """The broker could not be reached; gives back the pause until the next attempt, in seconds."""
        return self._pause(self._backoff.pause_s(), now)

    def refused(self, code: int, now: float) -> float:
        """The broker refused the connection; the pause. 0 where another version is worth trying."""
        if self._negotiation.refused(code):
            return self._pause(0.0, now)
        return self._pause(self._backoff.pause_s(refused=True, code=code), now)

    def closed(self, code: int | None, now: float) -> float:
        """The connection ended, or ended before CONNACK; the pause. 0 where another version is worth trying."""
        connected_at, self._connected_at = self._connected_at, None
        if connected_at is None and self._negotiation.hung_up(silent=now - self._begun_at >= PATIENCE_S):
            return self._pause(0.0, now)
        if connected_at is not None:
            self._negotiation.lost()
            self._short_lived += 1
            if now - connected_at >= LASTING_S:
                self._short_lived = 0
                self._backoff.connected()
        return self._pause(self._backoff.pause_s(code=code), now)

    def _pause(self, pause_s: float, now: float) -> float:
        self.next_at = now + pause_s
        return pause_s
