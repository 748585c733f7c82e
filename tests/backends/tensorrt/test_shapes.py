"""Which sizes an engine is compiled for."""

from __future__ import annotations

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.backends.tensorrt.shapes import ShapeRange, shape_ranges
from edge_sdk.errors import ModelError
from edge_sdk.package import BatchingRecord
from edge_sdk.spec import Axis
from edge_sdk.tensors import TensorSpec, is_batchable

BATCHING = BatchingRecord(max_batch=8, best_batch=4)


def spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def test_a_fixed_input_has_one_shape() -> None:
    """Every input has a range, also where there is nothing to choose."""
    ranges = shape_ranges([spec("x", 1, 3, 224, 224), spec("rate")], BATCHING, {})

    assert {"x": ShapeRange(*[(1, 3, 224, 224)] * 3), "rate": ShapeRange((), (), ())} == ranges


def test_the_batch_goes_from_one_to_its_most() -> None:
    """The free first axis that all inputs share is the batch, whatever it is called; engine.toml says how large."""
    for name in ("batch", "N", "?"):
        ranges = shape_ranges([spec("x", name, 3), spec("y", name)], BATCHING, {})

        assert {"x": ShapeRange((1, 3), (4, 3), (8, 3)), "y": ShapeRange((1,), (4,), (8,))} == ranges


def test_other_axes_come_from_engine_toml() -> None:
    """By name, the same in all inputs; by input and position where the graph gives none."""
    inputs = [spec("ids", "batch", "length"), spec("mask", "batch", "length"), spec("image", "batch", 3, "?", 64)]
    axes = {"length": Axis(best=64, max=256), "image:2": Axis(min=32, best=48, max=96)}
    ranges = shape_ranges(inputs, BATCHING, axes)

    assert ShapeRange((1, 1), (4, 64), (8, 256)) == ranges["ids"] == ranges["mask"]
    assert ShapeRange((1, 3, 32, 64), (4, 3, 48, 64), (8, 3, 96, 64)) == ranges["image"]


def test_a_range_for_the_first_axis_wins() -> None:
    """What a person wrote about an axis counts for more than that it looks like a batch."""
    ranges = shape_ranges([spec("ids", "length")], BATCHING, {"length": Axis(min=2, best=16, max=512)})

    assert {"ids": ShapeRange((2,), (16,), (512,))} == ranges


def test_a_free_axis_without_a_range() -> None:
    """The error names each such axis once, says where it is, and what to add to engine.toml."""
    inputs = [spec("ids", "batch", "length"), spec("mask", "batch", "length"), spec("image", "batch", 3, "?", "?")]
    with pytest.raises(ModelError) as raised:
        shape_ranges(inputs, BATCHING, {})

    assert "3 free axes without one: length (axis 1 of input ids: float32[batch, length])" in raised.value.problem
    assert ["length", "image:2", "image:3"] == list(lines_to_add(raised.value))


def test_inputs_that_share_no_batch() -> None:
    """A model whose state runs along another axis has no batch: its first axes want ranges like any other."""
    with pytest.raises(ModelError) as raised:
        shape_ranges([spec("input", "b", 576), spec("state", 2, "b", 128)], BATCHING, {})

    assert ["b"] == list(lines_to_add(raised.value))


def test_a_range_for_no_axis() -> None:
    """A name that the model does not have is a slip of the pen, and would otherwise do nothing."""
    with pytest.raises(ModelError, match=r"'lenght', which is no free axis .* they have 'batch', 'length'"):
        shape_ranges([spec("ids", "batch", "length")], BATCHING, {
            "length": Axis(best=1, max=2), "lenght": Axis(best=1, max=2)
        })  # fmt: skip


def lines_to_add(error: ModelError) -> dict[str, Axis]:
    """The [axes] table that an error asks for, read as engine.toml would be."""
    return {key: Axis(**table) for key, table in tomli.loads(error.fix.partition(":")[2])["axes"].items()}


axis_names = st.sampled_from(["batch", "length", "?", 'odd "name"', "a.b", "ü"])
shapes = st.lists(st.integers(1, 300) | axis_names, max_size=5).map(tuple)
specs = st.lists(shapes, min_size=1, max_size=4).map(
    lambda drawn: [spec(f"in.{index}", *shape) for index, shape in enumerate(drawn)]
)
batchings = st.integers(1, 1024).flatmap(
    lambda most: st.integers(1, most).map(lambda best: BatchingRecord(max_batch=most, best_batch=best))
)


@given(specs, batchings)
def test_what_the_error_asks_for_is_enough(inputs: list[TensorSpec], batching: BatchingRecord) -> None:
    """Whoever adds the lines of the error gets ranges; every one is in order, and fits the input's shape."""
    axes: dict[str, Axis] = {}
    try:
        ranges = shape_ranges(inputs, batching, {})
    except ModelError as exc:
        axes = lines_to_add(exc)
        ranges = shape_ranges(inputs, batching, axes)

    assert [item.name for item in inputs] == list(ranges)
    for item in inputs:
        sizes = ranges[item.name]
        by_axis = list(zip(sizes.smallest, sizes.best, sizes.largest))
        assert len(item.shape) == len(by_axis)
        for axis, (smallest, best, largest) in zip(item.shape, by_axis):
            assert 1 <= smallest <= best <= largest
            assert (axis == smallest == largest) or isinstance(axis, str)


@given(axis_names, st.lists(st.lists(st.integers(1, 300), max_size=4), min_size=1, max_size=4), batchings)
def test_a_batchable_model_needs_no_lines(first: str, rest: list[list[int]], batching: BatchingRecord) -> None:
    """Where requests can be stacked, the batch is all that varies, and it is known."""
    inputs = [spec(f"in{index}", first, *sizes) for index, sizes in enumerate(rest)]
    ranges = shape_ranges(inputs, batching, {})

    assert is_batchable(inputs, inputs)
    assert {(1, batching.best_batch, batching.max_batch)} == {
        (sizes.smallest[0], sizes.best[0], sizes.largest[0]) for sizes in ranges.values()
    }
    assert [tuple(sizes) for sizes in rest] == [sizes.largest[1:] for sizes in ranges.values()]
