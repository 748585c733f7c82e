"""Graph -> plan, in this process: parse, configure, compile.

It takes minutes and gigabytes, and a defect of TensorRT's ends the process. So this runs in one of its own, `child`,
which `process` starts and watches.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from edge_sdk.backends import cuda
from edge_sdk.backends.onnx_bytes import refuse_external_data
from edge_sdk.backends.tensorrt.api import Api, open_api
from edge_sdk.backends.tensorrt.compiling import Draft
from edge_sdk.backends.tensorrt.phases import Phases
from edge_sdk.backends.tensorrt.refusals import Fault, Refused, as_model_error
from edge_sdk.backends.tensorrt.shapes import ShapeRange
from edge_sdk.profiles import TensorRTOptions

_NOT_THE_BUILDERS = {"flavour", "compute_capabilities", "portable", "build_memory_bytes", "build_time_s"}
"""Options that do not change what comes out: the first three are in the order's targets."""

Setting: TypeAlias = "bool | int | float | str | tuple[str, ...] | None"


@dataclass(frozen=True)
class PlanOrder:
    """What a plan is compiled for."""

    flavour: str
    targets: tuple[str, ...]
    """Compute capabilities, as "8.6". None of them: tensorrt_rtx's portable default; `tensorrt` builds for the GPU at
    hand, and takes none."""
    options: TensorRTOptions
    shapes: Mapping[str, ShapeRange]
    """By input."""
    timing_cache: Path | None = None
    """Where `tensorrt` keeps what it measured, for the next build. Never used for tensorrt_rtx."""


@dataclass(frozen=True)
class Compiled:
    """A plan, and how it came to be."""

    plan: memoryview
    version: str
    settings: Mapping[str, Setting]
    """As they were used."""
    notes: tuple[str, ...]


def compiled(graph: bytes, order: PlanOrder, progress: Callable[[float], None]) -> Compiled:
    """The plan for `order`, made from an ONNX graph.

    Raises ModelError where TensorRT does not take the graph, ProfileError where it cannot do what the order asks,
    EngineFailed where it fails, BackendUnavailable where it is not to be had.
    """
    refuse_external_data(graph)
    api = open_api(order.flavour)
    options = order.options
    api.refuse(options, order.targets, gpu=not options.strip_weights or cuda.lacking() is None)
    draft = _drafted(api, graph, options)
    notes = [*_configured(api, draft, order)]
    notes += _with_timing_cache(api, draft, order)
    plan = _watched(api, draft, progress)
    notes += _keep_timing_cache(api, draft, order)
    return Compiled(plan, api.version, _settings(api, order), tuple(notes))


def _drafted(api: Api, graph: bytes, options: TensorRTOptions) -> Draft:
    def fault_in(part: bytes) -> Fault | None:
        try:
            api.draft(part, options)
        except Refused as exc:
            return exc.fault
        return None

    try:
        return api.draft(graph, options)
    except Refused as exc:
        raise as_model_error(graph, exc.fault, fault_in, f"{api.flavour} {api.version}") from exc


def _configured(api: Api, draft: Draft, order: PlanOrder) -> tuple[str, ...]:
    """Notes on what the device does not take."""
    api.set_shapes(draft, order.shapes)
    api.set_effort(draft, order.options)
    api.set_modes(draft, order.options, order.targets)
    return api.set_dla(draft, order.options.dla_cores) if order.options.dla_cores else ()


def _watched(api: Api, draft: Draft, progress: Callable[[float], None]) -> memoryview:
    phases = Phases(progress)
    monitor = api.watch(draft, phases)
    plan = api.compile(draft)
    del monitor  # TensorRT's side of it ends with the draft; ours has to live until here
    return plan


def _settings(api: Api, order: PlanOrder) -> dict[str, Setting]:
    """What was asked of the builder, flat, for the record beside the plan."""
    options = order.options.model_dump(mode="json", exclude=_NOT_THE_BUILDERS)
    options["timing_cache"] = _timing_cache(order) is not None
    return {
        "generation": api.generation,
        "targets": order.targets or ("portable" if order.flavour == "tensorrt_rtx" else "this GPU"),
        **options,
    }


def _timing_cache(order: PlanOrder) -> Path | None:
    """Where to keep measurements, if at all: a timing cache breaks RTX builds without a GPU (its documentation)."""
    return order.timing_cache if order.options.timing_cache and order.flavour == "tensorrt" else None


def _with_timing_cache(api: Api, draft: Draft, order: PlanOrder) -> list[str]:
    if (file := _timing_cache(order)) is None:
        return []
    try:
        measured = file.read_bytes()
    except FileNotFoundError:
        measured = b""
    except OSError as exc:
        api.load_timing_cache(draft, b"")
        return [f"The timing cache {file} cannot be read ({exc.strerror or exc}): everything is measured anew."]
    if api.load_timing_cache(draft, measured):
        return []
    api.load_timing_cache(draft, b"")
    return [f"TensorRT does not take the timing cache {file}: everything is measured anew."]


def _keep_timing_cache(api: Api, draft: Draft, order: PlanOrder) -> list[str]:
    """A build that cannot keep its measurements is no worse for it."""
    if (file := _timing_cache(order)) is None or not (measured := api.timing_cache(draft)):
        return []
    staged = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        staged.write_bytes(measured)
        staged.replace(file)
    except OSError as exc:
        staged.unlink(missing_ok=True)
        return [f"The timing cache {file} cannot be written ({exc.strerror or exc})."]
    return []
