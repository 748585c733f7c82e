"""The wheel: what a device needs is in it, and nothing that happened to lie around where it was made."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = "edge_sdk/_data"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from a copy of this tree in which somebody has worked: built, trained, left notes."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("these tests do not run from a source tree, so there is nothing to make a wheel of")
    tree = tmp_path_factory.mktemp("tree") / "edge-sdk"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "tests", "docs", "benchmarks", "dist"))
    for stray in (
        "engines/digits/build/cpu-x86/graph.onnx",
        "engines/digits/__pycache__/train.cpython-311.pyc",
        "engines/digits/checkpoint.pt",
        "engines/mine/engine.toml",
        "edge_sdk/__pycache__/cli.cpython-311.pyc",
    ):
        (tree / stray).parent.mkdir(parents=True, exist_ok=True)
        (tree / stray).write_bytes(b"stray")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), str(tree)]
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    if importlib.util.find_spec("hatchling") is not None:
        command.insert(4, "--no-build-isolation")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    if done.returncode != 0 and "hatchling" in done.stderr and "No matching distribution" in done.stderr:
        pytest.skip("hatchling is not installed and cannot be fetched here")

    assert 0 == done.returncode, done.stderr
    (made,) = folder.glob("*.whl")
    return made


def test_what_is_in_it(wheel: Path) -> None:
    """Every profile, the whole example, the licences - and no other file than those and the modules."""
    names = zipfile.ZipFile(wheel).namelist()
    data = {name.removeprefix(f"{DATA}/") for name in names if name.startswith(f"{DATA}/")}
    digits = ROOT / "engines/digits"
    photos = [file for part in ("calibration", "heldout") for file in (digits / part).rglob("*") if file.is_file()]
    expected = {
        *(f"device_profiles/{file.name}" for file in (ROOT / "device_profiles").glob("*.toml")),
        *(f"engines/digits/{part}" for part in ("engine.toml", "digits.onnx", "labels.txt", "README.md")),
        *(f"engines/digits/{file.relative_to(digits)}" for file in photos),
    }

    assert expected == data
    assert 15 == sum(name.startswith("device_profiles/") for name in data)
    assert {"LICENSE", "NOTICE"} == {Path(name).name for name in names if ".dist-info/licenses/" in name}
    assert [] == [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "edge_sdk").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    assert "edge_sdk/py.typed" in names


def test_it_finds_its_data(wheel: Path, tmp_path: Path) -> None:
    """Unpacked anywhere, it finds its profiles and the example without the repository."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import edge_sdk\n"
        "from edge_sdk import resources\n"
        "from edge_sdk.profiles import load_profiles\n"
        "from edge_sdk.spec import load_spec\n"
        "spec = load_spec(resources.EXAMPLES / 'digits')\n"
        "print(edge_sdk.__file__, len(load_profiles()), spec.name, spec.model.is_file(), sep='\\n')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    where, *found = done.stdout.splitlines()

    assert where.startswith(str(tmp_path))
    assert ["15", "digits", "True"] == found
