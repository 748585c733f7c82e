"""Stateful models: what one keeps from a request of a sequence to the next. The `[sequence]` table of engine.toml.

    [sequence]
    states = [{input = "state", output = "stateN", batch_axis = 1}]    # comes out, goes in again with the next request
    constants = {sr = 16000}                                           # inputs that no request brings
    context = {input = "input", samples = 64}                          # the end of an input comes again before the next

Such a model is seen in two other ways beside the graph's own. *Aligned*: constants are gone, and states have the batch
as their first axis, so that requests of several sequences stack like those of any model. *Asked*: states are gone as
well, and the context is taken off its input: what one request brings, and gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Union

import numpy as np
from pydantic import Field, model_validator

from edge_sdk.errors import SpecError
from edge_sdk.tensors import Array, TensorSpec, numpy_dtype
from edge_sdk.toml import Table

Tensors = tuple[TensorSpec, ...]
Sizes = Mapping[str, int]
"""The free axes that have one size after all, by name."""


class State(Table):
    """An output that is fed again, as `input`, with the next request of its sequence."""

    input: str
    output: str
    batch_axis: int = Field(default=0, ge=0, le=15)
    """Of both."""
    initial: float = 0.0
    """What every element is before the first request."""


class Context(Table):
    """The last `samples` of an input, which the model wants once more before the next ones; zeros before the first."""

    input: str
    samples: int = Field(gt=0, le=1 << 24)
    axis: int = Field(default=1, ge=1, le=15)


class SequenceRules(Table):
    """What is kept between requests, how long, and for how many sequences at a time."""

    states: tuple[State, ...] = ()
    constants: Mapping[str, Union[bool, int, float]] = {}
    """Inputs that have the same value in every request; an array of it where the input is one."""
    context: Context | None = None
    timeout_s: float = Field(default=60.0, gt=0, le=86_400)
    """A sequence of which nothing came for so long is forgotten."""
    max_sequences: int = Field(default=64, gt=0, le=65_536)
    """Open at a time, of all clients together."""

    @model_validator(mode="after")
    def _consistent(self) -> SequenceRules:
        if not self.states and self.context is None:
            raise ValueError("there is nothing to keep: give `states`, or a `context`")
        inputs = [state.input for state in self.states]
        for names in ([*inputs, *self.constants], [state.output for state in self.states]):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{twice[0]!r} is named twice")
        if self.context is not None and self.context.input in (*inputs, *self.constants):
            raise ValueError(f"the context's input {self.context.input!r} is a state or a constant too")
        return self

    def check(self, inputs: Tensors, outputs: Tensors, sizes: Sizes) -> None:
        """Raise SpecError unless a graph with these inputs and outputs has what is named here, and is so shaped."""
        taken, given = ({spec.name: _fixed(spec, sizes) for spec in specs} for specs in (inputs, outputs))
        for state in self.states:
            _check_state(state, _found(state.input, taken, "input"), _found(state.output, given, "output"))
        for name in self.constants:
            spec = _found(name, taken, "input")
            if spec.dtype == "string" or spec.has_free_axes:
                raise SpecError(f"The constant {spec} is text, or its size is not fixed; it cannot be filled in.")
        self.constant_feeds(inputs, sizes)
        if self.context is not None:
            spec, axis = _found(self.context.input, taken, "input"), self.context.axis
            size = spec.shape[axis] if axis < len(spec.shape) else 0
            if isinstance(size, int) and size <= self.context.samples:
                raise SpecError(
                    f"[sequence] keeps {self.context.samples} samples of {spec} along axis {axis}, "
                    "which leaves no room for new ones.",
                    fix="The axis must be longer than the context.",
                )
        if not self.asked(inputs, sizes):
            raise SpecError("[sequence] names every input of the model; a request would bring nothing.")
        if not self.answered(outputs):
            raise SpecError("[sequence] names every output of the model; an answer would hold nothing.")

    def aligned(self, inputs: Tensors, outputs: Tensors, sizes: Sizes) -> tuple[Tensors, Tensors]:
        """Inputs and outputs with the batch first and without constants."""
        states = {state.input: state for state in self.states}
        fed = [_fixed(spec, sizes) for spec in inputs if spec.name not in self.constants]
        batch = next((spec.shape[0] for spec in fed if spec.name not in states and spec.shape), "batch")
        moved = {
            spec.name: _batch_first(spec, states[spec.name].batch_axis, batch) for spec in fed if spec.name in states
        }
        new = {state.output: replace(moved[state.input], name=state.output) for state in self.states}
        return tuple(moved.get(spec.name, spec) for spec in fed), tuple(new.get(spec.name, spec) for spec in outputs)

    def asked(self, inputs: Tensors, sizes: Sizes) -> Tensors:
        """What one request brings."""
        kept = {*(state.input for state in self.states), *self.constants}
        return tuple(self._without_context(_fixed(spec, sizes)) for spec in inputs if spec.name not in kept)

    def answered(self, outputs: Tensors) -> Tensors:
        """What one request gets."""
        states = {state.output for state in self.states}
        return tuple(spec for spec in outputs if spec.name not in states)

    def constant_feeds(self, inputs: Tensors, sizes: Sizes) -> dict[str, Array]:
        """The inputs that no request brings. SpecError for a value that its dtype cannot hold."""
        feeds = {}
        for spec in inputs:
            if spec.name in self.constants:
                value, shape = self.constants[spec.name], _fixed(spec, sizes).shape
                try:
                    array = np.full([int(axis) for axis in shape], value, numpy_dtype(spec.dtype))
                except (OverflowError, ValueError) as exc:
                    raise SpecError(f"The constant {spec.name!r} is {value!r}, which is no {spec.dtype}.") from exc
                if not np.all(array == value) and array.dtype.kind != "f":
                    raise SpecError(f"The constant {spec.name!r} is {value!r}, which is no {spec.dtype}.")
                feeds[spec.name] = array
        return feeds

    def _without_context(self, spec: TensorSpec) -> TensorSpec:
        if self.context is None or spec.name != self.context.input:
            return spec
        axis, shape = self.context.axis, list(spec.shape)
        if isinstance(size := shape[axis], int):
            shape[axis] = size - self.context.samples
        return replace(spec, shape=tuple(shape))


def _found(name: str, among: Mapping[str, TensorSpec], side: str) -> TensorSpec:
    if (spec := among.get(name)) is None:
        raise SpecError(
            f"[sequence] names the {side} {name!r}, which the model does not have.",
            fix=f"Its {side}s are {', '.join(map(repr, among))}.",
        )
    return spec


def _check_state(state: State, into: TensorSpec, out: TensorSpec) -> None:
    if into.dtype != out.dtype or len(into.shape) != len(out.shape):
        raise SpecError(
            f"[sequence] feeds {out} as {into}; a state has one dtype and one number of axes.",
            fix="Name the output that holds the new state.",
        )
    if state.batch_axis >= len(into.shape):
        raise SpecError(
            f"[sequence] says that axis {state.batch_axis} of {into} is the batch; it has {len(into.shape)} axes.",
            fix="Axes are counted from 0.",
        )
    sizes = [axis for position, axis in enumerate(into.shape) if position != state.batch_axis]
    if into.dtype == "string" or not all(isinstance(axis, int) for axis in sizes):
        raise SpecError(
            f"The state {into} is text, or has a size that is not known before the first request.",
            fix="Say the size of its free axes in [axes], min and max the same.",
        )


def _fixed(spec: TensorSpec, sizes: Sizes) -> TensorSpec:
    """With every free axis that has a size after all; one without a name is called `input:position`."""
    if not spec.has_free_axes or not sizes:
        return spec
    shape = [
        axis if isinstance(axis, int) else sizes.get(f"{spec.name}:{position}" if axis == "?" else axis, axis)
        for position, axis in enumerate(spec.shape)
    ]
    return replace(spec, shape=tuple(shape))


def _batch_first(spec: TensorSpec, axis: int, batch: int | str) -> TensorSpec:
    rest = [size for position, size in enumerate(spec.shape) if position != axis]
    return replace(spec, shape=(batch if isinstance(spec.shape[axis], str) else spec.shape[axis], *rest))
