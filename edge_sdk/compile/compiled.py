"""The engine beside the graph, for devices that load one: compiled, and where its device is at hand compared and timed.

An engine that nobody ran is not believed more than it deserves. If this machine has the device, the engine answers the
golden requests and must answer them as the graph does on the CPU. If not, the package says so.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from edge_sdk.backends.base import Engine, EngineOrder
from edge_sdk.compile.golden import Golden
from edge_sdk.compile.order import Order
from edge_sdk.compile.verify import best_batch, throughput, time_engines
from edge_sdk.errors import BackendError, BackendUnavailable, DeviceLost, EngineFailed, EngineUnfit, OutOfMemory
from edge_sdk.package import PROFILE, EnginePackage, EngineRecord, Manifest, seal
from edge_sdk.profiles import DeviceProfile, Precision
from edge_sdk.tensors import signal_to_noise_db

_WORTH_IT = 1.02
"""How many times faster an engine in one stream must be than TensorRT's own choice: less than that is noise."""
_MIN_SNR_DB: dict[Precision, float] = {"fp32": 40.0, "fp16": 30.0, "int8": 20.0}
"""How closely an engine must answer as its graph does on the CPU. Kernels round in other places: TF32 and FP16 leave 50
dB and more; INT8 about 30, as values fall to the other side of a step. A wrong layout or scale leaves next to none."""


def with_engine(order: Order, graph: bytes, manifest: Manifest, golden: Golden, folder: Path) -> Manifest:
    """The manifest with an engine, compiled into `folder` from its graph; as it is where none can be compiled here.

    `folder` holds the rest of the package. Raises what the backend's `build` raises - ModelError where it does not take
    the graph, EngineFailed - and EngineFailed if the engine ran here and answers otherwise than the graph.
    """
    if order.missing is not None or (record := _compiled(order, graph, manifest, folder)) is None:
        return manifest
    manifest = _with_record(manifest, record)
    if not (available := order.preferred.availability()):
        return _untried(manifest, record, available.why_not)
    seal(folder, manifest)
    try:
        engine = order.preferred.load(EnginePackage.open(folder), order.profile)
    except (EngineUnfit, BackendUnavailable, OutOfMemory) as exc:
        return _untried(manifest, record, exc.problem)
    with closing(engine):
        manifest = _tried(order, graph, manifest, golden, record, engine)
        try:
            return _in_one_stream(order, graph, manifest, golden, folder, engine)
        except DeviceLost:
            raise
        except (BackendError, OutOfMemory) as exc:
            note = f"Whether it is faster without auxiliary streams could not be measured: {exc.problem}"
            return _noted_in(manifest, note)


def _in_one_stream(
    order: Order, graph: bytes, manifest: Manifest, golden: Golden, folder: Path, engine: Engine
) -> Manifest:
    """The engine compiled without auxiliary streams in the place of `engine`, if it is faster.

    TensorRT guesses whether a network gains by computing on several streams at once; events between them cost a small
    one more. It is compiled a second time for that, unless the options have the answer. Raises as `with_engine` does,
    and leaves everything as it was.
    """
    options = order.profile.tensorrt
    if options is None or options.max_aux_streams is not None or not golden.requests:
        return manifest
    single = {"tensorrt": options.model_copy(update={"max_aux_streams": 0})}
    with TemporaryDirectory(dir=folder.parent, prefix=".") as place:
        other = Path(place) / folder.name
        shutil.copytree(folder, other)
        alone = replace(order, profile=order.profile.model_copy(update=single))
        if (record := _compiled(alone, graph, manifest, other)) is None:
            return manifest
        seal(other, _with_record(manifest, record))
        with closing(order.preferred.load(EnginePackage.open(other), alone.profile)) as candidate:
            ours, theirs = time_engines([engine, candidate], golden.requests[0], seconds=1.0)
            if theirs * _WORTH_IT > ours:
                return manifest
            found = _tried(alone, graph, manifest, golden, record, candidate)
        for name in (record.file, record.sidecar):
            (other / name).replace(folder / name)
        packed = DeviceProfile.model_validate_json((folder / PROFILE).read_bytes()).model_copy(update=single)
        (folder / PROFILE).write_text(packed.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return found


def _compiled(order: Order, graph: bytes, manifest: Manifest, folder: Path) -> EngineRecord | None:
    step = "compiling the engine"
    order.progress(step, 0, 100)
    wanted = EngineOrder(graph, manifest.inputs, order.profile, manifest.batching, manifest.axes)
    record = order.preferred.build(wanted, folder, progress=lambda done: order.progress(step, round(100 * done), 100))
    order.progress(step, 100, 100)
    return record


def _untried(manifest: Manifest, record: EngineRecord, why: str) -> Manifest:
    note = f"It was compiled, but has not run, as the device that it is for is not at hand. {why}"
    return _with_record(manifest, _noted(record, note.strip()))


def _tried(
    order: Order, graph: bytes, manifest: Manifest, golden: Golden, record: EngineRecord, engine: Engine
) -> Manifest:
    """The manifest with what running the engine showed: that it answers as the graph does, how fast, at which batch."""
    if not golden.requests:
        return _with_record(manifest, _noted(record, f"It runs here, but was not compared: {golden.origin}."))
    step = "trying the engine"
    order.progress(step, 0, 2)
    snr_db = _closeness(order, graph, manifest, golden, engine)
    order.progress(step, 1, 2)
    (latency_ms,) = time_engines([engine], golden.requests[0], seconds=0.5)
    rates = throughput(engine, golden.requests[0], manifest.batching.max_batch)
    order.progress(step, 2, 2)
    record = _noted(record, f"It answers as the graph does on the CPU: {snr_db:g} dB over {golden.origin}.")
    record = record.model_copy(update={"latency_ms": latency_ms, "per_second_at_batch": rates})
    batching = manifest.batching.model_copy(update={"best_batch": best_batch(rates)})
    return _with_record(manifest.model_copy(update={"batching": batching}), record)


def _closeness(order: Order, graph: bytes, manifest: Manifest, golden: Golden, engine: Engine) -> float:
    """How close the engine's answers are to those of the graph on the CPU, in decibels; EngineFailed if not at all."""
    with order.loaded(graph) as on_cpu:
        wanted = [on_cpu.infer(feeds) for feeds in golden.requests]
    snr_db = signal_to_noise_db(wanted, [engine.infer(feeds) for feeds in golden.requests])
    needed_db = _MIN_SNR_DB[manifest.precision]
    if snr_db < needed_db:
        raise EngineFailed(
            f"The engine that {order.preferred.name} compiled answers otherwise than its graph does on the CPU: "
            f"{snr_db:g} dB of signal to noise over {golden.origin}; {needed_db:g} are needed.",
            fix="Build it in a higher precision, or with another [tensorrt] optimization_level in engine.toml; and "
            "please report it.",
        )
    return snr_db


def _noted(record: EngineRecord, note: str) -> EngineRecord:
    return record.model_copy(update={"notes": (*record.notes, note)})


def _noted_in(manifest: Manifest, note: str) -> Manifest:
    engine = manifest.backend.engine
    return manifest if engine is None else _with_record(manifest, _noted(engine, note))


def _with_record(manifest: Manifest, record: EngineRecord) -> Manifest:
    return manifest.model_copy(update={"backend": manifest.backend.model_copy(update={"engine": record})})
