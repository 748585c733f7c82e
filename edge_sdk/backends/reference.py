"""The reference backend: the ONNX specification's own evaluator, and an engine that misbehaves when told to.

It is slow and literal, so it is an oracle for the fast backends. And it is the stand-in for hardware that fails: a
graph whose metadata holds `edge_sdk.reference` tells the engine what to do and when, so that a real daemon can be shown
a runtime that hangs, raises, answers NaN or takes the process down, with no mock in sight.

    edge_sdk.reference = [{"do": "raise", "when": 666.0}, {"do": "sleep", "seconds": 0.05}]

`do` is `sleep`, `raise`, `nan` (in floating-point outputs), `abort` or `lose-device`. `when` is a value; the order is
followed if any element of the first input equals it. Without `when` it is followed every time. With `once`, the path of
a file, it is followed if the file is not there, and makes it: so a process that an order ended does better next time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edge_sdk.backends.base import Availability, EngineOrder, Progress, installed_version, no_progress
from edge_sdk.backends.onnx_bytes import refuse_external_data
from edge_sdk.errors import BackendUnavailable, DeviceLost, EngineFailed, OutOfMemory
from edge_sdk.package import GRAPH, EnginePackage
from edge_sdk.profiles import DeviceProfile
from edge_sdk.tensors import DTYPE_FROM_OIP, Array, Outputs, TensorSpec, numpy_dtype

ORDERS = "edge_sdk.reference"
_INSTALL = "Install it: pip install 'edge-sdk[build]'."


@dataclass(frozen=True)
class Order:
    """Something to do instead of, or before, computing."""

    do: Literal["sleep", "raise", "nan", "abort", "lose-device"]
    when: float | None = None
    seconds: float = 0.0
    once: str | None = None

    def applies(self, first_input: Array) -> bool:
        if self.when is not None and not np.any(first_input == self.when):
            return False
        return self.once is None or _made(Path(self.once))


class ReferenceBackend:
    name = "reference"
    compiles = False

    def availability(self) -> Availability:
        if importlib.util.find_spec("onnx") is None:
            return Availability(None, "onnx is not installed.", _INSTALL)
        return Availability(installed_version("onnx", "onnx", "onnx-weekly"))

    def can_build(self, profile: DeviceProfile, *, here: bool = False) -> Availability:
        return self.availability()

    def build(
        self, order: EngineOrder, folder: Path | None, *, progress: Progress = no_progress, considerate: bool = False
    ) -> None:
        return None

    def load(self, package: EnginePackage, profile: DeviceProfile) -> ReferenceEngine:
        return self.load_graph(package.read(GRAPH), profile)

    def load_graph(self, graph: bytes, profile: DeviceProfile) -> ReferenceEngine:
        try:
            import onnx
            import onnx.reference
        except ImportError as exc:
            raise BackendUnavailable(f"onnx cannot be imported: {exc}.", fix=_INSTALL) from exc
        refuse_external_data(graph)
        try:
            model = onnx.load_from_string(graph)
            if not model.graph.output:
                raise ValueError("it has no outputs")  # as no bytes at all have: protobuf takes them for a message
            initializers = {tensor.name for tensor in model.graph.initializer}
            orders = next((prop.value for prop in model.metadata_props if prop.key == ORDERS), "[]")
            return ReferenceEngine(
                onnx.reference.ReferenceEvaluator(model),
                inputs=tuple(_spec(value) for value in model.graph.input if value.name not in initializers),
                outputs=tuple(_spec(value) for value in model.graph.output),
                orders=tuple(Order(**order) for order in json.loads(orders)),
            )
        except Exception as exc:  # protobuf's and the evaluator's exceptions share no base class
            raise EngineFailed(f"onnx's reference evaluator cannot load the graph: {exc}.") from exc


class ReferenceEngine:
    """onnx's evaluator, behind the Engine protocol."""

    def __init__(
        self,
        evaluator: Any,
        *,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        orders: tuple[Order, ...],
    ) -> None:
        self._evaluator = evaluator
        self._inputs = inputs
        self._outputs = outputs
        self._orders = orders

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    def infer(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> Outputs:
        if self._evaluator is None:
            raise EngineFailed("This engine was closed; it cannot infer any more.", fix="Load the package again.")
        spoilt = self._follow_orders(feeds)
        try:
            computed = self._evaluator.run(None, dict(feeds))
        except MemoryError as exc:
            raise OutOfMemory("The device ran out of memory while it computed this.") from exc
        except Exception as exc:  # the evaluator raises whatever numpy and its operators raise
            raise EngineFailed(f"onnx's reference evaluator could not run the graph: {exc}.") from exc
        results = {  # copies: an Identity gives back the very array it was fed
            spec.name: np.array(array, dtype=numpy_dtype(spec.dtype), order="C")
            for spec, array in zip(self._outputs, computed)
        }
        if spoilt:
            for array in results.values():
                if array.dtype.kind == "f":
                    array.fill(np.nan)
        if out is None:
            return results
        for name, array in out.items():
            np.copyto(array, results[name])
        return dict(out)

    def close(self) -> None:
        self._evaluator = None

    def _follow_orders(self, feeds: Mapping[str, Array]) -> bool:
        """Do as told; whether the results are to be spoilt."""
        spoilt = False
        for order in self._orders:
            if not order.applies(feeds[self._inputs[0].name]):
                continue
            match order.do:
                case "sleep":
                    time.sleep(order.seconds)
                case "raise":
                    raise EngineFailed("The reference engine was told to fail.")
                case "nan":
                    spoilt = True
                case "abort":
                    os.abort()
                case "lose-device":
                    raise DeviceLost("The reference engine was told to lose its device.")
        return spoilt


def _made(file: Path) -> bool:
    """Make an empty file; whether it was not there."""
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _spec(value: Any) -> TensorSpec:
    import onnx

    tensor = value.type.tensor_type
    name = onnx.TensorProto.DataType.Name(tensor.elem_type)
    dtype = {"STRING": "string", "FLOAT": "float32", "DOUBLE": "float64"}.get(name, name.lower())
    if dtype not in DTYPE_FROM_OIP.values():
        raise ValueError(f"{value.name} is {dtype}, which edge-sdk does not take")
    axes = (axis.dim_value if axis.HasField("dim_value") else axis.dim_param or "?" for axis in tensor.shape.dim)
    return TensorSpec(value.name, dtype, tuple(axes))
