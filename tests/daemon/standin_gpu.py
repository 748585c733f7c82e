"""`python -m tests.daemon.standin_gpu serve ...`: the real command line on a computer that seems to have an RTX 3060.

Only what needs a GPU is stood in for: what nvidia-smi and CUDA would say of it, and the act of opening an engine. The
stand-in opens real plans alone: it looks whether the bytes it is given are what TensorRT for RTX made of this package's
graph, and then computes that graph on onnxruntime. Building, signing, storing and finding engines is the real thing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edge_sdk.backends import cuda, registry
from edge_sdk.backends.base import Backend, Engine
from edge_sdk.backends.onnx_bytes import interface
from edge_sdk.backends.tensorrt import TensorRTBackend, facts
from edge_sdk.backends.tensorrt.backend import Opening
from edge_sdk.errors import EngineFailed
from edge_sdk.package import GRAPH, EnginePackage
from edge_sdk.profiles import DeviceProfile, Gpu, Machine

log = logging.getLogger("edge_sdk.standin_gpu")

NAME, COMPUTE_CAPABILITY, MEMORY_BYTES = "NVIDIA GeForce RTX 3060", "8.6", 12 << 30


def machine_with_gpu(real: Callable[..., Machine]) -> Callable[..., Machine]:
    """What /proc says of this computer, and what nvidia-smi would say with that card in it."""
    gpu = Gpu(NAME, COMPUTE_CAPABILITY, MEMORY_BYTES, "581.15")
    return lambda *, gpus=True: replace(real(gpus=False), gpus=(gpu,) if gpus else ())


def cuda_facts() -> cuda.Facts:
    """What CUDA would say of that card."""
    return cuda.Facts(NAME, COMPUTE_CAPABILITY, MEMORY_BYTES, False, "13.0")


class StandInBackend(TensorRTBackend):
    """The TensorRT backend, but for the moment in which a plan meets a GPU."""

    def __init__(self, store: Path | None) -> None:
        super().__init__(store, machine=facts.this_machine, gpu=cuda_facts, opener=self._open_stand_in)
        self._graph = b""

    def load(self, package: EnginePackage, profile: DeviceProfile) -> Engine:
        self._graph = package.read(GRAPH)
        return super().load(package, profile)

    def _open_stand_in(self, plan: Callable[[], bytes], opening: Opening) -> Engine:
        found = plan()
        names = [spec.name.encode() for side in interface(self._graph) for spec in side]
        if b"trt" not in found[:4] or any(name not in found for name in names):
            raise EngineFailed("The stand-in was given bytes that are no plan of this graph.")
        log.info("The stand-in took a plan of %d bytes.", len(found))
        return registry.backend("onnxruntime").load_graph(self._graph, opening.profile)


def stand_in(name: str, store: Path | None = None) -> Backend:
    return StandInBackend(store) if name == "tensorrt" else _BACKEND(name, store)


_BACKEND = registry.backend

if __name__ == "__main__":
    from edge_sdk.cli import main

    registry.backend = stand_in
    Machine.read = machine_with_gpu(Machine.read)  # type: ignore[method-assign]
    main(prog_name="edge-sdk")
