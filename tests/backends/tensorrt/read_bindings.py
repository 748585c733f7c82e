"""What TensorRT's Python bindings have, read from the real bindings of releases that cannot be installed here.

    python tests/backends/tensorrt/read_bindings.py [release ...]

The bindings of every release are on PyPI, without the libraries that they need. Those of each release are downloaded,
put over libraries that gcc makes from nothing - with every function that the bindings import, all of them returning
null - and loaded in a process of their own. Nothing can be called that way, but every class, method and enumeration is
there, and their names go into `bindings/<release>.json` beside this file: of the classes in `edge_sdk`'s tables, of all
others that are named like them, and of all enumerations.

Needs pip, gcc and readelf (binutils), and a Python for which the releases have wheels (3.10 or 3.11).
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

RELEASES = {
    "8.6.1": "tensorrt-bindings",
    "10.3.0": "tensorrt-cu12-bindings",
    "10.13.3.9": "tensorrt-cu12-bindings",
    "11.4.0.106": "tensorrt-cu12-bindings",
}
"""Release -> the name under which PyPI has its bindings: JetPack 6.0, 6.1 and 7, and the newest when this was read."""

FOLDER = Path(__file__).parent / "bindings"

CLASSES = re.compile(
    r"^(Builder|OnnxParser|OnnxParserRefitter|ParserError|Runtime|Refitter|ILogger|IProgressMonitor|IBuilderConfig|"
    r"INetworkDefinition|IOptimizationProfile|IHostMemory|ITimingCache|ILayer|ITensor|ICudaEngine|IRuntimeConfig|"
    r"IExecutionContext)$"
)


def names_of(module: Any) -> dict[str, str]:
    """Class or enumeration -> its public names, joined."""
    found = {}
    for name, value in inspect.getmembers(module, inspect.isclass):
        if CLASSES.match(name) or hasattr(value, "__members__"):
            found[name] = " ".join(sorted(inner for inner in dir(value) if not inner.startswith("_")))
    return found


def read(release: str) -> None:
    """Write `bindings/<release>.json`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
             "--dest", folder, f"{RELEASES[release]}=={release}"],
            check=True,
        )  # fmt: skip
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(folder)
        bindings = next(folder.glob("*/tensorrt.so"))
        _make_libraries(bindings, folder)
        done = subprocess.run(
            [sys.executable, __file__, "--load", bindings],
            env={**os.environ, "LD_LIBRARY_PATH": str(folder)}, check=True, capture_output=True, text=True,
        )  # fmt: skip
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{release}.json").write_text(done.stdout, encoding="utf-8")
    print(f"{release}: {len(json.loads(done.stdout))} classes and enumerations")


def load(bindings: Path) -> None:
    """Print the names, as JSON; the libraries that the bindings need are where the loader finds them."""
    spec = importlib.util.spec_from_file_location("tensorrt", bindings)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(json.dumps(names_of(module), indent=0, sort_keys=True))


def _make_libraries(bindings: Path, folder: Path) -> None:
    """An empty library for every one of NVIDIA's that the bindings name; the first has all functions they look for."""
    dynamic = subprocess.run(["readelf", "--dynamic", bindings], check=True, capture_output=True, text=True).stdout
    needed = [name for name in re.findall(r"NEEDED.*\[(.+?)\]", dynamic) if name.startswith("libnv")]
    symbols = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", bindings], check=True, capture_output=True, text=True
    ).stdout
    missing = re.findall(r"FUNC +GLOBAL +DEFAULT +UND ((?!_?Py)\w+)$", symbols, re.M)  # not libc's: those have versions
    for index, library in enumerate(needed):
        functions = sorted(set(missing)) if index == 0 else []
        source = "".join(f"void* {name}(void) {{ return 0; }}\n" for name in functions) or "int nothing;\n"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", folder / library], input=source, text=True, check=True
        )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load(Path(sys.argv[2]))
    else:
        for chosen in sys.argv[1:] or RELEASES:
            read(chosen)
