"""A few requests that travel with a package: what an engine that is compiled later is compared with the graph on.

They are taken from the data that the build judges on. Where there is none they are made up, from a fixed seed and
within what each input plainly means: a picture has pixels, a number that picks a row of a table picks one that is
there. That is good enough to see whether two engines compute the same, or what FP16 rounds away. It says nothing about
how good a model is, and it is never what INT8 is calibrated on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from edge_sdk.backends.base import Engine
from edge_sdk.compile.datasets import Sample, Samples
from edge_sdk.compile.order import Ingredients, Order, free_axes
from edge_sdk.errors import EngineFailed, OutOfMemory
from edge_sdk.package import MAX_GOLDEN_BYTES, packed_requests
from edge_sdk.spec import Axis, EngineSpec, Preprocess
from edge_sdk.tensors import Array, Feeds, TensorSpec, numpy_dtype

_REQUESTS = 4
_LOOKED_AT = 8
"""Times as many samples are looked at where some may be of the wrong size."""
_ENOUGH_BYTES = 1 << 20
"""Of the file, unless a single request is larger than that."""
_SEED = 20


@dataclass(frozen=True)
class Golden:
    """Requests that the FP32 graph answers with numbers, and what to say of them."""

    requests: tuple[Feeds, ...]
    origin: str
    """Where they came from, or why there are none."""
    made_up: bool = False

    def samples(self) -> list[Sample]:
        return [Sample(f"golden request {number}", feeds) for number, feeds in enumerate(self.requests)]

    def packed(self) -> bytes:
        return packed_requests(self.requests)

    @property
    def note(self) -> str:
        if not self.requests:
            return f"There are no golden requests to compare a compiled engine on: {self.origin}."
        return f"golden.npz, on which a compiled engine is compared with the graph, holds {self.origin}."


def golden_requests(order: Order, ingredients: Ingredients, reference: Engine) -> Golden:
    """The package's golden requests: few, about 1 MB at most, and all such that the reference answers them."""
    specs = ingredients.summary.inputs
    if ingredients.judging is not None:
        return _of_samples(ingredients.judging, specs, order.spec.axes, reference)
    shapes = {spec.name: _shape(spec, order.spec.axes) for spec in specs}
    if unknown := [spec for spec in specs if shapes[spec.name] is None]:
        why = f"no data was given, and engine.toml has no sizes for the free axes of {unknown[0]} ([axes])"
        return Golden((), why, made_up=True)
    if text := [spec for spec in specs if spec.dtype == "string"]:
        return Golden((), f"no data was given, and text cannot be made up for {text[0]}", made_up=True)
    draw = np.random.default_rng(_SEED)
    makers = {spec.name: _maker(spec, order.spec, ingredients.model, len(specs)) for spec in specs}
    drawn = [
        {spec.name: makers[spec.name](draw, shapes[spec.name] or ()).astype(numpy_dtype(spec.dtype)) for spec in specs}
        for _ in range(_REQUESTS)
    ]
    chosen = _fitting(_answered(drawn, reference))
    if not chosen:
        return Golden((), "no data was given, and the model does not answer random requests", made_up=True)
    return Golden(chosen, f"{_counted(chosen, 'random request')} from a fixed seed, as no data was given", made_up=True)


def _of_samples(judging: Samples, inputs: Sequence[TensorSpec], axes: Mapping[str, Axis], reference: Engine) -> Golden:
    """Where `axes` says which sizes an engine is compiled for, only samples of those: it takes no others."""
    looked_at = judging.spread(_REQUESTS * (_LOOKED_AT if axes else 1))
    feeds = [sample.feeds for sample in looked_at if _is_in_range(sample.feeds, inputs, axes)][:_REQUESTS]
    if not feeds:
        return Golden((), f"none of {judging.source} has the sizes that engine.toml says in [axes]")
    if any(array.dtype == object for request in feeds for array in request.values()):
        return Golden((), "text is not packed")
    chosen = _fitting(_answered(feeds, reference))
    if not chosen:
        return Golden((), f"none of {judging.source} is answered with numbers and small enough to be packed")
    return Golden(chosen, f"{_counted(chosen, 'sample')} of {judging.source}")


def _is_in_range(feeds: Feeds, inputs: Sequence[TensorSpec], axes: Mapping[str, Axis]) -> bool:
    return all(
        axes[key].min <= feeds[spec.name].shape[position] <= axes[key].max
        for spec in inputs
        for key, position in free_axes(spec).items()
        if key in axes
    )


def _counted(requests: Sequence[Feeds], noun: str) -> str:
    return f"{len(requests)} {noun}{'s' if len(requests) > 1 else ''}"


def _answered(requests: Sequence[Feeds], reference: Engine) -> list[Feeds]:
    """Those that the reference answers, with nothing but numbers."""
    answered = []
    for feeds in requests:
        try:
            answers = reference.infer(feeds)
        except (EngineFailed, OutOfMemory):
            continue
        if all(np.isfinite(array).all() for array in answers.values() if array.dtype.kind == "f"):
            answered.append(feeds)
    return answered


def _fitting(requests: Sequence[Feeds]) -> tuple[Feeds, ...]:
    """As many of the first ones as are small enough together, but one at least unless even that is far too large."""
    for count in range(len(requests), 0, -1):
        chosen = requests[:count]
        unpacked = sum(array.nbytes for feeds in chosen for array in feeds.values())
        if unpacked + (1 << 16) <= MAX_GOLDEN_BYTES and (count == 1 or len(packed_requests(chosen)) <= _ENOUGH_BYTES):
            return tuple(chosen)
    return ()


# Requests that are made up


def _shape(spec: TensorSpec, axes: Mapping[str, Axis]) -> tuple[int, ...] | None:
    """The shape of one request: the best size of a free axis, and 1 for the batch; None if that is not known."""
    shape = list(spec.shape)
    for key, position in free_axes(spec).items():
        if key in axes:
            shape[position] = axes[key].best
        elif position == 0:
            shape[position] = 1
    sizes = [axis for axis in shape if isinstance(axis, int)]
    if len(sizes) < len(shape) or math.prod(sizes) * numpy_dtype(spec.dtype).itemsize > MAX_GOLDEN_BYTES:
        return None
    return tuple(sizes)


_Maker = Callable[[np.random.Generator, "tuple[int, ...]"], Array]


def _maker(spec: TensorSpec, wanted: EngineSpec, model: ModelProto, inputs: int) -> _Maker:
    """What draws values for an input."""
    dtype = numpy_dtype(spec.dtype)
    if dtype.kind == "f":
        if wanted.preprocess is not None and inputs == 1 and len(spec.shape) == 4:
            preprocess = wanted.preprocess
            return lambda draw, shape: _picture(draw, shape, preprocess)
        return lambda draw, shape: draw.standard_normal(shape, np.float32)
    if dtype == np.uint8:
        return lambda draw, shape: draw.integers(0, 256, shape)
    rows = _rows_it_picks_from(spec.name, model)  # a mask or a flag where it picks nothing
    return lambda draw, shape: draw.integers(0, rows or 2, shape)


def _picture(draw: np.random.Generator, shape: tuple[int, ...], preprocess: Preprocess) -> Array:
    """Random pixels, prepared as a photo's are."""
    per_channel = (1, -1, 1, 1) if preprocess.layout == "NCHW" else (1, 1, 1, -1)
    mean, std = (np.reshape(values, per_channel) for values in (preprocess.mean, preprocess.std))
    made: Array = (draw.integers(0, 256, shape) * preprocess.scale - mean) / std
    return made


_PASSING = frozenset({"Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"})


def _rows_it_picks_from(name: str, model: ModelProto) -> int | None:
    """The rows of the smallest table that the input, as it is, picks rows of; None if it picks none."""
    tables = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    same = {name}
    rows = []
    for node in model.graph.node:
        if node.op_type in _PASSING and node.input[0] in same:
            same.update(node.output)
        if node.op_type == "Gather" and node.input[1] in same and node.input[0] in tables:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            rows.append(tables[node.input[0]][axis])
    return min(rows, default=None)
