"""Graph -> plan with the real tensorrt_rtx, which needs no GPU for it; and what is said of graphs that it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edge_sdk import resources
from edge_sdk.backends.tensorrt import builder
from edge_sdk.backends.tensorrt.api import Api, open_api
from edge_sdk.backends.tensorrt.compiling import Draft
from edge_sdk.backends.tensorrt.parts import Graph
from edge_sdk.backends.tensorrt.process import compile_plan
from edge_sdk.backends.tensorrt.refusals import Fault, as_model_error
from edge_sdk.backends.tensorrt.shapes import ShapeRange
from edge_sdk.backends.tensorrt.sidecar import PLAN
from edge_sdk.errors import EngineFailed, ModelError, ProfileError
from tests.backends.tensorrt.plans import build, order_for
from tests.compile.graphs import conv_net
from tests.packages import scaling

pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")

DIGITS = resources.EXAMPLES / "digits" / "digits.onnx"


@pytest.fixture(scope="module")
def squeezenet(shared: Path) -> bytes:
    return (shared / "models" / "squeezenet.onnx").read_bytes()


@pytest.mark.parametrize("targets", [(), ("7.5",), ("8.6",), ("8.9",), ("12.0",), ("12.1",), ("8.6", "8.9")])
def test_a_plan_for_every_target(squeezenet: bytes, targets: tuple[str, ...], tmp_path: Path) -> None:
    """tensorrt_rtx compiles for any GPU, several at once, or (none named) all from 8.0 on; figures come with it."""
    plan = build(squeezenet, tmp_path, *targets)

    assert tmp_path / PLAN == plan.file
    assert 4_000_000 < plan.file.stat().st_size < 8_000_000
    assert [plan.file] == list(tmp_path.iterdir())
    assert 100_000_000 < plan.peak_bytes < 2_000_000_000
    assert 0 < plan.seconds < 120
    assert ("tensorrt_rtx", open_api("tensorrt_rtx").version, ()) == (plan.flavour, plan.version, plan.notes)
    assert (targets or "portable") == plan.settings["targets"]


def test_a_free_axis_with_one_size(tmp_path: Path) -> None:
    """`max_batch = 1`: TensorRT wants to be told that, too."""
    one = ShapeRange((1, 4), (1, 4), (1, 4))
    order = replace(order_for(scaling(2.0).SerializeToString(), "8.6"), shapes={"x": one})
    plan = compile_plan(scaling(2.0).SerializeToString(), order, tmp_path, progress=lambda _: None, considerate=False)

    assert 0 < plan.file.stat().st_size


@pytest.mark.parametrize("targets", [(), ("8.6",)])
def test_other_real_models(shared: Path, targets: tuple[str, ...], tmp_path: Path) -> None:
    """A detector with several outputs, and the example with a batch that varies."""
    for model in (shared / "models" / "fastestdet.onnx", DIGITS):
        plan = build(model.read_bytes(), tmp_path, *targets)

        assert 100_000 < plan.file.stat().st_size


def test_the_wishes_of_a_profile_are_settings(squeezenet: bytes, tmp_path: Path) -> None:
    """Everything that RTX can be asked for is taken together, and is in the record as it was asked."""
    wishes: dict[str, Any] = {
        "optimization_level": 5, "workspace_bytes": 1 << 28, "sparse_weights": True, "weight_streaming": True,
    }  # fmt: skip
    plan = build(squeezenet, tmp_path, "8.6", **wishes)

    assert wishes == {wish: plan.settings[wish] for wish in wishes}
    assert {"generation": "rtx", "timing_cache": False} == {
        name: plan.settings[name] for name in ("generation", "timing_cache")
    }
    assert json.loads(json.dumps(plan.settings)).keys() == plan.settings.keys()


def test_options_reach_tensorrt(squeezenet: bytes, tmp_path: Path) -> None:
    """They are not only recorded: with too little scratch memory no kernel is found, and the error says what to do."""
    with pytest.raises(EngineFailed, match="workspace limit") as raised:
        build(squeezenet, tmp_path, "8.6", workspace_bytes=1)

    assert raised.value.fix.startswith("Raise workspace_bytes")
    assert [] == list(tmp_path.iterdir())


def test_fp32_on_turing(tmp_path: Path) -> None:
    """tensorrt_rtx multiplies no FP32 matrices there; the error says what does work."""
    with pytest.raises(EngineFailed, match="FP32 GEMM is not supported") as raised:
        build(DIGITS.read_bytes(), tmp_path, "7.5")

    assert raised.value.fix.startswith("Build it in FP16 or INT8")


def test_wishes_that_rtx_cannot_fulfil(tmp_path: Path) -> None:
    """They end the build before it begins, as an error about the profile."""
    with pytest.raises(ProfileError, match="version_compatible"):
        build(DIGITS.read_bytes(), tmp_path, "8.6", version_compatible=True)


@pytest.mark.parametrize(
    ("model", "node", "wanted"),
    [
        ("mobilenetv2-qlinear.onnx", "input_QuantizeLinear (QuantizeLinear)", "Non-zero zero point is not supported"),
        (
            "mobilenetv2-int8-random.onnx",
            "m.classifier.bias_DequantizeLinear (DequantizeLinear)",
            "input has type Int32 but must have type",
        ),
    ],
)
def test_int8_of_another_scheme(shared: Path, model: str, node: str, wanted: str, tmp_path: Path) -> None:
    """The node, what TensorRT wants, and that edge-sdk quantises in that scheme by itself."""
    with pytest.raises(ModelError) as raised:
        build((shared / "models" / model).read_bytes(), tmp_path, "8.6")

    assert f"does not take the node {node}: it says: " in raised.value.problem
    assert wanted in raised.value.problem
    assert ".cpp" not in raised.value.problem
    assert "cudaError" not in raised.value.problem
    assert raised.value.fix.startswith("It takes symmetric signed INT8")


def test_a_defect_inside_the_builder(shared: Path, tmp_path: Path) -> None:
    """Silero is parsed without complaint and then fails an assertion of TensorRT's: its words, and that the graph
    still runs."""
    fixed = {"input": (1, 576), "state": (2, 1, 128), "sr": ()}
    shapes = {name: ShapeRange(shape, shape, shape) for name, shape in fixed.items()}
    order = replace(order_for(DIGITS.read_bytes(), "8.6"), shapes=shapes)
    graph = (shared / "models" / "silero-vad-16k.onnx").read_bytes()
    with pytest.raises(EngineFailed, match=r"could not compile the model; it says: .*Assertion") as raised:
        compile_plan(graph, order, tmp_path, progress=lambda done: None, considerate=False)

    assert "The package's graph still runs, on onnxruntime." == raised.value.fix


def test_values_that_decide_shapes(tmp_path: Path) -> None:
    """A shape that comes as an input would have to be known beforehand: said by the input's name."""
    nodes = [helper.make_node("Reshape", ["x", "sizes"], ["y"], "reshape")]
    graph = model(nodes, {"x": [2, 6]}, {"y": [None, None]}, integers={"sizes": [2]})
    with pytest.raises(ModelError, match="the values of its input 'sizes' decide the shapes"):
        build(graph, tmp_path, "8.6")


@pytest.mark.parametrize("graph", [b"no model at all", b""])
def test_bytes_that_are_no_model(graph: bytes, tmp_path: Path) -> None:
    """An error, whatever TensorRT would have made of them."""
    order = order_for(DIGITS.read_bytes(), "8.6")
    with pytest.raises((ModelError, EngineFailed)):
        builder.compiled(graph, order, lambda done: None)


def test_a_graph_that_names_a_file(tmp_path: Path) -> None:
    """Weights in other files are refused before TensorRT looks for them."""
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="/etc/passwd")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])], [weights],
    )  # fmt: skip
    with pytest.raises(EngineFailed, match="lies in another file"):
        build(helper.make_model(graph).SerializeToString(), tmp_path, "8.6")


# Splits


def model(
    nodes: Sequence[NodeProto],
    inputs: dict[str, list[int]],
    outputs: dict[str, list[int | None]],
    *,
    integers: dict[str, list[int]] | None = None,
    known: dict[str, list[int]] | None = None,
) -> bytes:
    """An ONNX file with operators of a domain of its own allowed, and one weight, `w`."""

    def value(name: str, shape: Sequence[int | None], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, list(shape))

    graph = helper.make_graph(
        list(nodes), "test",
        [value(*item) for item in inputs.items()]
        + [value(name, shape, TensorProto.INT64) for name, shape in (integers or {}).items()],
        [value(*item) for item in outputs.items()],
        [numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")],
        value_info=[value(*item) for item in (known or {}).items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)])
    made.ir_version = 8
    return bytes(made.SerializeToString())


def with_a_stranger(*strangers: NodeProto, known: bool = True) -> bytes:
    """Conv, Relu, the strangers, which make `d` out of `b`, Relu, Sigmoid."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "conv"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        *strangers,
        helper.make_node("Relu", ["d"], ["e"], "relu2"),
        helper.make_node("Sigmoid", ["e"], ["y"], "sigmoid"),
    ]
    return model(nodes, {"x": [1, 3, 8, 8]}, {"y": [1, 4]}, known={"d": [1, 4]} if known else {})


DET = helper.make_node("Det", ["b"], ["d"], "det")
MINE = helper.make_node("Mine", ["b"], ["d"], "mine", domain="mine")


@pytest.mark.parametrize(
    ("stranger", "subject", "reason"),
    [
        (DET, "det (Det)", "it has no such operator, or not with these inputs"),
        (MINE, "mine (Mine)", "it has no such operator, and no plugin of that name"),
    ],
)
def test_a_split_that_can_be_had(stranger: NodeProto, subject: str, reason: str, tmp_path: Path) -> None:
    """The node and its operator; and the parts on either side, tried on the parser, by the tensors at their edges."""
    with pytest.raises(ModelError) as raised:
        build(with_a_stranger(stranger), tmp_path, "8.6")

    assert raised.value.problem.endswith(f"does not take the node {subject}: {reason}.")
    assert (
        f"Export the model with operators that TensorRT has. Or cut it at {subject}, and compute that elsewhere: "
        "TensorRT takes, as models of their own, the 2 nodes from 'x' to 'b'; the 2 nodes from 'd' to 'y'. "
        "The package's graph still runs, on onnxruntime."
    ) == raised.value.fix


def test_a_part_that_cannot_be_tried(tmp_path: Path) -> None:
    """Behind a stranger nothing tells the shapes, unless the graph does: what was not tried is not promised."""
    with pytest.raises(ModelError) as raised:
        build(with_a_stranger(DET, known=False), tmp_path, "8.6")

    assert "the 2 nodes from 'x' to 'b'. The 2 others could not be tried" in raised.value.fix


def test_strangers_everywhere(tmp_path: Path) -> None:
    """Cut into many pieces a model is no use: that is said, instead of a list."""
    nodes = []
    for index in range(6):
        nodes.append(helper.make_node("Relu", [f"t{index}"], [f"r{index}"], f"relu{index}"))
        nodes.append(helper.make_node("Mine", [f"r{index}"], [f"t{index + 1}"], f"mine{index}", domain="mine"))
    known = {f"t{index}": [1, 4] for index in range(1, 6)}
    with pytest.raises(ModelError) as raised:
        build(model(nodes, {"t0": [1, 4]}, {"t6": [1, 4]}, known=known), tmp_path, "8.6")

    assert "mine0 (Mine)" in raised.value.problem
    assert raised.value.fix.startswith("It refuses several of its nodes, so cutting the model does not help.")


def test_parts_are_models() -> None:
    """Any run of nodes of a real graph is a model that ONNX's own checker takes, with what it needs and no more."""
    import onnx
    from onnx import shape_inference

    whole = shape_inference.infer_shapes(conv_net(batch=2))
    graph = Graph.read(whole.SerializeToString())
    assert graph is not None
    assert [node.name for node in whole.graph.node] == [node.name for node in graph.nodes]
    for first in range(len(graph.nodes)):
        for last in range(first + 1, len(graph.nodes) + 1):
            part = graph.part(first, last)
            assert part is not None
            made = onnx.load_from_string(part)
            onnx.checker.check_model(made)
            read = {name for node in made.graph.node for name in node.input}

            assert list(whole.graph.node)[first:last] == list(made.graph.node)
            assert {weight.name for weight in made.graph.initializer} <= read
            assert {value.name for value in made.graph.input} <= read


def test_tensorrt_86_tells_only_the_number_of_a_node() -> None:
    """Its name and operator are looked up in the graph."""
    graph = with_a_stranger(DET)
    error = as_model_error(graph, Fault("UNSUPPORTED_NODE", 2, "", "", "false"), lambda part: None, "tensorrt 8.6.1")

    assert "tensorrt 8.6.1 does not take the node det (Det): it has no such operator, or not with these inputs." == (
        error.problem
    )


def test_a_fault_of_no_node() -> None:
    """Where TensorRT names none, neither do we, and nothing is split."""
    fault = Fault("INVALID_GRAPH", -1, "", "", "Assertion failed: x > 0: The graph has a cycle.")
    error = as_model_error(with_a_stranger(DET), fault, lambda part: fault, "tensorrt 10.3.0")

    assert "tensorrt 10.3.0 does not take the graph: it says: The graph has a cycle." == error.problem


# The timing cache, which `tensorrt` keeps: here with tensorrt_rtx's, which has the calls but nothing to measure


@pytest.fixture
def draft() -> tuple[Api, Draft]:
    api = open_api("tensorrt_rtx")
    graph = DIGITS.read_bytes()
    order = order_for(graph, "8.6")
    draft = api.draft(graph, order.options)
    api.set_shapes(draft, order.shapes)
    return api, draft


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops in TensorRT-RTX:DeprecationWarning")
def test_a_timing_cache_is_kept(draft: tuple[Api, Draft], tmp_path: Path) -> None:
    """Its folder is made, and nothing else is left in it."""
    file = tmp_path / "timing" / "8.6.cache"
    order = replace(order_for(DIGITS.read_bytes()), flavour="tensorrt", targets=(), timing_cache=file)

    assert [] == builder._with_timing_cache(*draft, order)
    draft[0].compile(draft[1])
    assert [] == builder._keep_timing_cache(*draft, order)
    assert [file] == list(file.parent.iterdir())
    assert 0 < file.stat().st_size


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops in TensorRT-RTX:DeprecationWarning")
def test_a_timing_cache_that_is_no_good(draft: tuple[Api, Draft], tmp_path: Path) -> None:
    """A corrupt one, or one that cannot be read or written, costs its time again and a note, not the build."""
    file = tmp_path / "cache"
    order = replace(order_for(DIGITS.read_bytes()), flavour="tensorrt", targets=(), timing_cache=file)
    file.write_bytes(b"not what TensorRT wrote" * 10)

    assert [f"TensorRT does not take the timing cache {file}: everything is measured anew."] == (
        builder._with_timing_cache(*draft, order)
    )

    file.unlink()
    file.mkdir()
    assert "cannot be read" in builder._with_timing_cache(*draft, order)[0]
    assert "cannot be written" in builder._keep_timing_cache(*draft, order)[0]
    assert [file] == list(tmp_path.iterdir())


def test_no_timing_cache_for_rtx(draft: tuple[Api, Draft], tmp_path: Path) -> None:
    """It breaks builds without a GPU, so the option is not heeded there, on however it is set."""
    order = replace(order_for(DIGITS.read_bytes(), "8.6", timing_cache=True), timing_cache=tmp_path / "cache")

    assert [] == builder._with_timing_cache(*draft, order) + builder._keep_timing_cache(*draft, order)
    assert [] == list(tmp_path.iterdir())


def test_a_device_without_dla(draft: tuple[Api, Draft]) -> None:
    """The profile's promise is compared with what TensorRT finds; and every layer is asked about by its name."""
    api, made = draft
    with pytest.raises(ProfileError, match=r"dla_cores = 2; tensorrt_rtx [\d.]+ finds 0"):
        api.set_dla(made, 2)

    notes = api._left_to_gpu(made.network, made.config)
    assert "layers run on the GPU, because the DLA does not take them: convolution (" in notes[0]
