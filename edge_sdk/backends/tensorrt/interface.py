"""A package's inputs and outputs, held against an engine's, and the sizes that the engine was compiled for. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from edge_sdk.backends.tensorrt.lanes import IoTensor, Shape, Shapes
from edge_sdk.errors import EngineFailed, EngineUnfit, InvalidTensor
from edge_sdk.tensors import Array, TensorSpec, check_array, is_batchable, sizes_vary


class Interface:
    """What callers see of an engine: the names, dtypes and axes that the package promises."""

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._ranges: tuple[tuple[Shape, Shape], ...] = ()
        """Of each input, the smallest and the largest shape; known once an engine was seen."""

    @property
    def has_one_size(self) -> bool:
        """Whether every size is known once the number of rows is."""
        if is_batchable(self.inputs, self.outputs):
            return not sizes_vary((*self.inputs, *self.outputs))
        return not any(spec.has_free_axes for spec in (*self.inputs, *self.outputs))

    def check_engine(self, inputs: Sequence[IoTensor], outputs: Sequence[IoTensor]) -> tuple[IoTensor, ...]:
        """The engine's inputs in the order of the package's.

        EngineUnfit if they, or the outputs, are not those of the package. The graph beside the engine has them.
        """
        if reasons := (*_differences("input", self.inputs, inputs), *_differences("output", self.outputs, outputs)):
            raise EngineUnfit(
                f"TensorRT's engine is not the package's: {'; '.join(reasons)}. The graph runs on onnxruntime instead.",
                reasons=reasons,
                fix="Build the package again.",
            )
        by_name = {tensor.name: tensor for tensor in inputs}
        ordered = tuple(by_name[spec.name] for spec in self.inputs)
        self._ranges = tuple((one.smallest or one.shape, one.largest or one.shape) for one in ordered)
        return ordered

    def shapes_of(self, feeds: Mapping[str, Array]) -> Shapes:
        """The shapes of the inputs; EngineFailed unless these are they, InvalidTensor if one does not fit."""
        if len(feeds) != len(self.inputs) or any(spec.name not in feeds for spec in self.inputs):
            raise EngineFailed(
                f"TensorRT could not run the graph: it wants {', '.join(spec.name for spec in self.inputs)} "
                f"and was given {', '.join(feeds) or 'nothing'}."
            )
        for spec in self.inputs:
            check_array(feeds[spec.name], spec)
        return self._in_range(tuple(feeds[spec.name].shape for spec in self.inputs))

    def shapes_at(self, rows: int) -> Shapes:
        """Of the inputs of a batch, where there is one size; InvalidTensor if the engine was not compiled for it."""
        return self._in_range(tuple(_fixed(spec.at_batch(rows)) for spec in self.inputs))

    def output_shapes_at(self, rows: int) -> list[tuple[str, Shape]]:
        return [(spec.name, _fixed(spec.at_batch(rows))) for spec in self.outputs]

    def named(self, shapes: Shapes) -> Iterator[tuple[str, Shape]]:
        """The inputs' shapes, with their names."""
        return zip((spec.name for spec in self.inputs), shapes)

    def _in_range(self, shapes: Shapes) -> Shapes:
        for spec, shape, (smallest, largest) in zip(self.inputs, shapes, self._ranges):
            for position, (axis, size, least, most) in enumerate(zip(spec.shape, shape, smallest, largest)):
                if not least <= size <= most:
                    raise InvalidTensor(
                        f"Input {spec.name!r} has {size} along axis {axis if isinstance(axis, str) else position!r}; "
                        f"the engine was compiled for {f'{least} to {most}' if least < most else least}.",
                        fix="The tables [batching] and [axes] of engine.toml say what an engine is compiled for.",
                    )
        return shapes


def _differences(side: str, specs: Sequence[TensorSpec], tensors: Sequence[IoTensor]) -> Iterator[str]:
    found = {tensor.name: tensor for tensor in tensors}
    if {spec.name for spec in specs} != set(found):
        yield f"its {side}s are {', '.join(sorted(found))} and not {', '.join(sorted(spec.name for spec in specs))}"
        return
    for spec in specs:
        tensor = found[spec.name]
        if (tensor.dtype, len(tensor.shape)) != (spec.dtype, len(spec.shape)):
            yield f"its {side} {spec.name!r} is {tensor.dtype}{list(tensor.shape)} and not {spec.dtype}{spec.oip_shape}"


def _fixed(shape: Sequence[int | str]) -> Shape:
    return tuple(int(axis) for axis in shape)
