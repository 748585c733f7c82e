"""Tensor specs and the checks at the door: what fits goes in, and nothing is allocated on a stranger's word."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import InvalidTensor
from edge_sdk.tensors import (
    DTYPE_FROM_OIP,
    EXACT_DB,
    MAX_ELEMENTS,
    OIP_FROM_DTYPE,
    TensorSpec,
    allocate,
    check_feeds,
    dtype_name,
    element_count,
    is_batchable,
    numpy_dtype,
    signal_to_noise_db,
)

FREE = TensorSpec("x", "float32", ("batch", 3))
OTHER = TensorSpec("y", "int64", ("batch", 2))
NAMELESS = TensorSpec("x", "float32", ("?", "?"))


@pytest.mark.parametrize("dtype", ["complex64", "bfloat16", "FP32", "tensor(float)", "x" * 5000])
def test_a_spec_has_a_dtype_of_ours(dtype: str) -> None:
    """A dtype that no wire carries is refused when the spec is made, with a short sentence."""
    with pytest.raises(ValueError, match="has dtype") as caught:
        TensorSpec("x", dtype, ("batch", 3))

    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("dtype", OIP_FROM_DTYPE)
def test_dtypes_have_two_names(dtype: str) -> None:
    """A dtype survives the way to the wire and back, and the way through numpy in either byte order."""
    assert dtype == DTYPE_FROM_OIP[OIP_FROM_DTYPE[dtype]]
    for order in "<>":
        array = np.empty(0, numpy_dtype(dtype).newbyteorder(order))  # type: ignore[arg-type]  # numpy wants a literal

        assert dtype == dtype_name(array)


@given(st.lists(st.integers(0, 2**70), max_size=20))
def test_a_claimed_shape_is_counted_or_refused(shape: list[int]) -> None:
    """`element_count` is the product, and what it lets pass numpy can hold: no axis hides behind one of size zero."""
    try:
        count = element_count(shape)
    except InvalidTensor:
        assert len(shape) > 16 or math.prod(max(1, axis) for axis in shape) > MAX_ELEMENTS
    else:
        assert math.prod(shape) == count
        assert tuple(shape) == np.broadcast_to(np.int8(0), shape).shape


@pytest.mark.parametrize("shape", [[-1], [2, -3], [2**62, 2**62], [0, 2**62, 2**62], [1] * 40])
def test_lying_shapes_are_refused(shape: list[int]) -> None:
    """Negative axes, products beyond any memory, and too many axes."""
    with pytest.raises(InvalidTensor):
        element_count(shape)


@pytest.mark.parametrize(
    ("feeds", "complaint"),
    [
        ({}, "'x' is missing"),
        ({"x": np.zeros((1, 3), np.float32)}, "'y' is missing"),
        ({"x": np.zeros((1, 3), np.float32), "y": np.zeros((1, 2), np.int64), "z": np.zeros(1)}, "no input 'z'"),
        ({"x": np.zeros((1, 3)), "y": np.zeros((1, 2), np.int64)}, "came as FP64; the model takes FP32"),
        ({"x": np.zeros((1, 4), np.float32), "y": np.zeros((1, 2), np.int64)}, r"shape \[1, 4\]; .* \[-1, 3\]"),
        ({"x": np.zeros(3, np.float32), "y": np.zeros((1, 2), np.int64)}, r"shape \[3\]"),
        ({"x": np.zeros((2, 3), np.float32), "y": np.zeros((1, 2), np.int64)}, "another input has 2"),
    ],
)
def test_what_does_not_fit_is_named(feeds: dict[str, np.ndarray], complaint: str) -> None:
    """The error says which input, what came and what the model takes."""
    with pytest.raises(InvalidTensor, match=complaint):
        check_feeds(feeds, (FREE, OTHER))


def test_what_fits_passes() -> None:
    """Axes of one name agree; nameless axes need not agree with one another."""
    check_feeds({"x": np.zeros((5, 3), np.float32), "y": np.zeros((5, 2), np.int64)}, (FREE, OTHER))
    check_feeds({"x": np.zeros((5, 6), np.float32)}, (NAMELESS,))


@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        ([FREE, OTHER], [FREE], True),
        ([FREE], [TensorSpec("y", "float32", ("batch", "found"))], True),  # outputs may vary in size
        ([FREE], [TensorSpec("y", "float32", ("n", 3))], False),
        ([FREE], [TensorSpec("y", "float32", ())], False),
        ([FREE], [TensorSpec("y", "float32", (1, "batch"))], False),
        ([TensorSpec("x", "float32", (1, 3))], [FREE], False),
        ([TensorSpec("x", "float32", ("batch", "length"))], [FREE], True),  # those of one length
        ([TensorSpec("x", "float32", ("?", "?"))], [TensorSpec("y", "float32", ("?", "?"))], True),
        ([FREE], [TensorSpec("y", "float32", ("batch", "batch"))], False),  # each row beside each other
        ([FREE, TensorSpec("state", "float32", (2, "batch"))], [FREE], False),
        ([], [], False),
    ],
)
def test_requests_share_a_batch_only_along_one_free_axis(
    inputs: list[TensorSpec], outputs: list[TensorSpec], expected: bool
) -> None:
    """Every input and output starts with the same free axis, and has it nowhere else."""

    assert expected is is_batchable(inputs, outputs)


def test_allocate_makes_what_the_specs_say_or_nothing() -> None:
    """Arrays for a batch; None where a size is known only once it has been computed."""
    made = allocate([FREE, OTHER], 4)

    assert made is not None
    assert {"x": ((4, 3), "float32"), "y": ((4, 2), "int64")} == {n: (a.shape, a.dtype.name) for n, a in made.items()}
    assert None is allocate([FREE, TensorSpec("z", "float32", ("batch", "found"))], 4)
    assert None is allocate([TensorSpec("z", "string", (1,))], 4)


@pytest.mark.parametrize(
    ("wanted", "found", "decibels"),
    [
        ({"y": [1.0, 2.0]}, {"y": [1.0, 2.0]}, EXACT_DB),
        ({"y": [1.0, 1.0]}, {"y": [1.1, 0.9]}, 20.0),
        ({"y": [1.0], "z": [1.0]}, {"y": [1.0], "z": [1.01]}, 40.0),
        ({"y": [0.0, 0.0]}, {"y": [1e-8, 0.0]}, EXACT_DB),
        ({"y": [0.0, 0.0]}, {"y": [0.1, 0.0]}, -EXACT_DB),
        ({"y": [1.0, 1.0]}, {"y": [1.0, np.nan]}, -EXACT_DB),
        ({"y": [1.0, np.nan]}, {"y": [1.0, 7.0]}, EXACT_DB),
        ({"y": [1.0, 1.0]}, {"y": [1.0]}, -EXACT_DB),
        ({"y": [1.0]}, {"z": [1.0]}, -EXACT_DB),
        ({"y": [1.0], "class": [3]}, {"y": [1.0], "class": [4]}, EXACT_DB),
        ({"class": [3]}, {"class": [3]}, EXACT_DB),
        ({"class": [10]}, {"class": [11]}, 20.0),
        ({}, {}, EXACT_DB),
    ],
    ids=[
        "equal", "a tenth", "the worst output", "silence", "no silence", "nan", "nan was wanted", "shape", "name",
        "a class beside scores", "only a class", "another class", "nothing",
    ],
)  # fmt: skip
def test_signal_to_noise(wanted: dict[str, Any], found: dict[str, Any], decibels: float) -> None:
    """Over all answers, of several outputs the worst; floats decide where there are any."""
    one, other = ({name: np.array(value) for name, value in answer.items()} for answer in (wanted, found))

    assert signal_to_noise_db([one, one], [other, other]) == pytest.approx(decibels, abs=0.01)
