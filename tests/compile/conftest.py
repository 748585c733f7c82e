"""Fixtures of the compile room: the backend everything is measured on, profiles, and data for the small models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_sdk.profiles import DeviceProfile, load_profile
from tests.compile.graphs import conv_net, pictures

pytest.importorskip("onnx", reason="models cannot be built without the extra `build`")
pytest.importorskip("onnxruntime", reason="graphs cannot be run without the extra `cpu`")


@pytest.fixture(scope="session")
def cpu() -> DeviceProfile:
    """An x86 CPU with VNNI: u8 activations, INT32 biases."""
    return load_profile("cpu-x86")


@pytest.fixture(scope="session")
def jetson() -> DeviceProfile:
    """TensorRT: symmetric s8 activations, FP32 biases."""
    return load_profile("jetson-orin-nano")


@pytest.fixture
def engine_folder(tmp_path: Path) -> Path:
    """An engine spec with a small model, 64 calibration samples and 64 unlabelled validation samples."""
    folder = tmp_path / "engines" / "small"
    folder.mkdir(parents=True)
    (folder / "small.onnx").write_bytes(conv_net().SerializeToString())
    np.savez(folder / "calibration.npz", image=pictures(64, seed=1))
    np.savez(folder / "validation.npz", image=pictures(64, seed=2))
    (folder / "engine.toml").write_text(
        'name = "small"\nmodel = "small.onnx"\n'
        '[calibration]\ndata = "calibration.npz"\nsamples = 48\n'
        '[validation]\ndata = "validation.npz"\nmin_snr_db = 15.0\n[batching]\nmax_batch = 2\n'
    )
    return folder
