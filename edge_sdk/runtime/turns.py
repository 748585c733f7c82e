"""The turns that models take on the cores of a device: a batch waits until `admission` says that it is the next.

    turns = Turns(cores=2)
    turnstile = Turnstile(threads=2)        # of one worker; open to everybody
    turnstile.close(turns, "squeezenet")    # from now on its batches take their turns
    with turnstile:
        lane.start(...)

A batch may wait for long, so nobody decides before its turn has come what of it is still worth computing (see `lanes`).

Only models with threads of their own wait here. One that computes on the network thread does not: its batches take
milliseconds, and a network thread that waits keeps everybody else waiting.

A batch that computes for longer than `HELD_S` no longer keeps others waiting: it may hang, and then it never leaves.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

from edge_sdk.profiles import physical_cores
from edge_sdk.runtime.admission import Admission, Claim

HELD_S = 3.0
"""Longer than nearly every batch. Those that take longer share the cores with the others from then on."""


class Turns:
    """The cores of the device, shared by everybody who waits at a turnstile. Safe to use from any thread."""

    def __init__(self, cores: int = 0) -> None:
        """0 cores: the physical ones that this process may use."""
        self._admission = Admission(cores or physical_cores())
        self._lock = threading.Lock()
        self._turns: dict[Claim, threading.Event] = {}
        self._inside: dict[Claim, float] = {}  # since when

    def enter(self, claim: Claim) -> None:
        """Wait until `claim` may compute."""
        turn = threading.Event()
        with self._lock:
            self._turns[claim] = turn
            self._admission.ask(claim)
            self._let_in()
        while not turn.wait(HELD_S):
            with self._lock:
                for held, since in self._inside.items():
                    if time.monotonic() - since >= HELD_S:
                        self._admission.write_off(held)
                self._let_in()

    def leave(self, claim: Claim, seconds: float) -> None:
        with self._lock:
            del self._inside[claim]
            self._admission.give_back(claim, seconds)
            self._let_in()

    def _let_in(self) -> None:
        for claim in self._admission.granted():
            self._inside[claim] = time.monotonic()
            self._turns.pop(claim).set()


class Turnstile:
    """One worker's way to the cores: open, until it is closed for good. Each thread passes it by itself."""

    def __init__(self, threads: int) -> None:
        """`threads` is how many cores a batch keeps busy."""
        self._threads = threads
        self._turns: Turns | None = None
        self._model = ""
        self._mine = threading.local()
        self._claims: set[Claim] = set()

    def close(self, turns: Turns, model: str) -> None:
        """Let batches of `model` wait for their turn. Nothing may be on its way."""
        self._turns, self._model = turns, model

    @property
    def is_open(self) -> bool:
        return self._turns is None

    def is_crowded(self) -> bool:
        """Whether batches wait here, and none that has passed is computed. For any thread."""
        claims = tuple(self._claims)
        return bool(claims) and not any(claim.granted for claim in claims)

    def __enter__(self) -> None:
        if self._turns is not None:
            claim = Claim(self._model, self._threads)
            self._claims.add(claim)
            self._turns.enter(claim)
            self._mine.claim, self._mine.since = claim, time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._turns is not None:
            self._claims.discard(self._mine.claim)
            self._turns.leave(self._mine.claim, time.monotonic() - self._mine.since)
