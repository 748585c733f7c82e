"""Device profiles: what a device can do, as data; and which profile fits the machine we are on.

A profile is a TOML file in `device_profiles/`. It decides what a build produces (precisions, quantisation scheme,
backends in order of preference) and how an engine is run (threads, memory). Everything in it has its unit in its name,
and `[sources]` says where each number came from. `Machine` is the other half: the facts of this computer, read without
loading any vendor library. `detect` puts the two together and says why.

    profile, why = detect(Machine.read(), load_profiles())
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field

from edge_sdk import resources
from edge_sdk.errors import ProfileError
from edge_sdk.toml import Table, parse, read_toml

Precision = Literal["fp32", "fp16", "int8"]
Family = Literal["cpu", "jetson", "rtx", "datacenter"]


class Match(Table):
    """How the device is recognised. Every condition given must hold."""

    cpu_flags: tuple[str, ...] = ()
    """Flags of /proc/cpuinfo, all of them required."""
    any_cpu_flags: tuple[str, ...] = ()
    """Flags of /proc/cpuinfo, one of them required: names for one ability in several instruction sets."""
    device_tree: str | None = None
    """A regular expression, searched in the device tree's model (Raspberry Pi, Jetson)."""
    gpu_name: str | None = None
    """A regular expression, searched in the GPU's name as nvidia-smi reports it."""


class Memory(Table):
    total_bytes: int | None = Field(default=None, gt=0)
    """The memory of the device, or of its GPU where that is separate; None: whatever the machine has."""
    usable_fraction: float = Field(default=0.8, gt=0, le=1)
    """How much of it engines may use together."""


class Quantization(Table):
    """The INT8 scheme this device computes fastest; statistics are collected once, Q/DQ nodes written per scheme."""

    activations: Literal["u8", "s8"]
    symmetric: bool
    """Zero point fixed at 0 (s8); TensorRT requires it."""
    per_channel: bool = True
    quantize_bias: bool
    """INT32 biases. TensorRT's parser rejects an INT32 DequantizeLinear, so there biases stay in FP32."""
    reduce_range: bool = False
    """7-bit weights, for x86 without VNNI, whose 8-bit multiply-add saturates."""


class OnnxRuntimeOptions(Table):
    intra_op_threads: int = Field(default=0, ge=0)
    """0: one for each physical core the process may use."""
    spinning: bool = True
    """Threads that wait for one another spin for a few microseconds before they sleep; never between two runs. A build
    on the device itself measures it, and numbers of threads, and packs what earned its place."""
    graph_optimization: Literal["none", "basic", "extended", "all"] = "all"


class TensorRTOptions(Table):
    """How TensorRT builds engines for this device; engine.toml's [tensorrt] may override what depends on the model."""

    flavour: Literal["tensorrt", "tensorrt_rtx"]
    compute_capabilities: tuple[str, ...] = Field(min_length=1)
    """Of the device's GPU, as "8.6"."""
    portable: bool = False
    """tensorrt_rtx: build for every GPU from compute capability 8.0 on, at some cost in speed and size."""
    workspace_bytes: int | None = Field(default=None, gt=0)
    """Scratch memory a layer may use; None: as much as the GPU has."""
    optimization_level: int = Field(default=3, ge=0, le=5)
    """How long the builder searches: 0 compiles fastest, 5 tries everything. 3 is TensorRT's own default."""
    max_aux_streams: int | None = Field(default=None, ge=0, le=16)
    """Streams beside the main one on which an engine may compute; None: TensorRT decides, and a build on the device
    itself measures whether none at all is faster, and packs what it found."""
    timing_cache: bool = True
    """tensorrt: keep what the builder measured, for the next build. Never used for a tensorrt_rtx build."""
    version_compatible: bool = False
    """tensorrt: an engine that later versions of the same major release can load."""
    hardware_compatible: Literal["none", "ampere-plus", "same-compute-capability"] = "none"
    """tensorrt: an engine that other GPUs than this one can run."""
    weight_streaming: bool = False
    """Weights may stay in the computer's memory and be streamed to a GPU that has too little."""
    strip_weights: bool = False
    """Leave the weights out of the engine; they are put back from the graph when it is loaded. Needs a GPU to build."""
    sparse_weights: bool = False
    """Use the sparse tensor cores where weights have two zeros in every four."""
    dla_cores: int = Field(default=0, ge=0)
    """Deep-learning accelerators of the device. Layers that they do not take run on the GPU, and the report says so."""
    build_memory_bytes: int | None = Field(default=None, gt=0)
    """A build that takes more is ended; None: 60 % of the machine's memory."""
    build_time_s: float = Field(default=3600.0, gt=0)
    """A build that takes longer is ended."""


class PowerMode(Table):
    name: str
    watts: float = Field(gt=0)


class DeviceProfile(Table):
    """One device, as its TOML file describes it."""

    name: str = Field(pattern=r"^[a-z0-9-]{1,64}$")
    title: str
    family: Family
    architecture: Literal["x86_64", "aarch64"]
    backends: tuple[Literal["onnxruntime", "tensorrt"], ...] = Field(min_length=1)
    """In order of preference."""
    precisions: tuple[Precision, ...] = Field(min_length=1)
    match: Match = Match()
    memory: Memory = Memory()
    quantization: Quantization
    onnxruntime: OnnxRuntimeOptions = OnnxRuntimeOptions()
    tensorrt: TensorRTOptions | None = None
    power_modes: tuple[PowerMode, ...] = ()
    sources: Mapping[str, str] = {}
    """Where each number came from: key -> source."""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, as its driver's own tool reports it; None where the tool does not say (on a Jetson)."""

    name: str
    compute_capability: str | None = None
    """As "8.6"."""
    memory_bytes: int | None = None
    driver: str | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Machine:
    """The facts of a computer that decide which profile and which packages fit it."""

    architecture: str
    cpu_flags: frozenset[str]
    physical_cores: int
    memory_bytes: int
    device_tree: str
    gpus: tuple[Gpu, ...]

    @classmethod
    def read(cls, *, gpus: bool = True) -> Machine:
        """This computer, from /proc, /sys and nvidia-smi; whatever cannot be read is left empty.

        Without `gpus` the GPU's driver is not asked: that may take seconds, and only choosing a profile needs it.
        """
        cpuinfo = _text("/proc/cpuinfo")
        flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
        return cls(
            architecture={"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine()),
            cpu_flags=frozenset(flags.group(1).split()) if flags else frozenset(),
            physical_cores=physical_cores(),
            memory_bytes=_memory_bytes(),
            device_tree=_text("/proc/device-tree/model").rstrip("\0"),
            gpus=_gpus() if gpus else (),
        )

    @cached_property
    def has_vnni(self) -> bool:
        return bool(self.cpu_flags & {"avx512_vnni", "avx_vnni"})


def load_profile(name_or_path: str) -> DeviceProfile:
    """A profile by name (one that ships with edge-sdk) or by the path of a TOML file of your own."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = resources.PROFILES / f"{name_or_path}.toml"
        if not re.fullmatch(r"[a-z0-9-]{1,64}", name_or_path) or not path.is_file():
            raise ProfileError(
                f"There is no device profile {name_or_path[:80]!r}; there are {', '.join(sorted(profile_names()))}.",
                fix="Choose one, or give the path of a .toml file of your own.",
            )
    return parse(read_toml(path, ProfileError), DeviceProfile, str(path), ProfileError)


def profile_names() -> list[str]:
    return sorted(path.stem for path in resources.PROFILES.glob("*.toml"))


def load_profiles() -> list[DeviceProfile]:
    return [load_profile(name) for name in profile_names()]


def detect(machine: Machine, profiles: list[DeviceProfile]) -> tuple[DeviceProfile, str]:
    """The profile that fits `machine` best, and why, as a sentence.

    The more specific profile wins: a Raspberry Pi 5 is an arm64 CPU too, but its device tree names it.
    """
    candidates = [(p, reasons) for p in profiles if (reasons := fitting_conditions(machine, p)) is not None]
    if not candidates:
        raise ProfileError(
            f"No device profile fits this machine ({machine.architecture}, {machine.device_tree or 'no device tree'}).",
            fix="Give one with --profile; `edge-sdk profiles list` shows them.",
        )
    profile, reasons = max(candidates, key=lambda candidate: _specificity(candidate[0].match))
    return profile, f"{profile.title}: {', '.join(reasons)}."


def _specificity(match: Match) -> tuple[bool, int]:
    """A device tree or a GPU names the device outright, so it outweighs any number of CPU flags."""
    named = match.device_tree is not None or match.gpu_name is not None
    return named, len(match.cpu_flags) + 2 * bool(match.any_cpu_flags)


def fitting_conditions(machine: Machine, profile: DeviceProfile) -> list[str] | None:
    """The conditions of `profile` that `machine` meets, in words; None if it fails one."""
    if machine.architecture != profile.architecture:
        return None
    reasons = [f"the machine is {machine.architecture}"]
    if lacking_cpu_flags(machine, profile):
        return None
    reasons += [f"its CPU has {flag}" for flag in profile.match.cpu_flags]
    reasons += [f"its CPU has {flag}" for flag in profile.match.any_cpu_flags if flag in machine.cpu_flags][:1]
    if profile.match.device_tree is not None:
        if not re.search(profile.match.device_tree, machine.device_tree):
            return None
        reasons.append(f"its device tree says {machine.device_tree!r}")
    if profile.match.gpu_name is not None:
        gpu = next((gpu for gpu in machine.gpus if re.search(profile.match.gpu_name, gpu.name)), None)
        if gpu is None:
            return None
        reasons.append(f"its GPU is {gpu.name!r}")
    return reasons


def lacking_cpu_flags(machine: Machine, profile: DeviceProfile) -> str:
    """The CPU flags that `profile` is made for and `machine` has not, in words; empty if it has what it takes."""
    lacking = [flag for flag in profile.match.cpu_flags if flag not in machine.cpu_flags]
    alternatives = profile.match.any_cpu_flags
    if alternatives and machine.cpu_flags.isdisjoint(alternatives):
        lacking.append(" or ".join(alternatives))
    return ", ".join(lacking)


def physical_cores() -> int:
    """Cores this process may use, counting hyper-threads of one core once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = {_text(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") or str(n) for n in allowed}
    return max(1, len(siblings))


def processor() -> str:
    """The kind of processor and how many of its cores this process may use: what a measurement of threads holds for.

    `Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz, 4 cores`
    """
    cpuinfo = _text("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    parts = sorted(set(re.findall(r"^CPU (?:implementer|part)\s*:\s*(\S+)$", cpuinfo, re.MULTILINE)))
    kind = named[1].strip() if named else " ".join(parts) or platform.machine()
    return f"{kind}, {physical_cores()} cores"


def _memory_bytes() -> int:
    found = re.search(r"^MemTotal:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs, asked of the driver's own tool: no vendor library is loaded for it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    try:
        listed = subprocess.run(
            [tool, "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(_gpu(line) for line in listed.stdout.splitlines() if line.strip())


def _gpu(line: str) -> Gpu:
    """A line of nvidia-smi's answer; what it does not know it calls `[N/A]`, `[Not Supported]` or nothing at all."""
    name, compute_capability, mebibytes, driver = ([part.strip() for part in line.split(",")] + [""] * 4)[:4]
    return Gpu(
        name=name,
        compute_capability=compute_capability if re.fullmatch(r"\d+\.\d+", compute_capability) else None,
        memory_bytes=int(mebibytes) * 2**20 if mebibytes.isdigit() else None,
        driver=driver if re.fullmatch(r"[\d.]+", driver) else None,
    )


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
