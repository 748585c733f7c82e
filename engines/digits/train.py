"""Make the bundled example: a small convolutional network that reads handwritten digits.

Promise: from nothing but scikit-learn's copy of the digits data this writes the model, the
calibration images, the held-out images and the labels that `engine.toml` names. The held-out
images are never trained on, nor used to choose anything during a run. The same versions of
PyTorch and scikit-learn on the same kind of processor write the same bytes every time.

    pip install torch scikit-learn onnx onnxruntime pillow
    python engines/digits/train.py                  # half a minute on one core
    python engines/digits/train.py --out /tmp/d     # elsewhere, to compare

It writes, under `--out` (this folder unless told otherwise):

    digits.onnx                  image float32 [batch,1,8,8] in 0..1 -> probabilities [batch,10]
    labels.txt                   one label a line, in the order of the probabilities
    calibration/NNNN.png         128 balanced images from the training part
    heldout/<label>/NNNN.png     360 stratified images, for validation only

NNNN is the image's index in `sklearn.datasets.load_digits()`. Folders `calibration` and `heldout`
are emptied first, so that no image of an earlier split stays behind.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

SEED = 8
HELDOUT = 360
CALIBRATION = 128
EPOCHS = 60
BATCH = 64
EPSILON = 1e-5  # what BatchNorm adds to a variance

# Output channels and stride of each 3x3 convolution. Three of the four work at the full 8x8: that
# is where a network this small has enough arithmetic for INT8 to pay for its own bookkeeping.
# Shrinking earlier makes a model which is faster in FP32, and hardly any faster again in INT8.
CONVOLUTIONS = ((48, 1), (48, 1), (48, 1), (48, 2))

# Opset 17 and IR 8 are what the oldest runtimes in the field still read (TensorRT 8.5,
# onnxruntime 1.12); nothing newer is needed here.
OPSET = 17
IR_VERSION = 8


@dataclass(frozen=True)
class Digits:
    """The data and its split; the three index arrays point into `images` and `labels`.

    `images` is uint8 [1797,8,8], exactly what the PNG files hold; `calibration` is part of
    `training`, and `heldout` shares nothing with either.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    training: NDArray[np.int64]
    calibration: NDArray[np.int64]
    heldout: NDArray[np.int64]


def main() -> None:
    """Train, export, check the export against PyTorch, and say how good it is."""
    parser = argparse.ArgumentParser(description="Train the digits example and write its files.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out

    # One thread: with more, sums are added in an order that depends on the number of cores.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)

    digits = split_digits()
    network = train_network(digits)
    model = model_from_network(network)

    out.mkdir(parents=True, exist_ok=True)
    write_images(digits, out)
    out.joinpath("labels.txt").write_text("".join(f"{label}\n" for label in range(10)))
    out.joinpath("digits.onnx").write_bytes(model)

    print(check_model(model, network, digits))


def split_digits() -> Digits:
    """Load the data as 8-bit images and cut it into training, calibration and held-out parts."""
    pixels, labels = load_digits(return_X_y=True)
    # The source counts dark dots, 0 to 16 in every cell.
    images = np.rint(pixels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    training, heldout = train_test_split(np.arange(len(labels)), test_size=HELDOUT, stratify=labels, random_state=SEED)
    _, calibration = train_test_split(training, test_size=CALIBRATION, stratify=labels[training], random_state=SEED)
    return Digits(images, labels, np.sort(training), np.sort(calibration), np.sort(heldout))


def new_network() -> nn.Sequential:
    """The untrained network; it answers with logits, the Softmax is added on export."""
    layers: list[nn.Module] = []
    channels = 1
    for width, stride in CONVOLUTIONS:
        layers += [
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width, eps=EPSILON),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def train_network(digits: Digits) -> nn.Sequential:
    """Train for a fixed number of epochs and return the last state: nothing is picked by score."""
    images = tensor_from_images(digits.images[digits.training])
    labels = torch.from_numpy(digits.labels[digits.training])
    network = new_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02)
    batches = len(images) // BATCH  # the short last batch is left out; shuffling shares the loss
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=EPOCHS * batches)

    network.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(images))
        for chosen in order[: batches * BATCH].split(BATCH):
            logits = network(vary(images[chosen]))
            # A little smoothing keeps the logits small, and small logits quantise well.
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def vary(images: torch.Tensor) -> torch.Tensor:
    """Turn, shift and scale every image a little, as another hand would have written it."""
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * 0.2  # radians, about 11 degrees either way
    zoom = 1 + (torch.rand(count) * 2 - 1) * 0.1
    shift = (torch.rand(count, 2) * 2 - 1) * 0.2  # 1 is half the image: 0.8 of a pixel
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def model_from_network(network: nn.Sequential) -> bytes:
    """The network as a serialised ONNX model, each BatchNorm folded into its convolution.

    Written node by node instead of with PyTorch's exporter: the names stay short, and the bytes do
    not change with the exporter's version.
    """
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    value = "image"
    for index, (_, stride) in enumerate(CONVOLUTIONS):
        name = f"conv{index + 1}"
        weight, bias = folded(state, 3 * index)
        weights += [
            numpy_helper.from_array(weight, f"{name}.weight"),
            numpy_helper.from_array(bias, f"{name}.bias"),
        ]
        nodes += [
            helper.make_node(
                "Conv",
                [value, f"{name}.weight", f"{name}.bias"],
                [name],
                name=name,
                kernel_shape=[3, 3],
                strides=[stride, stride],
                pads=[1, 1, 1, 1],
            ),
            helper.make_node("Relu", [name], [f"relu{index + 1}"], name=f"relu{index + 1}"),
        ]
        value = f"relu{index + 1}"

    head = len(network) - 1
    weights += [
        numpy_helper.from_array(state[f"{head}.weight"], "head.weight"),
        numpy_helper.from_array(state[f"{head}.bias"], "head.bias"),
    ]
    nodes += [
        helper.make_node("GlobalAveragePool", [value], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["features"], name="flatten", axis=1),
        helper.make_node("Gemm", ["features", "head.weight", "head.bias"], ["logits"], name="head", transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], name="softmax", axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="edge-sdk digits example",
    )
    onnx.checker.check_model(model, full_check=True)
    serialised: bytes = model.SerializeToString(deterministic=True)
    return serialised


def folded(state: dict[str, NDArray[np.float32]], layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight and bias of the one convolution that does the work of number `layer` and the BatchNorm after it."""
    norm = f"{layer + 1}"
    factor = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + np.float32(EPSILON))
    weight = state[f"{layer}.weight"] * factor[:, None, None, None]
    bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * factor
    return weight, bias


def write_images(digits: Digits, out: Path) -> None:
    """Write the calibration and the held-out images as grayscale PNG, in place of older ones."""
    for part in ("calibration", "heldout"):
        shutil.rmtree(out / part, ignore_errors=True)
    paths = [(index, out / "calibration") for index in digits.calibration]
    paths += [(index, out / "heldout" / str(digits.labels[index])) for index in digits.heldout]
    for index, folder in paths:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[index]).save(folder / f"{index:04d}.png")


def check_model(model: bytes, network: nn.Sequential, digits: Digits) -> str:
    """One line on size and accuracy; raises AssertionError if the export differs from PyTorch."""
    images = tensor_from_images(digits.images[digits.heldout])
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (actual,) = session.run(["probabilities"], {"image": images.numpy()})
    with torch.no_grad():
        expected = functional.softmax(network(images), dim=1).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-5)

    right = int((actual.argmax(axis=1) == digits.labels[digits.heldout]).sum())
    return (
        f"digits.onnx: {len(model):,} bytes, held-out top-1 {right}/{len(images)} = {100 * right / len(images):.2f} %"
    )


def tensor_from_images(images: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 [n,8,8] -> float32 [n,1,8,8] in 0..1, as `[preprocess]` in engine.toml does."""
    return torch.from_numpy(images.astype(np.float32) / 255)[:, None]


if __name__ == "__main__":
    main()
