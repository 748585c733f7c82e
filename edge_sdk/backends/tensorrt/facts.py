"""What this machine has for TensorRT to run on, found without loading anything of NVIDIA's.

Flavours and versions come from the packages' metadata, GPUs and drivers from nvidia-smi. A Jetson's nvidia-smi tells
little and an older one has none: there the device tree names the module, and its device profile the GPU. Where a GPU is
about to be used anyway, CUDA itself is asked: it knows which of several it will take, and what of it this process sees.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import replace
from pathlib import Path

from edge_sdk.backends import cuda
from edge_sdk.backends.base import installed_version
from edge_sdk.backends.tensorrt import api
from edge_sdk.backends.tensorrt.sidecar import TITLES, Here
from edge_sdk.errors import BackendUnavailable, ProfileError
from edge_sdk.profiles import DeviceProfile, Machine, detect, load_profiles

FLAVOURS = ("tensorrt", "tensorrt_rtx")
_BINDINGS = (("pycuda", "driver.py", "pycuda"), ("cuda", "bindings", "cuda-bindings"))
"""What `backends.cuda` can use, in its order: the package, what of it, and the name under which it is published."""
BINDING_FIX = "Install one: pip install cuda-python; on a Jetson, pip install pycuda."
_CUDA_RELEASES = range(20, 10, -1)

_found: list[Machine] = []


def this_machine() -> Machine:
    """The machine with its GPUs. nvidia-smi may take a second, so a GPU that was found once is not looked for again;
    one that was not may only be late."""
    if _found:
        return _found[0]
    machine = Machine.read()
    if machine.gpus:
        _found.append(machine)
    return machine


def is_jetson(machine: Machine) -> bool:
    return "NVIDIA" in machine.device_tree or "Jetson" in machine.device_tree


def flavours() -> dict[str, str]:
    """The flavours that are installed, and their versions."""
    found = {flavour: api.find(flavour) for flavour in FLAVOURS}
    return {flavour: version for flavour, version in found.items() if version is not None}


def flavour_for(machine: Machine, profile: DeviceProfile | None = None) -> str:
    """Which flavour runs engines here: the profile's; without one this machine's, or else whichever is installed."""
    if profile is not None and profile.tensorrt is not None:
        return profile.tensorrt.flavour
    fitting = _fitting(machine)
    wanted = fitting.tensorrt.flavour if fitting is not None and fitting.tensorrt is not None else None
    if is_jetson(machine):
        return "tensorrt"
    installed = flavours()
    if wanted in installed or not installed:
        return wanted or "tensorrt_rtx"
    return next(iter(installed))


def here(flavour: str, machine: Machine, facts: cuda.Facts | None = None) -> Here:
    """What an engine of `flavour` finds here. `facts` are CUDA's own of the GPU that it would run on."""
    gpu = machine.gpus[0] if machine.gpus else None
    found = Here(
        flavour=flavour,
        version=api.find(flavour),
        gpu=_plain(gpu.name) if gpu is not None else None,
        compute_capability=gpu.compute_capability if gpu is not None else None,
        driver=gpu.driver if gpu is not None else None,
    )
    if facts is not None:
        found = replace(
            found,
            gpu=_plain(facts.name),
            compute_capability=facts.compute_capability,
            cuda=facts.cuda_version,
        )
    if is_jetson(machine):  # CUDA and nvidia-smi call every module of a family the same
        found = replace(
            found,
            gpu=_plain(machine.device_tree),
            compute_capability=found.compute_capability or _compute_capability(_fitting(machine)),
        )
    return found


def cuda_facts() -> cuda.Facts:
    """The GPU that CUDA takes in this process. Loads a CUDA binding; BackendUnavailable says what is missing."""
    binding = cuda.open_binding()
    if not binding.count():
        raise BackendUnavailable("CUDA sees no GPU here.", fix="`nvidia-smi` and CUDA_VISIBLE_DEVICES tell why.")
    return binding.facts(0)


def cuda_bindings() -> list[str]:
    """The CUDA bindings that are installed, each with its version."""
    return [
        f"{distribution} {installed_version(package, distribution)}"
        for package, part, distribution in _BINDINGS
        if (spec := importlib.util.find_spec(package)) is not None
        and any((Path(place) / part).exists() for place in spec.submodule_search_locations or ())
    ]


def cuda_release(flavour: str) -> str | None:
    """The CUDA release that the installed TensorRT is made for, as "13"; None where its packages do not say."""
    for release in _CUDA_RELEASES:
        try:
            importlib.metadata.version(f"{flavour}_cu{release}")
        except importlib.metadata.PackageNotFoundError:
            continue
        return str(release)
    return None


def install_fix(machine: Machine, flavour: str) -> str:
    """How to get TensorRT on this machine."""
    if is_jetson(machine):
        return "It comes with JetPack: sudo apt install nvidia-jetpack, and let the Python that runs edge-sdk see it."
    command = "'edge-sdk[rtx]'" if flavour == "tensorrt_rtx" else flavour
    return f"Install {TITLES[flavour]}: pip install {command}."


def _fitting(machine: Machine) -> DeviceProfile | None:
    try:
        return detect(machine, load_profiles())[0]
    except ProfileError:
        return None


def _compute_capability(profile: DeviceProfile | None) -> str | None:
    return profile.tensorrt.compute_capabilities[0] if profile is not None and profile.tensorrt is not None else None


def _plain(name: str) -> str:
    """A name as a sidecar can hold it."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in name)[:200]
