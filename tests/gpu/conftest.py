"""What the tests on a real GPU share: they are skipped, with the reason, where there is none.

    pytest tests/gpu -v

They need a CUDA binding and TensorRT, of whichever flavour; each test runs once for every flavour that is installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from onnx import ModelProto

from edge_sdk.backends import cuda
from edge_sdk.backends.base import EngineOrder
from edge_sdk.backends.tensorrt import api
from edge_sdk.backends.tensorrt.backend import TensorRTBackend
from edge_sdk.backends.tensorrt.executor import Options, TensorRTEngine, open_engine
from edge_sdk.backends.tensorrt.sidecar import PLAN
from edge_sdk.package import BatchingRecord
from edge_sdk.profiles import DeviceProfile, TensorRTOptions
from edge_sdk.spec import Axis
from tests import packages

FLAVOURS = ("tensorrt_rtx", "tensorrt")
MAX_BATCH = 8


@pytest.fixture(scope="session")
def gpu() -> Iterator[cuda.Device]:
    """The GPU, open for the whole session: so what engines give back can be told from what CUDA keeps for itself."""
    if (lacking := cuda.lacking()) is not None:
        pytest.skip(str(lacking))
    device = cuda.Device.open()
    yield device
    device.close()


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest, gpu: cuda.Device) -> str:
    if api.find(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


class Maker:
    """Builds engines for the GPU at hand, once for each graph and profile, and closes what it opened."""

    def __init__(self, flavour: str, folder: Path, gpu: cuda.Device) -> None:
        self.flavour = flavour
        self._backend = TensorRTBackend(folder / "store")
        self._folder = folder
        self._gpu = gpu
        self._plans: dict[tuple[object, ...], bytes] = {}
        self._opened = ExitStack()

    def profile(self, **options: object) -> DeviceProfile:
        """The tests' profile, with TensorRT's options for this GPU."""
        given = {"flavour": self.flavour, "compute_capabilities": [self._gpu.facts.compute_capability], **options}
        return packages.profile().model_copy(update={"tensorrt": TensorRTOptions.model_validate(given)})

    def plan(
        self, model: ModelProto, profile: DeviceProfile, axes: Mapping[str, Axis] = {}, *, here: bool = True
    ) -> bytes:
        """`here` False: what the profile says, such as a portable engine."""
        graph = model.SerializeToString()
        key = (graph, profile.model_dump_json(), tuple(axes), here)
        if key not in self._plans:
            folder = self._folder / str(len(self._plans))
            folder.mkdir()
            batching = BatchingRecord(max_batch=MAX_BATCH, best_batch=MAX_BATCH)
            order = EngineOrder(graph, packages.specs(model.graph.input), profile, batching, axes, here)
            self._backend.build(order, folder)
            self._plans[key] = (folder / PLAN).read_bytes()
        return self._plans[key]

    def engine(
        self,
        model: ModelProto,
        axes: Mapping[str, Axis] = {},
        *,
        options: Options = Options(),
        profile: DeviceProfile | None = None,
        here: bool = True,
    ) -> TensorRTEngine:
        chosen = profile or self.profile()
        plan = self.plan(model, chosen, axes, here=here)
        engine = open_engine(
            lambda: plan,
            api=api.open_api(self.flavour),
            profile=chosen,
            inputs=packages.specs(model.graph.input),
            outputs=packages.specs(model.graph.output),
            options=options,
        )
        self._opened.callback(engine.close)
        return engine

    def close(self) -> None:
        self._opened.close()


@pytest.fixture
def maker(flavour: str, tmp_path: Path, gpu: cuda.Device) -> Iterator[Maker]:
    made = Maker(flavour, tmp_path, gpu)
    yield made
    made.close()
