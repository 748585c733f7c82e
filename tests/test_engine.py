"""An engine in one's own process: checked, kept apart from its caller's arrays, and closed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import edge_sdk
from edge_sdk.backends import registry
from edge_sdk.errors import BackendUnavailable, EngineFailed, InvalidTensor, PackageError, PackageMismatch
from edge_sdk.package import GRAPH, LABELS, EnginePackage
from edge_sdk.profiles import Machine
from edge_sdk.tensors import TensorSpec
from tests.packages import BACKEND, make_package, profile, scaling, two_inputs


@pytest.fixture
def doubling(tmp_path: Path) -> EnginePackage:
    return make_package(tmp_path / "double", scaling(2.0))


def test_load_ask_close(doubling: EnginePackage) -> None:
    """The README's four lines: a package or its path, plain arrays in, named arrays out, closed at the end."""
    for given in (doubling, str(doubling.path)):
        with edge_sdk.load_engine(given) as engine:
            result = engine.infer({"x": np.arange(8, dtype=np.float32).reshape(2, 4).T.copy().T})

            assert [[0, 2, 4, 6], [8, 10, 12, 14]] == result["y"].tolist()
            assert ("x", "y") == (engine.inputs[0].name, engine.outputs[0].name)
        with pytest.raises(EngineFailed, match="closed"):
            engine.infer({"x": np.zeros((1, 4), np.float32)})


def test_results_are_the_callers(doubling: EnginePackage) -> None:
    """What one call gave back is untouched by the next."""
    with edge_sdk.load_engine(doubling) as engine:
        first = engine.infer({"x": np.ones((1, 4), np.float32)})["y"]
        engine.infer({"x": np.zeros((1, 4), np.float32)})

        assert [[2, 2, 2, 2]] == first.tolist()


def test_lists_are_arrays_too(tmp_path: Path) -> None:
    """Anything numpy takes is taken, and judged by its dtype."""
    with edge_sdk.load_engine(make_package(tmp_path / "two", two_inputs())) as engine:
        a, b = np.array([[1, 2, 3]], np.float32), np.array([[1, 1, 1]], np.float32)

        assert [[0, 1, 2]] == engine.infer({"a": a, "b": b})["difference"].tolist()
        with pytest.raises(InvalidTensor, match="'a' came as FP64"):
            engine.infer({"a": [[1.0, 2.0, 3.0]], "b": b})
        with pytest.raises(InvalidTensor, match="'b' is missing"):
            engine.infer({"a": a})


@pytest.mark.parametrize("order", "<>=")
def test_either_byte_order_is_taken(doubling: EnginePackage, order: str) -> None:
    """An array read from a big-endian file holds the same numbers, and gives the same results."""
    given = np.array([[1, 2, 3, 4]], f"{order}f4")
    with edge_sdk.load_engine(doubling) as engine:
        assert [[2, 4, 6, 8]] == engine.infer({"x": given})["y"].tolist()
    assert [[1, 2, 3, 4]] == given.tolist()


def test_a_package_for_another_machine_is_refused(doubling: EnginePackage) -> None:
    """PackageMismatch carries every reason, for a program to read."""
    other = dataclasses.replace(Machine.read(), architecture="riscv64")
    with pytest.raises(PackageMismatch, match="does not fit") as caught:
        registry.load_engine(doubling, other)

    assert doubling.mismatches(other) == caught.value.reasons


def test_loading_starts_no_other_program(
    doubling: EnginePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a package fits is known without asking the GPU's driver."""
    tool, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
    tool.write_text(f"#!/bin/sh\necho asked > {asked}\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    edge_sdk.load_engine(doubling).close()

    assert not asked.exists()


@pytest.mark.parametrize("name", [GRAPH, LABELS])
def test_an_altered_package_is_not_loaded(tmp_path: Path, name: str) -> None:
    """Every file's digest is checked, also of those that loading does not need."""
    doubling = make_package(tmp_path / "double", scaling(2.0), labels=("a", "b"))
    (doubling.path / name).write_bytes(scaling(3.0).SerializeToString())
    with pytest.raises(PackageError, match="altered"):
        edge_sdk.load_engine(doubling)


@pytest.mark.parametrize(
    ("side", "spec", "complaint"),
    [
        ("inputs", TensorSpec("z", "float32", ("batch", 4)), "inputs"),
        ("inputs", TensorSpec("x", "float64", ("batch", 4)), "float64"),
        ("outputs", TensorSpec("y", "float32", ("batch",)), "outputs"),
        ("outputs", TensorSpec("y", "int64", ("batch", 4)), "int64"),
    ],
    ids=["name", "input's dtype", "rank", "output's dtype"],
)
def test_a_manifest_of_another_graph_is_refused(
    doubling: EnginePackage, side: str, spec: TensorSpec, complaint: str
) -> None:
    """What the manifest promises to clients is what the engine has: names, dtypes and ranks."""
    manifest = doubling.manifest.model_copy(update={side: (spec,)})
    with pytest.raises(PackageError, match=complaint):
        registry.load_engine(dataclasses.replace(doubling, manifest=manifest))


def test_a_backend_that_does_not_exist_is_named() -> None:
    """BackendUnavailable names what there is, and a profile's order is followed past what is not here."""
    with pytest.raises(BackendUnavailable, match="no backend 'abacus'"):
        registry.backend("abacus")

    profile_of_a_jetson = profile().model_copy(update={"backends": ("tensorrt", BACKEND)})

    assert BACKEND == registry.backend_for(profile_of_a_jetson).name
    with pytest.raises(BackendUnavailable, match="Nothing here can run"):
        registry.backend_for(profile().model_copy(update={"backends": ("abacus",)}))
