"""The reference engine's orders: the stand-in for a runtime that hangs, raises, answers NaN or dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.backends.reference import ReferenceEngine
from edge_sdk.backends.registry import backend
from edge_sdk.errors import EngineFailed
from tests.packages import make_package, misbehaving, profile

X = np.array([[1, 2, 3, 4]], np.float32)
POISON = np.array([[1, 2, 3, 666]], np.float32)


def engine(*orders: Mapping[str, object]) -> ReferenceEngine:
    loaded = backend("reference").load_graph(misbehaving(orders).SerializeToString(), profile())

    assert isinstance(loaded, ReferenceEngine)
    return loaded


def test_raise_on_one_value() -> None:
    """Only a batch that holds the value fails; the engine lives on."""
    poisoned = engine({"do": "raise", "when": 666.0})
    with pytest.raises(EngineFailed, match="told to fail"):
        poisoned.infer({"x": np.concatenate([X, POISON])})

    assert (X * 2).tolist() == poisoned.infer({"x": X})["y"].tolist()


def test_nan_on_one_value() -> None:
    """The outputs are NaN, with `out` as well."""
    spoilt = engine({"do": "nan", "when": 666.0})
    out = {"y": np.zeros((1, 4), np.float32)}

    assert np.isnan(spoilt.infer({"x": POISON}, out)["y"]).all()
    assert (X * 2).tolist() == spoilt.infer({"x": X}, out)["y"].tolist()


def test_sleep_takes_its_time_and_then_computes() -> None:
    """Orders are followed in their order, without a value every time."""
    slow = engine({"do": "sleep", "seconds": 0.05})
    started = time.monotonic()
    result = slow.infer({"x": X})["y"]

    assert time.monotonic() - started >= 0.05
    assert (X * 2).tolist() == result.tolist()


def test_abort_takes_the_process_down(tmp_path: Path) -> None:
    """SIGABRT, as from an assertion in native code: nothing in Python can catch it."""
    package = make_package(tmp_path / "dying", misbehaving([{"do": "abort", "when": 666.0}]), backend="reference")
    program = f"""
import edge_sdk, numpy as np
engine = edge_sdk.load_engine({str(package.path)!r})
print(engine.infer({{"x": np.ones((1, 4), np.float32)}})["y"].sum(), flush=True)
engine.infer({{"x": np.full((1, 4), 666, np.float32)}})
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert (-signal.SIGABRT, "8.0\n") == (done.returncode, done.stdout)


@pytest.mark.parametrize("order", [{"do": "raise", "whenever": 1}, {}, "raise"])
def test_an_order_nobody_understands_is_refused(order: Mapping[str, object]) -> None:
    """A typing error in an order is found when the graph is loaded."""
    with pytest.raises(EngineFailed, match="cannot load the graph"):
        engine(order)
