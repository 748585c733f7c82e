"""Stages on other devices: whatever becomes of the question, whoever asked is told, and nobody waits for long."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue

from edge_sdk.errors import RequestError, Unavailable
from edge_sdk.mqtt.client import Client
from edge_sdk.mqtt.elsewhere import Elsewhere, Outcome
from edge_sdk.stages import Stage
from edge_sdk.tasks.base import BINARY, Payload

STAGE = Stage(name="find", model="digits", device="far", picture="request")
PAYLOAD = Payload(b"", BINARY)


def test_a_stop_does_not_wait_for_a_broker_that_is_gone() -> None:
    """The daemon has seconds to stop in, and an attempt to connect may take longer."""
    connecting, given_up = threading.Event(), threading.Event()

    def connect() -> Client:
        connecting.set()
        given_up.wait(60)
        raise Unavailable("It is gone.")

    elsewhere = Elsewhere(connect)
    elsewhere.ask(STAGE, PAYLOAD, 60.0, lambda outcome: None)
    assert connecting.wait(15)
    began = time.monotonic()
    elsewhere.close(limit_s=0.1)
    took_s = time.monotonic() - began
    given_up.set()

    assert took_s < 3.0


def test_a_defect_costs_one_question() -> None:
    """Its stage ends, and the next question is asked all the same."""
    outcomes: SimpleQueue[Outcome] = SimpleQueue()
    attempts = iter([ValueError("a secret path"), Unavailable("It is gone.")])

    def connect() -> Client:
        raise next(attempts)

    elsewhere = Elsewhere(connect)
    for _ in range(2):
        elsewhere.ask(STAGE, PAYLOAD, 60.0, outcomes.put)
    ends = [outcomes.get(timeout=15) for _ in range(2)]
    elsewhere.close(limit_s=5.0)

    assert all(isinstance(end, RequestError) for end in ends)
    assert "secret" not in str(ends[0])
