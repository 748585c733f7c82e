"""The seam's two acts, build and load, for TensorRT."""

from __future__ import annotations

from pathlib import Path

from edge_sdk.backends.base import Availability, Engine, EngineOrder, Progress, no_progress
from edge_sdk.errors import BackendUnavailable
from edge_sdk.package import EnginePackage, EngineRecord
from edge_sdk.profiles import DeviceProfile


class TensorRTBackend:
    name = "tensorrt"
    compiles = True

    def __init__(self, store: Path | None = None) -> None:
        self._store = store

    def availability(self) -> Availability:
        return Availability(None, "TensorRT has no executor yet.")

    def can_build(self, profile: DeviceProfile) -> Availability:
        return Availability(None, "TensorRT has no builder yet.")

    def build(
        self, order: EngineOrder, folder: Path | None, *, progress: Progress = no_progress, considerate: bool = False
    ) -> EngineRecord:
        raise BackendUnavailable("TensorRT has no builder yet.")

    def load(self, package: EnginePackage, profile: DeviceProfile) -> Engine:
        raise BackendUnavailable("TensorRT has no executor yet.")

    def load_graph(self, graph: bytes, profile: DeviceProfile) -> Engine:
        raise BackendUnavailable("TensorRT has no executor yet.")
