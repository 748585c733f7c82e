"""Two backends in one build: one judges graphs here, the other compiles the engine. What is decided, said and kept."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from edge_sdk.backends.base import Availability, Engine, EngineOrder, Progress, no_progress
from edge_sdk.backends.onnxruntime import OnnxRuntimeBackend
from edge_sdk.backends.registry import backend
from edge_sdk.compile import order as orders
from edge_sdk.compile.order import WantedPrecision
from edge_sdk.compile.pipeline import build, build_engine
from edge_sdk.errors import DeviceLost, EdgeSdkError, EngineFailed, EngineUnfit, ModelError, OutOfMemory, SpecError
from edge_sdk.package import GOLDEN, EnginePackage, EngineRecord
from edge_sdk.profiles import DeviceProfile, load_profile
from edge_sdk.tensors import Array, Outputs
from tests.compile.graphs import model
from tests.compile.nets import encoder, sentences


class StandInForAGpu:
    """A stand-in for TensorRT on a machine that has the GPU: its "plan" is the graph, and onnxruntime runs it.

    What it stands in for is only that the engine can be loaded and run here; that it is compiled, compared and timed is
    the pipeline's own doing.
    """

    name = "tensorrt"
    compiles = True

    def __init__(
        self,
        unfit: str = "",
        wrong: bool = False,
        aux_streams_cost_s: float = 0.0,
        second: EdgeSdkError | None = None,
        second_loads: bool = False,
    ) -> None:
        """`aux_streams_cost_s` is what TensorRT's own choice of streams costs a run; below 0 what it saves. The build
        of a second engine ends with the error `second`; if it `second_loads`, it is loading it that does."""
        self._unfit = unfit
        self._second = (second, second_loads)
        self._wrong = wrong
        self._aux_streams_cost_s = aux_streams_cost_s
        self.orders: list[EngineOrder] = []

    def availability(self) -> Availability:
        return Availability("1.0")

    def can_build(self, profile: DeviceProfile) -> Availability:
        return Availability("1.0")

    def build(
        self, order: EngineOrder, folder: Path | None, *, progress: Progress = no_progress, considerate: bool = False
    ) -> EngineRecord:
        assert folder is not None
        self.orders.append(order)
        error, loads = self._second
        if error is not None and not loads and len(self.orders) > 1:
            raise error
        plan = _scaled(order.graph) if self._wrong else order.graph
        (folder / "engine.plan").write_bytes(plan)
        (folder / "engine.json").write_text("{}")
        progress(0.5)
        return EngineRecord(file="engine.plan", sidecar="engine.json", bytes=len(plan), seconds=0.1, peak_bytes=1)

    def load(self, package: EnginePackage, profile: DeviceProfile) -> Engine:
        if self._unfit:
            raise EngineUnfit(self._unfit, reasons=(self._unfit,))
        error, loads = self._second
        if error is not None and loads and len(self.orders) > 1:
            raise error
        engine = OnnxRuntimeBackend().load_graph(package.read("engine.plan"), profile)
        single = profile.tensorrt is not None and profile.tensorrt.max_aux_streams == 0
        return _Slowed(engine, max(0.0, -self._aux_streams_cost_s if single else self._aux_streams_cost_s))

    def load_graph(self, graph: bytes, profile: DeviceProfile) -> Engine:
        raise AssertionError("graphs are judged by the backend that runs them here")


class _Slowed:
    """An engine that takes so much longer."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self.inputs, self.outputs, self.close = engine.inputs, engine.outputs, engine.close
        self._engine = engine
        self._seconds = seconds

    def infer(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> Outputs:
        time.sleep(self._seconds)
        return self._engine.infer(feeds, out)


def _scaled(graph: bytes) -> bytes:
    """A graph whose answers are half of what they were: a wrong scale somewhere."""
    import onnx

    wrong = onnx.load_from_string(graph)
    (output,) = wrong.graph.output
    for node in wrong.graph.node:
        node.output[:] = [f"{name}/right" if name == output.name else name for name in node.output]
    wrong.graph.node.append(helper.make_node("Mul", [f"{output.name}/right", "half"], [output.name]))
    wrong.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    return bytes(wrong.SerializeToString())


def _installed(monkeypatch: pytest.MonkeyPatch, stand_in: StandInForAGpu) -> StandInForAGpu:
    monkeypatch.setattr(orders, "backend_named", lambda name: stand_in if name == "tensorrt" else backend(name))
    return stand_in


def test_an_engine_that_can_run_is_compared_and_timed(
    engine_folder: Path, jetson: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the golden requests, against the CPU; the batch that was fastest is the best one; the report says it all."""
    stand_in = _installed(monkeypatch, StandInForAGpu())
    package = build_engine(engine_folder, profile=jetson)
    manifest = package.manifest
    package.verify()

    assert ("tensorrt", None) == (manifest.backend.name, manifest.backend.missing)
    assert manifest.backend.engine is not None
    assert (manifest.backend.engine.latency_ms or 0) > 0
    assert {1, 2} == set(manifest.backend.engine.per_second_at_batch)
    assert "answers as the graph does" in " ".join(manifest.backend.engine.notes)
    assert "1.0" == manifest.tools["tensorrt"]
    assert package.read("graph.onnx") == stand_in.orders[0].graph
    assert manifest.inputs == stand_in.orders[0].inputs
    assert {"engine.plan", "engine.json", GOLDEN} < set(manifest.files)
    report = package.read("report.md").decode()
    assert "- Engine: engine.plan by tensorrt" in report
    assert re.search(r"- Engine, measured: [\d.]+ ms", report)


@pytest.mark.parametrize(("cost_s", "chosen"), [(0.01, 0), (-0.01, None)])
def test_auxiliary_streams_are_measured(
    cost_s: float,
    chosen: int | None,
    engine_folder: Path,
    jetson: DeviceProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiled both ways and timed in turns; what is faster is packed, and the profile in the package says so."""
    stand_in = _installed(monkeypatch, StandInForAGpu(aux_streams_cost_s=cost_s))
    package = build_engine(engine_folder, profile=jetson)
    package.verify()
    packed = package.profile().tensorrt
    tried = [order.profile.tensorrt and order.profile.tensorrt.max_aux_streams for order in stand_in.orders]

    assert [None, 0] == tried
    assert packed is not None
    assert chosen == packed.max_aux_streams
    engine = package.manifest.backend.engine
    assert engine is not None
    assert (engine.latency_ms or 0) < 10


@pytest.mark.parametrize(
    ("error", "loads"),
    [
        (EngineFailed("It took longer than it may."), False),
        (OutOfMemory("There is no room for two."), True),
        (EngineUnfit("It does not fit.", reasons=("it does not fit",)), True),
    ],
)
def test_an_engine_that_is_there_does_not_go_for_one_that_might_be_faster(
    error: EdgeSdkError, loads: bool, engine_folder: Path, jetson: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one fails to compile, or has no room beside the first: the package has the first, and says so."""
    _installed(monkeypatch, StandInForAGpu(second=error, second_loads=loads))
    package = build_engine(engine_folder, profile=jetson)
    package.verify()
    engine = package.manifest.backend.engine

    assert engine is not None
    assert "answers as the graph does" in " ".join(engine.notes)
    assert error.problem in engine.notes[-1]


def test_a_device_that_is_lost_while_streams_are_measured_ends_the_build(
    engine_folder: Path, jetson: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(monkeypatch, StandInForAGpu(second=DeviceLost("It is gone."), second_loads=True))
    with pytest.raises(DeviceLost):
        build_engine(engine_folder, profile=jetson)


def test_a_choice_of_streams_is_not_measured_again(
    engine_folder: Path, jetson: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = _installed(monkeypatch, StandInForAGpu())
    with (engine_folder / "engine.toml").open("a") as file:
        file.write("[tensorrt]\nmax_aux_streams = 2\n")
    build_engine(engine_folder, profile=jetson)

    assert 1 == len(stand_in.orders)


def test_an_engine_that_answers_otherwise_is_refused(
    engine_folder: Path, jetson: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No package, and the error says how far off it was."""
    _installed(monkeypatch, StandInForAGpu(wrong=True))
    with pytest.raises(EngineFailed) as caught:
        build_engine(engine_folder, profile=jetson)

    assert re.search(r"\b6(\.\d+)? dB .*20 are needed", caught.value.problem)
    assert not list((engine_folder / "build").iterdir())


def test_an_engine_for_another_gpu_is_kept_and_said_to_be_untried(
    engine_folder: Path, jetson: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is here, but not the one it is for: compiled, not run, and why."""
    _installed(monkeypatch, StandInForAGpu(unfit="It is for an Orin; this is an H100."))
    engine = build_engine(engine_folder, profile=jetson).manifest.backend.engine

    assert engine is not None
    assert engine.latency_ms is None
    assert "has not run" in engine.notes[-1]
    assert "this is an H100" in engine.notes[-1]


def test_an_engine_that_cannot_be_compiled_here_is_missed(engine_folder: Path, jetson: DeviceProfile) -> None:
    """The manifest names the backend the device is to use, whatever ran the graph here, and why there is no engine."""
    manifest = build_engine(engine_folder, profile=jetson).manifest

    assert "tensorrt" == manifest.backend.name
    assert manifest.backend.engine is None
    assert manifest.backend.missing is not None
    assert "Orin Nano" in manifest.backend.missing
    assert "tensorrt" not in manifest.tools
    assert "onnxruntime" in manifest.tools


@pytest.mark.parametrize(
    "change",
    ["[tensorrt]\noptimization_level = 5\n", "[axes]\nN = { best = 2, max = 2 }\n"],
    ids=["tensorrt", "axes"],
)
def test_the_build_key_covers_the_engine(
    engine_folder: Path, jetson: DeviceProfile, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """What the engine is compiled by makes another build; so does a machine that can compile one."""
    assert not build(engine_folder, profile=jetson, precision="fp32").unchanged
    with (engine_folder / "engine.toml").open("a") as file:
        file.write(change)

    assert not build(engine_folder, profile=jetson, precision="fp32").unchanged
    assert build(engine_folder, profile=jetson, precision="fp32").unchanged
    _installed(monkeypatch, StandInForAGpu())
    assert not build(engine_folder, profile=jetson, precision="fp32").unchanged


def test_wishes_are_packed(engine_folder: Path, jetson: DeviceProfile) -> None:
    """engine.toml's [tensorrt] goes over the profile's, and the package carries the result to the device."""
    with (engine_folder / "engine.toml").open("a") as file:
        file.write("[tensorrt]\noptimization_level = 5\nweight_streaming = true\n")
    packed = build_engine(engine_folder, profile=jetson, precision="fp32").profile().tensorrt

    assert jetson.tensorrt is not None
    assert jetson.tensorrt.model_copy(update={"optimization_level": 5, "weight_streaming": True}) == packed


def test_ranges_are_checked_and_packed(engine_folder: Path, jetson: DeviceProfile) -> None:
    """An axis that no input has free is refused with those that there are."""
    toml = (engine_folder / "engine.toml").read_text()
    (engine_folder / "engine.toml").write_text(f"{toml}[axes]\nlength = {{ best = 8, max = 16 }}\n")
    with pytest.raises(SpecError) as caught:
        build_engine(engine_folder, profile=jetson, precision="fp32")
    (engine_folder / "engine.toml").write_text(f"{toml}[axes]\nN = {{ best = 2, max = 4 }}\n")
    axes = build_engine(engine_folder, profile=jetson, precision="fp32").manifest.axes

    assert "'length'" in caught.value.problem
    assert "'N'" in caught.value.fix
    assert [("N", 1, 2, 4)] == [(name, axis.min, axis.best, axis.max) for name, axis in axes.items()]


def _net(folder: Path, between: list[Any], weights: dict[str, Any], budget: str = "") -> Path:
    """A spec for tokens [N, 4, 8] through a MatMul, `between` (h to b), and another MatMul."""
    draw = np.random.default_rng(0)
    square = {name: np.asarray(draw.normal(size=(8, 8)) / 3, np.float32) for name in ("w1", "w2")}
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["h"]), *between, helper.make_node("MatMul", ["b", "w2"], ["y"])]
    net = model(nodes, {"x": ["N", 4, 8]}, {"y": ["N", 4, 8]}, {**square, **weights})
    (folder / "net.onnx").write_bytes(net.SerializeToString())
    np.savez(folder / "data.npz", x=draw.normal(size=(48, 4, 8)).astype(np.float32))
    (folder / "engine.toml").write_text(
        f'name = "net"\nmodel = "net.onnx"\n[calibration]\ndata = "data.npz"\nsamples = 24\n{budget}'
    )
    return folder


def _attention(scale: float) -> tuple[list[Any], dict[str, Any]]:
    """Attention whose products are `scale` times what they end as."""
    node = helper.make_node
    weights = {"up": np.array(scale, np.float32), "down": np.array(1 / scale, np.float32)}
    nodes = [
        node("Mul", ["h", "up"], ["u"]),
        node("Transpose", ["h"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["u", "t"], ["s"]),
        node("Mul", ["s", "down"], ["d"]),
        node("Softmax", ["d"], ["p"], axis=-1),
        node("MatMul", ["p", "h"], ["b"]),
    ]
    return nodes, weights


def _decision(package: EnginePackage) -> str:
    assert package.manifest.measurements is not None
    return package.manifest.measurements.decision


@pytest.mark.parametrize("precision", ["int8", "auto"])
def test_an_fp16_rest_that_overflows_stays_fp32(
    tmp_path: Path, jetson: DeviceProfile, precision: WantedPrecision
) -> None:
    """Products beyond 65504 between two INT8 layers, where QuantizeLinear makes a number of infinity again: the answers
    are far off, the rest stays FP32, and the decision says so."""
    fine = build_engine(_net(tmp_path, *_attention(1.0)), profile=jetson, precision=precision)
    overflowing = build_engine(_net(tmp_path, *_attention(1e5)), profile=jetson, precision=precision)

    assert _decision(fine).startswith("INT8 with an FP16 rest")
    assert _decision(overflowing).startswith("INT8: " if precision == "auto" else "INT8, as asked: ")
    assert "INT8 with an FP16 rest was outside the accuracy budget" in _decision(overflowing)
    assert b"/float16" not in overflowing.read("graph.onnx")


def test_fp16_comes_before_fp32(tmp_path: Path, jetson: DeviceProfile) -> None:
    """Where INT8 is outside the budget and FP16 inside it; with both sets of figures."""
    budget = '[validation]\ndata = "data.npz"\nmin_snr_db = 45.0\n'
    package = build_engine(_net(tmp_path, *_attention(1.0), budget), profile=jetson)

    assert "fp16" == package.manifest.precision
    assert re.match(
        r"FP16: its outputs are \d\d\.\d dB above .* INT8 with an FP16 rest was outside", _decision(package)
    )
    assert re.search(r"INT8 was outside the accuracy budget: .*but 45 dB are needed", _decision(package))


def test_fp32_is_what_is_left(tmp_path: Path, jetson: DeviceProfile) -> None:
    """Where neither INT8 nor FP16 will do, with why."""
    budget = '[validation]\ndata = "data.npz"\nmin_snr_db = 110.0\n'
    package = build_engine(_net(tmp_path, *_attention(1.0), budget), profile=jetson)

    assert "fp32" == package.manifest.precision
    assert _decision(package).startswith("FP32: INT8 with an FP16 rest was outside the accuracy budget")
    assert "FP16 was outside the accuracy budget" in _decision(package)


def test_without_calibration_data_it_is_fp16(tmp_path: Path, jetson: DeviceProfile) -> None:
    """On devices that compute FP16 natively; the decision still says how to get INT8."""
    (tmp_path / "net.onnx").write_bytes(_net_bytes(tmp_path, 1.0))
    package = build_engine(tmp_path / "net.onnx", profile=jetson)

    assert "fp16" == package.manifest.precision
    assert _decision(package).startswith("FP16: ")
    assert "--calibration" in _decision(package)


def test_fp16_that_overflows_is_not_taken(tmp_path: Path, jetson: DeviceProfile) -> None:
    """Not even on random requests alone; and an explicit wish for it is refused."""
    (tmp_path / "net.onnx").write_bytes(_net_bytes(tmp_path, 1e5))
    package = build_engine(tmp_path / "net.onnx", profile=jetson)

    assert "fp32" == package.manifest.precision
    assert "FP16 was outside the accuracy budget: its outputs hold NaN or infinity" in _decision(package)
    with pytest.raises(ModelError) as caught:
        build_engine(tmp_path / "net.onnx", profile=jetson, precision="fp16")
    assert "NaN or infinity" in caught.value.problem


def _net_bytes(folder: Path, scale: float) -> bytes:
    return (_net(folder, *_attention(scale)) / "net.onnx").read_bytes()


def test_a_profile_without_fp32(tmp_path: Path, jetson: DeviceProfile) -> None:
    """FP32 is only what it is measured against: nothing of it is packed, and where nothing else will do there is no
    package."""
    turing = jetson.model_copy(update={"precisions": ("fp16", "int8")})
    package = build_engine(_net(tmp_path, *_attention(1.0)), profile=turing)

    assert _decision(package).startswith("INT8 with an FP16 rest")
    with pytest.raises(ModelError) as caught:
        build_engine(_net(tmp_path, *_attention(1e5)), profile=turing)
    assert "INT8 with an FP16 rest was outside" in caught.value.problem
    assert "FP16 was outside" in caught.value.problem


def test_lengths_have_ranges(tmp_path: Path, jetson: DeviceProfile) -> None:
    """A model with a free length takes batches of equal lengths; its ranges are in the manifest for the compiler."""
    (tmp_path / "net.onnx").write_bytes(encoder().SerializeToString())
    np.savez(tmp_path / "data.npz", tokens=sentences(24, 20))
    (tmp_path / "engine.toml").write_text(
        'name = "net"\nmodel = "net.onnx"\n[calibration]\ndata = "data.npz"\n[axes]\nL = { best = 20, max = 128 }\n'
    )
    manifest = build_engine(tmp_path, profile=jetson).manifest

    assert "int8" == manifest.precision
    assert 8 == manifest.batching.max_batch
    assert 128 == manifest.axes["L"].max


def test_cpu_packages_are_as_they_were(engine_folder: Path, cpu: DeviceProfile) -> None:
    """No FP16, no engine, no golden requests: nothing of this is for a device that runs the graph."""
    package = build_engine(engine_folder, profile=cpu)
    record = json.loads((package.path / "manifest.json").read_text())["backend"]

    assert {"name": "onnxruntime"} == record
    assert package.manifest.precision in {"int8", "fp32"}
    assert "FP16" not in _decision(package)
    assert load_profile("cpu-x86").precisions == ("fp32", "int8")
