"""Stages of pipelines that live on other devices: asked over a connection of their own, as any client asks.

The connection is made when the first such stage is asked, and kept. Nobody waits here: what is to be asked goes to a
thread, and its outcome comes back through a callback, which must only take note.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Union

from edge_sdk.errors import EdgeSdkError, RequestError, Unavailable
from edge_sdk.mqtt.answers import Answer, Data
from edge_sdk.mqtt.client import Client
from edge_sdk.stages import Stage
from edge_sdk.tasks.base import BINARY, Payload
from edge_sdk.tasks.oip import decode_request
from edge_sdk.tensors import Outputs

log = logging.getLogger(__name__)

Outcome = Union[Outputs, RequestError]
Done = Callable[[Outcome], None]


class Elsewhere:
    """`connect` makes the client; it may take its time, and raise what `Client` raises."""

    def __init__(self, connect: Callable[[], Client]) -> None:
        self._connect = connect
        self._client: Client | None = None
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def ask(self, stage: Stage, payload: Payload, timeout_s: float, done: Done) -> None:
        """Ask the stage's model where it lives; `done` is called once, on some thread."""
        self._jobs.put(lambda: self._ask(stage, payload, timeout_s, done))
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="edge-sdk-elsewhere", daemon=True)
                self._thread.start()

    def close(self, limit_s: float) -> None:
        """Disconnect, and wait for that at most `limit_s`; what was not answered ends with Unavailable."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(limit_s)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
        if self._client is not None:
            self._client.close()

    def _ask(self, stage: Stage, payload: Payload, timeout_s: float, done: Done) -> None:
        where = f"device {stage.device!r}" if stage.device is not None else f"group {stage.group!r}"
        data: Data = payload.data
        try:
            if self._client is None:
                self._client = self._connect()
            if payload.content_type == BINARY:
                data = decode_request(payload.data, payload.header_length).feeds
            future = self._client.submit(
                stage.model or "", data, version=stage.version, device=stage.device, group=stage.group,
                timeout_s=timeout_s, accept=BINARY,
            )  # fmt: skip
        except Exception as exc:
            if not isinstance(exc, EdgeSdkError):
                log.exception("A defect of edge-sdk: %s could not be asked.", where)
            done(_as_request_error(exc, where))
            return

        def finished(future: Future[Answer]) -> None:
            error = future.exception()
            if error is None:
                done({name: array.copy() for name, array in future.result().outputs.items()})
            else:
                done(_as_request_error(error, where))

        future.add_done_callback(finished)


def _as_request_error(error: BaseException, where: str) -> RequestError:
    """What a stranger is told: of our broker he needs to know nothing."""
    if isinstance(error, RequestError):
        return error
    return Unavailable(f"The {where} gave no answer.", retry_after_ms=1000)
