"""What this machine has, what is wrong with it, and what to do: every finding a line, every fault with a next step.

Vendor libraries are looked for without being loaded; versions come from their packages' metadata.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from edge_sdk import __version__, console
from edge_sdk.backends.base import installed_version
from edge_sdk.backends.registry import NAMES, backend
from edge_sdk.errors import EdgeSdkError, ProfileError, SettingsError
from edge_sdk.mqtt.broker import find_broker, find_mosquitto
from edge_sdk.package import EnginePackage, package_folders
from edge_sdk.profiles import Machine, detect, load_profiles
from edge_sdk.settings import Settings

Level = Literal["ok", "note", "fault"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `fix` is what to do about a note or a fault."""

    subject: str
    level: Level
    detail: str
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(settings: Settings) -> list[Finding]:
    """Look at everything. Never raises: what cannot be looked at is a finding."""
    machine = Machine.read()
    return [
        finding
        for look in _LOOKS
        for finding in look(machine, settings)
    ]  # fmt: skip


def _python(machine: Machine, settings: Settings) -> Iterator[Finding]:
    yield Finding("edge-sdk", "ok", f"{__version__} on Python {platform.python_version()}, {sys.executable}")


def _processor(machine: Machine, settings: Settings) -> Iterator[Finding]:
    interesting = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")
    features = [flag for flag in interesting if flag in machine.cpu_flags]
    detail = (
        f"{machine.architecture}, {machine.physical_cores} cores, {console.size(machine.memory_bytes)} memory, "
        f"{', '.join(features) or 'no INT8 instructions known'}"
    )
    if machine.architecture == "x86_64" and not machine.has_vnni:
        yield Finding(
            "processor", "note", detail, "Without VNNI, INT8 gains less: compare with `build-engine --precision auto`."
        )
    else:
        yield Finding("processor", "ok", detail)


def _profile(machine: Machine, settings: Settings) -> Iterator[Finding]:
    try:
        profile, why = detect(machine, load_profiles())
        yield Finding("device profile", "ok", f"{profile.name} ({why})")
    except ProfileError as exc:
        yield Finding("device profile", "fault", exc.problem, exc.fix)


def _gpus(machine: Machine, settings: Settings) -> Iterator[Finding]:
    flavours = [
        f"{module} {installed_version(module, *distributions)}"
        for module, distributions in (
            ("tensorrt", ("tensorrt", "tensorrt_cu13", "tensorrt_cu12")),
            ("tensorrt_rtx", ("tensorrt_rtx", "tensorrt-rtx")),
        )
        if importlib.util.find_spec(module) is not None
    ]
    yield Finding(
        "GPU", "ok" if machine.gpus else "note", ", ".join(map(str, machine.gpus)) or "no NVIDIA GPU was found"
    )
    detail = ", ".join(flavours) or "not installed"
    if machine.gpus and not flavours:
        yield Finding(
            "TensorRT", "note", detail, "Jetson: it comes with JetPack. RTX: pip install tensorrt-rtx. Until then: CPU."
        )
    else:
        yield Finding("TensorRT", "ok" if flavours else "note", detail)


def _backends(machine: Machine, settings: Settings) -> Iterator[Finding]:
    for name in NAMES:
        available = backend(name).availability()
        if available:
            yield Finding(f"backend {name}", "ok", f"version {available.version}")
        else:
            level: Level = "fault" if name == "onnxruntime" else "note"
            yield Finding(f"backend {name}", level, available.why_not, available.fix)


def _extras(machine: Machine, settings: Settings) -> Iterator[Finding]:
    for module, distribution, extra, purpose in (
        ("PIL", "pillow", "vision", "JPEG and PNG requests"),
        ("onnx", "onnx", "build", "building engines"),
        ("onnxslim", "onnxslim", "build", "building engines"),
    ):
        if importlib.util.find_spec(module) is None:
            fix = f"For {purpose}: pip install 'edge-sdk[{extra}]'."
            yield Finding(distribution, "note", "not installed", fix)
        else:
            yield Finding(distribution, "ok", f"version {installed_version(module, distribution)}")


def _broker(machine: Machine, settings: Settings) -> Iterator[Finding]:
    binary = find_mosquitto()
    yield Finding("mosquitto", "ok" if binary else "note", binary or "the broker's binary is not on this machine")
    try:
        password = settings.password()
    except SettingsError as exc:
        yield Finding("broker", "fault", exc.problem, exc.fix)
        return
    found = find_broker(
        settings.broker.url,
        timeout_s=3.0,
        username=settings.broker.username,
        password=password.get_secret_value() if password is not None else None,
        tls_ca_file=str(settings.broker.ca_file) if settings.broker.ca_file is not None else None,
    )
    if found.reachable:
        yield Finding("broker", "ok", f"{settings.broker.url}: {found.detail}")
    else:
        fix = "Start one (`sudo apt install mosquitto`), or name yours with --broker or EDGE_SDK_BROKER__URL."
        yield Finding("broker", "fault", found.detail, fix)


def _engines(machine: Machine, settings: Settings) -> Iterator[Finding]:
    folder = settings.engines
    if not folder.is_dir():
        yield Finding("engines", "note", f"there is no folder {folder}", "Name yours with --engines.")
        return
    packages = package_folders(folder)
    if not packages:
        yield Finding("engines", "note", f"{folder} holds no package", "`edge-sdk build-engine` makes one.")
    for path in packages:
        yield _package(path, machine)


def _package(path: Path, machine: Machine) -> Finding:
    try:
        package = EnginePackage.open(path)
        package.verify()
    except EdgeSdkError as exc:
        return Finding(f"package {path.name}", "fault", exc.problem, exc.fix)
    if reasons := package.mismatches(machine):
        return Finding(str(package), "note", f"does not fit this machine: {'; '.join(reasons)}", "Build it here.")
    if notes := package.notes(machine):
        return Finding(str(package), "note", " ".join(notes))
    return Finding(str(package), "ok", f"sound, {os.fspath(path)}")


_LOOKS: tuple[Callable[[Machine, Settings], Iterator[Finding]], ...] = (
    _python,
    _processor,
    _profile,
    _gpus,
    _backends,
    _extras,
    _broker,
    _engines,
)
