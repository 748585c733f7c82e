"""What every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and photos, beside the repository; it is not part of it."""
    folder = Path(os.environ.get("EDGE_SDK_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"the real models are not at {folder}; EDGE_SDK_SHARED says where they are")
    return folder
