"""edge-sdk: from an ONNX model to a fast engine on a device, and from an MQTT request to an answer.

    import edge_sdk

    package = edge_sdk.build_engine("engines/digits")
    with edge_sdk.load_engine(package) as engine:
        outputs = engine.infer({"image": array})

    with edge_sdk.Client("mqtt://localhost") as client:
        print(client.infer("digits", "photo.png").predictions)

Importing this module loads no vendor library; each name below is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edge_sdk.compile.pipeline import build_engine
    from edge_sdk.engine import LoadedEngine, load_engine
    from edge_sdk.errors import EdgeSdkError
    from edge_sdk.mqtt.access import BrokerAccess
    from edge_sdk.mqtt.client import Client
    from edge_sdk.package import EnginePackage

__all__ = [
    "build_engine", "load_engine", "Client", "BrokerAccess", "EnginePackage", "LoadedEngine", "EdgeSdkError",
    "__version__",
]  # fmt: skip

_HOMES = {
    "build_engine": "edge_sdk.compile.pipeline",
    "load_engine": "edge_sdk.engine",
    "LoadedEngine": "edge_sdk.engine",
    "Client": "edge_sdk.mqtt.client",
    "BrokerAccess": "edge_sdk.mqtt.access",
    "EnginePackage": "edge_sdk.package",
    "EdgeSdkError": "edge_sdk.errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'edge_sdk' has no attribute {name!r}")
