"""Small models for the tests, made with onnx.helper: real graphs, real weights, no files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_sdk.tensors import Array


def model(
    nodes: Sequence[NodeProto],
    inputs: dict[str, Sequence[int | str]],
    outputs: dict[str, Sequence[int | str]],
    weights: dict[str, Array] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
    dtype: int = TensorProto.FLOAT,
) -> ModelProto:
    def values(named: dict[str, Sequence[int | str]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, dtype, list(shape)) for name, shape in named.items()]

    initializers = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "test", values(inputs), values(outputs), initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = ir_version
    return made


def conv_net(*, batch: int | str = "N", seed: int = 0) -> ModelProto:
    """Conv, Relu, MaxPool, a branch joined by Concat, Add, pooling and Gemm: ten classes of a 3 x 16 x 16 picture."""
    draw = np.random.default_rng(seed)

    def weight(*shape: int) -> Array:
        return np.asarray(draw.normal(size=shape) / np.sqrt(np.prod(shape[1:])), np.float32)

    node = helper.make_node
    pads: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        node("Conv", ["image", "w1", "b1"], ["c1"], "conv1", **pads),
        node("Relu", ["c1"], ["r1"], "relu1"),
        node("MaxPool", ["r1"], ["p1"], "pool1", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p1", "w2", "b2"], ["c2"], "conv2", **pads),
        node("Relu", ["c2"], ["r2"], "relu2"),
        node("Conv", ["p1", "w3"], ["c3"], "conv3", kernel_shape=[1, 1]),
        node("Concat", ["r2", "c3"], ["j"], "join", axis=1),
        node("Conv", ["j", "w4", "b4"], ["c4"], "conv4", kernel_shape=[1, 1]),
        node("Add", ["c4", "p1"], ["a"], "add"),
        node("Relu", ["a"], ["r4"], "relu4"),
        node("Conv", ["r4", "w5", "b5"], ["c5"], "conv5", **pads),
        node("Clip", ["c5", "zero", "six"], ["r5"], "clip5"),
        node("GlobalAveragePool", ["r5"], ["g"], "average"),
        node("Flatten", ["g"], ["f"], "flatten"),
        node("Gemm", ["f", "w6", "b6"], ["scores"], "gemm", transB=1),
    ]
    weights = {
        "w1": weight(16, 3, 3, 3), "b1": weight(16, 1)[:, 0] * 0.1,
        "w2": weight(16, 16, 3, 3), "b2": weight(16, 1)[:, 0] * 0.1,
        "w3": weight(8, 16, 1, 1),
        "w4": weight(16, 24, 1, 1), "b4": weight(16, 1)[:, 0] * 0.1,
        "w5": weight(32, 16, 3, 3), "b5": weight(32, 1)[:, 0] * 0.1,
        "w6": weight(10, 32) * 8, "b6": weight(10, 1)[:, 0],
        "zero": np.array(0, np.float32), "six": np.array(6, np.float32),
    }  # fmt: skip
    return model(nodes, {"image": [batch, 3, 16, 16]}, {"scores": [batch, 10]}, weights)


def pictures(count: int, seed: int = 1) -> Array:
    """Smooth pictures that differ from one another, like photos more than like noise; [count, 3, 16, 16]."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:16, 0:16] / 16.0
    waves = draw.normal(size=(count, 3, 4))
    made = [[a * np.sin(6 * x + 3 * b) + c * np.cos(6 * y + 3 * d) for a, b, c, d in channels] for channels in waves]
    return np.asarray(made, np.float32)
