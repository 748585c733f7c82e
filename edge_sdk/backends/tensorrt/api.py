"""TensorRT's door: the one file that imports it, and the choice among its generations.

Whether TensorRT is installed is answered without loading it. Which generation it is, is seen from what it has, never
from its version: within 10 there is more difference than the number says. Each generation has an adapter, whose two
halves are in `compiling` and `running`, and each adapter a table in `names` of all that it asks of the module. A module
that lacks any of it is refused here, by name, rather than in the middle of a build.

    api = open_api("tensorrt_rtx")
    engine = api.deserialize(plan, graph=None)
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any, ClassVar

from edge_sdk.backends.base import UNKNOWN_VERSION, installed_version
from edge_sdk.backends.tensorrt import names
from edge_sdk.backends.tensorrt.compiling import Compiling, Compiling8, Compiling10, Compiling11, CompilingRtx
from edge_sdk.backends.tensorrt.logs import Said, logger
from edge_sdk.backends.tensorrt.running import Running, Running8, Running10, RunningRtx
from edge_sdk.errors import BackendUnavailable

_DISTRIBUTIONS = {
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-bindings"),
}
"""The names under which each module is published; JetPack's own package calls itself `tensorrt`."""

_INSTALL = {
    "tensorrt_rtx": "Install it: pip install 'edge-sdk[rtx]'.",
    "tensorrt": "On a Jetson it comes with JetPack: apt install python3-libnvinfer, for the system's Python, which a "
    "virtual environment sees with --system-site-packages. On a server: pip install tensorrt.",
}


class Api(Compiling, Running):
    """One installed TensorRT, of any generation."""

    generation: ClassVar[str]
    names: ClassVar[names.Names]

    def __init__(self, trt: Any, flavour: str, version: str) -> None:
        self.trt = trt
        self.flavour = flavour
        self.version = version
        self.said = Said()
        self.logger = logger(trt, self.said)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.flavour} {self.version})"


class Api8(Compiling8, Running8, Api):
    generation = "8.6"
    names = names.TENSORRT_8


class Api10(Compiling10, Running10, Api):
    generation = "10"
    names = names.TENSORRT_10


class Api11(Compiling11, Running10, Api):
    generation = "11"
    names = names.TENSORRT_11


class ApiRtx(CompilingRtx, RunningRtx, Api):
    generation = "rtx"
    names = names.TENSORRT_RTX


ADAPTERS = (Api8, Api10, Api11, ApiRtx)


def find(flavour: str) -> str | None:
    """The installed version of `tensorrt` or `tensorrt_rtx`, found without importing it; None: not installed."""
    spec = importlib.util.find_spec(flavour)
    if spec is None or spec.origin is None:  # the latter is any folder of that name, such as a checkout
        return None
    return installed_version(flavour, *_DISTRIBUTIONS[flavour])


@functools.cache
def open_api(flavour: str) -> Api:
    """The adapter for the TensorRT that is installed here; the same one each time, since a process has one logger.

    Its version is the one that `find` gives, so that what is recorded with a plan can be compared without loading it.
    BackendUnavailable says what to install, what kept it from being imported, or what it lacks.
    """
    if (version := find(flavour)) is None:
        raise BackendUnavailable(f"{flavour} is not installed.", fix=_INSTALL[flavour])
    try:
        trt: Any = _imported(flavour)
        if version == UNKNOWN_VERSION:
            version = str(trt.__version__)
    except Exception as exc:  # an ImportError, the loader's OSError, or whatever else an installation does on import
        raise BackendUnavailable(
            f"{flavour} is installed and cannot be imported: {exc or type(exc).__name__}.",
            fix=f"Its module and its libraries have to be of one version. {_INSTALL[flavour]}",
        ) from exc
    adapter = adapter_for(trt)
    if lacking := names.lacking(trt, adapter.names.required):
        raise BackendUnavailable(
            f"{flavour} {version} lacks {', '.join(lacking[:5])}{' and more' if len(lacking) > 5 else ''}, "
            f"of what edge-sdk uses of generation {adapter.generation}.",
            fix="Use TensorRT 8.6, 10.3 or later, 11, or TensorRT for RTX 1.7.",
        )
    return adapter(trt, flavour, version)


def adapter_for(trt: Any) -> type[Api]:
    """The adapter for a module of TensorRT's, chosen by what it has."""
    if hasattr(trt, "ComputeCapability"):
        return ApiRtx
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return Api8
    if hasattr(trt.BuilderFlag, "INT8"):
        return Api10
    return Api11


def _imported(flavour: str) -> ModuleType:
    if flavour == "tensorrt_rtx":
        import tensorrt_rtx

        return tensorrt_rtx  # type: ignore[no-any-return]  # it is not there for mypy
    import tensorrt

    return tensorrt  # type: ignore[no-any-return]  # nor is this one
