"""What the operating system tells the daemon to do: SIGTERM and SIGINT stop it, SIGHUP lets it reload."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], None]


class Signals:
    """While the context lasts, signals call `stop` and `reload`; afterwards everything is as it was.

    Only the main thread may set handlers; elsewhere (an embedded daemon) this does nothing.
    """

    def __init__(self, *, stop: Callable[[], None], reload: Callable[[], None]) -> None:
        """Both are called inside whatever the main thread is doing: they must only take note."""
        self._wanted: dict[int, Handler] = {
            signal.SIGTERM: lambda _number, _frame: stop(),
            signal.SIGINT: lambda _number, _frame: stop(),
            signal.SIGHUP: lambda _number, _frame: reload(),
        }
        self._former: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, handler) for number, handler in self._wanted.items()}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
