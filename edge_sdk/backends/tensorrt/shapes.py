"""Which sizes an engine is compiled for: the smallest, the best and the largest shape of every input.

TensorRT compiles for a range of each free axis, and is fastest at one point in it. The batch is such an axis, and
engine.toml says how large it gets; any other one - the length of a sentence, the height of a picture - needs a range of
its own in engine.toml:

    [axes]
    length = { min = 1, best = 64, max = 256 }
    "image:2" = { best = 480, max = 1080 }       # the third axis of `image`, which has no name in the graph
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_sdk.errors import ModelError
from edge_sdk.package import BatchingRecord
from edge_sdk.spec import Axis
from edge_sdk.tensors import NAMELESS, TensorSpec


@dataclass(frozen=True)
class ShapeRange:
    """The shapes of one input that an engine takes, axis by axis, and the one it is fastest at."""

    smallest: tuple[int, ...]
    best: tuple[int, ...]
    largest: tuple[int, ...]


def shape_ranges(
    inputs: Sequence[TensorSpec], batching: BatchingRecord, axes: Mapping[str, Axis]
) -> dict[str, ShapeRange]:
    """The range of every input, fixed ones too; `axes` are engine.toml's, by name or as `input:position`.

    The first axis is the batch if it is free and the same in all inputs, unless `axes` has it. ModelError names every
    other free axis without a range, with the lines to add to engine.toml, and every range that belongs to no free axis.
    """
    batch = _batch_axis(inputs)
    ranges: dict[str, list[tuple[int, int, int]]] = {spec.name: [] for spec in inputs}
    lacking: dict[str, str] = {}
    for spec in inputs:
        for position, axis in enumerate(spec.shape):
            if isinstance(axis, int):
                ranges[spec.name].append((axis, axis, axis))
            elif (found := axes.get(key := _key(spec, position))) is not None:
                ranges[spec.name].append((found.min, found.best, found.max))
            elif position == 0 and axis == batch:
                ranges[spec.name].append((1, batching.best_batch, batching.max_batch))
            else:
                lacking.setdefault(key, f"axis {position} of input {spec}")
    if lacking:
        raise _lacks_ranges(lacking)
    _refuse_unknown(axes, inputs)
    return {
        name: ShapeRange(*(tuple(sizes[at] for sizes in by_axis) for at in range(3)))
        for name, by_axis in ranges.items()
    }


def _batch_axis(inputs: Sequence[TensorSpec]) -> str | None:
    """The free first axis that all inputs share, as in `tensors.is_batchable`; None where they share none."""
    first = {spec.shape[0] if spec.shape else None for spec in inputs}
    axis = first.pop() if len(first) == 1 else None
    return axis if isinstance(axis, str) else None


def _key(spec: TensorSpec, position: int) -> str:
    """What engine.toml calls an axis: its name, or its place where it has none."""
    axis = spec.shape[position]
    return f"{spec.name}:{position}" if axis == NAMELESS else str(axis)


def _lacks_ranges(lacking: Mapping[str, str]) -> ModelError:
    count = "a free axis" if len(lacking) == 1 else f"{len(lacking)} free axes"
    lines = "\n".join(f"    {_toml_key(key)} = {{ min = 1, best = 64, max = 256 }}" for key in lacking)
    return ModelError(
        f"TensorRT compiles for a range of sizes, and the model has {count} without one: "
        f"{', '.join(f'{key} ({where})' for key, where in lacking.items())}.",
        fix=f"Add to engine.toml, with the sizes that you use:\n\n    [axes]\n{lines}\n",
    )


def _refuse_unknown(axes: Mapping[str, Axis], inputs: Sequence[TensorSpec]) -> None:
    known = list(dict.fromkeys(
        _key(spec, position) for spec in inputs for position, axis in enumerate(spec.shape) if isinstance(axis, str)
    ))  # fmt: skip
    if unknown := [key for key in axes if key not in known]:
        raise ModelError(
            f"engine.toml gives a range for the axis {unknown[0]!r}, which is no free axis of the model's inputs; "
            f"they have {', '.join(map(repr, known)) or 'none'}.",
            fix="Take it out of [axes], or call it as the model does.",
        )


def _toml_key(key: str) -> str:
    """`key` as TOML writes it: bare if it can be, otherwise in quotes."""
    if key and all(letter.isascii() and (letter.isalnum() or letter in "_-") for letter in key):
        return key
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
