"""Imports point one way, vendors have one door each, and importing edge_sdk costs nothing it does not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "edge_sdk"

DOORS = {
    "PIL": {"tasks/images.py"},
    "amqtt": {"mqtt/broker.py"},
    "click": {"cli.py", "console.py"},
    "mqtt5": {"mqtt/transports/mqtt5.py"},
    "onnx": {"backends/reference.py", "compile"},
    "onnxruntime": {"backends/onnxruntime.py"},
    "onnxslim": {"compile/modernize.py"},
    "cuda": {"backends/cuda_bindings.py"},
    "paho": {"mqtt/transports/paho.py"},
    "prometheus_client": {"health.py"},
    "pycuda": {"backends/cuda_bindings.py"},
    "tensorrt": {"backends/tensorrt/api.py"},
    "tensorrt_rtx": {"backends/tensorrt/api.py"},
    "tomllib": {"toml.py"},
    "opentelemetry": {"mqtt/tracing.py"},
    "wsproto": {"mqtt/transports/websocket.py"},
    "tomli": {"toml.py"},
}
"""Vendor library -> the files, or the room, that may import it."""

VENDORS = (
    "onnx",
    "onnxruntime",
    "onnxslim",
    "paho",
    "mqtt5",
    "PIL",
    "amqtt",
    "tensorrt",
    "tensorrt_rtx",
    "pycuda",
    "cuda",
    "wsproto",
    "opentelemetry",
)


def imported(file: Path) -> Iterator[str]:
    """The top-level names of the modules that a file imports, at any depth in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            yield node.module.partition(".")[0]


def loaded_by(statement: str) -> set[str]:
    """The modules in a fresh interpreter after `statement`."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_contracts_of_pyproject_are_kept() -> None:
    """No room imports one above it, no room is missing from the list, and the pure ones stay pure."""
    lint = Path(sys.executable).parent / "lint-imports"
    if not lint.is_file():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)

    assert 0 == done.returncode, done.stdout


@pytest.mark.parametrize("vendor", DOORS)
def test_a_vendor_has_one_door(vendor: str) -> None:
    """A vendor library is imported in the one file that translates its errors."""
    users = {file.relative_to(SOURCE) for file in SOURCE.rglob("*.py") if vendor in imported(file)}
    doors = {Path(door) for door in DOORS[vendor]}
    elsewhere = {str(user) for user in users if not {user, *user.parents} & doors}

    assert users
    assert set() == elsewhere


def test_importing_edge_sdk_loads_next_to_nothing() -> None:
    """`import edge_sdk` loads no library beside Python's own, and none of our rooms."""
    modules = loaded_by("import edge_sdk")

    assert set() == modules & {*VENDORS, "numpy", "pydantic", "click"}
    assert {"edge_sdk"} == {module for module in modules if module.partition(".")[0] == "edge_sdk"}


@pytest.mark.parametrize(
    "module",
    ["backends.registry", "runtime.service", "tasks.image_classification", "mqtt.session", "mqtt.client", "daemon"],
)
def test_rooms_load_no_vendor_library(module: str) -> None:
    """A vendor library is loaded when something needs it: a device without a camera needs no Pillow."""

    assert set() == loaded_by(f"import edge_sdk.{module}") & set(VENDORS)


def test_the_names_of_the_front_door_exist() -> None:
    """Everything in `__all__` can be had, and nothing else is pretended."""
    import edge_sdk

    assert [] == [name for name in edge_sdk.__all__ if not hasattr(edge_sdk, name)]
    with pytest.raises(AttributeError, match="'nonsense'"):
        _ = edge_sdk.nonsense
