"""The profiles that ship: each loads, says where its numbers came from, and asks for a scheme its backend takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_sdk.profiles import DeviceProfile, Gpu, Machine, detect, load_profiles

PROFILES = load_profiles()
BARE = Machine("x86_64", frozenset({"avx2"}), 4, 8 << 30, "", ())


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_profile_is_sound(profile: DeviceProfile) -> None:
    """Every profile has sources, and TensorRT's scheme exactly where TensorRT is preferred."""
    prefers_tensorrt = profile.backends[0] == "tensorrt"

    assert profile.sources
    assert "onnxruntime" in profile.backends
    assert "int8" in profile.precisions
    assert {"fp32", "fp16"} & set(profile.precisions)
    assert prefers_tensorrt == profile.quantization.symmetric == (not profile.quantization.quantize_bias)
    assert prefers_tensorrt == (profile.tensorrt is not None)


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (BARE, "cpu-x86-avx2"),
        (replace(BARE, cpu_flags=frozenset({"avx2", "avx_vnni"})), "cpu-x86"),
        (replace(BARE, cpu_flags=frozenset({"avx2", "avx512_vnni"})), "cpu-x86"),
        (replace(BARE, gpus=(Gpu("NVIDIA GeForce RTX 2080 Ti"),)), "desktop-rtx-20"),
        (replace(BARE, gpus=(Gpu("NVIDIA GeForce GTX 1660 SUPER"),)), "desktop-rtx-20"),
        (replace(BARE, gpus=(Gpu("NVIDIA GeForce RTX 2050"),)), "desktop-rtx-30"),
        (replace(BARE, gpus=(Gpu("NVIDIA GeForce RTX 4070 Laptop GPU"),)), "desktop-rtx-40"),
        (replace(BARE, gpus=(Gpu("NVIDIA RTX A4000"),)), "cpu-x86-avx2"),
        (replace(BARE, gpus=(Gpu("NVIDIA H100 80GB HBM3"),)), "datacenter-h100"),
        (Machine("aarch64", frozenset({"asimd"}), 4, 8 << 30, "", ()), "cpu-arm64"),
        (Machine("aarch64", frozenset(), 4, 8 << 30, "Raspberry Pi 5 Model B Rev 1.0", ()), "raspberry-pi-5"),
        (
            Machine("aarch64", frozenset(), 6, 8 << 30, "NVIDIA Jetson Orin Nano Developer Kit", ()),
            "jetson-orin-nano",
        ),
        (Machine("aarch64", frozenset(), 12, 64 << 30, "NVIDIA Jetson AGX Orin Developer Kit", ()), "jetson-agx-orin"),
        (Machine("aarch64", frozenset(), 20, 128 << 30, "", (Gpu("NVIDIA GB10"),)), "dgx-spark"),
    ],
)
def test_machines_find_their_profile(machine: Machine, name: str) -> None:
    """The most specific profile that fits, and a sentence why."""
    profile, why = detect(machine, PROFILES)

    assert name == profile.name
    assert why.startswith(profile.title)
