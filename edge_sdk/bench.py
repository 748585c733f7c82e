"""How fast is it? A closed loop of `concurrency` requests, each answer followed by the next request.

The loop is the same whether it drives a package in this process (through the runtime, with its queue and its batches,
but without MQTT) or a device over MQTT: what differs is what transport costs.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edge_sdk.errors import DeviceLost, RequestError
from edge_sdk.package import EnginePackage
from edge_sdk.runtime.batching import QueueLimits
from edge_sdk.runtime.messages import Answer, Request
from edge_sdk.runtime.served import ServedModel
from edge_sdk.runtime.worker import Worker
from edge_sdk.tasks.base import Body, Payload

Submit = Callable[[], "Future[Any]"]
_DEADLINE_S = 60.0


@dataclass(frozen=True)
class BenchResult:
    """Latencies are from the moment a request was handed over until its answer was there."""

    requests: int
    errors: int
    concurrency: int
    seconds: float
    per_second: float
    p50_ms: float
    p99_ms: float
    first_error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def drive(submit: Submit, *, concurrency: int, seconds: float, warm_up: int = 10) -> BenchResult:
    """Keep `concurrency` requests in flight for `seconds`, after `warm_up` that are not counted."""
    for _ in range(warm_up):
        submit().result()
    done: queue.SimpleQueue[tuple[float, Future[Any]]] = queue.SimpleQueue()

    def launch() -> None:
        began = time.perf_counter()
        submit().add_done_callback(lambda future: done.put((time.perf_counter() - began, future)))

    latencies = []
    errors = 0
    first_error = None
    started = time.perf_counter()
    for _ in range(concurrency):
        launch()
    flying = concurrency
    while flying:
        latency, future = done.get()
        flying -= 1
        if (error := future.exception()) is not None:
            errors += 1
            first_error = first_error or str(error)
        else:
            latencies.append(latency)
        if time.perf_counter() - started < seconds:
            launch()
            flying += 1
    elapsed = time.perf_counter() - started
    p50, p99 = (float(np.percentile(latencies, q)) * 1e3 if latencies else 0.0 for q in (50, 99))
    return BenchResult(
        requests=len(latencies),
        errors=errors,
        concurrency=concurrency,
        seconds=round(elapsed, 3),
        per_second=round(len(latencies) / elapsed, 1),
        p50_ms=round(p50, 3),
        p99_ms=round(p99, 3),
        first_error=first_error,
    )


@contextmanager
def in_process(package: EnginePackage) -> Iterator[Callable[[Payload], Future[Body]]]:
    """The runtime of one package, without a transport: a function from a payload to the future of its answer."""
    pending: dict[int, Future[Body]] = {}
    lock = threading.Lock()
    last = 0

    def finish(answer: Answer) -> None:
        with lock:
            future = pending.pop(answer.ticket)
        if isinstance(answer.result, RequestError):
            future.set_exception(answer.result)
        else:
            future.set_result(answer.result)

    def lose(loss: DeviceLost) -> None:
        with lock:
            lost = [*pending.values()]
            pending.clear()
        for future in lost:
            future.set_exception(loss)

    def submit(payload: Payload) -> Future[Body]:
        nonlocal last
        future: Future[Body] = Future()
        now = time.monotonic()
        with lock:
            last += 1
            ticket = last
            pending[ticket] = future
        try:
            served.submit(Request(ticket, package.name, payload, now, now + _DEADLINE_S))
        except RequestError as exc:
            finish(Answer(ticket, exc))
        return future

    served = ServedModel(
        package.name, package.version, limits=QueueLimits(), on_answer=finish, on_lost=lose, clock=time.monotonic
    )  # fmt: skip
    worker = Worker.load(package)
    worker.warm_up()
    served.put_in_service(worker, quick=False)
    try:
        yield submit
    finally:
        served.retire()
        served.join(5.0)
