"""What the tests of the build side share: orders, and builds of them with the real tensorrt_rtx."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_sdk.backends.onnx_bytes import interface
from edge_sdk.backends.tensorrt.process import Plan, PlanOrder, compile_plan
from edge_sdk.backends.tensorrt.shapes import shape_ranges
from edge_sdk.package import BatchingRecord
from edge_sdk.profiles import TensorRTOptions

BATCHING = BatchingRecord(max_batch=8, best_batch=4)


def order_for(graph: bytes, *targets: str, **wishes: Any) -> PlanOrder:
    """A plan of `graph` for these compute capabilities; `wishes` are the profile's [tensorrt]."""
    options = TensorRTOptions.model_validate(
        {"flavour": "tensorrt_rtx", "compute_capabilities": targets or ("8.6",), **wishes}
    )
    return PlanOrder(options.flavour, targets, options, shape_ranges(interface(graph)[0], BATCHING, {}))


def build(
    graph: bytes,
    folder: Path,
    *targets: str,
    progress: Callable[[float], None] = lambda done: None,
    considerate: bool = False,
    **wishes: Any,
) -> Plan:
    order = order_for(graph, *targets, **wishes)
    return compile_plan(graph, order, folder, progress=progress, considerate=considerate)
