"""Which profile and which backend: what runs here comes before what would fit better."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edge_sdk.backends.registry import backend, discard, usable_profile
from edge_sdk.backends.tensorrt.store import entry_name
from edge_sdk.errors import BackendUnavailable
from edge_sdk.package import GRAPH
from edge_sdk.profiles import Gpu, Machine
from tests.packages import make_package, scaling

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


def test_an_engine_is_discarded_though_its_package_is_gone(tmp_path: Path) -> None:
    """Another build has put other files into the package's place: which graph it was is in the manifest."""
    package = make_package(tmp_path / "double", scaling(2.0))
    store = tmp_path / "store"
    ours = store / entry_name(package.manifest.files[GRAPH].sha256, version="1")
    others = store / entry_name("0" * 64, version="1")
    for entry in (ours, others):
        entry.mkdir(parents=True)
    (package.path / GRAPH).write_bytes(scaling(3.0).SerializeToString())
    discard(package, store=store)

    assert (False, True) == (ours.exists(), others.exists())
