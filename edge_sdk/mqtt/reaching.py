"""A broker reached beside everything else: for a connection whose owner has other things to do meanwhile.

    reaching = Reaching(transport, options, timeout_s=5)
    ...
    if reaching.done:                                # the transport has been woken
        transport.open(options, timeout_s=5, reached=reaching.result())    # or what `open` raises

To reach a broker is to look its name up, to wait for TCP, and to shake hands: all of `open` that waits. It touches
nothing of the transport's, so it can be done on a thread that lives no longer than the attempt. What that hands over is
one value, once; the transport stays with the thread that owns it.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

from edge_sdk.mqtt.transports.base import ConnectOptions, Reached, Transport


class Reaching:
    """One attempt, begun."""

    def __init__(self, transport: Transport, options: ConnectOptions, *, timeout_s: float) -> None:
        self.options = options
        self._transport = transport
        self._timeout_s = timeout_s
        self._reached: Future[Reached] = Future()
        threading.Thread(target=self._reach, name=f"reach {options.host}"[:32], daemon=True).start()

    @property
    def done(self) -> bool:
        return self._reached.done()

    def result(self) -> Reached:
        """What was reached, or BrokerError and the like: what `Transport.reach` raised."""
        return self._reached.result()

    def abandon(self) -> None:
        """Nobody wants it any more: whatever is reached is let go."""
        self._reached.add_done_callback(_let_go)

    def _reach(self) -> None:
        try:
            self._reached.set_result(self._transport.reach(self.options, timeout_s=self._timeout_s))
        except BaseException as exc:
            self._reached.set_exception(exc)
        self._transport.wake()


def _let_go(reached: Future[Reached]) -> None:
    if reached.exception() is None:
        reached.result().close()
