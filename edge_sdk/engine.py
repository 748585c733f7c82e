"""An engine in your own process: the package opened, checked, loaded, and asked with plain arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from edge_sdk.backends.registry import Loaded
from edge_sdk.backends.registry import load_engine as load_with_backend
from edge_sdk.package import EnginePackage
from edge_sdk.tensors import Array, Outputs, TensorSpec, check_feeds


class LoadedEngine:
    """An engine that checks what it is given; a context manager.

    >>> with edge_sdk.load_engine("engines/digits/build/cpu-x86") as engine:
    ...     engine.infer({"image": images})["probabilities"]
    """

    def __init__(self, package: EnginePackage, loaded: Loaded) -> None:
        self.package = package
        self.backend = loaded.backend
        """What runs it: `tensorrt`, `onnxruntime`."""
        self.second_best = loaded.second_best
        """Why that is not the backend the package prefers; empty if it is."""
        self._engine = loaded.engine

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of each input."""
        return self._engine.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of each output."""
        return self._engine.outputs

    def infer(self, feeds: Mapping[str, Any]) -> Outputs:
        """Every output, by name, from one array per input. The arrays given back are the caller's to keep.

        Shapes and dtypes are those of `inputs`, in either byte order; an axis with a name may have any size. Raises
        InvalidTensor if an array does not fit, EngineFailed if the runtime fails, OutOfMemory if it ran out of memory.
        """
        arrays = {name: _native(np.asarray(array, order="C")) for name, array in feeds.items()}
        check_feeds(arrays, self.inputs)
        return self._engine.infer(arrays)

    def close(self) -> None:
        """Give the memory back; `infer` raises EngineFailed from then on."""
        self._engine.close()

    def __enter__(self) -> LoadedEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LoadedEngine {self.package} on {self.backend}>"


def load_engine(package: EnginePackage | str | os.PathLike[str]) -> LoadedEngine:
    """Load the engine of a package (or of the package in that directory), every file checked against its digest.

    Where the package prefers a backend that has no engine for this machine, its graph runs with the next one; what runs
    it, and why, are `backend` and `second_best`.

    Raises PackageError if it is no package or was altered, PackageMismatch if it does not fit this machine,
    BackendUnavailable if the runtime it needs is not installed, EngineFailed if the runtime refuses it.
    """
    opened = package if isinstance(package, EnginePackage) else EnginePackage.open(package)
    opened.verify()
    return LoadedEngine(opened, load_with_backend(opened))


def _native(array: Array) -> Array:
    """Runtimes are given an address, and take what lies there for numbers in this machine's byte order."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)
