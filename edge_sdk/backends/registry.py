"""Which backend runs a package: the one place that names them all, each imported only when it is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_sdk.backends.base import Backend, Engine, EngineOrder, Progress
from edge_sdk.errors import BackendUnavailable, EngineUnfit, OutOfMemory, PackageError, PackageMismatch
from edge_sdk.package import GRAPH, EnginePackage
from edge_sdk.profiles import DeviceProfile, Machine, detect, load_profiles
from edge_sdk.tensors import TensorSpec

NAMES = ("tensorrt", "onnxruntime", "reference")
"""Backends that exist."""
_COMPILING = ("tensorrt",)
"""Those whose engines are compiled for one kind of device: said here, so that a device without them loads nothing."""


def backend(name: str, store: Path | None = None) -> Backend:
    """The backend called `name`; BackendUnavailable if edge-sdk has none of that name.

    `store` is the folder for engines that are compiled here and belong to no package; None: the user's own.
    """
    match name:
        case "tensorrt":
            from edge_sdk.backends.tensorrt import TensorRTBackend

            return TensorRTBackend(store)
        case "onnxruntime":
            from edge_sdk.backends.onnxruntime import OnnxRuntimeBackend

            return OnnxRuntimeBackend()
        case "reference":
            from edge_sdk.backends.reference import ReferenceBackend

            return ReferenceBackend()
    raise BackendUnavailable(
        f"edge-sdk has no backend {name!r} in this release; it has {', '.join(NAMES)}.",
        fix="The package's portable graph runs with any of them: build for a cpu profile to use it here.",
    )


def backend_for(profile: DeviceProfile) -> Backend:
    """The first backend the profile prefers that can run here; BackendUnavailable says what each of them lacks."""
    lacking = []
    fixes = []
    for name in profile.backends:
        try:
            candidate = backend(name)
        except BackendUnavailable as exc:
            lacking.append(exc.problem)
            fixes.append(exc.fix)
            continue
        if available := candidate.availability():
            return candidate
        lacking.append(f"{name}: {available.why_not}")
        fixes.append(available.fix)
    raise BackendUnavailable(
        f"Nothing here can run an engine for profile {profile.name}. {' '.join(lacking)}", fix=" ".join(fixes)
    )


def usable_profile(machine: Machine) -> tuple[DeviceProfile, str]:
    """The profile for engines that are to run on `machine`, and why: the best-fitting one whose preferred backend can.

    A computer with an RTX card fits that card's profile, but without TensorRT a graph quantised for TensorRT would run
    on its CPU, slower than in FP32. ProfileError if none fits.
    """
    profiles = load_profiles()
    fitting, why = detect(machine, profiles)
    if _can_run(fitting):
        return fitting, why
    usable, why = detect(machine, [profile for profile in profiles if _can_run(profile)])
    return usable, f"{why} The profile {fitting.name} fits better, but {fitting.backends[0]} is not to be had here."


def _can_run(profile: DeviceProfile) -> bool:
    try:
        return bool(backend(profile.backends[0]).availability())
    except BackendUnavailable:
        return False


@dataclass(frozen=True)
class Loaded:
    """An engine, and the backend that runs it."""

    engine: Engine
    backend: str
    second_best: str = ""
    """Why it is not the backend that the package prefers; empty if it is."""
    better_can_be_built: bool = False
    """Whether `rebuild` can make what the preferred backend lacks."""


def load_engine(
    package: EnginePackage,
    machine: Machine | None = None,
    *,
    store: Path | None = None,
    why_not_preferred: str = "",
) -> Loaded:
    """The package's engine, loaded by the first backend its profile prefers that can, starting with the manifest's.

    Where the preferred one has no engine that may be loaded here, the package's graph runs with the next: slower, and
    with the same answers. So it does where the caller says why the preferred one is not to be used. Raises
    PackageMismatch if the package does not fit this machine, PackageError if a file was altered or the manifest
    describes another graph than the package holds, BackendUnavailable or EngineFailed as the last of the backends says.
    """
    if reasons := package.mismatches(machine or Machine.read(gpus=False)):
        raise PackageMismatch(
            f"The package {package} does not fit this machine: {'; '.join(reasons)}.",
            reasons=reasons,
            fix="Build it for this machine: `edge-sdk profiles detect` names the profile.",
        )
    profile = package.profile()
    names = _in_order(package.manifest.backend.name, profile)
    passed_over: list[str] = []
    buildable = False
    if why_not_preferred and len(names) > 1:
        passed_over.append(why_not_preferred)
        names = names[1:]
    for name in names:
        chosen = backend(name, store)
        try:
            if not (available := chosen.availability()):
                raise BackendUnavailable(
                    f"The package {package} needs {name}: {available.why_not}", fix=available.fix
                )  # fmt: skip
            engine = _loaded(chosen, package, profile, store)
        except (EngineUnfit, BackendUnavailable, OutOfMemory) as exc:
            if name == names[-1]:
                raise
            passed_over.append(exc.problem)
            if isinstance(exc, EngineUnfit):
                able = chosen.can_build(profile, here=True)
                buildable = buildable or bool(able)
                passed_over += [] if able else [able.why_not]
            continue
        try:
            _check_promises("inputs", package, package.manifest.inputs, engine.inputs)
            _check_promises("outputs", package, package.manifest.outputs, engine.outputs)
        except PackageError:
            engine.close()
            raise
        return Loaded(engine, name, " ".join(passed_over), buildable)
    raise AssertionError("a package has at least one backend")


def _loaded(chosen: Backend, package: EnginePackage, profile: DeviceProfile, store: Path | None) -> Engine:
    """The engine, in a process of its own if the package asks for one."""
    if package.manifest.serving.isolation == "none":
        return chosen.load(package, profile)
    from edge_sdk.backends.isolated import IsolatedEngine

    return IsolatedEngine(package, chosen.name, store=store)


def rebuild(package: EnginePackage, *, store: Path | None = None, progress: Progress) -> None:
    """Compile the package's graph for the accelerator of this machine, into `store`: the next load finds it there.

    Leaves the processor to whoever else wants it. Raises what `Backend.build` raises.
    """
    preferred = backend(package.manifest.backend.name, store)
    preferred.build(EngineOrder.of(package, here=True), None, progress=progress, considerate=True)


def prefers_compiled(package: EnginePackage) -> bool:
    """Whether the package's first choice is an engine that is compiled for its device."""
    return package.manifest.backend.name in _COMPILING


def preload(package: EnginePackage) -> None:
    """Load the library that will run the package's graph on the CPU, if there is one: all engines on it share it."""
    if package.manifest.backend.name == "onnxruntime":
        from edge_sdk.backends import onnxruntime

        onnxruntime.preload()


def preferred_version(package: EnginePackage, *, store: Path | None = None) -> str:
    """The version of the runtime that the package prefers; empty where it is not to be had."""
    return backend(package.manifest.backend.name, store).availability().version or ""


def discard(package: EnginePackage, *, store: Path | None = None) -> None:
    """Take out of `store` what was compiled from the package's graph: it was found to answer otherwise, or nobody has
    found that it does not. The package's files are not looked at: another build may have replaced them."""
    from edge_sdk.backends.tensorrt.store import EngineStore

    kept = EngineStore(store)
    for entry in kept.engines(package.manifest.files[GRAPH].sha256):
        kept.drop(entry)


def trial_mark(package: EnginePackage, *, store: Path | None = None) -> Path:
    """The file beside what `rebuild` makes for the package in which a caller may note how far its trial is."""
    from edge_sdk.backends.tensorrt.store import EngineStore

    return EngineStore(store).folder / f"trial-{package.manifest.files[GRAPH].sha256[:32]}"


def check_store(store: Path | None = None) -> str:
    """Why what is compiled here cannot be kept, and what to do; empty if it can be, or nothing is compiled here."""
    if not backend("tensorrt", store).availability():
        return ""
    from edge_sdk.backends.tensorrt.store import EngineStore

    health = EngineStore(store).check()
    return f"{health.why_not} {health.fix}".strip()


def _in_order(preferred: str, profile: DeviceProfile) -> list[str]:
    """The preferred backend, then those that the profile has behind it; a package's graph runs with any of them."""
    others: list[str] = list(profile.backends)
    return [preferred, *others[others.index(preferred) + 1 :]] if preferred in others else [preferred]


def _check_promises(
    side: str, package: EnginePackage, promised: tuple[TensorSpec, ...], found: tuple[TensorSpec, ...]
) -> None:
    """Clients are told what the manifest says; the engine has to have it, by name, dtype and number of axes.

    Sizes are left alone: a backend may know one that the graph leaves open. So is the rank of an engine's tensor
    without axes: runtimes say `()` also where they do not know.
    """
    by_name = {spec.name: spec for spec in found}
    agree = len(promised) == len(found) and all(
        (actual := by_name.get(spec.name)) is not None
        and actual.dtype == spec.dtype
        and (len(actual.shape) == len(spec.shape) or not actual.shape)
        for spec in promised
    )
    if not agree:
        raise PackageError(
            f"The manifest of the package {package} describes other {side} than its graph has: "
            f"{_listed(promised)} in the manifest, {_listed(found)} in the graph.",
            fix="Build the package again.",
        )


def _listed(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(map(str, specs))[:300] or "none"
