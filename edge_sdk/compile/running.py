"""How a graph is run best by onnxruntime on this machine: with how many threads, and whether they spin as they compute.

    speeds = speeds_of([fp32, int8], options, load, feeds, max_batch=8)
    speeds[1].record            # for the manifest; `best_batch` of `per_second_at_batch` is found with it

More threads answer sooner, and cost more processor time: they wait for one another between the operators of a graph,
asleep or spinning. So every way to run has two measures: the median latency, and the processor time of one inference at
half load, when a few inferences come one behind another and the process then rests as long. A way takes the place of a
more frugal one only if

* it is `_WORTH_THREADS` times as fast or more, and
* what it costs in processor time is at most `_WORTH_CPU` times what it gains: twice as fast may cost 2.5 times as much.
  (MobileNetV2 INT8 by two threads costs a quarter more processor time than by one, and the daemon then answers 0.84 of
  what a bare loop does, and not 0.65.)

No way spins for longer than a few microseconds, nor between inferences. Left to itself, onnxruntime spins for a second:
a tiny model's two threads took 5.2 ms of processor time for each inference in between rests of 5 ms, which the network,
the decoders or another model could have used. Spinning briefly gives nearly all of the gain (see
`backends.onnxruntime`).

All ways of all candidates are measured in turns within one run, some seconds altogether.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

from edge_sdk.backends.base import Engine
from edge_sdk.compile.verify import throughput, time_engines
from edge_sdk.package import RunningRecord, WayRecord
from edge_sdk.profiles import OnnxRuntimeOptions, physical_cores, processor
from edge_sdk.tensors import Feeds

_WORTH_THREADS = 1.15
"""How many times as fast a way to run a graph must be as a more frugal one: less than that is noise."""
_WORTH_CPU = 1.25
_TOGETHER = 4
"""Inferences that come one behind another at half load."""
_LONGEST_REST_S = 0.02
_SECONDS_FOR_LATENCIES = 1.2
_SECONDS_AT_HALF_LOAD = 0.1
_RUNS_AT_HALF_LOAD = 200
_ROUNDS = 3

Load = Callable[[bytes, OnnxRuntimeOptions], AbstractContextManager[Engine]]


@dataclass(frozen=True)
class Speed:
    """How fast a graph is, run in the best way. Nothing is known where nothing was measured."""

    latency_ms: float | None = None
    per_second_at_batch: Mapping[int, float] = field(default_factory=dict)
    record: RunningRecord | None = None


def speeds_of(
    graphs: Sequence[bytes],
    options: OnnxRuntimeOptions,
    load: Load,
    feeds: Feeds,
    *,
    max_batch: int,
    each: Callable[[], None] = lambda: None,
) -> list[Speed]:
    """How fast each of `graphs` is here. `options` are the profile's; those of a way take their place.

    First the numbers of threads, which spin where there are several, then for each graph the best of them beside the
    same one asleep.
    """
    with ExitStack() as stack:

        def loaded(graph: bytes, options: OnnxRuntimeOptions) -> _Way:
            return _Way(options, stack.enter_context(load(graph, options)))

        ways = [[loaded(graph, way) for way in ways_to_run(options)] for graph in graphs]
        measures = _measured(ways, feeds)
        tried = [list(each_of) for each_of in measures]
        best = [_best(*both) for both in zip(ways, measures)]
        if any(way.options.intra_op_threads > 1 for way, _ in best):
            ways = [
                [*(loaded(graph, asleep) for asleep in _asleep(way.options)), way]
                for graph, (way, _) in zip(graphs, best)
            ]
            measures = _measured(ways, feeds)
            tried = [[*before, *after[:-1]] for before, after in zip(tried, measures)]
            best = [_best(*both) for both in zip(ways, measures)]
        speeds = []
        for (way, measure), others in zip(best, tried):
            rates = throughput(way.engine, feeds, max_batch)
            record = RunningRecord(
                intra_op_threads=measure.intra_op_threads,
                spinning=measure.spinning,
                processor=processor(),
                tried=tuple(others),
            )
            speeds.append(Speed(measure.latency_ms, rates, record))
            each()
    return speeds


@dataclass(frozen=True)
class _Way:
    options: OnnxRuntimeOptions
    engine: Engine


def _best(ways: Sequence[_Way], measures: Sequence[WayRecord]) -> tuple[_Way, WayRecord]:
    measure = best_way(measures)
    return ways[measures.index(measure)], measure


def _asleep(options: OnnxRuntimeOptions) -> list[OnnxRuntimeOptions]:
    """The same, not spinning; a single thread has none to wait for."""
    return [options.model_copy(update={"spinning": False})] if options.intra_op_threads > 1 else []


def ways_to_run(options: OnnxRuntimeOptions, cores: int = 0) -> list[OnnxRuntimeOptions]:
    """One thread, two, four... and one for each of `cores` (0: of this machine), the most frugal first."""
    cores = cores or physical_cores()
    most = min(options.intra_op_threads or cores, cores)
    counts = sorted({most, *(1 << power for power in range(most.bit_length()) if 1 << power < most)})
    return [options.model_copy(update={"intra_op_threads": count, "spinning": count > 1}) for count in counts]


def best_way(ways: Sequence[WayRecord]) -> WayRecord:
    """The one to use of `ways`, the most frugal of which is the first; see the module for the rule."""
    frugal, *others = ways
    best = frugal
    for other in others:
        if _is_worth_it(other, best) and _is_worth_it(other, frugal):
            best = other
    return best


def _is_worth_it(way: WayRecord, frugal: WayRecord) -> bool:
    gain = frugal.latency_ms / way.latency_ms
    return gain >= _WORTH_THREADS and _WORTH_CPU * gain >= way.cpu_ms / max(frugal.cpu_ms, 1e-6)


def _measured(candidates: Sequence[Sequence[_Way]], feeds: Feeds) -> list[tuple[WayRecord, ...]]:
    """The measures of each candidate's ways, all of them taken in turns."""
    engines = [way.engine for ways in candidates for way in ways]
    latencies = time_engines(engines, feeds, seconds=_SECONDS_FOR_LATENCIES)
    costs: list[list[float]] = [[] for _ in engines]
    for _ in range(_ROUNDS):
        for engine, latency_ms, cost in zip(engines, latencies, costs):
            cost.append(_cpu_ms_at_half_load(engine, feeds, latency_ms))
    figures = iter(zip(latencies, map(min, costs)))  # whatever else the process did is no cost of an inference
    return [tuple(_record(way.options, *next(figures)) for way in ways) for ways in candidates]


def _record(options: OnnxRuntimeOptions, latency_ms: float, cpu_ms: float) -> WayRecord:
    return WayRecord(
        intra_op_threads=options.intra_op_threads,
        spinning=options.spinning,
        latency_ms=latency_ms,
        cpu_ms=round(cpu_ms, 4),
    )


def _cpu_ms_at_half_load(engine: Engine, feeds: Feeds, latency_ms: float) -> float:
    """Processor time of one inference, all threads of the process together, with a rest behind every few."""
    rest_s = min(_TOGETHER * latency_ms / 1e3, _LONGEST_REST_S)
    engine.infer(feeds)
    runs = 0
    began, until = time.process_time(), time.perf_counter() + _SECONDS_AT_HALF_LOAD
    while not runs or (time.perf_counter() < until and runs < _RUNS_AT_HALF_LOAD):
        for _ in range(_TOGETHER):
            engine.infer(feeds)
        time.sleep(rest_s)
        runs += _TOGETHER
    return (time.process_time() - began) / runs * 1e3
