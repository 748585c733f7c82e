"""Other servers for the same model, each in an environment of its own; `python -m benchmarks.serving --peers DIR`.

A `*_server.py` here runs under its peer's own Python, never under ours: `python X_server.py PORT MODEL.onnx`. Each
serves the way its documentation recommends for small requests, with onnxruntime and its defaults inside, as in the
naive daemon. Requests come over what each takes fastest: HTTP with binary tensors, multipart, gRPC, or JSON where there
is nothing else.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent

PEERS = {
    "pytriton": ("nvidia-pytriton==0.7.0", "/v2/models/model/infer", "triton"),
    "mlserver": ("mlserver==1.7.1", "", "grpc"),
    "bentoml": ("bentoml==1.4.*", "/infer", "multipart"),
    "litserve": ("litserve==0.2.*", "/predict", "json"),
}
"""What to install, the path that takes a request, and how the image travels. (pytriton 0.7 brings the interpreter of an
early Python 3.11: with the standard library of 3.11.7 its stub does not start, with Debian 12's 3.11.2 it does.)"""


def install(name: str, folder: Path, python: str) -> Path:
    """The Python of a peer's environment, made below `folder` if it is not there yet."""
    made = folder / name / "bin" / "python"
    if not (folder / name / "installed").exists():
        subprocess.run([python, "-m", "venv", "--clear", str(folder / name)], check=True)
        subprocess.run([str(made), "-m", "pip", "install", "-q", PEERS[name][0], "onnxruntime"], check=True)
        (folder / name / "installed").touch()
    return made


def server(name: str, python: Path, port: int, model: Path) -> list[str]:
    """The command that serves `model`; on `port` and, some of them, on the two after it."""
    return [str(python), str(HERE / f"{name}_server.py"), str(port), str(model)]


def load(name: str, python: Path, port: int, payload_bytes: int) -> Sequence[str]:
    """The command that asks it; concurrency and seconds follow."""
    _, path, kind = PEERS[name]
    if kind == "grpc":  # its stubs are in its environment
        return [str(python), str(HERE / f"{name}_server.py"), "load", str(port), str(payload_bytes)]
    return [str(python), str(HERE.parent / "http_load.py"), str(port), path, kind, str(payload_bytes)]


def free_ports() -> int:
    """A port that is free, with the two after it."""
    while True:
        with socket.socket() as first, socket.socket() as second, socket.socket() as third:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
                third.bind(("127.0.0.1", port + 2))
            except (OSError, OverflowError):
                continue
            return port


def installed_mb(python: Path) -> float:
    """What the peer's environment takes on the disk."""
    files = python.parent.parent.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink()) / 1e6
