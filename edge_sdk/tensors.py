"""What goes into an engine and comes out of it: named tensors of a dtype and a shape.

Dtypes carry numpy's names inside (`float32`) and the Open Inference Protocol's on the wire (`FP32`); this file is the
only place that knows both. A shape holds an int for a fixed axis and a name for one that may vary (`"batch"`); an axis
the model left nameless is called `"?"`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import InvalidTensor

Array = NDArray[Any]
Feeds = dict[str, Array]
"""One array for each input of an engine, by name."""
Outputs = dict[str, Array]
"""One array for each output of an engine, by name."""

OIP_FROM_DTYPE = {
    "bool": "BOOL",
    "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64",
    "string": "BYTES",
}  # fmt: skip
DTYPE_FROM_OIP = {oip: dtype for dtype, oip in OIP_FROM_DTYPE.items()}

NAMELESS = "?"
"""What a free axis is called to which the model gives no name."""

MAX_RANK = 16
"""More axes than any model has; numpy itself stops at 64."""
MAX_ELEMENTS = 1 << 31
"""A bound checked before any arithmetic on sizes a stranger sent is believed."""


@dataclass(frozen=True)
class TensorSpec:
    """The name, dtype (numpy's name, or `string`) and shape of one input or output.

    A dtype that has no name on the wire is a ValueError here, so that nothing later meets one.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in OIP_FROM_DTYPE:
            raise ValueError(
                f"{self.name[:80]!r} has dtype {self.dtype[:40]!r}; tensors have one of {', '.join(OIP_FROM_DTYPE)}"
            )

    @property
    def oip_datatype(self) -> str:
        return OIP_FROM_DTYPE[self.dtype]

    @property
    def oip_shape(self) -> list[int]:
        """The shape as the Open Inference Protocol writes it: -1 for an axis that may vary."""
        return [axis if isinstance(axis, int) else -1 for axis in self.shape]

    @property
    def has_free_axes(self) -> bool:
        return any(isinstance(axis, str) for axis in self.shape)

    def at_batch(self, batch: int) -> tuple[int | str, ...]:
        """The shape with its first axis set to `batch`, if that axis is free."""
        if self.shape and isinstance(self.shape[0], str):
            return (batch, *self.shape[1:])
        return self.shape

    def __str__(self) -> str:
        axes = ", ".join(str(axis) for axis in self.shape)
        return f"{self.name}: {self.dtype}[{axes}]"


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype behind our name; `string` tensors are arrays of Python objects (bytes)."""
    return np.dtype(object) if dtype == "string" else np.dtype(dtype)


def dtype_name(array: Array) -> str:
    """Our name for an array's dtype: the inverse of `numpy_dtype`."""
    dtype = array.dtype
    if (known := _NAME_OF_DTYPE.get(dtype)) is None:
        known = _NAME_OF_DTYPE[dtype] = "string" if dtype.kind in "OSU" else dtype.name
    return known


_NAME_OF_DTYPE: dict[np.dtype[Any], str] = {}
"""numpy works a dtype's name out anew each time, which takes longer than the rest of a check."""


def element_count(shape: Sequence[int]) -> int:
    """The product of a shape a stranger claimed, or InvalidTensor: checked before anything is allocated."""
    if len(shape) > MAX_RANK:
        raise InvalidTensor(f"A shape has {len(shape)} axes; at most {MAX_RANK} are taken.")
    count = 1
    for axis in shape:
        if axis < 0:
            raise InvalidTensor(f"The shape {_short(shape)} has a negative axis; a request gives every size.")
        count *= max(1, axis)  # numpy counts the other axes of an empty array too
        if count > MAX_ELEMENTS:
            raise InvalidTensor(f"The shape {_short(shape)} has more than {MAX_ELEMENTS:,} elements.")
    return 0 if 0 in shape else count


def check_feeds(feeds: Mapping[str, Array], specs: Sequence[TensorSpec]) -> None:
    """Raise InvalidTensor unless there is exactly one fitting array for each of `specs`.

    Named axes must agree with one another wherever their name recurs (`"?"` never has to).
    """
    wanted = {spec.name for spec in specs}
    if unknown := sorted(set(feeds) - wanted):
        raise InvalidTensor(f"The model has no input {unknown[0][:80]!r}; its inputs are {_listed(wanted)}.")
    bound: dict[str, int] = {}
    for spec in specs:
        if spec.name not in feeds:
            raise InvalidTensor(f"Input {spec.name!r} is missing; the model's inputs are {_listed(wanted)}.")
        check_array(feeds[spec.name], spec)
        for axis, size in zip(spec.shape, feeds[spec.name].shape):
            if isinstance(axis, str) and axis != NAMELESS and bound.setdefault(axis, size) != size:
                raise InvalidTensor(
                    f"Input {spec.name!r} has {size} along axis {axis!r}, another input has {bound[axis]}; "
                    "they must be equal."
                )


def check_array(array: Array, spec: TensorSpec) -> None:
    """Raise InvalidTensor unless `array` has the dtype and the shape of `spec`."""
    if dtype_name(array) != spec.dtype:
        came = OIP_FROM_DTYPE.get(dtype_name(array), array.dtype.name)
        raise InvalidTensor(f"Input {spec.name!r} came as {came}; the model takes {spec.oip_datatype}.")
    fits = len(array.shape) == len(spec.shape) and all(
        isinstance(axis, str) or axis == size for axis, size in zip(spec.shape, array.shape)
    )
    if not fits:
        raise InvalidTensor(
            f"Input {spec.name!r} came with shape {_short(array.shape)}; the model takes {spec.oip_shape} "
            "(-1: any size)."
        )


def is_batchable(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether requests can be stacked along a shared, free first axis, those whose other sizes are equal.

    True only when every input and output starts with the same free axis, and none has it in another place: a model
    whose state runs along its second axis, or that compares the rows of a batch, must see each request alone.
    """
    specs = (*inputs, *outputs)
    if not specs or any(not spec.shape or not isinstance(spec.shape[0], str) for spec in specs):
        return False
    first, *others = {spec.shape[0] for spec in specs}
    return not others and (first == NAMELESS or not any(first in spec.shape[1:] for spec in specs))


def sizes_vary(inputs: Sequence[TensorSpec]) -> bool:
    """Whether requests may differ in more than their first axis: in the length of a text, the size of a picture."""
    return any(isinstance(axis, str) for spec in inputs for axis in spec.shape[1:])


def allocate(specs: Sequence[TensorSpec], batch: int) -> dict[str, Array] | None:
    """Arrays that fit `specs` at `batch`, or None where a size is known only once it has been computed."""
    arrays = {}
    for spec in specs:
        shape = spec.at_batch(batch)
        if spec.dtype == "string" or any(isinstance(axis, str) for axis in shape):
            return None
        arrays[spec.name] = np.empty([int(axis) for axis in shape], dtype=spec.dtype)
    return arrays


def zeros(specs: Sequence[TensorSpec]) -> Feeds:
    """One request of zeros, for timing and warming up; InvalidTensor for text. A free axis counts as 1."""
    feeds = {}
    for spec in specs:
        if spec.dtype == "string":
            raise InvalidTensor(f"The input {spec} takes text; zeros cannot stand for it.", fix="Give an input.")
        shape = [axis if isinstance(axis, int) else 1 for axis in spec.shape]
        feeds[spec.name] = np.zeros(shape, dtype=spec.dtype)
    return feeds


EXACT_DB = 150.0
"""Stands for outputs without any difference: more than FP32 itself can tell apart."""
_SILENCE = 1e-6
"""Root mean square: where nothing but zeros was wanted, a noise below this is none."""


def signal_to_noise_db(wanted: Sequence[Outputs], found: Sequence[Outputs]) -> float:
    """How close answers are to those that were wanted, over all of them and of several outputs the worst: 40 dB is a
    noise of 1 %. `EXACT_DB` for equal ones, its negative for answers that have nothing in common.

    Floats decide where there are any: what an engine picks by them, such as a class, may tip over with the last bit.
    Other outputs decide where there is nothing else. Where NaN or infinity was wanted, anything goes.

    >>> signal_to_noise_db([{"y": np.ones(4)}], [{"y": np.full(4, 1.01)}])
    40.0
    """
    outputs: dict[str, SignalToNoise] = {}
    floats = any(array.dtype.kind == "f" for answer in wanted for array in answer.values())
    for answer, other in zip(wanted, found):
        for name, array in answer.items():
            if name not in other or other[name].dtype != array.dtype:
                return -EXACT_DB
            if array.dtype.kind == "f" or not floats:
                outputs.setdefault(name, SignalToNoise()).add(array, other[name])
    return min((output.db for output in outputs.values()), default=EXACT_DB)


@dataclass
class SignalToNoise:
    """How close one output is to the one that was wanted, over as many answers as are added."""

    signal: float = 0.0
    noise: float = 0.0
    count: int = 0

    def add(self, wanted: Array, found: Array) -> None:
        """Take another answer into the sums. Other shapes, or NaN where a number was wanted, are infinite noise."""
        if found.shape != wanted.shape:
            self.noise = math.inf
        elif wanted.dtype == object:
            self.signal += wanted.size
            self.noise += 0.0 if np.array_equal(wanted, found) else math.inf
        else:
            exact, other = wanted.astype(np.float64), found.astype(np.float64)
            counts = np.isfinite(exact)
            noise = float(np.square(exact[counts] - other[counts]).sum())
            self.signal += float(np.square(exact[counts]).sum())
            self.noise += noise if math.isfinite(noise) else math.inf
        self.count += wanted.size

    @property
    def db(self) -> float:
        if self.noise == 0.0 or (self.signal == 0.0 and self.noise <= self.count * _SILENCE**2):
            return EXACT_DB
        if math.isinf(self.noise) or self.signal == 0.0:
            return -EXACT_DB
        return round(max(-EXACT_DB, min(EXACT_DB, 10 * math.log10(self.signal / self.noise))), 2)


def _listed(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _short(shape: Sequence[int]) -> str:
    """A shape in an error that may go to whoever sent it: neither many axes nor many digits."""
    axes = [text if len(text) <= 20 else f"{text[:20]}..." for text in map(str, shape[:8])]
    return f"[{', '.join(axes)}{', ...' if len(shape) > 8 else ''}]"
