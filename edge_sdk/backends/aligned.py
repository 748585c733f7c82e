"""A stateful engine as one whose requests stack: the batch is the first axis of everything, constants are filled in.

Models put the batch of a state where their framework does, often second. What computes batches knows one place for it:
this engine copies states from there to where the model wants them, and back.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_sdk.backends.base import Distant, Engine, Threaded
from edge_sdk.sequence import SequenceRules, Sizes
from edge_sdk.tensors import Array, Outputs, TensorSpec


class AlignedEngine:
    """`engine`, aligned as `rules` say: see `SequenceRules.aligned`. It is never pipelined."""

    def __init__(self, engine: Engine, rules: SequenceRules, sizes: Sizes) -> None:
        """Takes over `engine`, whose inputs and outputs `rules.check` has found to be what it says."""
        self._engine = engine
        self._inputs, self._outputs = rules.aligned(engine.inputs, engine.outputs, sizes)
        self._constants = rules.constant_feeds(engine.inputs, sizes)
        self._in_axes = {state.input: state.batch_axis for state in rules.states if state.batch_axis}
        self._out_axes = {state.output: state.batch_axis for state in rules.states if state.batch_axis}
        self._places: dict[tuple[str, int], Array] = {}
        """Where a state lies as the model has it, by name and rows: kept, so that an engine may keep it bound."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    @property
    def threads(self) -> int:
        return self._engine.threads if isinstance(self._engine, Threaded) else 1

    def elsewhere_bytes(self) -> int:
        return self._engine.elsewhere_bytes() if isinstance(self._engine, Distant) else 0

    def infer(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> Outputs:
        taken = {**feeds, **self._constants}
        for name, axis in self._in_axes.items():
            taken[name] = self._moved(name, feeds[name], axis, keep=out is not None)
        if out is None:
            given = self._engine.infer(taken)
            for name, axis in self._out_axes.items():
                given[name] = np.ascontiguousarray(np.moveaxis(given[name], axis, 0))
            return given
        places = dict(out)
        for name, axis in self._out_axes.items():
            places[name] = self._place(name, out[name], axis)
        self._engine.infer(taken, places)
        for name, axis in self._out_axes.items():
            np.copyto(out[name], np.moveaxis(places[name], axis, 0))
        return dict(out)

    def close(self) -> None:
        self._places.clear()
        self._engine.close()

    def _moved(self, name: str, array: Array, axis: int, *, keep: bool) -> Array:
        moved = np.moveaxis(array, 0, axis)
        if not keep:
            return np.ascontiguousarray(moved)
        place = self._place(name, array, axis)
        np.copyto(place, moved)
        return place

    def _place(self, name: str, array: Array, axis: int) -> Array:
        if (place := self._places.get((name, len(array)))) is None:
            shape = np.moveaxis(array, 0, axis).shape
            place = self._places[name, len(array)] = np.empty(shape, array.dtype)
        return place
