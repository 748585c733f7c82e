"""An engine for an order: shapes -> compiled plan -> signed sidecar, in a folder of the caller's.

`Recipe` is all that the engine depends on, so its name in the store is made from it; `make_engine` follows it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edge_sdk.backends.base import EngineOrder, Progress
from edge_sdk.backends.tensorrt import facts
from edge_sdk.backends.tensorrt.shapes import ShapeRange, shape_ranges
from edge_sdk.backends.tensorrt.sidecar import SIDECAR, Here, ShapesRecord, Sidecar, encode, signed
from edge_sdk.backends.tensorrt.store import EngineStore, entry_name
from edge_sdk.package import EngineRecord, file_sha256
from edge_sdk.profiles import TensorRTOptions

RTX_TARGETS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""The compute capabilities that TensorRT for RTX compiles for by name; every other GPU gets a portable engine."""


@dataclass(frozen=True)
class Recipe:
    """What an engine is made from, and for which GPU."""

    order: EngineOrder
    options: TensorRTOptions
    here: Here
    """The machine it is made on; for `tensorrt` also the one that it is for."""
    shapes: Mapping[str, ShapeRange]
    targets: tuple[str, ...]
    """Compute capabilities. None of them: the GPU at hand, or whatever TensorRT for RTX calls portable."""

    @classmethod
    def of(cls, order: EngineOrder, options: TensorRTOptions, here: Here) -> Recipe:
        """ModelError if a free axis of the graph has no range."""
        return cls(
            order, options, here, shape_ranges(order.inputs, order.batching, order.axes), _targets(order, options, here)
        )

    @property
    def is_for_gpu_at_hand(self) -> bool:
        return self.options.flavour == "tensorrt"

    @property
    def name(self) -> str:
        """Of the engine in a store."""
        return entry_name(
            self.order.graph_sha256,
            flavour=self.options.flavour,
            version=self.here.version,
            gpu=self.here.gpu if self.is_for_gpu_at_hand else None,
            targets=self.targets,
            options=self.options.model_dump(mode="json"),
            shapes={name: vars(sizes) for name, sizes in self.shapes.items()},
        )


def make_engine(
    recipe: Recipe, folder: Path, store: EngineStore, *, progress: Progress, considerate: bool
) -> EngineRecord:
    """Compile into `folder`, which then holds the plan and its sidecar and nothing else of the build.

    Raises what `compile_plan` raises, and BackendUnavailable if the store has no key to sign with.
    """
    from edge_sdk.backends.tensorrt.process import PlanOrder, compile_plan

    key = store.key()  # before the minutes that a build takes
    order, options, here = recipe.order, recipe.options, recipe.here
    timing_cache = None
    if recipe.is_for_gpu_at_hand and options.timing_cache:
        timing_cache = store.timing_cache(version=here.version or "", gpu=here.gpu or "")
    wanted = PlanOrder(options.flavour, recipe.targets, options, recipe.shapes, timing_cache)
    compiled = compile_plan(order.graph, wanted, folder, progress=progress, considerate=considerate)
    sidecar = Sidecar(
        flavour=options.flavour,
        version=compiled.version,
        cuda=facts.cuda_release(options.flavour),
        profile=order.profile.name,
        settings=_recorded(compiled.settings),
        shapes={name: ShapesRecord(**vars(sizes)) for name, sizes in recipe.shapes.items()},
        graph_sha256=order.graph_sha256,
        plan_sha256=file_sha256(compiled.file),
        plan_bytes=compiled.file.stat().st_size,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **_fitting(recipe),
    )
    (folder / SIDECAR).write_bytes(encode(signed(sidecar, key)))
    return EngineRecord(
        file=compiled.file.name,
        sidecar=SIDECAR,
        bytes=sidecar.plan_bytes,
        seconds=compiled.seconds,
        peak_bytes=compiled.peak_bytes,
        notes=compiled.notes,
    )


def _fitting(recipe: Recipe) -> dict[str, Any]:
    """What the engine fits. What `tensorrt` was built on matters to it; TensorRT for RTX asks nothing of a GPU."""
    if not recipe.is_for_gpu_at_hand:
        return {"compute_capabilities": recipe.targets, "portable": not recipe.targets}
    here, options = recipe.here, recipe.options
    return {
        "compute_capabilities": (here.compute_capability,) if here.compute_capability is not None else (),
        "gpu": here.gpu,
        "driver": here.driver,
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
    }


def _targets(order: EngineOrder, options: TensorRTOptions, here: Here) -> tuple[str, ...]:
    if options.flavour == "tensorrt":
        return ()
    if order.here:
        return (here.compute_capability,) if here.compute_capability in RTX_TARGETS else ()
    return () if options.portable else options.compute_capabilities


def _recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The builder's settings as a sidecar can hold them: plain values, and lists of them."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float)):
            return value
        text = value if isinstance(value, str) else json.dumps(value)
        return "".join(letter if " " <= letter <= "~" else "?" for letter in text)[:200]

    return {
        plain(str(name)): tuple(map(plain, value)) if isinstance(value, (list, tuple)) else plain(value)
        for name, value in settings.items()
    }
