"""How fast is it? A closed loop of `concurrency` requests, each answer followed by the next request.

The loop is the same whether it drives a package in this process (through the runtime, with its queue and its batches,
but without MQTT) or a device over MQTT: what differs is what transport costs.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edge_sdk.backends.base import DeviceTime, Engine, Timed
from edge_sdk.backends.onnxruntime import OnnxRuntimeBackend
from edge_sdk.backends.registry import load_engine
from edge_sdk.errors import BackendUnavailable, EngineFailed
from edge_sdk.package import GRAPH, EnginePackage
from edge_sdk.tensors import Feeds, allocate

Submit = Callable[[], "Future[Any]"]


@dataclass(frozen=True)
class DeviceFigures:
    """An engine alone, batch after batch: medians, by the device's own clock and by the wall's."""

    batch: int
    wall_ms: float
    device_ms: float
    """From the first copy to the last."""
    compute_ms: float
    cuda_provider_ms: float | None = None
    """What onnxruntime's CUDA provider takes for the same batch of the same graph, by the wall's clock; None where it
    is not installed."""


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
    device: DeviceFigures | None = None
    """Of a package whose engine runs on a device with a clock of its own."""

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


def device_figures(package: EnginePackage, *, seconds: float) -> DeviceFigures | None:
    """What a best batch of zeros takes on the package's device; None where that has no clock, or zeros make no sense.

    Half of `seconds` goes to onnxruntime's CUDA provider where that is installed.
    """
    with closing(load_engine(package).engine) as engine:
        batch = package.manifest.batching.best_batch
        feeds = allocate(engine.inputs, batch)
        if not isinstance(engine, Timed) or feeds is None:
            return None
        for array in feeds.values():
            array.fill(0)
        taken: list[DeviceTime] = []

        def note() -> None:
            if (of_batch := engine.device_time()) is not None:
                taken.append(of_batch)

        wall_ms = _median_ms(engine, feeds, seconds / 2, note)
    if not taken:
        return None
    try:
        peer = OnnxRuntimeBackend().load_on_cuda(package.read(GRAPH), package.profile())
    except (BackendUnavailable, EngineFailed):
        peer_ms = None
    else:
        with closing(peer):
            peer_ms = _median_ms(peer, feeds, seconds / 2)
    total_ms, compute_ms = (round(float(np.median([time[part] for time in taken])), 4) for part in (0, 1))
    return DeviceFigures(batch, wall_ms, total_ms, compute_ms, peer_ms)


def _median_ms(engine: Engine, feeds: Feeds, seconds: float, each: Callable[[], object] = lambda: None) -> float:
    """Of one run, after a few that are not counted."""
    out = engine.infer(feeds)
    for _ in range(5):
        engine.infer(feeds, out)
    times: list[float] = []
    began = time.perf_counter()
    while not times or times[-1] - began < seconds:
        engine.infer(feeds, out)
        times.append(time.perf_counter())
        each()
    return round(float(np.median(np.diff([began, *times]))) * 1e3, 4)
