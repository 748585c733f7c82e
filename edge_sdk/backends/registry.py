"""Which backend runs a package: the one place that names them all, each imported only when it is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_sdk.errors import BackendUnavailable, PackageError, PackageMismatch
from edge_sdk.package import EnginePackage
from edge_sdk.profiles import DeviceProfile, Machine, detect, load_profiles
from edge_sdk.tensors import TensorSpec

if TYPE_CHECKING:
    from edge_sdk.backends.base import Backend, Engine

NAMES = ("onnxruntime", "reference")
"""Backends that exist. A profile may name one that does not exist yet; its packages then hold the graph alone."""


def backend(name: str) -> Backend:
    """The backend called `name`; BackendUnavailable if edge-sdk has none of that name."""
    match name:
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


def load_engine(package: EnginePackage, machine: Machine | None = None) -> Engine:
    """The package's engine, loaded by the backend its manifest names.

    Raises PackageMismatch if the package does not fit this machine, PackageError if a file was altered or the manifest
    describes another graph than the package holds, BackendUnavailable or EngineFailed as the backend says.
    """
    if reasons := package.mismatches(machine or Machine.read(gpus=False)):
        raise PackageMismatch(
            f"The package {package} does not fit this machine: {'; '.join(reasons)}.",
            reasons=reasons,
            fix="Build it for this machine: `edge-sdk profiles detect` names the profile.",
        )
    chosen = backend(package.manifest.backend.name)
    if not (available := chosen.availability()):
        raise BackendUnavailable(f"The package {package} needs {chosen.name}: {available.why_not}", fix=available.fix)
    engine = chosen.load(package, package.profile())
    try:
        _check_promises("inputs", package, package.manifest.inputs, engine.inputs)
        _check_promises("outputs", package, package.manifest.outputs, engine.outputs)
    except PackageError:
        engine.close()
        raise
    return engine


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
