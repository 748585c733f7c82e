"""Old and odd exports become modern FP32 graphs that answer as before, to the same names and dtypes."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from edge_sdk.backends.onnxruntime import OnnxRuntimeBackend
from edge_sdk.compile.inspect import summarize
from edge_sdk.compile.modernize import IR_VERSION, OPSET, modern_graph
from edge_sdk.compile.widths import narrowed, widened
from edge_sdk.errors import ModelError
from edge_sdk.profiles import DeviceProfile
from edge_sdk.tensors import Array, Outputs
from tests.compile.graphs import conv_net, model, pictures


def _answers(graph: ModelProto, profile: DeviceProfile, image: Array) -> Outputs:
    engine = OnnxRuntimeBackend().load_graph(graph.SerializeToString(), profile)
    try:
        return engine.infer({"image": image})
    finally:
        engine.close()


def test_old_file_becomes_modern(cpu: DeviceProfile) -> None:
    """Opset 9, IR 3 and weights among the inputs: brought up to date, with the same answers."""
    old = conv_net()
    old.opset_import[0].version = 9
    clip = next(node for node in old.graph.node if node.op_type == "Clip")
    del clip.input[1:]
    clip.attribute.extend([helper.make_attribute("min", 0.0), helper.make_attribute("max", 6.0)])
    old.ir_version = 3
    for tensor in old.graph.initializer:
        old.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    modern = modern_graph(old, summarize(old, "old.onnx"))
    image = pictures(2)

    assert () == modern.notes
    assert OPSET == modern.model.opset_import[0].version
    assert IR_VERSION == modern.model.ir_version
    assert ["image"] == [value.name for value in modern.model.graph.input]
    np.testing.assert_allclose(
        _answers(conv_net(), cpu, image)["scores"], _answers(modern.model, cpu, image)["scores"], rtol=1e-4, atol=1e-5
    )


def test_newer_opsets_are_left_alone() -> None:
    """A graph that is modern already keeps its opset."""
    newer = conv_net()
    newer.opset_import[0].version = 20
    newer.ir_version = 9
    modern = modern_graph(newer, summarize(newer, "newer.onnx"))

    assert 20 == modern.model.opset_import[0].version
    assert 9 == modern.model.ir_version


def test_quantised_graphs_are_left_exactly_as_they_are() -> None:
    """Their ranges were chosen for the very nodes they have."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    weights: dict[str, Array] = {"s": np.array(0.1, np.float32), "z": np.array(0, np.uint8)}
    graph = model(nodes, {"x": [1, 4]}, {"y": [1, 4]}, weights, opset=13, ir_version=7)
    modern = modern_graph(graph, summarize(graph, "quantised.onnx"))

    assert graph.SerializeToString() == modern.model.SerializeToString()
    assert "already quantised" in modern.notes[0]


def test_control_flow_stays_at_its_opset() -> None:
    """The converter loses what subgraphs read from around them, so it is not asked; a note says so."""
    branch = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["n"])],
        "branch",
        [],
        [helper.make_tensor_value_info("n", TensorProto.FLOAT, [1])],
    )
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["positive"], to=TensorProto.BOOL),
        helper.make_node("If", ["positive"], ["y"], then_branch=branch, else_branch=branch),
    ]
    graph = model(nodes, {"x": [1]}, {"y": [1]}, opset=14)
    modern = modern_graph(graph, summarize(graph, "flow.onnx"))

    assert 14 == modern.model.opset_import[0].version
    assert "control flow" in modern.notes[0]


def test_opsets_before_seven_are_refused() -> None:
    """Nothing converts them, so the error says what to do instead of failing somewhere inside."""
    ancient = conv_net()
    ancient.opset_import[0].version = 6

    with pytest.raises(ModelError) as caught:
        modern_graph(ancient, summarize(ancient, "ancient.onnx"))

    assert "opset 6" in caught.value.problem


def test_a_failing_simplifier_is_noted_not_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever onnxslim raises, the graph before it still stands."""
    import onnxslim

    def failing(model: ModelProto) -> ModelProto:
        raise KeyError("slimming")

    monkeypatch.setattr(onnxslim, "slim", failing)
    graph = conv_net()
    modern = modern_graph(graph, summarize(graph, "net.onnx"))

    assert "could not be simplified" in modern.notes[0]
    assert len(graph.graph.node) == len(modern.model.graph.node)


def test_half_precision_computes_in_fp32_and_still_answers_in_fp16(cpu: DeviceProfile) -> None:
    """A model that came in FP16 keeps its names and dtypes at the edge, and has FP32 weights inside."""
    half = narrowed(conv_net())
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    kept = [node for node in half.graph.node if node.op_type != "Cast"]
    names = {"image/float16": "image", "scores/float16": "scores"}
    for node in kept:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    del half.graph.node[:]
    half.graph.node.extend(kept)
    wide = widened(half)
    image = pictures(1).astype(np.float16)

    assert {TensorProto.FLOAT} == {tensor.data_type for tensor in wide.graph.initializer}
    assert np.float16 == _answers(wide, cpu, image)["scores"].dtype
    np.testing.assert_allclose(
        _answers(conv_net(), cpu, pictures(1))["scores"], _answers(wide, cpu, image)["scores"], rtol=0.02, atol=0.02
    )


def test_narrowed_graph_is_strongly_typed(cpu: DeviceProfile) -> None:
    """FP16 means FP16 weights and casts at the edge: FP32 in, FP32 out, answers within FP16's rounding."""
    narrow = narrowed(conv_net())
    image = pictures(2)

    assert {TensorProto.FLOAT16} == {tensor.data_type for tensor in narrow.graph.initializer}
    assert summarize(conv_net(), "").inputs == summarize(narrow, "").inputs
    np.testing.assert_allclose(
        _answers(conv_net(), cpu, image)["scores"], _answers(narrow, cpu, image)["scores"], rtol=0.02, atol=0.02
    )


def test_scales_of_a_resize_stay_fp32(cpu: DeviceProfile) -> None:
    """The specification has them as FP32 whatever the data is."""
    nodes = [helper.make_node("Resize", ["image", "", "scales"], ["y"], mode="nearest")]
    weights = {"scales": np.array([1, 1, 2, 2], np.float32)}
    narrow = narrowed(model(nodes, {"image": [1, 3, 16, 16]}, {"y": [1, 3, 32, 32]}, weights))

    assert (1, 3, 32, 32) == _answers(narrow, cpu, pictures(1))["y"].shape
