"""Everything that each adapter asks of TensorRT's module, as the names that have to be in it.

A vendor renames and removes; an adapter that uses a name which is gone fails in the middle of a build, or of a request.
So the names are listed here, and a module that lacks one is refused as it is opened. Tests hold the lists to be exactly
what `compiling` and `running` use, and hold them against the real bindings of every generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Names:
    """The names of one adapter, as `Class.attribute`."""

    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    """Those that only some releases of the generation have, and that are looked for before they are used."""
    not_in_rtx: frozenset[str] = frozenset()
    """Those among `required` that TensorRT for RTX does not have. All others can be held against it: it is the one
    TensorRT that is installed wherever there is no GPU."""


def lacking(trt: Any, required: frozenset[str]) -> tuple[str, ...]:
    """Those of the names that the module `trt` does not have."""
    return tuple(sorted(name for name in required if not _has(trt, name)))


def _has(module: Any, dotted: str) -> bool:
    place = module
    for part in dotted.split("."):
        if not hasattr(place, part):
            return False
        place = getattr(place, part)
    return True


def _names(**classes: str) -> frozenset[str]:
    """Class -> its attributes, separated by blanks."""
    return frozenset(
        dotted
        for name, attributes in classes.items()
        for dotted in (name, *(f"{name}.{a}" for a in attributes.split()))
    )


_COMPILING = _names(
    Builder="build_serialized_network create_builder_config create_network create_optimization_profile num_DLA_cores",
    BuilderFlag="GPU_FALLBACK SPARSE_WEIGHTS",
    DeviceType="DLA",
    ErrorCode="name",
    IBuilderConfig="DLA_core add_optimization_profile builder_optimization_level can_run_on_DLA create_timing_cache "
    "default_device_type get_timing_cache max_aux_streams set_flag set_memory_pool_limit set_timing_cache",
    ILayer="name type",
    ILogger="Severity",
    INetworkDefinition="get_input get_layer num_inputs num_layers",
    IOptimizationProfile="set_shape",
    ITensor="is_shape_tensor name shape",
    ITimingCache="serialize",
    LayerType="name",
    MemoryPoolType="WORKSPACE",
    OnnxParser="get_error num_errors parse",
    ParserError="code desc node",
)

_RUNNING = _names(
    DataType="name",
    ICudaEngine="get_tensor_dtype get_tensor_location get_tensor_mode get_tensor_name get_tensor_profile_shape "
    "get_tensor_shape num_io_tensors",
    IExecutionContext="execute_async_v3 get_max_output_size get_tensor_shape set_input_shape set_tensor_address",
    Runtime="deserialize_cuda_engine",
    TensorIOMode="INPUT",
    TensorLocation="HOST",
)

_COMPATIBLE = _names(
    BuilderFlag="VERSION_COMPATIBLE",
    HardwareCompatibilityLevel="",
    IBuilderConfig="hardware_compatibility_level",
    Runtime="engine_host_code_allowed",
)
"""Plans for other versions or other GPUs, in the way of `tensorrt`."""

_WEAKLY_TYPED = _names(
    BuilderFlag="FP16 INT8 OBEY_PRECISION_CONSTRAINTS",
    DataType="FLOAT",
    ILayer="get_output num_outputs precision set_output_type",
    ITensor="dtype",
    NetworkDefinitionCreationFlag="EXPLICIT_BATCH",
    OnnxParser="set_flag",
    OnnxParserFlag="NATIVE_INSTANCENORM",
)

_STRONGLY_TYPED = _names(NetworkDefinitionCreationFlag="STRONGLY_TYPED")

_CONTEXTS_8 = _names(
    IBuilderConfig="set_preview_feature",
    ICudaEngine="create_execution_context_without_device_memory device_memory_size",
    IExecutionContext="active_optimization_profile device_memory",
    PreviewFeature="PROFILE_SHARING_0806",
)

_SINCE_10 = _names(
    BuilderFlag="STRIP_PLAN WEIGHT_STREAMING",
    ExecutionContextAllocationStrategy="USER_MANAGED",
    IBuilderConfig="progress_monitor",
    ICudaEngine="create_execution_context device_memory_size_v2 streamable_weights_size weight_streaming_budget_v2",
    IExecutionContext="set_device_memory",
    IProgressMonitor="",
    OnnxParserRefitter="refit_from_bytes",
    ParserError="node_name node_operator",
    Refitter="refit_cuda_engine",
)

_RTX = _names(
    ComputeCapability="",
    CudaGraphStrategy="DISABLED WHOLE_GRAPH_CAPTURE",
    IBuilderConfig="num_compute_capabilities set_compute_capability",
    ICudaEngine="create_runtime_config",
    IRuntimeConfig="cuda_graph_strategy set_execution_context_allocation_strategy",
)

_ALL = _COMPILING | _RUNNING

TENSORRT_8 = Names(
    required=_ALL | _COMPATIBLE | _WEAKLY_TYPED | _CONTEXTS_8,
    not_in_rtx=frozenset({
        "BuilderFlag.FP16", "BuilderFlag.INT8", "BuilderFlag.OBEY_PRECISION_CONSTRAINTS",
        "ICudaEngine.create_execution_context_without_device_memory", "ICudaEngine.device_memory_size",
        "ILayer.precision", "ILayer.set_output_type", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
        "PreviewFeature.PROFILE_SHARING_0806",
    }),
)  # fmt: skip
TENSORRT_10 = Names(
    required=_ALL | _COMPATIBLE | _STRONGLY_TYPED | _SINCE_10,
    optional=frozenset({"HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"}),
)
TENSORRT_11 = Names(required=_ALL | _COMPATIBLE | _SINCE_10)
TENSORRT_RTX = Names(required=_ALL | _STRONGLY_TYPED | _SINCE_10 | _RTX)
