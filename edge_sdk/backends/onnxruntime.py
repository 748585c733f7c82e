"""The onnxruntime backend: any graph, on the CPU, anywhere.

It compiles nothing ahead of time: the portable graph is what it loads, Q/DQ nodes fused into integer kernels as the
session is made. Graph optimisation comes from the profile; so do threads and spinning, unless the package was built on
a processor like this one and says what was best there. Nothing is measured when it is loaded: that would take seconds
of a device that is about to serve. `infer` with `out` runs over a kept binding as long as it is given the same arrays,
so a serving loop neither allocates nor re-binds.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.backends.base import (
    Availability,
    EngineOrder,
    Progress,
    installed_version,
    no_progress,
    version_numbers,
)
from edge_sdk.backends.onnx_bytes import refuse_external_data
from edge_sdk.errors import BackendUnavailable, EngineFailed, OutOfMemory
from edge_sdk.package import GRAPH, EnginePackage
from edge_sdk.profiles import DeviceProfile, physical_cores, processor
from edge_sdk.tensors import Array, Outputs, TensorSpec

_INSTALL = "Install it: pip install 'edge-sdk[cpu]'."
_DISTRIBUTIONS = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-qnn",
    "onnxruntime-rocm", "onnxruntime-migraphx", "onnxruntime-cann", "onnxruntime-training", "ort-nightly",
    "ort-nightly-gpu",
)  # fmt: skip
"""The names under which the module `onnxruntime` is published; NVIDIA's wheels for Jetson are `onnxruntime-gpu`."""

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

_SPIN_US = 5
"""How long a thread that waits for the others spins before it sleeps. Measured on two cores, MobileNetV2 INT8, back to
back: 2.8 ms where they sleep at once, 2.2 with 5 us, 2.1 without a limit. But without one two threads may spin on one
core while the other is busy, or has just woken up: then it takes 6.7 to 8.4 ms, where one thread takes 4.3, and with
5 us it takes 4.5."""
_SPINS_BRIEFLY = (1, 26)
"""The first release that knows such a limit. With older ones threads sleep."""

_BINDINGS_KEPT = 16
"""A serving loop has one set of arrays for each batch size it uses."""


class OnnxRuntimeBackend:
    name = "onnxruntime"
    compiles = False

    def availability(self) -> Availability:
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(None, "onnxruntime is not installed.", _INSTALL)
        return Availability(installed_version("onnxruntime", *_DISTRIBUTIONS))

    def can_build(self, profile: DeviceProfile, *, here: bool = False) -> Availability:
        return self.availability()

    def build(
        self, order: EngineOrder, folder: Path | None, *, progress: Progress = no_progress, considerate: bool = False
    ) -> None:
        return None

    def load(self, package: EnginePackage, profile: DeviceProfile) -> OnnxRuntimeEngine:
        """By its file, once that was checked: of bytes, onnxruntime's Python would keep a second copy for good."""
        options = package.onnxruntime_options(profile, processor())
        with package.lent(GRAPH, refuse_external_data) as file:
            return self._engine(str(file), profile.model_copy(update={"onnxruntime": options}))

    def load_graph(self, graph: bytes, profile: DeviceProfile) -> OnnxRuntimeEngine:
        refuse_external_data(graph)
        return self._engine(graph, profile)

    def _engine(self, graph: bytes | str, profile: DeviceProfile) -> OnnxRuntimeEngine:
        try:
            return OnnxRuntimeEngine(_session(graph, profile, _CPU))
        except ValueError as exc:  # TensorSpec's
            raise EngineFailed(f"onnxruntime cannot load the graph: {exc}.") from exc

    def load_on_cuda(self, graph: bytes, profile: DeviceProfile) -> OnnxRuntimeEngine:
        """The graph on onnxruntime's own way to an NVIDIA GPU: what TensorRT's engine is to be faster than.

        BackendUnavailable where that is not installed, or does not load.
        """
        refuse_external_data(graph)
        session = _session(graph, profile, _CUDA)
        if _CUDA not in session.get_providers():
            raise BackendUnavailable(
                "onnxruntime's CUDA provider is not to be had here.",
                fix="It is in onnxruntime-gpu, which takes the place of onnxruntime.",
            )
        return OnnxRuntimeEngine(session)


class OnnxRuntimeEngine:
    """An onnxruntime session, behind the Engine protocol."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = tuple(_spec(node) for node in session.get_inputs())
        self._outputs = tuple(_spec(node) for node in session.get_outputs())
        self._output_names = [spec.name for spec in self._outputs]
        self._speaks_text = any(spec.dtype == "string" for spec in (*self._inputs, *self._outputs))
        self._bindings: dict[tuple[object, ...], tuple[Any, tuple[Array, ...]]] = {}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    def infer(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> Outputs:
        if self._session is None:
            raise EngineFailed("This engine was closed; it cannot infer any more.", fix="Load the package again.")
        try:
            if self._speaks_text:
                return self._infer_text(feeds, out)
            if out is None:
                return dict(zip(self._output_names, self._session.run(self._output_names, dict(feeds))))
            self._session.run_with_iobinding(self._binding(feeds, out))
            return dict(out)
        except Exception as exc:
            raise _translated(exc) from exc

    @property
    def threads(self) -> int:
        return int(self._session.get_session_options().intra_op_num_threads)

    def twin(self) -> OnnxRuntimeEngine:
        """Over the same session, whose `run` any number of threads may call; bindings are one thread's alone."""
        return OnnxRuntimeEngine(self._session)

    def close(self) -> None:
        self._bindings.clear()
        self._session = None

    def _infer_text(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None) -> Outputs:
        """Strings are bytes to us and `str` to onnxruntime's Python API, which calls `str()` on anything else."""
        texts = {name: _mapped(array, _as_text) if array.dtype == object else array for name, array in feeds.items()}
        computed = self._session.run(self._output_names, texts)
        results = {
            name: _mapped(array, str.encode) if array.dtype == object else array
            for name, array in zip(self._output_names, computed)
        }
        if out is None:
            return results
        for name, array in out.items():
            np.copyto(array, results[name])
        return dict(out)

    def _binding(self, feeds: Mapping[str, Array], out: Mapping[str, Array]) -> Any:
        """A binding of exactly these arrays, kept: re-binding costs as much as running a small model."""
        arrays = (*feeds.values(), *out.values())
        key = (*feeds, *out, *map(id, arrays))
        if (kept := self._bindings.get(key)) is not None:
            return kept[0]
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in out.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        if len(self._bindings) >= _BINDINGS_KEPT:
            self._bindings.pop(next(iter(self._bindings)))
        self._bindings[key] = (binding, arrays)  # holding the arrays keeps their ids from being used again
        return binding


def preload() -> None:
    """Load the library, where it is installed."""
    if importlib.util.find_spec("onnxruntime") is not None:
        with contextlib.suppress(Exception):  # what is wrong with it is said when a graph is loaded
            import onnxruntime  # noqa: F401


def _session(graph: bytes | str, profile: DeviceProfile, provider: str) -> Any:
    try:
        import onnxruntime
    except ImportError as exc:
        raise BackendUnavailable(f"onnxruntime cannot be imported: {exc}.", fix=_INSTALL) from exc
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = profile.onnxruntime.intra_op_threads or physical_cores()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = {
        "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }[profile.onnxruntime.graph_optimization]
    spins = profile.onnxruntime.spinning and version_numbers(onnxruntime.__version__) >= _SPINS_BRIEFLY
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    options.add_session_config_entry("session.force_spinning_stop", "1")  # at the end of a run
    options.log_severity_level = 3  # errors; they reach us as exceptions anyway
    try:
        wanted = {provider: None, _CPU: None}  # the CPU's has what another one does not take
        there = [name for name in wanted if name in onnxruntime.get_available_providers()]
        return onnxruntime.InferenceSession(graph, options, providers=there)
    except Exception as exc:  # onnxruntime's exceptions share no base class
        raise EngineFailed(f"onnxruntime cannot load the graph: {_first_line(exc)}.") from exc


def _mapped(array: Array, convert: Callable[[Any], Any]) -> Array:
    mapped = np.empty(array.shape, dtype=object)
    mapped.ravel()[:] = [convert(element) for element in array.ravel()]
    return mapped


def _as_text(element: bytes | str) -> str:
    """onnxruntime's strings are UTF-8: bytes that are not raise UnicodeDecodeError, which becomes EngineFailed."""
    return element.decode("utf-8") if isinstance(element, bytes) else str(element)


def _spec(node: Any) -> TensorSpec:
    shape = tuple(axis if isinstance(axis, int) else (axis or "?") for axis in node.shape)
    return TensorSpec(node.name, _DTYPES.get(node.type, node.type), shape)


_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64",
    "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
    "tensor(bool)": "bool", "tensor(string)": "string",
}  # fmt: skip


def _translated(exc: Exception) -> Exception:
    """onnxruntime's exceptions share no base class and say what they mean in their text."""
    text = _first_line(exc)
    if "Failed to allocate memory" in str(exc) or isinstance(exc, MemoryError):
        return OutOfMemory("The device ran out of memory while it computed this.")
    return EngineFailed(f"onnxruntime could not run the graph: {text}.")


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip(".")[:400]
