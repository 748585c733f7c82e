"""The executor on a real GPU, with engines that TensorRT compiled for it: onnxruntime on the CPU is the oracle."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest
from onnx import ModelProto

from edge_sdk.backends import cuda
from edge_sdk.backends.onnxruntime import OnnxRuntimeBackend
from edge_sdk.backends.tensorrt import api
from edge_sdk.backends.tensorrt.executor import Options, TensorRTEngine, TensorRTSlot, open_engine
from edge_sdk.errors import EngineFailed, InvalidTensor, OutOfMemory
from edge_sdk.profiles import Memory
from edge_sdk.spec import Axis
from edge_sdk.tensors import Array, Feeds, Outputs
from tests import packages
from tests.compile.graphs import conv_net, pictures
from tests.compile.nets import encoder, photos, resnet50, sentences
from tests.gpu.conftest import MAX_BATCH, Maker

pytestmark = pytest.mark.gpu

MAX_RELATIVE_ERROR = 1e-3
"""Of an output's largest value: TF32, which TensorRT may use for FP32, has 10 bits behind the point."""
SLACK_BYTES = 8 << 20
"""What CUDA may keep or take for itself between two looks at the free memory: its pools grow by 2 MB blocks."""
LENGTHS = {"L": Axis(min=1, best=40, max=128)}


def wanted(model: ModelProto, feeds: Feeds) -> Outputs:
    return OnnxRuntimeBackend().load_graph(model.SerializeToString(), packages.profile()).infer(feeds)


def relative_error(found: Outputs, expected: Outputs) -> float:
    return max(
        float(np.abs(found[name] - array).max() / max(float(np.abs(array).max()), 1e-12))
        for name, array in expected.items()
    )


def put_in(slot: TensorRTSlot, name: str, given: Array) -> None:
    slot.at(len(given))[0][name][...] = given
    slot.start(len(given))


@pytest.mark.parametrize("batch", [1, 3, MAX_BATCH])
def test_answers_are_the_cpus(maker: Maker, batch: int) -> None:
    """The same within MAX_RELATIVE_ERROR, at any batch: through `infer`, with `out` and without, and through slots."""
    model = conv_net()
    engine = maker.engine(model)
    given = pictures(batch)
    expected = wanted(model, {"image": given})
    out = {name: np.empty_like(array) for name, array in expected.items()}
    engine.infer({"image": given}, out)
    answers = [engine.infer({"image": given}), out]
    for slot in engine.slots(batch):
        for _ in range(4):  # enqueued, captured, launched
            put_in(slot, "image", given)
            slot.finish()
            answers.append({name: array.copy() for name, array in slot.at(batch)[1].items()})

    assert 10 == len(answers)
    assert max(relative_error(answer, expected) for answer in answers) <= MAX_RELATIVE_ERROR


def test_a_length_that_varies(maker: Maker) -> None:
    """A transformer over sequences of any length in its range; outside it the request is refused, by name."""
    model = encoder()
    engine = maker.engine(model, LENGTHS)

    assert () == engine.slots(1)
    for count, length in ((1, 1), (2, 40), (8, 128), (2, 40), (2, 40), (2, 40)):
        feeds = {"tokens": sentences(count, length)}
        assert relative_error(engine.infer(feeds), wanted(model, feeds)) <= MAX_RELATIVE_ERROR
    with pytest.raises(InvalidTensor, match=r"129 along axis 'L'.* 1 to 128"):
        engine.infer({"tokens": sentences(1, 129)})


def test_batches_in_flight_keep_apart(maker: Maker) -> None:
    """Two engines with two lanes each, all in flight at once, hundreds of times: every answer is its own."""
    engines = [maker.engine(packages.scaling(factor)) for factor in (2.0, 3.0)]
    flying: deque[tuple[TensorRTSlot, float, Array]] = deque()
    waiting = deque([(slot, factor) for engine, factor in zip(engines, (2.0, 3.0)) for slot in engine.slots(MAX_BATCH)])
    draw = np.random.default_rng(0)

    def land() -> None:
        slot, factor, given = flying.popleft()
        slot.finish()
        waiting.append((slot, factor))

        np.testing.assert_allclose(slot.at(len(given))[1]["y"], given * factor, rtol=MAX_RELATIVE_ERROR)

    for _ in range(400):
        if not waiting:
            land()
        slot, factor = waiting.popleft()
        given = draw.normal(size=(int(draw.integers(1, MAX_BATCH + 1)), 4)).astype(np.float32)
        put_in(slot, "x", given)
        flying.append((slot, factor, given))
    while flying:
        land()


def test_engines_of_several_threads(maker: Maker) -> None:
    """Three threads, an engine each, one arena: every answer is right."""
    engines = [(maker.engine(conv_net(seed=seed)), conv_net(seed=seed)) for seed in range(3)]
    failures: list[BaseException] = []

    def work(engine: TensorRTEngine, model: ModelProto) -> None:
        try:
            given = pictures(4)
            expected = wanted(model, {"image": given})
            for _ in range(50):
                assert relative_error(engine.infer({"image": given}), expected) <= MAX_RELATIVE_ERROR
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=engine) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [] == failures


def test_graphs_change_nothing_but_the_time(maker: Maker, gpu: cuda.Device) -> None:
    """With CUDA graphs and without, the same bits; and with them, something really is launched as a graph."""
    model = conv_net()
    given = {"image": pictures(4)}
    answers = {}
    for graphs in (True, False):
        engine = maker.engine(model, options=Options(graphs=graphs))
        answers[graphs] = [engine.infer(given)["scores"].tobytes() for _ in range(5)]
        held = engine.device.held.graphs
        ours = graphs and maker.flavour == "tensorrt" and gpu.can_capture  # RTX captures by itself

        assert (1 if ours else 0) == held

        engine.close()

    assert {answers[False][0]} == {*answers[True], *answers[False]}


def test_device_time_is_less_than_the_walls(maker: Maker) -> None:
    """By events: above nothing, the compute within the whole, the whole within what the caller waited."""
    engine = maker.engine(conv_net())
    given = {"image": pictures(8)}
    engine.infer(given)
    began = time.perf_counter()
    engine.infer(given)
    wall_ms = (time.perf_counter() - began) * 1e3
    taken = engine.device_time()

    assert taken is not None
    assert 0 < taken.compute_ms <= taken.total_ms <= wall_ms


def test_memory_is_given_back(maker: Maker, gpu: cuda.Device) -> None:
    """After the last engine is closed the device has what it had before, ten times over."""
    model = resnet50()
    given = {"image": photos(MAX_BATCH, 224)}

    def free() -> int:
        with gpu:
            return gpu.free_bytes()

    def work() -> int:
        engine = maker.engine(model)
        engine.slots(MAX_BATCH)
        for _ in range(3):
            engine.infer(given)
        taken = free()
        engine.close()
        return taken

    work()  # what CUDA and TensorRT load once for the process
    before = free()
    least = min(work() for _ in range(10))

    assert before - least > 50 << 20  # its weights alone are 100 MB in FP32
    assert before - free() <= SLACK_BYTES


def test_an_engine_makes_room_and_comes_back(maker: Maker, gpu: cuda.Device) -> None:
    """Under a budget for one of two, both answer in turn, and the device never holds both."""
    models = [resnet50(seed=seed) for seed in range(2)]
    plans = [maker.plan(model, maker.profile()) for model in models]
    room = Memory(total_bytes=int(1.7 * max(map(len, plans))) + (200 << 20), usable_fraction=1.0)
    tight = maker.profile().model_copy(update={"memory": room})
    engines = [maker.engine(model, profile=tight) for model in models]
    given = {"image": photos(2, 224)}
    for _ in range(2):
        for engine, model in zip(engines, models):
            assert relative_error(engine.infer(given), wanted(model, given)) <= MAX_RELATIVE_ERROR
    nothing = maker.profile().model_copy(update={"memory": Memory(total_bytes=1 << 20)})
    for engine in engines:
        engine.close()
    with pytest.raises(OutOfMemory, match="may use"):
        maker.engine(models[0], profile=nothing)


def test_two_lanes_are_not_slower_than_one(maker: Maker) -> None:
    """Copies of one batch beside the compute of another: never a loss. `benchmarks/gpu.py` says how much of a gain."""
    model = resnet50()

    def rate(options: Options) -> float:
        engine = maker.engine(model, options=options)
        found = max(throughput(engine.slots(MAX_BATCH), MAX_BATCH) for _ in range(3))
        engine.close()
        return found

    one, two = rate(Options(lanes=1)), rate(Options(lanes=2))

    assert two >= 0.95 * one


def throughput(slots: Sequence[TensorRTSlot], rows: int, seconds: float = 0.5) -> float:
    order = deque(slots)
    for slot in order:
        slot.start(rows)
    done = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        order[0].finish()
        order[0].start(rows)
        order.rotate(-1)
        done += 1
    for slot in order:
        slot.finish()
    return done * rows / (time.perf_counter() - began)


def test_the_portable_engine(maker: Maker) -> None:
    """What TensorRT for RTX builds for any GPU from Ampere on runs on this one."""
    if maker.flavour != "tensorrt_rtx":
        pytest.skip("portable engines are tensorrt_rtx's")
    model = conv_net()
    engine = maker.engine(model, profile=maker.profile(portable=True), here=False)
    given = {"image": pictures(4)}

    assert relative_error(engine.infer(given), wanted(model, given)) <= MAX_RELATIVE_ERROR


def test_what_is_no_plan_is_refused(maker: Maker) -> None:
    """Bytes that TensorRT does not take are EngineFailed with its own words, and the process lives."""

    def opened(plan: bytes) -> TensorRTEngine:
        runtime = api.open_api(maker.flavour)
        return open_engine(lambda: plan, api=runtime, profile=maker.profile(), inputs=(), outputs=())

    for broken in (b"", b"no plan", maker.plan(conv_net(), maker.profile())[:1000]):
        with pytest.raises(EngineFailed):
            opened(broken)
