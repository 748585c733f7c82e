"""An engine in a process of its own: the same answers, and whatever becomes of that process, the next one goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

from edge_sdk.backends.isolated import IsolatedEngine
from edge_sdk.backends.registry import load_engine
from edge_sdk.errors import BackendError, DeviceLost, EngineFailed, OutOfMemory, PackageError
from edge_sdk.spec import Serving
from edge_sdk.tensors import Array, Feeds, Outputs
from tests import packages
from tests.brokers import eventually

POISON = 666.0
Isolate = Callable[..., IsolatedEngine]


@pytest.fixture
def isolate(tmp_path: Path) -> Iterator[Isolate]:
    """Engines of packages, each in a process, closed at the end."""
    engines: list[IsolatedEngine] = []

    def isolated(model: ModelProto, *, backend: str = "reference", **options: Any) -> IsolatedEngine:
        package = packages.make_package(tmp_path / f"p{len(engines)}", model, backend=backend)
        engines.append(IsolatedEngine(package, backend, **options))
        return engines[-1]

    yield isolated
    for engine in engines:
        engine.close()


def hosted(engine: IsolatedEngine, rows: int = 4, width: int = 4) -> tuple[Feeds, Outputs]:
    return engine.arrays({"x": np.empty((rows, width), np.float32)}, {"y": np.empty((rows, width), np.float32)})


def numbers(value: float, rows: int = 1) -> Array:
    return np.full((rows, 4), value, np.float32)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("backend", sorted({packages.BACKEND, "reference"}))
def test_it_answers_as_an_engine_does(isolate: Isolate, backend: str) -> None:
    """In arrays of its own, in views of their first rows, in arrays of others, and in new ones."""
    engine = isolate(packages.scaling(3.0), backend=backend)
    feeds, outputs = hosted(engine)
    feeds["x"][:] = np.arange(16, dtype=np.float32).reshape(4, 4)
    wanted = feeds["x"] * 3
    first = engine.infer({"x": feeds["x"][:3]}, {"y": outputs["y"][:3]})["y"]
    strange = {"y": np.empty((2, 4), np.float32)}
    given_back = engine.infer({"x": feeds["x"][2:].copy()}, strange)

    np.testing.assert_array_equal(wanted[:3], first)
    assert np.shares_memory(first, outputs["y"])
    np.testing.assert_array_equal(wanted[2:], strange["y"])
    assert given_back["y"] is strange["y"]
    np.testing.assert_array_equal(wanted, engine.infer({"x": feeds["x"]})["y"])
    assert (("batch", 4), ("batch", 4)) == (engine.inputs[0].shape, engine.outputs[0].shape)


def test_text_crosses_too(isolate: Isolate) -> None:
    words = np.array([[b"one", "zwölf".encode(), b""]], dtype=object)
    engine = isolate(packages.identity(TensorProto.STRING), backend=packages.BACKEND)

    assert words.tolist() == engine.infer({"x": words})["y"].tolist()


def test_a_package_may_ask_for_it(tmp_path: Path) -> None:
    """`isolation = "process"` in engine.toml; the process is another one."""
    package = packages.make_package(tmp_path / "p", packages.scaling(), serving=Serving(isolation="process"))
    engine = load_engine(package).engine

    assert isinstance(engine, IsolatedEngine)
    assert engine.pid not in (None, os.getpid())
    engine.close()
    engine.close()
    with pytest.raises(EngineFailed, match="closed"):
        engine.infer({"x": numbers(1)})


@pytest.mark.parametrize("where", ["arrays of its own", "others"])
def test_a_killed_child_loses_nothing(isolate: Isolate, where: str) -> None:
    """SIGKILL between two batches and in the middle of one: the next child is given what this one had."""
    engine = isolate(packages.misbehaving([{"do": "sleep", "seconds": 0.5, "when": 5.0}]))
    feeds, outputs = hosted(engine) if where == "arrays of its own" else ({"x": numbers(0, 4)}, None)
    answers = []
    for value, delay in ((1.0, 0.0), (5.0, 0.2)):
        assert engine.pid is not None
        killing = threading.Timer(delay, os.kill, (engine.pid, signal.SIGKILL))
        killing.start()
        if not delay:
            killing.join()
        feeds["x"][:] = value
        answers.append(float(engine.infer(feeds, outputs)["y"].mean()))
        killing.join()
        answers.append(float(engine.infer(feeds, outputs)["y"].mean()))

    assert [2.0, 2.0, 10.0, 10.0] == answers
    assert 3 == engine.started


def test_what_ends_every_child_fails(isolate: Isolate) -> None:
    """A batch is tried twice, and no more; the one behind it is computed."""
    engine = isolate(packages.misbehaving([{"do": "abort", "when": POISON}]))
    feeds, outputs = hosted(engine)
    feeds["x"][:] = POISON
    with pytest.raises(EngineFailed, match="ended twice"):
        engine.infer(feeds, outputs)
    feeds["x"][:] = 1.0

    assert 2.0 == float(engine.infer(feeds, outputs)["y"].mean())
    assert 3 == engine.started


def test_what_goes_wrong_is_told_as_it_is(isolate: Isolate) -> None:
    """An error of the engine crosses whole, and the child goes on; a lost device is lost with its process alone."""
    orders = [{"do": "raise", "when": POISON}, {"do": "lose-device", "when": 7.0}]
    engine = isolate(packages.misbehaving(orders))
    greedy = isolate(packages.filling(), backend=packages.BACKEND)
    with pytest.raises(EngineFailed, match="told to fail"):
        engine.infer({"x": numbers(POISON)})

    assert (1, 2.0) == (engine.started, float(engine.infer({"x": numbers(1)})["y"].mean()))
    with pytest.raises(EngineFailed, match="ended twice") as lost:
        engine.infer({"x": numbers(7)})
    assert not isinstance(lost.value, DeviceLost)
    with pytest.raises(OutOfMemory if packages.BACKEND == "onnxruntime" else BackendError):
        greedy.infer({"x": np.array([2**44], np.int64)})


def test_what_does_not_load_is_told_at_once(isolate: Isolate, tmp_path: Path) -> None:
    package = packages.make_package(tmp_path / "p", packages.scaling())
    (package.path / "graph.onnx").write_bytes(b"altered")

    with pytest.raises(PackageError, match="altered"):
        IsolatedEngine(package, packages.BACKEND)


def test_a_child_that_has_grown_is_replaced(isolate: Isolate) -> None:
    """Between two batches, and its memory is back: the process is gone."""
    engine = isolate(packages.filling(), backend=packages.BACKEND, growth_bytes=32 << 20, look_every=1)
    before = engine.pid
    sizes = [2, 3, 30_000_000, 4]
    answers = [engine.infer({"x": np.array([size], np.int64)})["y"].size for size in sizes]

    assert sizes == answers
    assert before is not None
    if packages.BACKEND == "onnxruntime":  # whose arena keeps what it had
        assert (2, True) == (engine.started, has_ended(before))


def test_it_ends_with_the_process_that_it_computes_for(tmp_path: Path) -> None:
    """SIGKILL for that one, while a batch is computed that takes a minute; SIGTERM it leaves alone."""
    package = packages.make_package(
        tmp_path / "p", packages.misbehaving([{"do": "sleep", "seconds": 60.0, "when": 5.0}]), backend="reference"
    )
    program = (
        "import sys, numpy as np, threading\n"
        "from edge_sdk.backends.isolated import IsolatedEngine\n"
        "from edge_sdk.package import EnginePackage\n"
        "engine = IsolatedEngine(EnginePackage.open(sys.argv[1]), 'reference')\n"
        "print(engine.pid, flush=True)\n"
        "engine.infer({'x': np.full((1, 4), 5, np.float32)})\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, package.path], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, signal.SIGTERM)
    still_there = not has_ended(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()

    assert still_there
    assert eventually(lambda: has_ended(child), "the child's end")
