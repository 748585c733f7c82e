"""What this machine has, what is wrong with it, and what to do: every finding a line, every fault with a next step.

Vendor libraries are looked for without being loaded; versions come from their packages' metadata.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from edge_sdk import __version__, console
from edge_sdk.backends.base import installed_version
from edge_sdk.backends.registry import NAMES, backend
from edge_sdk.backends.tensorrt import TensorRTBackend, facts
from edge_sdk.backends.tensorrt.candidates import Candidate
from edge_sdk.backends.tensorrt.sidecar import TITLES, newest_cuda
from edge_sdk.errors import EdgeSdkError, ProfileError, SettingsError
from edge_sdk.mqtt.address import parse_url
from edge_sdk.mqtt.broker import find_broker, find_mosquitto
from edge_sdk.mqtt.certificates import SOON_DAYS, ExpiryWatch, told
from edge_sdk.mqtt.topics import Topics
from edge_sdk.mqtt.transports.base import MqttVersion
from edge_sdk.mqtt.transports.choice import chosen, fast_fix, has_mqtt5
from edge_sdk.mqtt.trying import what_is_lacking
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
    for gpu in machine.gpus:
        told = [gpu.name]
        if gpu.compute_capability is not None:
            told.append(f"compute capability {gpu.compute_capability}")
        if gpu.memory_bytes is not None:
            told.append(f"{console.size(gpu.memory_bytes)} memory")
        if gpu.driver is not None:
            told.append(f"driver {gpu.driver} (programs of CUDA {newest_cuda(gpu.driver) or 'before 11'})")
        yield Finding("GPU", "ok", ", ".join(told))
    flavours, has_gpu = facts.flavours(), facts.here("tensorrt", machine).gpu is not None
    if not machine.gpus:
        detail = f"that of {machine.device_tree}" if has_gpu else "no NVIDIA GPU was found"
        yield Finding("GPU", "ok" if has_gpu else "note", detail)
    for subject, found, fix in (
        (
            "TensorRT",
            [f"{TITLES[flavour]} {version}" for flavour, version in flavours.items()],
            f"{facts.install_fix(machine, facts.flavour_for(machine))} Until then the CPU computes.",
        ),
        ("CUDA binding", facts.cuda_bindings(), facts.BINDING_FIX),
    ):
        detail = ", ".join(found) or "not installed"
        yield Finding(subject, "ok" if found else "note", detail, fix if has_gpu and not found else "")


def _store(machine: Machine, settings: Settings) -> Iterator[Finding]:
    """Where engines that are compiled here are kept: a place that cannot be written means a build at every start."""
    health = TensorRTBackend(settings.engine_cache).store.check()
    if not health:
        level: Level = "fault" if facts.flavours() and machine.gpus else "note"
        yield Finding("engine store", level, health.why_not, health.fix)
        return
    key = "with its key" if health.has_key else "no key yet"
    yield Finding(
        "engine store",
        "ok",
        f"{health.folder} can be written, {key}, {health.engines} engines, {console.size(health.bytes)} of at most "
        f"{console.size(health.limit_bytes)}",
    )


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


def _transport(machine: Machine, settings: Settings) -> Iterator[Finding]:
    """Which library speaks MQTT, and why that one."""
    wanted, protocol = settings.broker.transport, settings.broker.spoken
    if wanted == "mqtt5" and not has_mqtt5():
        yield Finding("transport", "fault", "mqtt5, as the settings say, is not installed", fast_fix())
        return
    library = chosen(wanted, 4 if protocol == "3.1.1" else 5)
    named = f"{library} {installed_version(*_LIBRARIES[library])}"
    if wanted != "auto":
        yield Finding("transport", "ok", f"{named}, as the settings say")
    elif library == "mqtt5":
        rest = ", and paho where the broker knows no MQTT 5" if protocol == "auto" else ""
        yield Finding("transport", "ok", f"{named}, which is compiled{rest}")
    elif protocol == "3.1.1":
        yield Finding("transport", "ok", f"{named}, for mqtt5 does not speak MQTT 3.1.1")
    else:
        fix = f"It takes less processor time: {fast_fix()}"
        yield Finding("transport", "note", f"{named}, for mqtt5 is not installed", fix)


_LIBRARIES = {"mqtt5": ("mqtt5", "mqtt5"), "paho": ("paho.mqtt", "paho-mqtt")}
"""Module and distribution."""


def _broker(machine: Machine, settings: Settings) -> Iterator[Finding]:
    binary = find_mosquitto()
    yield Finding("mosquitto", "ok" if binary else "note", binary or "the broker's binary is not on this machine")
    try:
        found = find_broker(settings.broker.url, access=settings.access(), timeout_s=3.0)
    except SettingsError as exc:
        yield Finding("broker", "fault", exc.problem, exc.fix)
        return
    if found.reachable:
        yield Finding("broker", "ok", f"{settings.broker.url}: {found.detail}")
        topics = Topics(settings.root, settings.device)
        version: MqttVersion = 5 if found.protocol == "5" and settings.broker.protocol != "3.1.1" else 4
        if trouble := what_is_lacking(settings.broker.url, topics, version, access=settings.access()):
            what, _, fix = trouble.partition(". ")
            yield Finding("rights at the broker", "fault", f"{settings.device}'s {what}", f"{fix}.")
        else:
            yield Finding("rights at the broker", "ok", f"what {settings.device} is sent reaches it")
    else:
        fix = "Start one (`sudo apt install mosquitto`), or name yours with --broker or EDGE_SDK_BROKER__URL."
        yield Finding("broker", "fault", found.detail, fix)


def _secrets(machine: Machine, settings: Settings) -> Iterator[Finding]:
    """What we show the broker: how long it is good, and who can read it."""
    try:
        access = settings.access()
    except SettingsError:
        return  # the broker's finding says so
    for file in access.open_to_all():
        yield Finding("secrets", "note", f"every user of this machine may read {file}", f"chmod 600 {file}")
    if access.client_cert is None:
        return
    if not parse_url(settings.broker.url).tls:
        fix = "Use mqtts:// or wss://."
        yield Finding("client certificate", "note", f"it is not shown to {settings.broker.url}, which has no TLS", fix)
        return
    days = ExpiryWatch(access.client_cert).days_left(time.time())
    if days is None:
        fix = "It is to be PEM, and readable."
        yield Finding("client certificate", "fault", f"{access.client_cert} holds no certificate", fix)
        return
    level: Level = "fault" if days < 0 else "note" if days <= SOON_DAYS else "ok"
    yield Finding("client certificate", level, f"{access.client_cert} {told(days)}", "Renew it.")


def _engines(machine: Machine, settings: Settings) -> Iterator[Finding]:
    folder = settings.engines
    if not folder.is_dir():
        yield Finding("engines", "note", f"there is no folder {folder}", "Name yours with --engines.")
        return
    packages = package_folders(folder)
    if not packages:
        yield Finding("engines", "note", f"{folder} holds no package", "`edge-sdk build-engine` makes one.")
    for path in packages:
        yield _package(path, machine, settings.engine_cache)


def _package(path: Path, machine: Machine, store: Path | None) -> Finding:
    try:
        package = EnginePackage.open(path)
        package.verify()
    except EdgeSdkError as exc:
        return Finding(f"package {path.name}", "fault", exc.problem, exc.fix)
    if reasons := package.mismatches(machine):
        return Finding(str(package), "note", f"does not fit this machine: {'; '.join(reasons)}", "Build it here.")
    notes = package.notes(machine)
    if (fit := engine_fit(package, store)) is not None and not fit.place:
        return Finding(str(package), "note", "; ".join((*notes, fit.text())), fit.fix)
    if notes:
        return Finding(str(package), "note", " ".join(notes))
    return Finding(str(package), "ok", f"sound, {os.fspath(path)}{f'; {fit.text()}' if fit is not None else ''}")


@dataclass(frozen=True)
class EngineFit:
    """Whether a package of a backend that compiles has an engine that may be loaded here, and if not why."""

    place: str
    """Of the engine that would be loaded; empty if there is none."""
    why_not: tuple[str, ...]
    """For each engine that was found, what is against it."""
    meanwhile: str
    """What answers where none may be loaded; empty if nothing here can."""
    fix: str

    def text(self) -> str:
        if self.place:
            return f"{self.place} fits this machine"
        lacking = f"no engine fits this machine ({'. '.join(self.why_not)})" if self.why_not else "it has no engine yet"
        return f"{lacking}; {self.meanwhile or 'nothing'} answers until one does"

    def to_dict(self) -> dict[str, Any]:
        return {"fits": bool(self.place), **asdict(self)}


def engine_fit(package: EnginePackage, store: Path | None = None) -> EngineFit | None:
    """Where the engine of `package` would come from; None if its backend compiles none. Loads nothing of NVIDIA's."""
    if package.manifest.backend.name != TensorRTBackend.name:
        return None
    tensorrt = TensorRTBackend(store)
    meanwhile = ""
    try:
        meanwhile = _second_best(package)
        found: tuple[Candidate, ...] = tensorrt.fit(package)
        if place := next((candidate.place for candidate in found if not candidate.reasons), ""):
            return EngineFit(place, (), "", "")
        return EngineFit("", tuple(map(str, found)), meanwhile, tensorrt.next_step(package, found))
    except EdgeSdkError as exc:
        return EngineFit("", (exc.problem,), meanwhile, exc.fix)


def _second_best(package: EnginePackage) -> str:
    others = [name for name in package.profile().backends if name != package.manifest.backend.name]
    return next((name for name in others if backend(name).availability()), "")


_LOOKS: tuple[Callable[[Machine, Settings], Iterator[Finding]], ...] = (
    _python,
    _processor,
    _profile,
    _gpus,
    _store,
    _backends,
    _extras,
    _transport,
    _broker,
    _secrets,
    _engines,
)
