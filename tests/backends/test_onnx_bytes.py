"""What is read of a graph without the `onnx` package is what `onnx` reads."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edge_sdk import resources
from edge_sdk.backends.onnx_bytes import interface
from edge_sdk.errors import EngineFailed
from edge_sdk.tensors import OIP_FROM_DTYPE, dtype_name, numpy_dtype
from tests import packages

GRAPHS = {
    "one input": packages.scaling(),
    "no name for the batch": packages.scaling(batch=None),
    "fixed": packages.scaling(batch=3),
    "two of each": packages.two_inputs(),
    "batch in the middle": packages.stateful(),
    "no axes": packages.total(),
    "int64": packages.filling(),
    "text": packages.identity(TensorProto.STRING),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_inputs_and_outputs_are_those_that_onnx_sees(name: str) -> None:
    model = GRAPHS[name]
    expected = packages.specs(model.graph.input), packages.specs(model.graph.output)

    assert expected == interface(model.SerializeToString())


@pytest.mark.parametrize("dtype", OIP_FROM_DTYPE)
def test_every_dtype(dtype: str) -> None:
    kind = TensorProto.STRING if dtype == "string" else helper.np_dtype_to_tensor_dtype(numpy_dtype(dtype))
    ((spec,), _) = interface(packages.identity(kind).SerializeToString())

    assert dtype == spec.dtype


def test_constants_among_the_inputs_are_left_out() -> None:
    """Up to IR version 3 every weight is listed as an input, too."""
    model = packages.scaling()
    weight = model.graph.initializer[0]
    kind = helper.np_dtype_to_tensor_dtype(numpy_dtype(dtype_name(numpy_helper.to_array(weight))))
    model.graph.input.append(helper.make_tensor_value_info(weight.name, kind, list(weight.dims)))
    inputs, _ = interface(model.SerializeToString())

    assert ["x"] == [spec.name for spec in inputs]


def test_a_real_model() -> None:
    file = resources.EXAMPLES / "digits" / "digits.onnx"
    model = onnx.load(Path(file))

    assert (packages.specs(model.graph.input), packages.specs(model.graph.output)) == interface(file.read_bytes())


def test_what_is_no_tensor_is_refused() -> None:
    """Sequences have no shape that a tensor could have."""
    sequence = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, ["n"])
    model: ModelProto = packages.identity()
    model.graph.input[0].CopyFrom(sequence)
    with pytest.raises(EngineFailed, match="cannot be made out"):
        interface(model.SerializeToString())


@given(st.binary(max_size=200) | st.integers(0, 200).map(lambda cut: packages.two_inputs().SerializeToString()[:cut]))
def test_whatever_the_bytes_are_only_one_error_comes(data: bytes) -> None:
    try:
        inputs, outputs = interface(data)
    except EngineFailed:
        return

    assert all(spec.dtype in OIP_FROM_DTYPE for spec in (*inputs, *outputs))
