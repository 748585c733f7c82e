"""Q/DQ graphs: placed where it pays, in the profile's scheme, close to FP32, and computed in integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edge_sdk.backends.onnxruntime import OnnxRuntimeBackend
from edge_sdk.compile.calibrate import Range, observe
from edge_sdk.compile.datasets import Sample
from edge_sdk.compile.inspect import summarize
from edge_sdk.compile.modernize import modern_graph
from edge_sdk.compile.quantize import activation_levels, place, quantized
from edge_sdk.errors import ModelError
from edge_sdk.profiles import DeviceProfile, Quantization
from tests.compile.graphs import conv_net, model, pictures

BACKEND = OnnxRuntimeBackend()
SAMPLES = [Sample(str(i), {"image": image[np.newaxis]}) for i, image in enumerate(pictures(32))]
U8 = Quantization(activations="u8", symmetric=False, quantize_bias=True)
S8 = Quantization(activations="s8", symmetric=True, quantize_bias=False)
ARM = Quantization(activations="s8", symmetric=False, quantize_bias=True)
AVX2 = Quantization(activations="u8", symmetric=False, quantize_bias=True, reduce_range=True)
PER_TENSOR = Quantization(activations="u8", symmetric=False, quantize_bias=True, per_channel=False)


def _net() -> ModelProto:
    net = conv_net()
    return modern_graph(net, summarize(net, "net.onnx")).model


def _quantized(net: ModelProto, scheme: Quantization, profile: DeviceProfile) -> ModelProto:
    placement = place(net, scheme)
    statistics = observe(net, placement.observed, SAMPLES, BACKEND, profile)
    return quantized(net, placement, statistics.ranges("minmax", symmetric=scheme.symmetric), scheme)


def _snr_db(net: ModelProto, other: ModelProto, profile: DeviceProfile) -> float:
    images = pictures(64, seed=9)
    wanted, found = (
        BACKEND.load_graph(graph.SerializeToString(), profile).infer({"image": images})["scores"]
        for graph in (net, other)
    )
    return float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum()))


def _weights(graph: ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in graph.graph.initializer}


@pytest.mark.parametrize("scheme", [U8, S8, ARM, AVX2, PER_TENSOR], ids=["u8", "s8", "arm", "avx2", "per-tensor"])
def test_answers_stay_close(scheme: Quantization, cpu: DeviceProfile) -> None:
    """In every scheme the outputs keep their names, dtypes and, nearly, their values."""
    net = _net()
    graph = _quantized(net, scheme, cpu)
    onnx.checker.check_model(graph, full_check=True)

    assert summarize(net, "").inputs == summarize(graph, "").inputs
    assert summarize(net, "").outputs == summarize(graph, "").outputs
    assert _snr_db(net, graph, cpu) > 22


def test_convolutions_are_computed_in_integers(cpu: DeviceProfile, tmp_path: Path) -> None:
    """onnxruntime turns every weighted operator into an integer kernel, and drops the Relu and the Clip."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    graph = _quantized(_net(), U8, cpu)
    onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]

    assert 5 == operators.count("QLinearConv")
    assert 1 == operators.count("QGemm")
    assert not {"Conv", "Gemm", "Relu", "Clip", "FusedConv"} & set(operators)


def test_tensorrt_scheme(cpu: DeviceProfile) -> None:
    """Symmetric: every zero point is 0. Biases stay FP32. Outputs of convolutions are left alone."""
    graph = _quantized(_net(), S8, cpu)
    weights = _weights(graph)
    zero_points = [tensor for name, tensor in weights.items() if name.endswith("/zero_point")]
    pairs = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]

    assert {TensorProto.INT8} == {tensor.data_type for tensor in zero_points}
    assert all(not numpy_helper.to_array(tensor).any() for tensor in zero_points)
    assert not [tensor for tensor in weights.values() if tensor.data_type == TensorProto.INT32]
    assert "c1" not in {node.input[0] for node in pairs}
    assert "scores" not in {node.input[0] for node in pairs}


def test_followers_that_lead_only_to_float_stay_float() -> None:
    """The pooling before the classifier is between weighted operators; one at the end of a network is not."""
    net = conv_net()
    assert "g" in place(net, U8).followers

    shortened = conv_net()
    nodes = list(shortened.graph.node)[:-1]
    del shortened.graph.node[:], shortened.graph.output[:]
    shortened.graph.node.extend(nodes)
    shortened.graph.output.append(helper.make_tensor_value_info("f", TensorProto.FLOAT, ["N", 32]))

    assert "g" not in place(shortened, U8).followers
    assert "p1" in place(shortened, U8).followers


def test_tensors_that_only_move_share_one_range(cpu: DeviceProfile) -> None:
    """What a MaxPool or a Concat takes in and puts out has the same levels, so 8-bit values are copied.

    Not so the part of a Concat that is behind a Relu, where another part is negative: it would lose its zero point.
    """
    weights = _weights(_quantized(_net(), U8, cpu))

    for one, other in (("r1", "p1"), ("c3", "j")):
        for part in ("scale", "zero_point"):
            assert numpy_helper.to_array(weights[f"{one}/{part}"]) == numpy_helper.to_array(weights[f"{other}/{part}"])
    assert 0 == numpy_helper.to_array(weights["r2/zero_point"])


def test_reduced_range_is_seven_bits(cpu: DeviceProfile) -> None:
    """Without VNNI, two products of u8 and full-range s8 overflow 16 bits."""
    for scheme, highest in ((AVX2, 63), (U8, 127)):
        weights = _weights(_quantized(_net(), scheme, cpu))
        largest = max(
            int(np.abs(numpy_helper.to_array(tensor).astype(int)).max())
            for name, tensor in weights.items()
            if name.endswith("/weight/quantized")
        )

        assert highest == largest


def test_quantised_tensor_that_is_an_output_keeps_its_name(cpu: DeviceProfile) -> None:
    """A tensor the caller reads is there under its name, read by the next operator too."""
    net = _net()
    net.graph.output.append(helper.make_tensor_value_info("p1", TensorProto.FLOAT, ["N", 16, 8, 8]))
    graph = _quantized(net, U8, cpu)
    answer = BACKEND.load_graph(graph.SerializeToString(), cpu).infer({"image": pictures(1)})

    assert {"scores", "p1"} == set(answer)


def test_nothing_to_quantise_is_said() -> None:
    """A graph without weights to multiply has a falsy placement."""
    assert not place(model([helper.make_node("Neg", ["x"], ["y"])], {"x": [1, 4]}, {"y": [1, 4]}), U8)


def test_dynamic_weights_stay_float() -> None:
    """Without constants there is nothing to prepare: attention's MatMuls are left as they are."""
    graph = model([helper.make_node("MatMul", ["a", "b"], ["y"])], {"a": [4, 4], "b": [4, 4]}, {"y": [4, 4]})

    assert not place(graph, U8)


def test_old_opsets_are_refused() -> None:
    """Per-channel Q/DQ came with opset 13."""
    old = conv_net()
    old.opset_import[0].version = 12

    with pytest.raises(ModelError):
        place(old, U8)


def test_dead_channels_keep_their_bias(cpu: DeviceProfile) -> None:
    """A channel whose weights are nearly zero still has a bias, which must fit 32 bits."""
    net = _net()
    for tensor in net.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if tensor.name in {"w5", "b5"}:
            array[0] = 1e-12 if tensor.name == "w5" else 3.0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    assert _snr_db(net, _quantized(net, U8, cpu), cpu) > 22


@given(st.floats(-1e4, 1e4, width=32), st.floats(0, 2e4, width=32), st.sampled_from([U8, S8, ARM]))
def test_zero_is_a_level(low: float, width: float, scheme: Quantization) -> None:
    """Zero is represented exactly and the range is covered to within one step: padding and ReLU rely on it."""
    levels = activation_levels(Range(low, low + width), scheme)
    lowest, highest = (0, 255) if scheme.activations == "u8" else (-128, 127)
    scale, zero_point = float(levels.scale), int(levels.zero_point)

    assert scale > 0
    assert lowest <= zero_point <= highest
    if not scheme.symmetric and width > 1e-30:
        assert (lowest - zero_point) * scale <= min(low, 0.0) + scale
        assert (highest - zero_point) * scale >= max(low + width, 0.0) - scale
