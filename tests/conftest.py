"""What every room's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from edge_sdk import resources
from edge_sdk.package import EnginePackage

# How long an example may take says more about the machine's other work than about ours.
hypothesis.settings.register_profile("edge-sdk", deadline=None)
hypothesis.settings.load_profile("edge-sdk")


@pytest.fixture(scope="session", autouse=True)
def own_runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Daemons note what they compute in a folder of this run: crashes of another run are no concern of theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and photos, beside the repository; it is not part of it."""
    folder = Path(os.environ.get("EDGE_SDK_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"the real models are not at {folder}; EDGE_SDK_SHARED says where they are")
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> EnginePackage:
    """The bundled example, built for this machine with INT8; alone in its folder, which a daemon can serve."""
    pytest.importorskip("onnx", reason="building needs the extra [build]")
    from edge_sdk.compile.pipeline import build

    output = tmp_path_factory.mktemp("engines") / "digits"
    return build(resources.EXAMPLES / "digits", precision="int8", output=output).package
