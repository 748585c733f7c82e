"""The executor, over a simulated GPU that does things in any order it may: `simulated_gpu` says what it watches.

What runs here is our own code, all of it. The driver and TensorRT are stand-ins; `tests/gpu` has the real ones.
"""

from __future__ import annotations

import functools
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from edge_sdk.backends.base import Engine, Pipelined
from edge_sdk.backends.cuda import Device
from edge_sdk.backends.tensorrt.arena import SharedGpu
from edge_sdk.backends.tensorrt.executor import Options, TensorRTEngine, TensorRTSlot, open_engine
from edge_sdk.backends.tensorrt.lanes import MAX_GRAPHS
from edge_sdk.errors import (
    BackendUnavailable,
    DeviceLost,
    EngineFailed,
    EngineUnfit,
    InvalidTensor,
    OutOfMemory,
)  # fmt: skip
from edge_sdk.profiles import DeviceProfile, Memory
from edge_sdk.tensors import Array, TensorSpec
from tests import packages
from tests.backends.simulated_gpu import MEBIBYTE, SimulatedCuda
from tests.backends.simulated_tensorrt import SimulatedTensorRT, simulated_plan

BATCH = {"batch": (1, 8)}


class Bench:
    """A simulated GPU and engines on it."""

    def __init__(self, cuda: SimulatedCuda, *, memory: Memory = Memory(), patience_s: float = 0.0) -> None:
        self.cuda = cuda
        self.api = SimulatedTensorRT(cuda)
        self.gpu = SharedGpu(Device(cuda), memory, patience_s=patience_s)
        self.engines: list[TensorRTEngine] = []

    def load(
        self,
        model: ModelProto,
        sizes: Mapping[str, tuple[int, int]] = BATCH,
        *,
        options: Options = Options(),
        api: SimulatedTensorRT | None = None,
        **facts: Any,
    ) -> TensorRTEngine:
        plan = simulated_plan(model.SerializeToString(), sizes, **facts)
        self.gpu.join()
        engine = TensorRTEngine(
            lambda: plan,
            gpu=self.gpu,
            api=api or self.api,
            inputs=packages.specs(model.graph.input),
            outputs=packages.specs(model.graph.output),
            options=options,
        )
        self.engines.append(engine)
        return engine

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


@pytest.fixture(params=[False, True], ids=["discrete", "integrated"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(SimulatedCuda(integrated=request.param))
    yield made
    made.close()

    assert {} == made.cuda.leaks()


def rows(count: int, start: float = 0.0) -> Array:
    return np.arange(start, start + 4 * count, dtype=np.float32).reshape(count, 4)


def ask(engine: TensorRTEngine, count: int, start: float = 1.0) -> list[list[float]]:
    answer: list[list[float]] = engine.infer({"x": rows(count, start)})["y"].tolist()
    return answer


def put_in(slot: TensorRTSlot, given: Array) -> None:
    slot.at(len(given))[0]["x"][...] = given
    slot.start(len(given))


def taken_out(slot: TensorRTSlot, count: int) -> Array:
    slot.finish()
    return np.array(slot.at(count)[1]["y"])


# One engine


def test_it_is_an_engine_and_pipelined(bench: Bench) -> None:
    """It says the package's inputs and outputs, with the names of their axes, not TensorRT's."""
    engine: Engine = bench.load(packages.scaling())

    assert isinstance(engine, Pipelined)
    assert (TensorSpec("x", "float32", ("batch", 4)),) == engine.inputs
    assert (TensorSpec("y", "float32", ("batch", 4)),) == engine.outputs


@pytest.mark.parametrize("seed", range(10))
def test_infer_computes(seed: int) -> None:
    """Any batch in any order, with `out` and without, several inputs whatever their order in the engine."""
    bench = Bench(SimulatedCuda(seed, integrated=seed % 2 == 1))
    engine, two = bench.load(packages.scaling(3.0)), bench.load(packages.two_inputs())
    out = {"y": np.empty((2, 4), np.float32)}
    for count in (1, 3, 8, 2, 2, 2, 2):
        assert (rows(count, count) * 3).tolist() == ask(engine, count, count)
    results = engine.infer({"x": rows(2)}, out)
    a, b = np.full((2, 3), 5, np.float32), np.full((2, 3), 3, np.float32)

    assert results["y"] is out["y"]
    assert (rows(2) * 3).tolist() == out["y"].tolist()
    assert [[2] * 3] * 2 == two.infer({"b": b, "a": a})["difference"].tolist()

    bench.close()

    assert {} == bench.cuda.leaks()


def test_results_belong_to_the_caller(bench: Bench) -> None:
    """What one call gave back is changed neither by the next nor by closing; feeds are only read."""
    engine = bench.load(packages.scaling(2.0))
    frozen = np.frombuffer(rows(2).tobytes(), np.float32).reshape(2, 4)
    first = engine.infer({"x": frozen})["y"]
    engine.infer({"x": rows(2, 50)})
    engine.close()

    assert (rows(2) * 2).tolist() == first.tolist()
    assert rows(2).tolist() == frozen.tolist()


@pytest.mark.parametrize("seed", range(60))
def test_slots_compute_in_any_schedule(seed: int) -> None:
    """Several engines with two lanes each, batches of any size in flight, `infer` between them: never a wrong number.

    The order in which the streams get on is drawn anew for each seed; the simulated GPU reports every pair of accesses
    that only luck had put in order.
    """
    draw = random.Random(seed)
    bench = Bench(SimulatedCuda(seed, integrated=seed % 3 == 0, eager=draw.choice([0.0, 0.3, 0.8])))
    factors = [2.0, 3.0, 5.0]
    engines = [
        bench.load(packages.scaling(factor), activation_bytes=draw.choice([0, 1000, 9000])) for factor in factors
    ]
    lanes = [list(engine.slots(8)) for engine in engines]
    flying: list[tuple[int, TensorRTSlot, Array]] = []
    for step in range(40):
        which = draw.randrange(3)
        if draw.random() < 0.2:
            assert (rows(2, step) * factors[which]).tolist() == ask(engines[which], 2, step)
        free = [slot for slot in lanes[which] if all(slot is not busy for _, busy, _ in flying)]
        if free and draw.random() < 0.6:
            given = rows(draw.choice([1, 4, 4, 4, 8]), step)
            put_in(free[0], given)
            flying.append((which, free[0], given))
        elif flying:
            which, slot, given = flying.pop(0)
            assert (given * factors[which]).tolist() == taken_out(slot, len(given)).tolist()
    for which, slot, given in flying:
        assert (given * factors[which]).tolist() == taken_out(slot, len(given)).tolist()
    bench.close()

    assert {} == bench.cuda.leaks()


def test_copies_and_computes_of_batches_overlap() -> None:
    """The next batch may be copied in, all of it, before the one ahead of it has begun to compute; and it is computed
    before that one's results are copied out."""
    bench = Bench(SimulatedCuda(eager=0.0))
    first, second = bench.load(packages.scaling(2.0)).slots(4)
    put_in(first, rows(4))
    put_in(second, rows(4, 100))
    bench.cuda.run_where_possible(lambda operation: operation.label in ("copy in", "event"))

    assert 2 == bench.cuda.history.count("copy in")
    assert "compute" not in bench.cuda.history

    bench.cuda.run_where_possible(lambda operation: operation.label != "copy out")

    assert 2 == bench.cuda.history.count("compute")
    assert "copy out" not in bench.cuda.history
    assert (rows(4, 100) * 2).tolist() == taken_out(second, 4).tolist()
    assert (rows(4) * 2).tolist() == taken_out(first, 4).tolist()

    bench.close()


def test_an_integrated_gpu_copies_nothing() -> None:
    """There the arrays that a caller fills are the memory that is computed in, and no device buffers are made."""
    bench = Bench(SimulatedCuda(integrated=True))
    engine = bench.load(packages.scaling(2.0), activation_bytes=0, weight_bytes=1)
    (slot, _) = engine.slots(8)
    put_in(slot, rows(8))

    assert (rows(8) * 2).tolist() == taken_out(slot, 8).tolist()
    assert {"compute", "scratch", "event"} >= set(bench.cuda.history)
    assert 1 == bench.cuda.allocated

    bench.close()


def test_a_slot_has_the_same_arrays_each_time(bench: Bench) -> None:
    """The arrays of a number of rows are made once, all of a slot's in the same place; each slot has its own."""
    engine = bench.load(packages.scaling(2.0))
    slots = engine.slots(8)

    assert slots == engine.slots(4)
    for slot in slots:
        assert slot.at(3)[0]["x"] is slot.at(3)[0]["x"]
        assert (3, 4) == slot.at(3)[1]["y"].shape
        assert np.shares_memory(slot.at(3)[0]["x"], slot.at(8)[0]["x"])
    assert not np.shares_memory(slots[0].at(8)[0]["x"], slots[1].at(8)[0]["x"])


def test_infer_leaves_the_arrays_of_slots_alone(bench: Bench) -> None:
    """A caller may be filling a slot while it asks for something else."""
    engine = bench.load(packages.scaling(2.0))
    slot = engine.slots(8)[0]
    slot.at(8)[0]["x"][...] = rows(8)

    assert (rows(3, 9) * 2).tolist() == ask(engine, 3, 9)
    assert rows(8).tolist() == slot.at(8)[0]["x"].tolist()


def test_finish_without_start_is_nothing_and_start_twice_is_refused(bench: Bench) -> None:
    """A slot has one batch at a time."""
    slot = bench.load(packages.scaling(2.0)).slots(2)[0]
    slot.finish()
    put_in(slot, rows(2))
    with pytest.raises(EngineFailed, match="not yet finished"):
        slot.start(2)

    assert (rows(2) * 2).tolist() == taken_out(slot, 2).tolist()


def test_no_slots_where_a_size_comes_with_the_request(bench: Bench) -> None:
    """A model whose length varies has none, and infers; one whose sizes are all fixed has them."""
    vary = bench.load(packages.total(("length",)), {"length": (1, 100)})
    fixed = bench.load(packages.scaling(2.0, batch=3))

    assert () == vary.slots(1)
    assert 2 == len(fixed.slots(8))
    assert (3, 4) == fixed.slots(8)[0].at(1)[0]["x"].shape
    for length in (3, 100, 1):
        assert float(length) == vary.infer({"x": np.ones(length, np.float32)})["y"].item()


def test_sizes_outside_the_range_are_refused_by_name(bench: Bench) -> None:
    """InvalidTensor says the input, the axis by the name it has in the graph, the size, and what may be."""
    engine = bench.load(packages.stateful(), {"batch": (1, 4)})
    scaling = bench.load(packages.scaling(2.0), {"batch": (2, 4)})
    for count in (1, 5):
        with pytest.raises(InvalidTensor, match=rf"'x' has {count} along axis 'batch'.*compiled for 2 to 4"):
            ask(scaling, count)
    with pytest.raises(InvalidTensor, match="compiled for 2 to 4"):
        scaling.slots(5)
    with pytest.raises(InvalidTensor, match="compiled for 2 to 4"):
        scaling.slots(4)[0].at(5)
    with pytest.raises(InvalidTensor, match="FP64"):
        scaling.infer({"x": rows(2).astype(np.float64)})
    with pytest.raises(InvalidTensor, match="shape"):
        scaling.infer({"x": np.ones((2, 5), np.float32)})

    assert (rows(2, 1) * 2).tolist() == ask(scaling, 2)
    assert {"total", "new_state"} == {spec.name for spec in engine.outputs}


def test_feeds_that_are_not_the_models(bench: Bench) -> None:
    """EngineFailed, and the engine goes on working."""
    engine = bench.load(packages.scaling(2.0))
    for feeds in ({}, {"z": rows(1)}, {"x": rows(1), "z": rows(1)}):
        with pytest.raises(EngineFailed, match="could not run the graph"):
            engine.infer(feeds)
    with pytest.raises(EngineFailed, match="do not fit"):
        engine.infer({"x": rows(2)}, {"y": np.empty((3, 4), np.float32)})

    assert (rows(1, 1) * 2).tolist() == ask(engine, 1)


def test_a_size_that_only_the_data_decides_does_not_load(bench: Bench) -> None:
    """EngineUnfit, which sends the package to onnxruntime, and says so."""
    with pytest.raises(EngineUnfit, match=r"'y' is only known once.*onnxruntime instead") as refused:
        bench.load(packages.scaling(), unknown_outputs=["y"])

    assert 1 == len(refused.value.reasons)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ((TensorSpec("z", "float32", ("batch", 4)),), r"its inputs are x and not z"),
        ((TensorSpec("x", "int64", ("batch", 4)),), r"'x' is float32\[-1, 4\] and not int64\[-1, 4\]"),
        ((TensorSpec("x", "float32", ("batch",)),), r"'x' is float32\[-1, 4\] and not float32\[-1\]"),
    ],
)
def test_an_engine_of_another_package_does_not_load(bench: Bench, inputs: tuple[TensorSpec, ...], reason: str) -> None:
    """Other names, dtypes or numbers of axes than the package's are EngineUnfit."""
    model = packages.scaling()
    plan = simulated_plan(model.SerializeToString(), BATCH)
    bench.gpu.join()
    with pytest.raises(EngineUnfit, match=reason):
        TensorRTEngine(
            lambda: plan, gpu=bench.gpu, api=bench.api, inputs=inputs, outputs=packages.specs(model.graph.output)
        )


def test_sizes_in_the_computers_memory(bench: Bench) -> None:
    """A tensor that TensorRT writes there itself is read from there; such an engine is not captured."""
    engine = bench.load(packages.scaling(2.0), on_host=["y"])
    for _ in range(4):
        assert (rows(2, 1) * 2).tolist() == ask(engine, 2)
    assert "copy out" not in bench.cuda.history
    assert 0 == bench.cuda.calls.get("begin_capture", 0)


def test_closing(bench: Bench) -> None:
    """Closing twice is harmless, with a batch in flight too; a closed engine says so."""
    engine = bench.load(packages.scaling())
    slot = engine.slots(2)[0]
    put_in(slot, rows(2))
    engine.close()
    engine.close()
    for out in (None, {"y": np.empty((1, 4), np.float32)}):
        with pytest.raises(EngineFailed, match="closed"):
            engine.infer({"x": rows(1)}, out)
    for act in (slot.start, slot.at):
        with pytest.raises(EngineFailed, match="closed"):
            act(2)
    slot.finish()


def test_device_time(bench: Bench) -> None:
    """None before the first batch; then the device's own milliseconds, of `infer` and of slots."""
    engine = bench.load(packages.scaling())

    assert engine.device_time() is None

    ask(engine, 2)
    of_infer = engine.device_time()
    slot = engine.slots(2)[0]
    put_in(slot, rows(2))
    slot.finish()
    of_slot = engine.device_time()

    assert of_infer is not None
    assert of_slot is not None
    assert 0 < of_infer.compute_ms < of_infer.total_ms
    assert 0 < of_slot.compute_ms < of_slot.total_ms


# CUDA graphs


def test_a_shape_that_comes_again_is_a_graph(bench: Bench) -> None:
    """The first time it is enqueued, the second time captured as well, and from then on launched: never enqueued."""
    engine = bench.load(packages.scaling(2.0))
    for step in range(6):
        assert (rows(3, step) * 2).tolist() == ask(engine, 3, step)

    assert (3, 4) == (bench.api.enqueued, bench.cuda.calls["launch"])
    assert 4 == bench.cuda.history.count("compute (graph)")

    ask(engine, 5)

    assert 4 == bench.cuda.calls["launch"]


def test_graphs_go_with_the_arena_they_were_captured_in(bench: Bench) -> None:
    """A larger engine moves the arena; what was captured with the old address is dropped and captured again."""
    engine = bench.load(packages.scaling(2.0), activation_bytes=1000)
    for step in range(3):
        ask(engine, 3, step)
    launched = bench.cuda.calls["launch"]
    bench.load(packages.scaling(5.0), activation_bytes=50_000)

    assert (rows(3, 7) * 2).tolist() == ask(engine, 3, 7)
    assert launched == bench.cuda.calls["launch"]

    for step in range(3):
        assert (rows(3, step) * 2).tolist() == ask(engine, 3, step)
    assert launched < bench.cuda.calls["launch"]


def test_a_graph_knows_which_arrays_it_was_captured_with(bench: Bench) -> None:
    """`infer` and the first slot share a lane; what was captured over one's arrays is not launched for the other's."""
    engine = bench.load(packages.scaling(2.0))
    for step in range(3):
        ask(engine, 3, step)
    slot = engine.slots(3)[0]
    for step in range(4):
        put_in(slot, rows(3, 10 * step))

        assert (rows(3, 10 * step) * 2).tolist() == taken_out(slot, 3).tolist()
        assert (rows(3, step) * 2).tolist() == ask(engine, 3, step)


def test_the_arena_moves_only_when_nobody_computes_in_it() -> None:
    """An engine that needs more may be loaded while batches of another are on their way."""
    bench = Bench(SimulatedCuda(eager=0.0))
    slots = bench.load(packages.scaling(2.0), activation_bytes=1000).slots(4)
    for slot in slots:
        put_in(slot, rows(4))
    bench.load(packages.scaling(3.0), activation_bytes=50_000)

    assert "compute" in bench.cuda.history  # the first engine's: nobody else asked
    for slot in slots:
        assert (rows(4) * 2).tolist() == taken_out(slot, 4).tolist()

    bench.close()

    assert {} == bench.cuda.leaks()


def test_a_capture_that_fails_is_never_tried_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """It is noted once, and the engine goes on without graphs, in all of its lanes."""
    caplog.set_level(logging.INFO)
    engine = bench.load(packages.scaling(2.0))
    bench.cuda.fail("end_capture", 1, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
    slots = engine.slots(8)
    for step in range(6):
        put_in(slots[step % 2], rows(3, step))

        assert (rows(3, step) * 2).tolist() == taken_out(slots[step % 2], 3).tolist()

    assert 1 == bench.cuda.calls["begin_capture"]
    assert ["The engine cannot be captured as a CUDA graph"] == [
        message[:45] for message in caplog.messages if "captured" in message
    ]


@pytest.mark.parametrize("kind", ["unwanted", "the runtime's own", "a binding without"])
def test_who_captures_nothing(kind: str) -> None:
    """Neither where it was not wanted, nor where the runtime does it, nor where the binding cannot."""
    bench = Bench(SimulatedCuda())
    bench.cuda.can_capture = kind != "a binding without"
    api = SimulatedTensorRT(bench.cuda, captures_graphs=kind == "the runtime's own")
    engine = bench.load(packages.scaling(2.0), options=Options(graphs=kind != "unwanted"), api=api)
    for _ in range(4):
        ask(engine, 2)

    assert 0 == bench.cuda.calls.get("begin_capture", 0)
    assert 4 == api.enqueued

    bench.close()


def test_graphs_are_bounded(bench: Bench) -> None:
    """Lengths that never end do not pile up: neither graphs nor what is remembered of them."""
    model = packages.total(("length",))
    engine = bench.load(model, {"length": (1, 100)})
    for length in [*range(1, 60), *range(1, 60)] + [length for length in range(1, 30) for _ in range(3)]:
        assert float(length) == engine.infer({"x": np.ones(length, np.float32)})["y"].item()
    held = bench.gpu.device.held.graphs

    assert MAX_GRAPHS == held


# Memory


def test_everything_is_given_back_with_the_last_engine(bench: Bench) -> None:
    """The arena is as large as the engines that are left need it; streams, events, graphs, pinned memory, context."""
    small, large = (bench.load(packages.scaling(), activation_bytes=size) for size in (1000, 100_000))
    for engine in (small, large):
        engine.slots(8)
        for _ in range(3):
            ask(engine, 2)
    with_both = bench.cuda.allocated
    large.close()
    with_one = bench.cuda.allocated
    small.close()

    assert with_both - with_one > 100_000 - 1000
    assert with_one < 100_000
    assert (0, {}) == (bench.cuda.allocated, bench.cuda.leaks())


def test_weights_are_loaded_once_for_all_lanes(bench: Bench) -> None:
    """Two lanes and a third user of one engine take its weights once."""
    engine = bench.load(packages.scaling(), weight_bytes=MEBIBYTE, options=Options(lanes=3))
    engine.slots(8)
    ask(engine, 2)

    assert (1, MEBIBYTE) == (bench.api.loads, bench.cuda.allocated // MEBIBYTE * MEBIBYTE)


def test_the_budget_is_asked_before_anything_is_loaded() -> None:
    """What exceeds the profile's share of the device is OutOfMemory, with the figures, and TensorRT is not troubled."""
    bench = Bench(SimulatedCuda(), memory=Memory(total_bytes=2000, usable_fraction=0.5))
    with pytest.raises(OutOfMemory, match="may use 1,000 bytes"):
        bench.load(packages.scaling(width=4), weight_bytes=100_000, activation_bytes=10)

    assert (0, 0) == (bench.api.loads, bench.cuda.largest_allocated)
    assert {} == bench.cuda.leaks()


def roomy(engines: int) -> Bench:
    """A bench whose budget has room for so many engines of a mebibyte and a bit."""
    return Bench(SimulatedCuda(), memory=Memory(total_bytes=int(engines * 1.2 * MEBIBYTE), usable_fraction=1.0))


def test_the_longest_unused_engine_makes_room_and_comes_back() -> None:
    """The third engine takes the place of the one asked longest ago, which loads itself again when it is asked."""
    bench = roomy(2)
    one, two = (bench.load(packages.scaling(factor), weight_bytes=MEBIBYTE) for factor in (2.0, 3.0))
    ask(one, 2)
    three = bench.load(packages.scaling(5.0), weight_bytes=MEBIBYTE)

    assert [True, False, True] == [engine.is_resident for engine in (one, two, three)]
    for _ in range(3):
        for engine, factor in ((one, 2.0), (two, 3.0), (three, 5.0)):
            assert (rows(2, 1) * factor).tolist() == ask(engine, 2)
    assert bench.cuda.largest_allocated <= bench.gpu.budget_bytes
    assert two.is_resident or one.is_resident

    bench.close()

    assert {} == bench.cuda.leaks()


def test_the_arrays_of_slots_outlive_an_eviction() -> None:
    """They are lent until the engine is closed; what lies in them is computed when the engine is back."""
    for integrated in (False, True):
        cuda = SimulatedCuda(integrated=integrated)
        bench = Bench(cuda, memory=Memory(total_bytes=int(2.2 * MEBIBYTE), usable_fraction=1.0))
        one = bench.load(packages.scaling(2.0), weight_bytes=MEBIBYTE)
        slots = one.slots(8)
        feeds, outputs = slots[1].at(4)
        feeds["x"][...] = rows(4)
        for factor in (3.0, 5.0):
            bench.load(packages.scaling(factor), weight_bytes=MEBIBYTE)

        assert not one.is_resident

        slots[1].start(4)
        slots[1].finish()

        assert outputs["y"] is slots[1].at(4)[1]["y"]
        assert (rows(4) * 2).tolist() == outputs["y"].tolist()

        bench.close()

        assert {} == bench.cuda.leaks()


def test_an_engine_that_cannot_come_back_holds_nothing() -> None:
    """Its plan may have gone meanwhile: EngineFailed each time it is asked, and its place is free for others."""
    bench = Bench(SimulatedCuda(), memory=Memory(total_bytes=int(1.2 * MEBIBYTE), usable_fraction=1.0))
    one, two = (bench.load(packages.scaling(factor), weight_bytes=MEBIBYTE) for factor in (2.0, 3.0))
    one._plan = lambda: b"nonsense" * (MEBIBYTE // 8)
    for _ in range(2):
        with pytest.raises(EngineFailed, match="no plan"):
            ask(one, 2)

    assert 0 == bench.gpu.held_bytes
    assert (rows(2, 1) * 3).tolist() == ask(two, 2)

    bench.close()


def test_who_is_in_use_is_not_sent_away() -> None:
    """While a batch is in flight its engine stays; whoever needs its place is told OutOfMemory, after a while."""
    bench = roomy(1)
    one = bench.load(packages.scaling(2.0), weight_bytes=MEBIBYTE)
    slot = one.slots(2)[0]
    put_in(slot, rows(2))
    with pytest.raises(OutOfMemory, match="those in use now leave"):
        bench.load(packages.scaling(3.0), weight_bytes=MEBIBYTE)

    assert (rows(2) * 2).tolist() == taken_out(slot, 2).tolist()

    two = bench.load(packages.scaling(3.0), weight_bytes=MEBIBYTE)

    assert [False, True] == [one.is_resident, two.is_resident]

    bench.close()


def test_waiting_for_room_ends_when_a_batch_does() -> None:
    """Two threads whose engines cannot both be there take turns: everybody gets an answer."""
    bench = Bench(SimulatedCuda(), memory=Memory(total_bytes=int(1.2 * MEBIBYTE), usable_fraction=1.0), patience_s=60.0)
    engines = {factor: bench.load(packages.scaling(factor), weight_bytes=MEBIBYTE) for factor in (2.0, 3.0)}

    def ask_often(factor: float) -> None:
        for step in range(10):
            assert (rows(2, step) * factor).tolist() == ask(engines[factor], 2, step)

    in_threads([lambda: ask_often(2.0), lambda: ask_often(3.0)])
    bench.close()

    assert {} == bench.cuda.leaks()


def test_a_device_with_less_than_it_said_sends_the_idle_away() -> None:
    """Another process may have filled it: whoever is idle makes room before anybody is told OutOfMemory."""
    bench = Bench(SimulatedCuda(total_bytes=int(2.2 * MEBIBYTE)), memory=Memory(total_bytes=64 * MEBIBYTE))
    one, two = (bench.load(packages.scaling(factor), weight_bytes=MEBIBYTE) for factor in (2.0, 3.0))
    three = bench.load(packages.scaling(5.0), weight_bytes=MEBIBYTE)

    assert [False, False, True] == [engine.is_resident for engine in (one, two, three)]
    assert (rows(2, 1) * 2).tolist() == ask(one, 2)

    bench.close()

    assert {} == bench.cuda.leaks()


def test_weights_that_do_not_fit_are_streamed() -> None:
    """With weight streaming, an engine takes what the budget leaves for its weights; without, it is OutOfMemory."""
    memory = Memory(total_bytes=MEBIBYTE, usable_fraction=1.0)

    def load(bench: Bench, *, streaming: bool) -> TensorRTEngine:
        options = Options(weight_streaming=streaming)
        return bench.load(packages.scaling(2.0), options=options, weight_bytes=3 * MEBIBYTE, streamable=True)

    bench = Bench(SimulatedCuda(), memory=memory)
    engine = load(bench, streaming=True)
    engine.slots(8)

    assert (rows(2, 1) * 2).tolist() == ask(engine, 2)
    assert MEBIBYTE // 2 < bench.cuda.allocated <= MEBIBYTE

    bench.close()
    bench = Bench(SimulatedCuda(), memory=memory)
    with pytest.raises(OutOfMemory):
        load(bench, streaming=False)

    assert {} == bench.cuda.leaks()


# Failures


def everything(bench: Bench) -> None:
    """Load, infer, slots, capture, another engine, close."""
    try:
        engine = bench.load(packages.scaling(2.0))
        other = bench.load(packages.scaling(3.0), activation_bytes=20_000)
        for step in range(3):
            assert (rows(2, step) * 2).tolist() == ask(engine, 2, step)
            assert (rows(2, step) * 3).tolist() == ask(other, 2, step)
        for slot in engine.slots(4):
            put_in(slot, rows(4))
        for slot in engine.slots(4):
            assert (rows(4) * 2).tolist() == taken_out(slot, 4).tolist()
    finally:
        bench.close()


def test_memory_that_runs_out_anywhere_is_out_of_memory() -> None:
    """Whichever allocation fails, and whichever stream or event: OutOfMemory, or done without; nothing is left over."""
    seen = 0
    for function in ("allocate", "allocate_host", "create_stream", "create_event"):
        sound = Bench(SimulatedCuda())
        everything(sound)
        for nth in range(1, sound.cuda.calls[function] + 1):
            bench = Bench(SimulatedCuda())
            bench.cuda.fail(function, nth, "CUDA_ERROR_OUT_OF_MEMORY")
            try:
                everything(bench)
            except OutOfMemory:
                seen += 1

            assert {} == bench.cuda.leaks(), f"{function} {nth}"
    assert seen > 10


@pytest.mark.parametrize("status", ["CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED"])
@pytest.mark.parametrize(
    "function", ["push", "copy_in", "record", "synchronize_event", "wait", "end_capture", "launch"]
)
def test_a_sticky_status_is_device_lost(function: str, status: str) -> None:
    """Whichever call hears of it first; every later one says the same, and closing does not complain."""
    bench = Bench(SimulatedCuda())
    engine = bench.load(packages.scaling(2.0))
    bench.load(packages.scaling(3.0))
    slots = engine.slots(2)
    bench.cuda.fail(function, 1, status)

    def work() -> None:
        for step in range(4):
            put_in(slots[step % 2], rows(2))
            slots[step % 2].finish()
            ask(bench.engines[1], 1)

    with pytest.raises(DeviceLost, match=r"lost to this process .* until the process is started again"):
        work()
    with pytest.raises(DeviceLost):
        ask(engine, 2)

    bench.close()


@pytest.mark.parametrize("operations", range(0, 60, 4))
def test_a_device_that_is_lost_on_the_way(operations: int) -> None:
    """A fault while the device works is noticed by whoever waits next, as DeviceLost and as nothing else."""
    bench = Bench(SimulatedCuda(operations))
    engine = bench.load(packages.scaling(2.0))
    slots = engine.slots(2)
    bench.cuda.lose_after(operations)

    def work() -> None:
        for step in range(20):
            put_in(slots[step % 2], rows(2))

            assert (rows(2) * 2).tolist() == taken_out(slots[step % 2], 2).tolist()

    with pytest.raises(DeviceLost):
        work()

    bench.close()


def test_what_tensorrt_refuses_is_engine_failed(bench: Bench) -> None:
    """The engine goes on working, and so do others; a refusal whose reason is a lost device is DeviceLost."""
    engine = bench.load(packages.scaling(2.0))
    slot = engine.slots(2)[0]
    bench.api.refuse_to_enqueue = True
    for _ in range(2):
        with pytest.raises(EngineFailed, match="could not run"):
            ask(engine, 2)
        with pytest.raises(EngineFailed, match="could not run"):
            put_in(slot, rows(2))
        slot.finish()
    bench.api.refuse_to_enqueue = False

    assert (rows(2, 1) * 2).tolist() == ask(engine, 2)

    put_in(slot, rows(2))

    assert (rows(2) * 2).tolist() == taken_out(slot, 2).tolist()

    bench.api.refuse_to_enqueue = True
    bench.cuda.fail("synchronize_stream", 1, "CUDA_ERROR_LAUNCH_FAILED")
    with pytest.raises(DeviceLost) as lost:
        ask(engine, 7)

    assert isinstance(lost.value.__cause__, EngineFailed)

    del lost  # its frames know TensorRT's context
    bench.cuda._sticky = ""  # the fixture wants everything given back


@pytest.mark.parametrize("comes_back", [False, True])
def test_what_fails_to_load_on_a_lost_device_is_device_lost(comes_back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT answers with None, whatever it is that CUDA told it: asked at once, CUDA says it to us too."""
    bench = Bench(SimulatedCuda())
    engine = bench.load(packages.scaling(2.0))
    bench.gpu.evict_idle(but=object())  # type: ignore[arg-type]  # nobody's name

    def deserialize(plan: bytes, *, graph: bytes | None) -> Any:
        bench.cuda._sticky = "CUDA_ERROR_LAUNCH_FAILED"
        raise EngineFailed("The simulated TensorRT could not load the engine; it says: nothing.")

    monkeypatch.setattr(bench.api, "deserialize", deserialize)
    with pytest.raises(DeviceLost) as lost:
        ask(engine, 1) if comes_back else bench.load(packages.scaling(3.0))

    assert isinstance(lost.value.__context__, EngineFailed)

    bench.close()


def test_a_plan_that_is_none(bench: Bench) -> None:
    """EngineFailed as TensorRT says it, and the place that was booked is free again."""
    bench.gpu.join()
    with pytest.raises(EngineFailed, match="no plan"):
        TensorRTEngine(lambda: b"nonsense", gpu=bench.gpu, api=bench.api, inputs=(), outputs=())

    assert {} == bench.cuda.leaks()


# Threads


def test_engines_of_several_threads_share_the_arena() -> None:
    """Four threads, an engine each, the arena growing and shrinking between them: never a wrong number."""
    bench = Bench(SimulatedCuda(3))
    kept = bench.load(packages.scaling(2.0), activation_bytes=5000)

    def work(factor: float) -> None:
        for activation_bytes in (100, 40_000, 0):
            engine = bench.load(packages.scaling(factor), activation_bytes=activation_bytes)
            slots = engine.slots(4)
            for step in range(6):
                slot = slots[step % 2]
                put_in(slot, rows(3, step))

                assert (rows(3, step) * factor).tolist() == taken_out(slot, 3).tolist()
                assert (rows(1, step) * factor).tolist() == ask(engine, 1, step)
            engine.close()

    in_threads([functools.partial(work, factor) for factor in (3.0, 5.0, 7.0, 11.0)])

    assert (rows(2, 1) * 2).tolist() == ask(kept, 2)

    bench.close()

    assert {} == bench.cuda.leaks()


def in_threads(acts: Sequence[Callable[[], None]]) -> None:
    failures: list[BaseException] = []

    def run(act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


# The door


def test_one_gpu_for_all_engines_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`open_engine` opens the device once and closes it with the last engine; the smallest of the budgets counts."""
    cuda = SimulatedCuda()
    monkeypatch.setattr(Device, "open", lambda ordinal: Device(cuda, ordinal))
    model = packages.scaling(2.0)
    plan = simulated_plan(model.SerializeToString(), BATCH)
    profile = packages.profile()
    small = profile.model_copy(update={"memory": Memory(total_bytes=MEBIBYTE)})

    def opened(profile: DeviceProfile) -> TensorRTEngine:
        inputs, outputs = packages.specs(model.graph.input), packages.specs(model.graph.output)
        return open_engine(lambda: plan, api=SimulatedTensorRT(cuda), profile=profile, inputs=inputs, outputs=outputs)

    for _ in range(2):
        one, two = opened(profile), opened(small)
        gpu = SharedGpu.of(0, profile.memory)

        assert (1, int(0.8 * MEBIBYTE)) == (cuda.retained, gpu.budget_bytes)

        gpu.leave(two)
        one.close()

        assert (rows(2, 1) * 2).tolist() == ask(two, 2)

        two.close()

        assert {} == cuda.leaks()


def test_without_a_gpu_there_is_no_engine() -> None:
    """BackendUnavailable, and nothing is remembered of the attempt."""
    cuda = SimulatedCuda()
    with pytest.raises(BackendUnavailable, match="no device 1 here; it sees 1"):
        Device(cuda, 1)

    assert {} == cuda.leaks()
