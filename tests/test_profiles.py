"""Device profiles: every shipped one is sound and sourced, and each machine finds its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_sdk import resources
from edge_sdk.errors import ProfileError
from edge_sdk.profiles import Gpu, Machine, detect, load_profile, load_profiles, profile_names
from edge_sdk.toml import read_toml


def machine(architecture: str, *flags: str, device_tree: str = "", gpu: str = "") -> Machine:
    return Machine(architecture, frozenset(flags), 4, 8 << 30, device_tree, (Gpu(gpu),) if gpu else ())


def numbers(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of everything in a profile that is a number, or a version made of numbers."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for entry in value:
                yield from numbers(entry, f"{prefix}{key}.")
        elif (isinstance(value, (int, float)) and not isinstance(value, bool)) or key == "compute_capabilities":
            yield f"{prefix}{key}"


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_are_sound_and_sourced(name: str) -> None:
    """A profile loads, is called like its file, and says of each of its numbers where it comes from."""
    data = read_toml(resources.PROFILES / f"{name}.toml", ProfileError)
    sources = load_profile(name).sources
    unsourced = {
        key for key in numbers(data) if not any(key == source or key.startswith(f"{source}.") for source in sources)
    }

    assert name == load_profile(name).name
    assert set() == unsourced


@pytest.mark.parametrize("name", profile_names())
def test_schemes_suit_their_backend(name: str) -> None:
    """TensorRT takes symmetric signed INT8 without INT32 biases; a profile that prefers it asks for nothing else."""
    profile = load_profile(name)
    scheme = profile.quantization
    prefers_tensorrt = "tensorrt" == profile.backends[0]

    assert prefers_tensorrt is (profile.tensorrt is not None)
    assert not prefers_tensorrt or ("s8", True, False) == (scheme.activations, scheme.symmetric, scheme.quantize_bias)


@pytest.mark.parametrize(
    ("found", "profile", "because"),
    [
        (machine("x86_64", "avx2", "avx512_vnni"), "cpu-x86", "its CPU has avx512_vnni"),
        (machine("x86_64", "avx2", "avx_vnni"), "cpu-x86", "its CPU has avx_vnni"),
        (machine("x86_64", "avx2"), "cpu-x86-avx2", "its CPU has avx2"),
        (machine("aarch64", "asimddp"), "cpu-arm64", "the machine is aarch64"),
        (machine("aarch64", device_tree="Raspberry Pi 4 Model B Rev 1.4"), "cpu-arm64", "the machine is aarch64"),
        (machine("aarch64", device_tree="Raspberry Pi 5 Model B Rev 1.0"), "raspberry-pi-5", "Raspberry Pi 5 Model B"),
        (
            machine("aarch64", device_tree="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"),
            "jetson-orin-nano", "Orin Nano",
        ),
        (machine("aarch64", device_tree="NVIDIA Jetson AGX Orin Developer Kit"), "jetson-agx-orin", "AGX Orin"),
        (machine("aarch64", device_tree="NVIDIA Jetson AGX Thor Developer Kit"), "jetson-thor", "Thor"),
        (machine("x86_64", "avx2", "avx_vnni", gpu="NVIDIA GeForce RTX 4070"), "desktop-rtx-40", "RTX 4070"),
        (machine("x86_64", "avx2", "avx512_vnni", gpu="NVIDIA H100 80GB HBM3"), "datacenter-h100", "H100 80GB"),
        (machine("x86_64", "avx2", gpu="Quadro K620"), "cpu-x86-avx2", "its CPU has avx2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_machine_finds_its_profile(found: Machine, profile: str, because: str) -> None:
    """The most specific profile whose every condition holds is chosen, and the reason says what decided."""
    chosen, why = detect(found, load_profiles())

    assert profile == chosen.name
    assert because in why
    assert why.startswith(chosen.title)


def test_a_machine_that_fits_nothing_is_told_so() -> None:
    """No profile is guessed: the error names the machine and the way out."""
    with pytest.raises(ProfileError, match=r"riscv64.*--profile"):
        detect(machine("riscv64"), load_profiles())


@pytest.mark.parametrize("name", ["no-such", "../cpu-x86", "/etc/passwd", "CPU-X86", "", "x" * 1000])
def test_unknown_names_are_refused(name: str) -> None:
    """A name that is not a shipped profile's reaches no file, and the error lists those there are."""
    with pytest.raises(ProfileError, match="there are cpu-arm64, "):
        load_profile(name)


def test_a_profile_of_your_own(tmp_path: Path) -> None:
    """A path loads a file like a shipped one; a key nobody knows is refused with its name."""
    text = (resources.PROFILES / "cpu-x86.toml").read_text(encoding="utf-8")
    own = tmp_path / "board.toml"
    own.write_text(text.replace('"cpu-x86"', '"board"'), encoding="utf-8")

    assert "board" == load_profile(str(own)).name

    own.write_text("watts = 3\n" + text, encoding="utf-8")
    with pytest.raises(ProfileError, match=r"board\.toml: `watts` is not a known key"):
        load_profile(str(own))


def test_the_driver_is_asked_only_if_need_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a machine without its GPUs starts no nvidia-smi, which may take seconds."""
    tool, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
    tool.write_text(f"#!/bin/sh\necho asked >> {asked}\necho NVIDIA H100 PCIe\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    without = Machine.read(gpus=False)

    assert () == without.gpus
    assert not asked.exists()
    assert (Gpu("NVIDIA H100 PCIe"),) == Machine.read().gpus


@pytest.mark.parametrize(
    ("line", "gpu"),
    [
        (
            "NVIDIA GeForce RTX 3060, 8.6, 12288, 580.65.06",
            Gpu("NVIDIA GeForce RTX 3060", "8.6", 12288 * 2**20, "580.65.06"),
        ),
        ("Orin (nvgpu), [N/A], [N/A], 540.4.0", Gpu("Orin (nvgpu)", None, None, "540.4.0")),
        ("Orin (nvgpu), 8.7, [Not Supported], N/A", Gpu("Orin (nvgpu)", "8.7", None, None)),
    ],
)
def test_what_the_driver_does_not_say_is_none(
    line: str, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi knows less on a Jetson, and says so in several ways."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{line}'\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    assert (gpu,) == Machine.read().gpus


def test_this_machine_can_be_read() -> None:
    """Reading a machine raises nothing and finds at least one core."""
    found = Machine.read()

    assert found.architecture
    assert found.physical_cores >= 1
