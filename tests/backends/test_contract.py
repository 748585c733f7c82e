"""What every backend keeps: one suite over all of them, and each the oracle of the others."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from edge_sdk.backends import registry
from edge_sdk.backends.base import UNKNOWN_VERSION, Backend, Engine, installed_version
from edge_sdk.backends.onnx_bytes import refuse_external_data
from edge_sdk.errors import EngineFailed, OutOfMemory
from edge_sdk.tensors import OIP_FROM_DTYPE, Array, TensorSpec, allocate
from tests import packages
from tests.compile.graphs import conv_net, pictures

TOLERANCE = 1e-5
"""float32 sums of a few hundred terms, added in another order."""


@pytest.fixture(params=registry.NAMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen = registry.backend(request.param)
    if not (available := chosen.availability()):
        pytest.skip(f"{available.why_not} {available.fix}")
    return chosen


@pytest.fixture
def engine(backend: Backend) -> Iterator[Engine]:
    """y = 2 * x, rows of four."""
    loaded = load(backend, packages.scaling(2.0))
    yield loaded
    loaded.close()


def load(backend: Backend, model: ModelProto) -> Engine:
    return backend.load_graph(model.SerializeToString(), packages.profile())


def rows(count: int, start: float = 0.0) -> Array:
    return np.arange(start, start + 4 * count, dtype=np.float32).reshape(count, 4)


def test_specs_are_those_of_the_graph(backend: Backend) -> None:
    """Names, dtypes and shapes; an axis keeps its name, and `?` stands for one without."""
    two = load(backend, packages.two_inputs())
    row = ("float32", ("batch", 3))
    nameless = load(backend, packages.scaling(batch=None))

    assert (TensorSpec("a", *row), TensorSpec("b", *row)) == two.inputs
    assert (TensorSpec("sum", *row), TensorSpec("difference", *row)) == two.outputs
    assert ("?", 4) == nameless.inputs[0].shape


def test_every_output_by_name(backend: Backend) -> None:
    """All outputs come back, whatever the order in which inputs were given."""
    engine = load(backend, packages.two_inputs())
    a, b = np.full((1, 3), 5, np.float32), np.full((1, 3), 3, np.float32)

    for feeds in ({"a": a, "b": b}, {"b": b, "a": a}):
        outputs = engine.infer(feeds)
        assert {"sum": [[8] * 3], "difference": [[2] * 3]} == {name: array.tolist() for name, array in outputs.items()}


@pytest.mark.parametrize("batch", [1, 3, 8, 2])
def test_a_batch_is_a_larger_first_axis(engine: Engine, batch: int) -> None:
    """One engine takes any batch, in any order of sizes."""

    assert (rows(batch) * 2).tolist() == engine.infer({"x": rows(batch)})["y"].tolist()


def test_out_is_written_and_given_back(engine: Engine) -> None:
    """With `out`, results land in those very arrays, call after call, also when arrays are swapped for others."""
    out, other = {"y": np.empty((2, 4), np.float32)}, {"y": np.empty((2, 4), np.float32)}
    feeds = {"x": rows(2)}
    for factor, target in ((1, out), (3, out), (5, other), (7, out)):
        feeds["x"][:] = rows(2) * factor
        results = engine.infer(feeds, target)

        assert results["y"] is target["y"]
        assert (rows(2) * 2 * factor).tolist() == target["y"].tolist()
    assert (rows(2) * 2 * 5).tolist() == other["y"].tolist()


def test_arrays_are_told_apart_by_their_names(backend: Backend) -> None:
    """The same two arrays under swapped names are other feeds, also over a kept binding."""
    engine = load(backend, packages.two_inputs())
    one, two = np.full((1, 3), 1, np.float32), np.full((1, 3), 2, np.float32)
    out = {"sum": np.empty((1, 3), np.float32), "difference": np.empty((1, 3), np.float32)}

    assert [[-1] * 3] == engine.infer({"a": one, "b": two}, out)["difference"].tolist()
    assert [[1] * 3] == engine.infer({"b": one, "a": two}, out)["difference"].tolist()


def test_more_arrays_than_any_loop_uses(engine: Engine) -> None:
    """Bindings may be forgotten; results stay right over many sets of arrays used in turn."""
    sets = [({"x": rows(n % 3 + 1, n)}, {"y": np.empty((n % 3 + 1, 4), np.float32)}) for n in range(40)]
    for feeds, out in sets * 2:
        engine.infer(feeds, out)

        assert (feeds["x"] * 2).tolist() == out["y"].tolist()


@pytest.mark.parametrize(
    "model", [packages.scaling(2.0), packages.identity(shape=("batch", 4))], ids=["mul", "identity"]
)
def test_results_belong_to_the_caller(backend: Backend, model: ModelProto) -> None:
    """Without `out`, what one call gave back is changed neither by the next nor by a change of the feeds."""
    engine = load(backend, model)
    feeds = {"x": rows(2)}
    first = engine.infer(feeds)["y"]
    kept = first.copy()
    feeds["x"][:] = -1
    engine.infer(feeds)

    assert kept.tolist() == first.tolist()


def test_feeds_are_only_read(engine: Engine) -> None:
    """A read-only array, a view of a request's bytes, is as good as any, and is left as it was."""
    frozen = np.frombuffer(rows(2).tobytes(), np.float32).reshape(2, 4)
    for out in (None, {"y": np.empty((2, 4), np.float32)}):
        engine.infer({"x": frozen}, out)

    assert rows(2).tolist() == frozen.tolist()


@pytest.mark.parametrize("dtype", OIP_FROM_DTYPE)
def test_dtypes(backend: Backend, dtype: str) -> None:
    """Every dtype of the wire goes in and comes out as it was; strings are bytes."""
    kind = getattr(TensorProto, {"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper()))
    engine = load(backend, packages.identity(kind, ("batch", 2)))
    given = {
        "string": np.array([["grün".encode(), b""]], dtype=object),
        "bool": np.array([[True, False]]),
    }.get(dtype, np.array([[0, 100]], dtype=dtype if dtype != "string" else object))
    result = engine.infer({"x": given})["y"]
    out = {"y": np.empty_like(given)}
    engine.infer({"x": given}, out)

    assert (dtype, dtype) == (engine.inputs[0].dtype, engine.outputs[0].dtype)
    assert (given.dtype, given.tolist()) == (result.dtype, result.tolist())
    assert given.tolist() == out["y"].tolist()


def test_an_output_may_have_no_axes(backend: Backend) -> None:
    """A scalar is an array of shape ()."""
    engine = load(backend, packages.total())
    out = {"y": np.empty((), np.float32)}

    assert ((), 6.0) == (engine.infer({"x": np.array([1, 2, 3], np.float32)})["y"].shape, engine.infer(
        {"x": np.array([1, 2, 3], np.float32)}, out)["y"].item())  # fmt: skip


def test_a_stateful_model(backend: Backend) -> None:
    """State that runs along its second axis comes back and can be fed again."""
    engine = load(backend, packages.stateful())
    state = np.zeros((1, 1, 2), np.float32)
    for _ in range(3):
        outputs = engine.infer({"sample": np.ones((1, 2), np.float32), "state": state})
        state = outputs["new_state"]

    assert [[3, 3]] == outputs["total"].tolist()


def test_what_the_runtime_refuses_is_engine_failed(engine: Engine) -> None:
    """Whatever the runtime raises is translated, and the engine goes on working. (Shapes are checked before.)"""
    for feeds in ({}, {"z": rows(1)}):
        with pytest.raises(EngineFailed, match="could not run the graph"):
            engine.infer(feeds)

    assert (rows(1) * 2).tolist() == engine.infer({"x": rows(1)})["y"].tolist()


def test_memory_that_is_not_there_is_out_of_memory(backend: Backend) -> None:
    """Asked for 64 TB, the runtime fails, the process lives, and the engine computes the next thing."""
    engine = load(backend, packages.filling())
    with pytest.raises(OutOfMemory):
        engine.infer({"x": np.array([2**44], np.int64)})

    assert [0, 0] == engine.infer({"x": np.array([2], np.int64)})["y"].tolist()


@pytest.mark.parametrize(
    "graph", [b"", b"\x00", b"not a graph", packages.scaling().SerializeToString()[:-20], b"\x08\x08"],
    ids=["nothing", "zero", "text", "cut", "empty"],
)  # fmt: skip
def test_a_broken_graph_does_not_load(backend: Backend, graph: bytes) -> None:
    """Bytes that are no graph are EngineFailed when they are loaded, not when they are asked."""
    with pytest.raises(EngineFailed, match=r"cannot load the graph"):
        backend.load_graph(graph, packages.profile())


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.COMPLEX64, TensorProto.FLOAT8E4M3FN])
def test_a_dtype_that_no_wire_carries_does_not_load(backend: Backend, kind: int) -> None:
    """A graph whose input is of a dtype we have no name for is EngineFailed, which says so."""
    with pytest.raises(EngineFailed, match="cannot load the graph"):
        load(backend, packages.identity(kind))


def elsewhere(location: str, where: str) -> ModelProto:
    """y = w * x, the four numbers of w in the file `location`: in the graph, or in one of the places beside it."""
    w = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        w.external_data.add(key=key, value=value)
    multiply = helper.make_node("Mul", ["x", "w"], ["y"])
    row = (TensorProto.FLOAT, ("batch", 4))
    model = packages.graph([multiply], {"x": row}, {"y": row})
    constant = helper.make_node("Constant", [], ["w"], value=w)
    match where:
        case "graph":
            model.graph.initializer.append(w)
        case "node":
            model.graph.node.insert(0, constant)
        case "branch":
            branch = helper.make_graph([constant], "b", [], [helper.make_tensor_value_info("w", 1, [4])])
            always = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("yes", 9, [], [True]))
            model.graph.node.insert(0, helper.make_node("If", ["yes"], ["w"], then_branch=branch, else_branch=branch))
            model.graph.node.insert(0, always)
        case "function":
            opsets = [helper.make_opsetid("", 17)]
            model.functions.append(helper.make_function("ours", "Weights", [], ["w"], [constant], opsets))
            model.opset_import.append(helper.make_opsetid("ours", 1))
            model.graph.node.insert(0, helper.make_node("Weights", [], ["w"], domain="ours"))
    return model


@pytest.mark.parametrize("path", ["weights", "absolute", "../{}/weights"])
@pytest.mark.parametrize("where", ["graph", "node", "branch", "function"])
def test_a_graph_reads_no_file(
    backend: Backend, where: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that says its weights lie in a file is refused, even where that file exists, and nobody opens it."""
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "weights"
    os.mkfifo(weights)  # whoever opens it waits for ever
    location = str(weights) if path == "absolute" else path.format(tmp_path.name)
    with pytest.raises(EngineFailed, match="cannot load the graph: some of its data lies in another file"):
        load(backend, elsewhere(location, where))


@given(st.binary(max_size=200), st.integers(0, 400), st.binary(max_size=4))
def test_any_bytes_are_walked_or_refused(noise: bytes, position: int, splice: bytes) -> None:
    """Looking for files in bytes that are no graph raises EngineFailed or nothing."""
    sound = packages.scaling().SerializeToString()
    for data in (noise, sound[:position], sound[:position] + splice + sound[position + len(splice) :]):
        with contextlib.suppress(EngineFailed):
            refuse_external_data(data)


def test_close_gives_everything_back(engine: Engine) -> None:
    """Closing twice is harmless, and a closed engine says so, with and without `out`."""
    engine.infer({"x": rows(1)}, {"y": np.empty((1, 4), np.float32)})
    engine.close()
    engine.close()

    for out in (None, {"y": np.empty((1, 4), np.float32)}):
        with pytest.raises(EngineFailed, match="closed"):
            engine.infer({"x": rows(1)}, out)


def test_results_are_the_same_each_time(backend: Backend) -> None:
    """The same feeds give the same bits, with `out` and without."""
    engine = load(backend, conv_net())
    feeds = {"image": pictures(4)}
    out = allocate(engine.outputs, 4)
    once = engine.infer(feeds)["scores"]

    assert once.tobytes() == engine.infer(feeds)["scores"].tobytes() == engine.infer(feeds, out)["scores"].tobytes()


def test_backends_agree() -> None:
    """On a network with every operator the compiler knows, all backends give the same scores, within TOLERANCE."""
    available = [chosen for chosen in map(registry.backend, registry.NAMES) if chosen.availability()]
    if len(available) < 2:
        pytest.skip("one backend alone has nobody to agree with")
    scores = [load(chosen, conv_net()).infer({"image": pictures(4)})["scores"] for chosen in available]

    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], rtol=TOLERANCE, atol=TOLERANCE)


def test_the_profile_decides_how_a_graph_is_run(backend: Backend) -> None:
    """Every optimisation level and spinning on or off: the same results."""
    for level in ("none", "basic", "extended", "all"):
        options = packages.profile().onnxruntime.model_copy(update={"graph_optimization": level, "spinning": True})
        profile = packages.profile().model_copy(update={"onnxruntime": options})
        engine = backend.load_graph(packages.scaling(2.0).SerializeToString(), profile)

        assert (rows(1) * 2).tolist() == engine.infer({"x": rows(1)})["y"].tolist()


def test_availability_is_said_in_words() -> None:
    """Every backend says its version, or why it cannot run and what to do."""
    for name in registry.NAMES:
        available = registry.backend(name).availability()

        assert available.version if available else available.why_not and available.fix
        assert not dataclasses.replace(available, version=None)


def test_a_runtime_under_another_name_is_available(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module may come from onnxruntime-gpu, or from a vendor's build without any metadata: it runs all the same."""
    known = {f"{'onnxruntime-gpu' if backend.name == 'onnxruntime' else 'onnx-weekly'}": "1.23.4"}

    def version(name: str) -> str:
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(importlib.metadata, "version", version)

    assert "1.23.4" == backend.availability().version

    known.clear()

    assert UNKNOWN_VERSION == backend.availability().version == installed_version("no_such_module")
    assert backend.availability()
