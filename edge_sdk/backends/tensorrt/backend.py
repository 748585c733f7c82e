"""The seam's two acts, build and load, for TensorRT; and `trust`, for engines that come from elsewhere.

    build    a recipe, made into a package or into this machine's store
    load     the first engine - the package's, else the store's - that has nothing against it, opened by the executor
    trust    a package's engine, signed with this machine's key once a person vouched for it

What an engine fits is decided in `sidecar`, what this machine has is found in `facts`, and neither loads TensorRT.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk.backends import cuda
from edge_sdk.backends.base import Availability, Engine, EngineOrder, Progress, no_progress
from edge_sdk.backends.onnx_bytes import interface, refuse_external_data
from edge_sdk.backends.tensorrt import api, facts
from edge_sdk.backends.tensorrt.candidates import Candidate, candidates, reasons_against
from edge_sdk.backends.tensorrt.making import Recipe, make_engine
from edge_sdk.backends.tensorrt.sidecar import (
    PLAN,
    SIDECAR,
    TITLES,
    Here,
    Sidecar,
    Unreadable,
    decode,
    encode,
    key_id,
    signed,
)
from edge_sdk.backends.tensorrt.store import EngineStore, entry_name
from edge_sdk.errors import BackendUnavailable, DeviceLost, EngineFailed, EngineUnfit
from edge_sdk.package import GRAPH, BatchingRecord, EnginePackage, EngineRecord
from edge_sdk.profiles import DeviceProfile, Machine, TensorRTOptions
from edge_sdk.tensors import TensorSpec

if TYPE_CHECKING:  # loaded when an engine is opened
    from edge_sdk.backends.tensorrt.executor import Options, TensorRTEngine

_MEASURING = BatchingRecord(max_batch=32, best_batch=8)
"""Of an engine made straight from a graph, which no manifest describes."""
_SHOWN = 3
_ON_THE_DEVICE = "Build it on the device, or let `edge-sdk serve` do so there."


@dataclass(frozen=True)
class Opening:
    """What a plan is opened with."""

    flavour: str
    profile: DeviceProfile
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    graph: bytes | None
    """The portable graph, for a plan that was stripped of its weights."""


Opener = Callable[[Callable[[], bytes], Opening], Engine]
"""What makes an engine of a plan, which it reads as often as it needs. Only plans with nothing against them get there.
Raises as `executor.open_engine` does."""


def open_with_executor(plan: Callable[[], bytes], opening: Opening, options: Options | None = None) -> TensorRTEngine:
    """TensorRT itself: needs the GPU. Without `options`, as the profile says."""
    from edge_sdk.backends.tensorrt.executor import open_engine

    return open_engine(
        plan,
        api=api.open_api(opening.flavour),
        profile=opening.profile,
        inputs=opening.inputs,
        outputs=opening.outputs,
        graph=opening.graph,
        options=options,
    )


@dataclass(frozen=True)
class Trusted:
    """An engine that this machine's key vouches for from now on."""

    entry: Path
    """Its copy in the store."""
    sidecar: Sidecar
    key: str
    """The name of the key, not the key."""


class TensorRTBackend:
    name = "tensorrt"
    compiles = True

    def __init__(
        self,
        store: Path | None = None,
        *,
        machine: Callable[[], Machine] = facts.this_machine,
        gpu: Callable[[], cuda.Facts] = facts.cuda_facts,
        opener: Opener = open_with_executor,
    ) -> None:
        """`machine` tells what this computer has, `gpu` what CUDA says of its GPU, `opener` makes engines of plans:
        what a test without a GPU has to stand in for."""
        self.store = EngineStore(store)
        self._machine = machine
        self._gpu = gpu
        self._open = opener

    # What can be done here

    def availability(self) -> Availability:
        """Whether engines can be run here: TensorRT, an NVIDIA GPU and a CUDA binding are all there."""
        return self._can_run(facts.flavour_for(self._machine()))

    def _can_run(self, flavour: str) -> Availability:
        machine = self._machine()
        version = api.find(flavour)
        lacking = []
        if version is None:
            lacking.append((f"{TITLES[flavour]} is not installed.", facts.install_fix(machine, flavour)))
        if facts.here(flavour, machine).gpu is None:
            fix = "Where there is one, NVIDIA's driver makes it visible: `nvidia-smi` has to list it."
            lacking.append(("There is no NVIDIA GPU here.", fix))
        if not facts.cuda_bindings():
            lacking.append(("No CUDA binding is installed.", facts.BINDING_FIX))
        if lacking:
            return Availability(None, *(" ".join(parts) for parts in zip(*lacking)))
        return Availability(version)

    def can_build(self, profile: DeviceProfile, *, here: bool = False) -> Availability:
        """TensorRT for RTX builds anywhere; TensorRT only on the GPU that the engine is for."""
        machine = self._machine()
        flavour = facts.flavour_for(machine, profile)
        version = api.find(flavour)
        if version is None:
            why_not = f"{TITLES[flavour]} is not installed here."
            return Availability(None, why_not, facts.install_fix(machine, flavour))
        if flavour == "tensorrt" and (why_not := _why_not_its_gpu(machine, profile, here=here)):
            return Availability(None, why_not, _ON_THE_DEVICE)
        if not (health := self.store.check()):
            return Availability(None, health.why_not, health.fix)
        return Availability(version)

    # Building

    def build(
        self, order: EngineOrder, folder: Path | None, *, progress: Progress = no_progress, considerate: bool = False
    ) -> EngineRecord:
        if not (able := self.can_build(order.profile, here=order.here)):
            raise BackendUnavailable(able.why_not, fix=able.fix)
        options = self._options(order.profile)
        recipe = Recipe.of(
            order, options, self._here(options.flavour, exactly=order.here or options.flavour == "tensorrt")
        )
        if folder is not None:
            return make_engine(recipe, folder, self.store, progress=progress, considerate=considerate)
        with self.store.adding(recipe.name) as staged:
            return make_engine(recipe, staged, self.store, progress=progress, considerate=considerate)

    def _here(self, flavour: str, *, exactly: bool) -> Here:
        """What this machine has; `exactly`, as CUDA tells it, so that what is built here is what is loaded here."""
        return facts.here(flavour, self._machine(), self._gpu() if exactly else None)

    def _options(self, profile: DeviceProfile) -> TensorRTOptions:
        """How to build for a profile; one that says nothing of TensorRT is built for this machine, by default."""
        if profile.tensorrt is not None:
            return profile.tensorrt
        flavour = facts.flavour_for(self._machine())
        found = self._here(flavour, exactly=False).compute_capability or "8.0"
        return TensorRTOptions.model_validate({"flavour": flavour, "compute_capabilities": [found]})

    # Loading

    def load(self, package: EnginePackage, profile: DeviceProfile) -> Engine:
        flavour = facts.flavour_for(self._machine(), profile)
        if not (able := self._can_run(flavour)):
            raise BackendUnavailable(able.why_not, fix=able.fix)
        graph = package.read(GRAPH)
        manifest = package.manifest
        refused = []
        for candidate in candidates(package, self.store, self._here(flavour, exactly=True)):
            if candidate.plan is not None:
                stripped = candidate.sidecar is not None and candidate.sidecar.is_stripped
                opening = Opening(
                    flavour, profile, manifest.inputs, manifest.outputs, graph if stripped else None
                )  # fmt: skip
                try:
                    engine = self._open(candidate.plan, opening)
                except DeviceLost:
                    raise
                except (EngineFailed, EngineUnfit) as exc:
                    candidate = replace(candidate, plan=None, reasons=(f"it does not load: {exc.problem}",))
                    if candidate.is_stored:
                        self.store.drop(candidate.folder)
                else:
                    if candidate.is_stored:
                        self.store.used(candidate.folder)
                    return engine
            refused.append(candidate)
        raise self._unfit(package, refused)

    def load_graph(self, graph: bytes, profile: DeviceProfile) -> Engine:
        """Compiled for this machine and loaded, with nothing kept. Batches of up to 32; ModelError for a graph with
        other free axes, whose sizes nobody has said."""
        options = self._options(profile)
        if not (able := self._can_run(options.flavour)):
            raise BackendUnavailable(able.why_not, fix=able.fix)
        refuse_external_data(graph)
        inputs, outputs = interface(graph)
        completed = profile.model_copy(update={"tensorrt": options})
        with tempfile.TemporaryDirectory(prefix="edge-sdk-") as folder:
            self.build(EngineOrder(graph, inputs, completed, _MEASURING, {}, here=True), Path(folder))
            plan = (Path(folder) / PLAN).read_bytes()
        opening = Opening(options.flavour, completed, inputs, outputs, graph if options.strip_weights else None)
        return self._open(lambda: plan, opening)

    def fit(self, package: EnginePackage) -> tuple[Candidate, ...]:
        """Every engine there is for a package, and what is against each; loads nothing of NVIDIA's.

        BackendUnavailable if the store's key cannot be trusted.
        """
        found = self._here(facts.flavour_for(self._machine(), package.profile()), exactly=False)
        return tuple(replace(candidate, plan=None) for candidate in candidates(package, self.store, found))

    def next_step(self, package: EnginePackage, found: Sequence[Candidate] = ()) -> str:
        """What to do about a package without an engine that fits; `found` are those that do not."""
        profile = package.profile()
        able = self._can_run(facts.flavour_for(self._machine(), profile)) and self.can_build(profile, here=True)
        if able:
            step = "`edge-sdk serve` builds one in the background, and answers with the package's graph meanwhile."
        else:
            step = f"{able.why_not} {able.fix}"
        if any(candidate.lacks_only_trust for candidate in found):
            step = f"If you know who built it: `edge-sdk trust {package.path}`. Otherwise: {step}"
        return step

    def _unfit(self, package: EnginePackage, refused: list[Candidate]) -> EngineUnfit:
        reasons = tuple(map(str, refused))
        if refused:
            shown = " ".join(f"{reason[0].upper()}{reason[1:].rstrip('.')}." for reason in reasons[:_SHOWN])
            more = f" So it is with {len(refused) - _SHOWN} more in the store." if len(refused) > _SHOWN else ""
            problem = f"No engine for {package} may be loaded here. {shown}{more}"
        else:
            problem = f"There is no engine for {package} yet. {package.manifest.backend.missing or ''}".rstrip()
        return EngineUnfit(problem, reasons=reasons, fix=self.next_step(package, refused))

    # Trusting

    def trust(self, package: EnginePackage) -> Trusted:
        """Copy a package's engine into this machine's store, signed with this machine's key.

        For a person who has checked where the package came from: an engine is a program. Raises EngineUnfit, and signs
        nothing, if there is another reason against it than whose signature it has; PackageError if a file was altered.
        """
        record = package.manifest.backend.engine
        if record is None:
            raise EngineUnfit(f"{package} holds no engine to trust.", reasons=(), fix=self.next_step(package))
        graph, plan, described = (package.read(name) for name in (GRAPH, record.file, record.sidecar))
        key = self.store.key()
        found = self._here(facts.flavour_for(self._machine(), package.profile()), exactly=False)
        graph_sha256 = hashlib.sha256(graph).hexdigest()
        try:
            sidecar = decode(described)
        except Unreadable as exc:
            raise _untrustworthy(package, (str(exc),)) from exc
        if sidecar.signed_by != key_id(key):  # otherwise it was signed here, and must be as it was then
            sidecar = signed(sidecar, key)
        if reasons := reasons_against(sidecar, plan, graph_sha256, found, key):
            raise _untrustworthy(package, reasons)
        name = entry_name(graph_sha256, trusted=sidecar.signature)
        with self.store.adding(name) as staged:
            (staged / PLAN).write_bytes(plan)
            (staged / SIDECAR).write_bytes(encode(sidecar))
        return Trusted(self.store.folder / name, sidecar, key_id(key))


def _why_not_its_gpu(machine: Machine, profile: DeviceProfile, *, here: bool) -> str:
    """Why what `tensorrt` builds on this machine is not for the profile's GPU; empty if it is."""
    there = facts.here("tensorrt", machine)
    if there.gpu is None:
        return "TensorRT builds an engine only on the GPU that it is for, and there is no NVIDIA GPU here."
    if here or profile.tensorrt is None:
        return ""
    if machine.architecture == profile.architecture and (
        there.compute_capability in (None, *profile.tensorrt.compute_capabilities)
    ):
        return ""
    return (
        f"TensorRT builds an engine only on the GPU that it is for, and {there.gpu} here is not that of a "
        f"{profile.title}."
    )


def _untrustworthy(package: EnginePackage, reasons: tuple[str, ...]) -> EngineUnfit:
    return EngineUnfit(
        f"The engine of {package} would not be loaded here, whoever signed it: {'; '.join(reasons)}.",
        reasons=reasons,
        fix="Build it for this machine: `edge-sdk profiles detect` names the profile.",
    )
