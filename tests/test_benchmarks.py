"""Benchmarks whose figures are in the documentation still run; what they measure is nobody's to check here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(90)
def test_the_hot_path_can_be_measured(shared: Path) -> None:
    """The daemon fed from memory answers, and the time of a request comes out."""
    pytest.importorskip("onnxruntime")
    command = [sys.executable, "-m", "benchmarks.hotpath", "--models", str(shared / "models"), "--requests", "40"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny, 8 together: ")
