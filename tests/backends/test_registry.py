"""Which profile and which backend: what runs here comes before what would fit better."""

from __future__ import annotations

import dataclasses

import pytest

from edge_sdk.backends.registry import backend, usable_profile
from edge_sdk.errors import BackendUnavailable
from edge_sdk.profiles import Gpu, Machine

PC = Machine("x86_64", frozenset({"avx2", "avx512_vnni"}), 8, 32_000_000_000, "", (Gpu("NVIDIA GeForce RTX 4090"),))


def test_without_tensorrt_a_gpu_machine_builds_for_its_cpu() -> None:
    """A graph quantised for TensorRT would run on the CPU, and slowly: the CPU's profile is taken, and it is said."""
    pytest.importorskip("onnxruntime")
    profile, why = usable_profile(PC)

    assert "cpu-x86" == profile.name
    assert "desktop-rtx-40 fits better" in why


def test_a_cpu_machine_gets_its_own_profile() -> None:
    pytest.importorskip("onnxruntime")
    profile, why = usable_profile(dataclasses.replace(PC, gpus=(), cpu_flags=frozenset({"avx2"})))

    assert "cpu-x86-avx2" == profile.name
    assert "fits better" not in why


def test_a_backend_that_does_not_exist_is_said_to_be_none() -> None:
    with pytest.raises(BackendUnavailable, match="no backend 'openvino'"):
        backend("openvino")
