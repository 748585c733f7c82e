"""Two networks as large and as shaped as real ones, made by a script with seeded weights: nothing is downloaded.

`resnet50` has the layers of ResNet-50 and its 25.5 million parameters. `encoder` is a transformer over token ids whose
batch and length are both free. Their weights are random, but scaled so that activations neither grow nor die out and
every input gets an answer of its own: what quantisation loses can be measured on them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_sdk.tensors import Array

VOCABULARY = 1000
LENGTH = 128
"""The longest sequence that `encoder` has positions for."""


def resnet50(*, seed: int = 0, classes: int = 1000) -> ModelProto:
    """ResNet-50 v1.5, batch normalisation folded into the convolutions: `image` [N, 3, 224, 224] -> `scores`."""
    net = _Net(seed)
    x = net.relu(net.conv("image", 3, 64, 7, 2))
    x = net.add("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    width_in = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            short = x if block else net.conv(x, width_in, 4 * width, 1, stride)
            x = net.relu(net.conv(x, width_in, width, 1))
            x = net.relu(net.conv(x, width, width, 3, stride))
            # Small branches: sixteen sums of equals would grow 65536-fold, and multiply every rounding error with them.
            x = net.relu(net.add("Add", [net.conv(x, width, 4 * width, 1, gain=0.1), short]))
            width_in = 4 * width
    x = net.add("Flatten", [net.add("GlobalAveragePool", [x])])
    net.add(
        "Gemm",
        [x, net.blind_weight((classes, width_in), gain=16.0), net.weight((classes,), 100)],
        output="scores",
        transB=1,
    )
    return net.model({"image": ["N", 3, 224, 224]}, {"scores": ["N", classes]})


def encoder(*, seed: int = 0, layers: int = 2, width: int = 128, heads: int = 4, classes: int = 16) -> ModelProto:
    """A transformer encoder: `tokens` int64 [N, L] -> `scores` [N, classes], from the mean over the sequence."""
    net = _Net(seed)
    shape = net.add("Shape", ["tokens"])
    length = net.add("Gather", [shape, net.constant(np.array(1, np.int64))], axis=0)
    positions = net.add("Range", [net.constant(np.array(0, np.int64)), length, net.constant(np.array(1, np.int64))])
    words = net.add("Gather", [net.weight((VOCABULARY, width), 1), "tokens"], axis=0)
    places = net.add("Gather", [net.weight((LENGTH, width), 4), positions], axis=0)
    x = net.norm(net.add("Add", [words, places]), width)
    for _ in range(layers):
        attended = net.attention(x, width, heads)
        x = net.norm(net.add("Add", [x, attended]), width)
        inner = net.gelu(net.linear(x, width, 4 * width, gain=1.5))
        x = net.norm(net.add("Add", [x, net.linear(inner, 4 * width, width)]), width)
    pooled = net.add("ReduceMean", [x], axes=[1], keepdims=0)
    weight = net.weight((width, classes), width, gain=4.0)
    net.add("Gemm", [pooled, weight, net.weight((classes,), 100)], output="scores")
    return net.model({"tokens": ["N", "L"]}, {"scores": ["N", classes]}, TensorProto.INT64)


def photos(count: int, size: int, seed: int = 1) -> Array:
    """Pictures with structure at every scale, as photos have it: float32 [count, 3, size, size], mean 0, variance 1."""
    draw = np.random.default_rng(seed)
    made = np.zeros((count, 3, size, size), np.float32)
    for scale in (2, 4, 14, 56):
        coarse = draw.standard_normal((count, 3, scale, scale), np.float32)
        made += coarse.repeat(size // scale, axis=2).repeat(size // scale, axis=3) * np.float32(4 / scale)
    return np.asarray((made - made.mean()) / made.std(), np.float32)


def sentences(count: int, length: int, seed: int = 1) -> Array:
    """Token ids, int64 [count, length]: some tokens are common and most are rare, as in language."""
    draw = np.random.default_rng(seed)
    return np.minimum(draw.zipf(1.3, (count, length)), VOCABULARY - 1).astype(np.int64)


class _Net:
    """A graph that is written down layer by layer; every layer gives back the name of its output."""

    def __init__(self, seed: int) -> None:
        self._draw = np.random.default_rng(seed)
        self._nodes: list[NodeProto] = []
        self._weights: list[TensorProto] = []

    def add(self, operator: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        name = output or f"{operator.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def constant(self, array: Array) -> str:
        name = f"constant{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, shape: tuple[int, ...], fan_in: int, gain: float = 1.0) -> str:
        """Normal, so that a sum over `fan_in` values of variance 1 has the variance `gain`."""
        return self.constant(self._draw.standard_normal(shape, np.float32) * np.float32((gain / fan_in) ** 0.5))

    def blind_weight(self, shape: tuple[int, ...], gain: float) -> str:
        """The same for each of shape[0] outputs, but adding up to 0: an output does not see what all inputs share.

        Behind a Relu that is a mean above 0, and layer by layer it would drown what tells one picture from another.
        """
        values = self._draw.standard_normal(shape, np.float32).reshape(shape[0], -1)
        values -= values.mean(axis=1, keepdims=True)
        return self.constant((values * np.float32((gain / values.shape[1]) ** 0.5)).reshape(shape))

    def conv(self, x: str, inputs: int, outputs: int, size: int, stride: int = 1, gain: float = 2.0) -> str:
        """A gain of 2 makes up for the half that a Relu takes away."""
        weight = self.blind_weight((outputs, inputs, size, size), gain)
        bias = self.weight((outputs,), 100)
        pad = size // 2
        window: dict[str, Any] = {"kernel_shape": [size, size], "strides": [stride, stride]}
        return self.add("Conv", [x, weight, bias], pads=[pad, pad, pad, pad], **window)

    def relu(self, x: str) -> str:
        return self.add("Relu", [x])

    def linear(self, x: str, inputs: int, outputs: int, gain: float = 1.0) -> str:
        product = self.add("MatMul", [x, self.weight((inputs, outputs), inputs, gain)])
        return self.add("Add", [product, self.weight((outputs,), 100)])

    def norm(self, x: str, width: int) -> str:
        scale = self.constant(np.float32(1) + self._draw.standard_normal(width, np.float32) * np.float32(0.1))
        return self.add("LayerNormalization", [x, scale, self.weight((width,), 100)], axis=-1, epsilon=1e-5)

    def attention(self, x: str, width: int, heads: int) -> str:
        split = self.constant(np.array([0, 0, heads, width // heads], np.int64))
        query, key, value = (
            self.add("Transpose", [self.add("Reshape", [self.linear(x, width, width, 2.0), split])], perm=axes)
            for axes in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        )
        scaled = self.add(
            "Div", [self.add("MatMul", [query, key]), self.constant(np.array((width / heads) ** 0.5, np.float32))]
        )
        mixed = self.add("MatMul", [self.add("Softmax", [scaled], axis=-1), value])
        joined = self.add("Transpose", [mixed], perm=[0, 2, 1, 3])
        together = self.add("Reshape", [joined, self.constant(np.array([0, 0, width], np.int64))])
        return self.linear(together, width, width)

    def gelu(self, x: str) -> str:
        """As exporters write it: x * (1 + erf(x / sqrt(2))) / 2."""
        half, one, root = (self.constant(np.array(value, np.float32)) for value in (0.5, 1.0, 2**0.5))
        grown = self.add("Add", [self.add("Erf", [self.add("Div", [x, root])]), one])
        return self.add("Mul", [self.add("Mul", [x, grown]), half])

    def model(
        self,
        inputs: dict[str, list[int | str]],
        outputs: dict[str, list[int | str]],
        input_type: int = TensorProto.FLOAT,
    ) -> ModelProto:
        ins = [helper.make_tensor_value_info(name, input_type, shape) for name, shape in inputs.items()]
        outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
        graph = helper.make_graph(self._nodes, "net", ins, outs, self._weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        made.ir_version = 8
        return made
