"""Real models with known results: what users bring, and what must come of it."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest

import edge_sdk
from edge_sdk.compile.evaluate import evaluate
from edge_sdk.compile.pipeline import build_engine
from edge_sdk.profiles import DeviceProfile
from edge_sdk.tensors import Array

BGR = 'color = "BGR"\nmean = [104.0, 117.0, 123.0]\n'
IMAGENET = f'color = "RGB"\nscale = {1 / 255}\nmean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]\n'


def photo_engine(folder: Path, shared: Path, model: str, preprocess: str) -> Path:
    """A spec for a classifier: every fourth photo to calibrate on, the others to judge on."""
    for index, photo in enumerate(sorted((shared / "images" / "imagenet-500").glob("*.jpg"))):
        place = folder / ("calibration" if index % 4 == 0 else "validation")
        place.mkdir(exist_ok=True, parents=True)
        (place / photo.name).symlink_to(photo)
    (folder / "engine.toml").write_text(
        f'name = "photos"\nmodel = "{shared / "models" / model}"\ntask = "image-classification"\n'
        f"[preprocess]\nresize_short_side = 256\ncenter_crop = 224\n{preprocess}"
        f'[postprocess]\nlabels = "{shared / "images" / "imagenet-labels.txt"}"\n'
        '[calibration]\ndata = "calibration"\nsamples = 125\n'
        '[validation]\ndata = "validation"\nmax_drop = 2.0\n'
    )
    return folder


def test_squeezenet_keeps_its_answers(tmp_path: Path, shared: Path, cpu: DeviceProfile) -> None:
    """On 375 photos it was not calibrated on: agreement of 94 %, top-1 within 2 points of FP32.

    How much faster it is, `python -m benchmarks.int8` tells.
    """
    package = build_engine(photo_engine(tmp_path, shared, "squeezenet.onnx", BGR), profile=cpu, precision="int8")
    measured = package.manifest.measurements

    assert measured is not None
    assert 375 == measured.samples
    assert (measured.agreement_percent or 0) >= 94
    assert (measured.engine.top1_percent or 0) >= (measured.reference.top1_percent or 100) - 2
    assert "probabilities" == package.manifest.postprocess.scores


def test_old_half_precision_file_builds(tmp_path: Path, shared: Path, cpu: DeviceProfile) -> None:
    """Opset 7, IR 3, FP16, weights among the inputs: built in INT8, and still FP16 to whoever asks it."""
    folder = photo_engine(tmp_path, shared, "squeezenet-opset7-fp16.onnx", BGR)
    package = build_engine(folder, profile=cpu, precision="int8")
    measured = package.manifest.measurements

    assert measured is not None
    assert "float16" == package.manifest.inputs[0].dtype == package.manifest.outputs[0].dtype
    assert (measured.agreement_percent or 0) >= 94


def test_quantised_file_is_served_as_it_is(tmp_path: Path, shared: Path, cpu: DeviceProfile) -> None:
    """Byte for byte, at the accuracy it is known for."""
    folder = photo_engine(tmp_path, shared, "mobilenetv2-qlinear.onnx", IMAGENET)
    package = build_engine(folder, profile=cpu)
    found = evaluate(package, str(shared / "images" / "imagenet-500"))

    assert (shared / "models" / "mobilenetv2-qlinear.onnx").read_bytes() == package.read("graph.onnx")
    assert 500 == found.samples
    assert pytest.approx(67.2, abs=0.41) == found.package.top1_percent


def test_stateful_model_with_control_flow(tmp_path: Path, shared: Path, cpu: DeviceProfile) -> None:
    """Silero VAD, its state passed by the caller: the known probability for each chunk, and never a batch."""
    package = build_engine(shared / "models" / "silero-vad-16k.onnx", profile=cpu, output=tmp_path / "vad")
    expected = json.loads((shared / "models" / "silero-vad-expected.json").read_text())["probabilities"]
    with wave.open(str(shared / "audio" / "speech-16k.wav")) as audio:
        samples = np.frombuffer(audio.readframes(audio.getnframes()), "<i2").astype(np.float32) / 32768
    state: Array = np.zeros((2, 1, 128), np.float32)
    context: Array = np.zeros(64, np.float32)
    found = []
    with edge_sdk.load_engine(package) as engine:
        for start in range(0, 512 * len(expected), 512):
            chunk = samples[start : start + 512]
            feeds = {"input": np.concatenate([context, chunk])[np.newaxis], "state": state, "sr": np.array(16000)}
            answer = engine.infer(feeds)
            state, context = answer["stateN"], chunk[-64:]
            found.append(float(answer["output"].item()))

    assert 1 == package.manifest.batching.max_batch
    np.testing.assert_allclose(expected, found, atol=2e-4)


@pytest.mark.parametrize(
    ("model", "precision", "max_batch"),
    [("fastestdet", "fp32", 1), ("mobilenetv2-int8-random", "int8", 8), ("tiny", "fp32", 8)],
)
def test_bare_files_are_packaged(
    tmp_path: Path, shared: Path, cpu: DeviceProfile, model: str, precision: str, max_batch: int
) -> None:
    """Without a spec or data: tensors in, tensors out, batches where the axes allow them."""
    package = build_engine(shared / "models" / f"{model}.onnx", profile=cpu, output=tmp_path / "package")

    assert precision == package.manifest.precision
    assert "tensors" == package.manifest.task
    assert max_batch == package.manifest.batching.max_batch
