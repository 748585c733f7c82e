"""A stand-in for a backend that compiles engines, with no GPU and no TensorRT: it is put at the registry's seam.

A build takes as long as the test says and leaves an entry in the store; with that entry, the package's graph runs on
onnxruntime under another backend's name. So a service can be shown every turn that a build may take.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from edge_sdk.backends import registry
from edge_sdk.backends.base import Availability, Backend, Engine, EngineOrder, Progress, no_progress
from edge_sdk.errors import EdgeSdkError, EngineFailed, EngineUnfit
from edge_sdk.package import GRAPH, EnginePackage
from edge_sdk.profiles import DeviceProfile
from edge_sdk.tensors import Array, Outputs
from tests.packages import graph, make_package, scaling

PROFILE = "desktop-rtx-30"
"""A device whose engines are compiled, and whose second-best backend is onnxruntime."""


def package_to_compile(folder: Path, factor: float = 2.0, **fields: object) -> EnginePackage:
    """A package that prefers an engine which it does not hold."""
    return make_package(folder, scaling(factor), backend="tensorrt", profile=PROFILE, **fields)  # type: ignore[arg-type]


def shifting() -> ModelProto:
    """y = x + 1, float32: what zeros tell from a scaling."""
    nodes = [helper.make_node("Add", ["x", "one"], ["y"])]
    row = (TensorProto.FLOAT, ("batch", 4))
    return graph(nodes, {"x": row}, {"y": row}, {"one": np.array(1, np.float32)})


class StandInBrokenEngine:
    """Loads like another, and fails whenever it is asked."""

    def __init__(self, engine: Engine) -> None:
        self.inputs, self.outputs, self.close = engine.inputs, engine.outputs, engine.close

    def infer(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> Outputs:
        raise EngineFailed("The stand-in cannot compute.")


class StandInCompiler:
    """`install` makes it the backend `tensorrt` of one test. What it did is in `builds` and `cancelled`."""

    name = "tensorrt"
    compiles = True

    def __init__(self, store: Path, *, before_step: Callable[[], None] = lambda: None) -> None:
        """`before_step` is called before each report of a build's progress."""
        self.store = store
        self.version = "stand-in"
        self.steps: Sequence[float] = [n / 10 for n in range(11)]
        self.fails: BaseException | None = None
        """What a build ends with."""
        self.turns_into: Callable[[bytes], bytes] = lambda graph: graph
        """What is made of the graph on the way: a compiler's defect."""
        self.runs_into: EdgeSdkError | None = None
        """What loading an engine ends with."""
        self.once_kept: Callable[[], None] = lambda: None
        """What happens between the moment that an engine lies in the store and the end of its build."""
        self.computes = True
        """Whether the engines that were loaded compute anything."""
        self.builds: list[EngineOrder] = []
        self.cancelled = 0
        self.at_once = 0
        self.most_at_once = 0
        self._before_step = before_step
        self._going_on = threading.Event()
        self._going_on.set()
        self._lock = threading.Lock()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        others = registry.backend

        def backend(name: str, store: Path | None = None) -> Backend:
            return self if name == self.name else others(name, store)

        patch.setattr(registry, "backend", backend)

    def hold(self) -> None:
        """Builds wait, before their next step."""
        self._going_on.clear()

    def go_on(self) -> None:
        self._going_on.set()

    def availability(self) -> Availability:
        return Availability(self.version)

    def can_build(self, profile: DeviceProfile, *, here: bool = False) -> Availability:
        return self.availability()

    def build(
        self, order: EngineOrder, folder: Path | None, *, progress: Progress = no_progress, considerate: bool = False
    ) -> None:
        with self._lock:
            self.builds.append(order)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            for done in self.steps:
                self._going_on.wait(20.0)
                self._before_step()
                progress(done)
            if self.fails is not None:
                raise self.fails
        except Exception as exc:
            self.cancelled += exc is not self.fails
            raise
        finally:
            with self._lock:
                self.at_once -= 1
        entry = self.entry(order.graph_sha256)
        entry.mkdir(parents=True)
        (entry / "engine.plan").write_bytes(self.turns_into(order.graph))
        self.once_kept()

    def entry(self, graph_sha256: str) -> Path:
        return self.store / f"{graph_sha256[:32]}-{'0' * 16}"

    def load(self, package: EnginePackage, profile: DeviceProfile) -> Engine:
        entry = self.entry(package.manifest.files[GRAPH].sha256)
        if not entry.is_dir():
            raise EngineUnfit(f"There is no engine for {package.name}.", reasons=())
        if self.runs_into is not None:
            raise self.runs_into
        engine = self.load_graph((entry / "engine.plan").read_bytes(), profile)
        return engine if self.computes else StandInBrokenEngine(engine)

    def load_graph(self, graph: bytes, profile: DeviceProfile) -> Engine:
        return registry.backend("onnxruntime").load_graph(graph, profile)


BROKEN = EngineFailed("The compiler met its end in a layer.")
