"""INT8 graphs with an FP16 rest, and FP16 as an accelerator computes it: right types, few casts, honest rounding."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper

from edge_sdk.backends.onnxruntime import OnnxRuntimeBackend
from edge_sdk.compile.calibrate import observe
from edge_sdk.compile.datasets import Sample
from edge_sdk.compile.inspect import summarize
from edge_sdk.compile.mixed import mixed
from edge_sdk.compile.modernize import modern_graph
from edge_sdk.compile.quantize import place, quantized
from edge_sdk.compile.widths import narrowed, rounded
from edge_sdk.profiles import DeviceProfile, load_profile
from edge_sdk.tensors import Array, signal_to_noise_db
from tests.compile.graphs import conv_net, model, pictures
from tests.compile.nets import encoder, sentences

BACKEND = OnnxRuntimeBackend()
node = helper.make_node


@pytest.fixture(scope="module")
def int8_encoder(jetson: DeviceProfile) -> ModelProto:
    net = encoder()
    modern = modern_graph(net, summarize(net, "encoder.onnx")).model
    placement = place(modern, jetson.quantization)
    samples = [Sample(str(row), {"tokens": row[np.newaxis]}) for row in sentences(16, 24)]
    statistics = observe(modern, placement.observed, samples, BACKEND, jetson)
    return quantized(modern, placement, statistics.ranges("minmax", symmetric=True), jetson.quantization)


def _types(graph: ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    return {value.name: value.type.tensor_type.elem_type for value in values}


def _answer(graph: ModelProto, feeds: dict[str, Array], profile: DeviceProfile) -> dict[str, Array]:
    engine = BACKEND.load_graph(graph.SerializeToString(), profile)
    try:
        return dict(engine.infer(feeds))
    finally:
        engine.close()


def _quantised_relu_chain(*between: NodeProto) -> ModelProto:
    """Two quantised MatMuls by hand, and whatever is `between` the tensors `a` and `b`."""
    weights: dict[str, Any] = {
        "s": np.float32(0.05), "z": np.int8(0), "w": np.full((4, 4), 9, np.int8), "k": np.float32(2.0),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "s", "z"], ["wd"]),
        node("MatMul", ["xd", "wd"], ["a"]),
        *between,
        node("QuantizeLinear", ["b", "s", "z"], ["bq"]),
        node("DequantizeLinear", ["bq", "s", "z"], ["bd"]),
        node("MatMul", ["bd", "wd"], ["y"]),
    ]
    weights = {name: np.asarray(value) for name, value in weights.items()}
    return model(nodes, {"x": ["N", 4]}, {"y": ["N", 4]}, weights)


def test_everything_but_the_quantised_is_fp16(int8_encoder: ModelProto, cpu: DeviceProfile) -> None:
    """Attention, normalisation and what adds up run in FP16; Q/DQ keep FP32 scales; the answers stay."""
    graph = mixed(int8_encoder)
    types = _types(graph)
    makers = {name: each for each in graph.graph.node for name in each.output}
    softmaxes = [each for each in graph.graph.node if each.op_type in {"Softmax", "LayerNormalization"}]
    dynamic = [
        n for n in graph.graph.node if n.op_type == "MatMul" and makers[n.input[1]].op_type != "DequantizeLinear"
    ]
    scales = [each.input[1] for each in graph.graph.node if each.op_type.endswith("quantizeLinear")]
    tokens = {"tokens": sentences(8, 24, seed=3)}

    assert len(softmaxes) == 7
    assert {TensorProto.FLOAT16} == {types[each.output[0]] for each in softmaxes}
    assert len(dynamic) == 4
    assert {TensorProto.FLOAT16} == {types[each.output[0]] for each in dynamic}
    assert {TensorProto.FLOAT} == {t.data_type for t in graph.graph.initializer if t.name in scales}
    assert summarize(int8_encoder, "").outputs == summarize(graph, "").outputs
    assert signal_to_noise_db([_answer(int8_encoder, tokens, cpu)], [_answer(graph, tokens, cpu)]) > 25


def test_tensors_are_cast_once(int8_encoder: ModelProto) -> None:
    """One cast for each tensor that crosses, none there and back, and no GELU is cast between two INT8 layers."""
    graph = mixed(int8_encoder).graph
    casts = [each for each in graph.node if each.op_type == "Cast"]
    cast = {name for each in casts for name in each.output}

    assert max(Counter(each.input[0] for each in casts).values()) == 1
    assert not [each for each in casts if each.input[0] in cast]
    assert len(casts) == 17


@pytest.mark.parametrize(
    ("between", "casts"),
    [
        ([node("Relu", ["a"], ["b"])], 0),
        ([node("Sigmoid", ["a"], ["g"]), node("Mul", ["a", "k"], ["h"]), node("Mul", ["g", "h"], ["b"])], 0),
        ([node("Softmax", ["a"], ["b"])], 0),
        ([node("Transpose", ["a"], ["t"]), node("MatMul", ["a", "t"], ["m"]), node("MatMul", ["m", "a"], ["b"])], 2),
    ],
    ids=["an activation", "a gate", "a softmax alone", "matrices"],
)
def test_a_region_is_worth_its_casts(between: list[NodeProto], casts: int, cpu: DeviceProfile) -> None:
    """Cheap operations between INT8 layers stay where they are; products of matrices are worth two casts."""
    plain = _quantised_relu_chain(*between)
    graph = mixed(plain)
    feeds = {"x": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}

    assert casts == sum(each.op_type == "Cast" for each in graph.graph.node)
    assert (graph is plain) == (casts == 0)
    np.testing.assert_allclose(_answer(plain, feeds, cpu)["y"], _answer(graph, feeds, cpu)["y"], rtol=0.05, atol=0.1)


def test_quantised_products_can_be_fp16(int8_encoder: ModelProto) -> None:
    """For a device without FP32 products, there is none left: neither quantised nor not."""
    graph = mixed(int8_encoder, matrices=True)
    types = _types(graph)

    assert {TensorProto.FLOAT16} == {
        types[each.output[0]] for each in graph.graph.node if each.op_type in {"MatMul", "Gemm"}
    }


def test_fp32_inputs_of_the_specification_stay(cpu: DeviceProfile) -> None:
    """A Resize has FP32 scales whatever it resizes; a subgraph is left alone."""
    plain = _quantised_relu_chain(
        node("Unsqueeze", ["a", "axes"], ["u"]),
        node("Resize", ["u", "", "scales"], ["r"], mode="nearest"),
        node("ReduceMean", ["r"], ["m"], axes=[0], keepdims=0),
        node("MatMul", ["m", "square"], ["b"]),
    )
    constants: dict[str, Array] = {
        "axes": np.array([0], np.int64),
        "scales": np.array([1, 1, 1], np.float32),
        "square": np.eye(4, dtype=np.float32),
    }
    plain.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    graph = mixed(plain)
    kept = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    feeds = {"x": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}

    assert TensorProto.FLOAT == kept["scales"]
    assert TensorProto.FLOAT16 == kept["square/float16"]
    np.testing.assert_allclose(_answer(plain, feeds, cpu)["y"], _answer(graph, feeds, cpu)["y"], rtol=0.05, atol=0.1)


def _cast_there_and_back() -> ModelProto:
    nodes = [node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16), node("Cast", ["half"], ["y"], to=TensorProto.FLOAT)]
    return rounded(model(nodes, {"x": ["N"]}, {"y": ["N"]}))


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_rounding_is_fp16s(values: list[float]) -> None:
    """To the nearest FP16 number, ties to even, infinity from 65520 on; tiny ones keep more digits."""
    array = np.array(values, np.float32)
    engine = BACKEND.load_graph(_cast_there_and_back().SerializeToString(), load_profile("cpu-x86"))
    with np.errstate(over="ignore"):
        expected = array.astype(np.float16).astype(np.float32)
    found = engine.infer({"x": array})["y"]
    tiny = np.abs(array) < 2.0**-14

    np.testing.assert_array_equal(expected[~tiny], found[~tiny])
    np.testing.assert_allclose(array[tiny], found[tiny], rtol=2.0**-11, atol=1e-37)


def test_overflow_inside_is_seen(cpu: DeviceProfile) -> None:
    """A value beyond 65504 between two FP16 nodes, in an answer that is small again: onnxruntime alone hides it."""
    nodes = [node("Mul", ["x", "k"], ["m"]), node("Relu", ["m"], ["r"]), node("Mul", ["r", "s"], ["y"])]
    weights = {"k": np.array(1000, np.float32), "s": np.array(1e-3, np.float32)}
    narrow = narrowed(model(nodes, {"x": ["N"]}, {"y": ["N"]}, weights))
    found = _answer(rounded(narrow), {"x": np.array([1, 60, 70], np.float32)}, cpu)["y"]

    np.testing.assert_allclose([1, 60], found[:2], rtol=2e-3)
    assert np.isinf(found[2])


def test_fp16_is_judged_close_to_fp32(cpu: DeviceProfile) -> None:
    """Rounding everywhere costs a convolutional network three digits, no more, and the interface stays."""
    net = conv_net()
    graph = rounded(narrowed(net))
    onnx.checker.check_model(graph, full_check=True)
    wanted, found = (_answer(each, {"image": pictures(8)}, cpu) for each in (net, graph))

    assert summarize(net, "").inputs == summarize(graph, "").inputs
    assert 50 < signal_to_noise_db([wanted], [found]) < 80
