"""Small packages for the tests: real ONNX graphs made with onnx.helper, sealed like any other package.

    package = make_package(tmp_path / "double", doubling(), max_batch=8)
    with edge_sdk.load_engine(package) as engine: ...

A graph says what it computes in its docstring, so a test can tell what to expect.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="graphs cannot be made without the extra `build`")

from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_sdk.backends.reference import ORDERS
from edge_sdk.package import (
    GRAPH,
    LABELS,
    BackendRecord,
    BatchingRecord,
    EnginePackage,
    Manifest,
    SourceRecord,
    seal,
    writing,
)
from edge_sdk.profiles import DeviceProfile, load_profile
from edge_sdk.spec import Postprocess, Preprocess, TaskName
from edge_sdk.tensors import DTYPE_FROM_OIP, Array, TensorSpec

Shape = Sequence[int | str | None]

ARCHITECTURE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
PROFILE = "cpu-arm64" if ARCHITECTURE == "aarch64" else "cpu-x86"
"""A profile whose packages load on the machine that runs the tests."""

BACKEND = "onnxruntime" if importlib.util.find_spec("onnxruntime") is not None else "reference"
"""What runs a package unless a test says otherwise."""


def profile() -> DeviceProfile:
    return load_profile(PROFILE)


# Graphs


def graph(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, tuple[int, Shape]],
    outputs: Mapping[str, tuple[int, Shape]],
    constants: Mapping[str, Array] | None = None,
) -> ModelProto:
    """A model; inputs and outputs are name -> (element type, shape)."""

    def values(named: Mapping[str, tuple[int, Shape]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, kind, list(shape)) for name, (kind, shape) in named.items()]

    weights = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    made = helper.make_graph(list(nodes), "test", values(inputs), values(outputs), weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def scaling(factor: float = 2.0, *, width: int = 4, batch: int | str | None = "batch") -> ModelProto:
    """y = factor * x, float32, `width` numbers a row."""
    nodes = [helper.make_node("Mul", ["x", "factor"], ["y"])]
    shape = (batch, width)
    constants = {"factor": np.array(factor, np.float32)}
    return graph(nodes, {"x": (TensorProto.FLOAT, shape)}, {"y": (TensorProto.FLOAT, shape)}, constants)


def misbehaving(orders: Sequence[Mapping[str, object]], *, width: int = 4) -> ModelProto:
    """y = 2 * x, unless the reference engine is ordered otherwise."""
    return order(scaling(width=width), orders)


def order(model: ModelProto, orders: Sequence[Mapping[str, object]]) -> ModelProto:
    """`model` itself, with orders for the reference engine."""
    model.metadata_props.add(key=ORDERS, value=json.dumps(list(orders)))
    return model


def two_inputs() -> ModelProto:
    """sum = a + b and difference = a - b; a and b share their batch."""
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])]
    row = (TensorProto.FLOAT, ("batch", 3))
    return graph(nodes, {"a": row, "b": row}, {"sum": row, "difference": row})


def stateful() -> ModelProto:
    """total = sample + state, given back as new_state too; the state's batch is its second axis."""
    nodes = [
        helper.make_node("Unsqueeze", ["sample", "axis"], ["lifted"]),
        helper.make_node("Add", ["lifted", "state"], ["new_state"]),
        helper.make_node("Squeeze", ["new_state", "axis"], ["total"]),
    ]
    sample, state = (TensorProto.FLOAT, ("batch", 2)), (TensorProto.FLOAT, (1, "batch", 2))
    inputs, outputs = {"sample": sample, "state": state}, {"total": sample, "new_state": state}
    return graph(nodes, inputs, outputs, {"axis": np.array([0], np.int64)})


def identity(kind: int = TensorProto.FLOAT, shape: Shape = ("batch", 3)) -> ModelProto:
    """y = x."""
    return graph([helper.make_node("Identity", ["x"], ["y"])], {"x": (kind, shape)}, {"y": (kind, shape)})


def total(shape: Shape = ("length",)) -> ModelProto:
    """y = the sum of x, without axes; x may have any length."""
    nodes = [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)]
    return graph(nodes, {"x": (TensorProto.FLOAT, shape)}, {"y": (TensorProto.FLOAT, ())})


def texts() -> ModelProto:
    """Tokens of any length, [batch, length] int64 below 50, to what each means, [batch, length, 3], and their mean."""
    meanings = np.random.default_rng(5).normal(size=(50, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["meanings", "tokens"], ["each"]),
        helper.make_node("ReduceMean", ["each"], ["mean"], axes=[1], keepdims=0),
    ]
    tokens = (TensorProto.INT64, ("batch", "length"))
    outputs = {"each": (TensorProto.FLOAT, ("batch", "length", 3)), "mean": (TensorProto.FLOAT, ("batch", 3))}
    return graph(nodes, {"tokens": tokens}, outputs, {"meanings": meanings})


def centring() -> ModelProto:
    """y = x less the mean of its batch, of any width: a model that looks at the rows beside a row."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    shape = ("batch", "width")
    return graph(nodes, {"x": (TensorProto.FLOAT, shape)}, {"y": (TensorProto.FLOAT, shape)})


def counting(width: int = 4) -> ModelProto:
    """y = the sum of each row, under an axis of its own name: a model that cannot tell that it takes batches."""
    nodes = [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)]
    constants = {"axes": np.array([1], np.int64)}
    x, y = (TensorProto.FLOAT, ("rows", width)), (TensorProto.FLOAT, ("sums",))
    return graph(nodes, {"x": x}, {"y": y}, constants)


def filling() -> ModelProto:
    """y = zeros, as many as the int64 x says: memory on demand."""
    nodes = [helper.make_node("ConstantOfShape", ["x"], ["y"])]
    return graph(nodes, {"x": (TensorProto.INT64, (1,))}, {"y": (TensorProto.FLOAT, ("size",))})


def brightness(side: int = 8) -> ModelProto:
    """Scores of a picture [batch, 3, side, side]: the mean of its red, its green and its blue."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["scores"]),
    ]
    image = (TensorProto.FLOAT, ("batch", 3, side, side))
    return graph(nodes, {"image": image}, {"scores": (TensorProto.FLOAT, ("batch", 3))})


# Packages


def make_package(
    folder: Path,
    model: ModelProto | bytes,
    *,
    name: str | None = None,
    version: str = "1",
    backend: str = BACKEND,
    task: TaskName = "tensors",
    max_batch: int = 8,
    best_batch: int | None = None,
    max_wait_ms: float = 0.0,
    preprocess: Preprocess | None = None,
    postprocess: Postprocess | None = None,
    labels: Sequence[str] = (),
    **manifest: Any,
) -> EnginePackage:
    """A sealed package in `folder`, in the place of what was there. `model` may be bytes that are no graph at all."""
    data = model if isinstance(model, bytes) else model.SerializeToString()
    digest = hashlib.sha256(data).hexdigest()
    fields: dict[str, Any] = {
        "name": name or folder.name,
        "version": version,
        "task": task,
        "preprocess": preprocess,
        "postprocess": postprocess or Postprocess(),
        "inputs": () if isinstance(model, bytes) else specs(model.graph.input),
        "outputs": () if isinstance(model, bytes) else specs(model.graph.output),
        "profile": PROFILE,
        "architecture": ARCHITECTURE,
        "precision": "fp32",
        "batching": BatchingRecord(max_batch=max_batch, best_batch=best_batch or max_batch, max_wait_ms=max_wait_ms),
        "backend": BackendRecord(name=backend),
        "source": SourceRecord(file="test.onnx", sha256=digest, bytes=len(data), opset=17, ir_version=8),
        "tools": {},
        "build_key": digest,
        "created": "2026-01-01T00:00:00Z",
        **manifest,
    }
    with writing(folder) as staged:
        (staged / GRAPH).write_bytes(data)
        if labels:
            (staged / LABELS).write_text("\n".join(labels) + "\n", encoding="utf-8")
        seal(staged, Manifest(**fields))
    return EnginePackage.open(folder)


def specs(values: Sequence[Any]) -> tuple[TensorSpec, ...]:
    """The inputs or outputs of a graph as a manifest records them."""
    return tuple(
        TensorSpec(
            value.name, _dtype(value.type.tensor_type.elem_type), tuple(map(_axis, value.type.tensor_type.shape.dim))
        )
        for value in values
    )


def _axis(axis: Any) -> int | str:
    return int(axis.dim_value) if axis.HasField("dim_value") else str(axis.dim_param) or "?"


def _dtype(kind: int) -> str:
    name: str = TensorProto.DataType.Name(kind)
    dtype = {"STRING": "string", "FLOAT": "float32", "DOUBLE": "float64"}.get(name, name.lower())

    assert dtype in DTYPE_FROM_OIP.values(), dtype
    return dtype
