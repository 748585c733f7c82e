"""The half of TensorRT that makes plans, for each generation of its API: 8.6, 10, 11 and TensorRT for RTX.

`Compiling` has what all generations share; a subclass is exactly what differs. Precision is in the graph - Q/DQ nodes
for INT8, FP16 tensors - and networks are typed strongly, so that nothing is computed in another one. 8.6 cannot be:
there the precisions that occur in the graph are allowed, and the layers that are FP32 in it held to that.

Whatever is asked of the vendor's module is written out - as `self.trt.Name`, or as an attribute of something annotated
with a class of `vendor` - and listed in `names`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_sdk.backends.tensorrt import logs
from edge_sdk.backends.tensorrt.logs import NEEDS_GPU
from edge_sdk.backends.tensorrt.phases import Phases
from edge_sdk.backends.tensorrt.refusals import STILL_RUNS, Fault, Refused, fallback_notes
from edge_sdk.backends.tensorrt.shapes import ShapeRange
from edge_sdk.backends.tensorrt.vendor import (
    Builder,
    DataType,
    ErrorCode,
    IBuilderConfig,
    IHostMemory,
    ILayer,
    INetworkDefinition,
    IOptimizationProfile,
    ITensor,
    ITimingCache,
    LayerType,
    OnnxParser,
    ParserError,
)
from edge_sdk.errors import EngineFailed, ModelError, ProfileError
from edge_sdk.profiles import TensorRTOptions

_ADVICE = {
    "FP32 GEMM is not supported": "Build it in FP16 or INT8: on Turing, tensorrt_rtx multiplies no FP32 matrices.",
    "workspace limit": "Raise workspace_bytes in the profile's [tensorrt] table.",
    "out of memory": "Give the build more of the GPU's memory: stop what else is using it, or lower workspace_bytes.",
}
"""What TensorRT says when it gives up -> what helps."""

_HARDWARE = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class Draft:
    """A network on its way to a plan. Its weights are the parser's memory, so they live and die together."""

    builder: Builder
    network: INetworkDefinition
    parser: OnnxParser
    config: IBuilderConfig


class Compiling(ABC):
    """A draft, the steps that configure it, and `compile`."""

    trt: Any
    flavour: str
    version: str
    said: logs.Said
    logger: Any

    def refuse(self, options: TensorRTOptions, targets: Sequence[str], *, gpu: bool) -> None:
        """Raise ProfileError if this TensorRT cannot do what is asked; `gpu`: whether this machine has one."""
        if reasons := self._impossible(options, targets, gpu):
            raise ProfileError(
                f"{self.flavour} {self.version} cannot do what the profile asks: {'; '.join(reasons)}.",
                fix="Change it in the profile's [tensorrt] table, or in engine.toml's.",
            )

    def _impossible(self, options: TensorRTOptions, targets: Sequence[str], gpu: bool) -> list[str]:
        reasons = []
        if targets:
            reasons.append(f"compute capabilities {', '.join(targets)}, it builds for the GPU at hand only")
        if options.portable:
            reasons.append('portable, which only tensorrt_rtx has; here it is hardware_compatible = "ampere-plus"')
        level = _HARDWARE.get(options.hardware_compatible)
        if level is not None and not hasattr(self.trt.HardwareCompatibilityLevel, level):
            reasons.append(f'hardware_compatible = "{options.hardware_compatible}", which came with a later release')
        return reasons

    def draft(self, graph: bytes, options: TensorRTOptions) -> Draft:
        """The network of an ONNX graph, with an untouched configuration.

        Raises Refused where the parser stops, EngineFailed where TensorRT does not even begin.
        """
        self.said.clear()
        try:
            builder: Builder = self.trt.Builder(self.logger)
        except Exception as exc:  # the bindings' TypeError: TensorRT made none
            raise EngineFailed(
                f"{self.flavour} {self.version} makes no builder; it says: {self.said}.",
                fix=NEEDS_GPU,
            ) from exc
        network: INetworkDefinition = self.new_network(builder)
        parser: OnnxParser = self.new_parser(network, options)
        if not parser.parse(graph):
            raise Refused(self._fault(parser))
        return Draft(builder, network, parser, builder.create_builder_config())

    @abstractmethod
    def new_network(self, builder: Builder) -> INetworkDefinition:
        """An empty network in which every tensor has the type that the graph gives it, as far as that can be."""

    def new_parser(self, network: INetworkDefinition, options: TensorRTOptions) -> OnnxParser:
        """A parser that fills `network`."""
        return self.trt.OnnxParser(network, self.logger)

    def _fault(self, parser: OnnxParser) -> Fault:
        """The parser's first error; the ones after it follow from it."""
        if not parser.num_errors:
            return Fault("", -1, "", "", str(self.said))
        error: ParserError = parser.get_error(0)
        code: ErrorCode = error.code()
        name, operator = self.node_of(error)
        return Fault(str(code.name), int(error.node()), name, operator, logs.readable([error.desc()]))

    @abstractmethod
    def node_of(self, error: ParserError) -> tuple[str, str]:
        """The name and the operator of the node that an error is about; empty where it does not tell."""

    def set_shapes(self, draft: Draft, shapes: Mapping[str, ShapeRange]) -> None:
        """Compile for these ranges. ModelError where the network has to know an input's values, not only its size."""
        builder: Builder = draft.builder
        network: INetworkDefinition = draft.network
        config: IBuilderConfig = draft.config
        profile: IOptimizationProfile = builder.create_optimization_profile()
        is_wanted = False  # by a free axis, also where only one size is
        for index in range(network.num_inputs):
            tensor: ITensor = network.get_input(index)
            if tensor.is_shape_tensor:
                raise ModelError(
                    f"TensorRT cannot compile the model: the values of its input {tensor.name!r} decide the shapes of "
                    "others, and would have to be known beforehand.",
                    fix=f"Export the model with that input as a constant. {STILL_RUNS}",
                )
            sizes = shapes[tensor.name]
            profile.set_shape(tensor.name, sizes.smallest, sizes.best, sizes.largest)
            is_wanted = is_wanted or -1 in tensor.shape
        if is_wanted and config.add_optimization_profile(profile) < 0:
            raise EngineFailed(f"{self.flavour} does not take the shapes {dict(shapes)}; it says: {self.said}.")

    def set_effort(self, draft: Draft, options: TensorRTOptions) -> None:
        """How long to search, with how much scratch memory, and for how many streams beside the main one."""
        config: IBuilderConfig = draft.config
        config.builder_optimization_level = options.optimization_level
        if options.workspace_bytes is not None:
            config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        if options.max_aux_streams is not None:
            config.max_aux_streams = options.max_aux_streams

    def set_modes(self, draft: Draft, options: TensorRTOptions, targets: Sequence[str]) -> None:
        """What kind of plan it is to be."""
        config: IBuilderConfig = draft.config
        if options.sparse_weights:
            config.set_flag(self.trt.BuilderFlag.SPARSE_WEIGHTS)

    def set_dla(self, draft: Draft, cores: int) -> tuple[str, ...]:
        """Compile for a deep-learning accelerator, and say which layers it leaves to the GPU.

        The engine is for the first of the cores. ProfileError if the device has fewer.
        """
        builder: Builder = draft.builder
        config: IBuilderConfig = draft.config
        if builder.num_DLA_cores < cores:
            raise ProfileError(
                f"The profile has dla_cores = {cores}; {self.flavour} {self.version} finds {builder.num_DLA_cores} on "
                "this device.",
                fix="Set dla_cores = 0 in the profile's [tensorrt] table. DLAs are on Xavier and Orin, not on Thor; "
                "TensorRT 10.7 was the last 10.x to drive them, 11.4.1 does again on AGX Orin.",
            )
        config.default_device_type = self.trt.DeviceType.DLA
        config.DLA_core = 0
        config.set_flag(self.trt.BuilderFlag.GPU_FALLBACK)
        return self._left_to_gpu(draft.network, config)

    def _left_to_gpu(self, network: INetworkDefinition, config: IBuilderConfig) -> tuple[str, ...]:
        left: defaultdict[str, list[str]] = defaultdict(list)
        computing = 0
        for index in range(network.num_layers):
            layer: ILayer = network.get_layer(index)
            if (kind := _kind(layer)) == "CONSTANT":
                continue
            computing += 1
            if not config.can_run_on_DLA(layer):
                left[kind].append(layer.name)
        return fallback_notes(left, computing)

    def load_timing_cache(self, draft: Draft, measured: bytes) -> bool:
        """Use what earlier builds measured, or (empty) begin to collect; False if TensorRT does not take it.

        It makes an empty cache of one that it cannot read, and says so in its log only.
        """
        self.said.clear()
        config: IBuilderConfig = draft.config
        cache: ITimingCache = config.create_timing_cache(measured)
        taken = cache is not None and bool(config.set_timing_cache(cache, False))
        return taken and not self.said.mentions("timing cache")

    def timing_cache(self, draft: Draft) -> bytes:
        """What this build and those before it measured."""
        config: IBuilderConfig = draft.config
        cache: ITimingCache = config.get_timing_cache()
        if cache is None:
            return b""
        return bytes(cache.serialize())

    @abstractmethod
    def watch(self, draft: Draft, phases: Phases) -> Any:
        """Report the build to `phases`. What comes back has to outlive it; None where TensorRT reports nothing."""

    def compile(self, draft: Draft) -> memoryview:
        """The plan; EngineFailed with what TensorRT said. For minutes, without holding Python's lock."""
        self.said.clear()
        builder: Builder = draft.builder
        plan: IHostMemory = builder.build_serialized_network(draft.network, draft.config)
        if plan is None:
            problem = f"{self.flavour} {self.version} could not compile the model; it says: {self.said}."
            advice = next((advice for text, advice in _ADVICE.items() if self.said.mentions(text)), "")
            raise EngineFailed(problem, fix=f"{advice} {STILL_RUNS}".strip())
        return memoryview(plan)


class Compiling8(Compiling):
    """8.6, of JetPack 6.0: precision is a permission; no progress, no streamed or stripped weights."""

    def _impossible(self, options: TensorRTOptions, targets: Sequence[str], gpu: bool) -> list[str]:
        reasons = super()._impossible(options, targets, gpu)
        for wish in ("weight_streaming", "strip_weights"):
            if getattr(options, wish):
                reasons.append(f"{wish}, which came with TensorRT 10")
        return reasons

    def new_network(self, builder: Builder) -> INetworkDefinition:
        return builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))

    def new_parser(self, network: INetworkDefinition, options: TensorRTOptions) -> OnnxParser:
        """A plan for other versions or other GPUs must do without the InstanceNormalization plugin."""
        parser: OnnxParser = super().new_parser(network, options)
        if options.version_compatible or options.hardware_compatible != "none":
            parser.set_flag(self.trt.OnnxParserFlag.NATIVE_INSTANCENORM)
        return parser

    def node_of(self, error: ParserError) -> tuple[str, str]:
        return "", ""

    def set_modes(self, draft: Draft, options: TensorRTOptions, targets: Sequence[str]) -> None:
        super().set_modes(draft, options, targets)
        config: IBuilderConfig = draft.config
        # Without it only one context may have the profile, and every lane has a context.
        config.set_preview_feature(self.trt.PreviewFeature.PROFILE_SHARING_0806, True)
        _make_compatible(self.trt, config, options)
        self._allow_precisions(draft.network, config)

    def _allow_precisions(self, network: INetworkDefinition, config: IBuilderConfig) -> None:
        """Once FP16 is allowed, TensorRT takes it for FP32 layers too, unless they are held to what the graph says."""
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        if any(_kind(layer) in ("QUANTIZE", "DEQUANTIZE") for layer in layers):
            config.set_flag(self.trt.BuilderFlag.INT8)
        if any("HALF" in _types(layer) for layer in layers):
            config.set_flag(self.trt.BuilderFlag.FP16)
            config.set_flag(self.trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
            for layer in layers:
                self._hold(layer)

    def _hold(self, layer: ILayer) -> None:
        """Those that convert or compute shapes have no precision of their own to hold."""
        if _types(layer) == {"FLOAT"} and _kind(layer) not in ("CONSTANT", "SHAPE", "CAST", "QUANTIZE", "DEQUANTIZE"):
            layer.precision = self.trt.DataType.FLOAT
            for index in range(layer.num_outputs):
                layer.set_output_type(index, self.trt.DataType.FLOAT)

    def watch(self, draft: Draft, phases: Phases) -> None:
        return None


class Compiling10(Compiling):
    """10, of JetPack 6.1 to 7.1 and of data centres: can be typed strongly, and is."""

    def new_network(self, builder: Builder) -> INetworkDefinition:
        return builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def node_of(self, error: ParserError) -> tuple[str, str]:
        return error.node_name(), error.node_operator()

    def set_modes(self, draft: Draft, options: TensorRTOptions, targets: Sequence[str]) -> None:
        super().set_modes(draft, options, targets)
        config: IBuilderConfig = draft.config
        if options.weight_streaming:
            config.set_flag(self.trt.BuilderFlag.WEIGHT_STREAMING)
        if options.strip_weights:
            config.set_flag(self.trt.BuilderFlag.STRIP_PLAN)
        self.set_reach(config, options, targets)

    def set_reach(self, config: IBuilderConfig, options: TensorRTOptions, targets: Sequence[str]) -> None:
        """Which other machines may run the plan."""
        _make_compatible(self.trt, config, options)

    def watch(self, draft: Draft, phases: Phases) -> Any:
        config: IBuilderConfig = draft.config
        monitor = logs.monitor(self.trt, phases)
        config.progress_monitor = monitor
        return monitor


class Compiling11(Compiling10):
    """11: always typed strongly."""

    def new_network(self, builder: Builder) -> INetworkDefinition:
        return builder.create_network(0)


class CompilingRtx(Compiling10):
    """TensorRT for RTX: builds on any machine for the GPUs it is told, which finish the kernels themselves."""

    def _impossible(self, options: TensorRTOptions, targets: Sequence[str], gpu: bool) -> list[str]:
        reasons = [
            f"compute capability {target}, it has {', '.join(self._capabilities())}"
            for target in targets
            if _member(target) not in self._members()
        ]
        if options.version_compatible:
            reasons.append("version_compatible, its plans fit one version only")
        if options.hardware_compatible != "none":
            reasons.append("hardware_compatible; here it is portable, or several compute_capabilities")
        if options.dla_cores:
            reasons.append("dla_cores, DLAs are on Jetson")
        if options.strip_weights and not gpu:
            reasons.append("strip_weights on a machine without a GPU")
        return reasons

    def set_reach(self, config: IBuilderConfig, options: TensorRTOptions, targets: Sequence[str]) -> None:
        """Without targets: its own default, every GPU from compute capability 8.0 on."""
        if not targets:
            return
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            if not config.set_compute_capability(self._members()[_member(target)], index):
                raise EngineFailed(f"{self.flavour} does not build for compute capability {target}: {self.said}.")

    def _members(self) -> Mapping[str, Any]:
        members: Mapping[str, Any] = self.trt.ComputeCapability.__members__
        return members

    def _capabilities(self) -> list[str]:
        return [f"{name[2:-1]}.{name[-1]}" for name in self._members() if name.startswith("SM")]


def _make_compatible(trt: Any, config: IBuilderConfig, options: TensorRTOptions) -> None:
    """For later versions of TensorRT, or for other GPUs than the one at hand."""
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if level := _HARDWARE.get(options.hardware_compatible):
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)


def _kind(layer: ILayer) -> str:
    kind: LayerType = layer.type
    return str(kind.name)


def _types(layer: ILayer) -> set[str]:
    """The types of a layer's results."""
    return {_type(layer.get_output(index)) for index in range(layer.num_outputs)}


def _type(tensor: ITensor) -> str:
    kind: DataType = tensor.dtype
    return str(kind.name)


def _member(compute_capability: str) -> str:
    """TensorRT's name for a compute capability: SM86 for 8.6."""
    return "SM" + compute_capability.replace(".", "")
