"""The watch: what hangs is told of, and what only waits for its turn is not."""

from __future__ import annotations

import threading
import time

from edge_sdk.errors import EngineHung
from edge_sdk.runtime.messages import Request
from edge_sdk.runtime.recorder import FlightRecorder
from edge_sdk.runtime.turns import Turns, Turnstile
from edge_sdk.tasks.base import Payload
from edge_sdk.watch import Watch
from tests.brokers import eventually


def test_who_waits_for_a_turn_does_not_hang() -> None:
    """A batch that computes for ever is what is told of, not the one behind it, which came first and waits for it."""
    recorder = FlightRecorder()
    hung: list[EngineHung] = []
    watch = Watch(recorder, hang_s=0.4, on_hang=hung.append)
    turns = Turns(cores=1)
    patient, greedy = Turnstile(threads=1), Turnstile(threads=1)
    patient.close(turns, "patient")
    greedy.close(turns, "greedy")
    with greedy:

        def wait() -> None:
            with patient:
                pass

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        eventually(patient.is_crowded, "a batch that waits")
        for model, turnstile, ticket in (("patient", patient, 1), ("greedy", greedy, 2)):
            request = Request(ticket, model, Payload(b""), time.monotonic(), float("inf"))
            recorder.begin(model, (request,)).waits = turnstile.is_crowded
        watch.start()
        eventually(lambda: hung, "word of what hangs")
    waiting.join(20.0)
    watch.stop()

    assert "of greedy" in str(hung[0])
    assert not patient.is_crowded()
