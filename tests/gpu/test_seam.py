"""The CUDA seam on a real driver, by each binding that is installed: what `test_cuda` has the stand-in do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.backends import cuda
from edge_sdk.backends.cuda import Held
from edge_sdk.backends.cuda_bindings import BINDINGS
from tests.backends.test_cuda import EXERCISE, require

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("binding", [kind.name for kind in BINDINGS])
def test_a_binding_does_what_it_is_asked(gpu: cuda.Device, binding: str) -> None:
    """Memory, copies, streams, events and graphs, in threads that come and go; in a process of its own."""
    require(binding)
    done = subprocess.run(
        [sys.executable, "-c", EXERCISE, binding], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    told = done.stdout.splitlines()
    once = ["back True", f"held {Held()}"] + (["graph False 3.5"] if binding == "cuda-python" else [])

    assert (0, "") == (done.returncode, done.stderr)
    assert told[0] == f"facts {' '.join(map(str, gpu.facts))}"
    for line in once:
        assert 2 == told.count(line)
    assert 2 == sum(line.startswith("refused OutOfMemory") for line in told)
    assert all(float(line.split()[1]) >= 0 for line in told if line.startswith("elapsed"))
