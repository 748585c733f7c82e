"""Real models behind the real daemon: a photo from a shell, and a stateful model whose state the client carries."""

from __future__ import annotations

import json
import subprocess
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.compile.pipeline import build_engine
from edge_sdk.mqtt.client import Client
from edge_sdk.tensors import Array
from tests.brokers import Broker
from tests.daemon.processes import DaemonProcess, running_daemon

DEVICE = "real"
CHUNKS = 400
"""Of silero's 1,875: enough for the state to go wrong in."""


@pytest.fixture(scope="module")
def serving(broker: Broker, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """SqueezeNet as a classifier and Silero VAD as tensors, in one daemon."""
    folder = tmp_path_factory.mktemp("real")
    spec = folder / "specs" / "squeezenet"
    spec.mkdir(parents=True)
    (spec / "engine.toml").write_text(
        f'name = "squeezenet"\nmodel = "{shared / "models" / "squeezenet.onnx"}"\ntask = "image-classification"\n'
        '[preprocess]\nresize_short_side = 256\ncenter_crop = 224\ncolor = "BGR"\nmean = [104.0, 117.0, 123.0]\n'
        f'[postprocess]\nlabels = "{shared / "images" / "imagenet-labels.txt"}"\n'
    )
    engines = folder / "engines"
    build_engine(spec, precision="fp32", output=engines / "squeezenet")
    build_engine(shared / "models" / "silero-vad-16k.onnx", precision="fp32", output=engines / "silero-vad-16k")
    with running_daemon(engines, broker.url, folder, ready=["squeezenet", "silero-vad-16k"], device=DEVICE) as daemon:
        yield daemon


@pytest.mark.parametrize("version", ["5", "311"])
def test_a_photo_from_a_shell(version: str, serving: DaemonProcess, broker: Broker, shared: Path) -> None:
    """`mosquitto_pub -f photo.jpg` with `mosquitto_sub` listening gets its label back."""
    model = f"edge/v1/{DEVICE}/models/squeezenet"
    port = str(broker.port)
    listening = subprocess.Popen(
        ["stdbuf", "-oL", "mosquitto_sub", "-V", version, "-p", port, "-t", f"{model}/result", "-C", "1", "-d"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert listening.stdout is not None
    assert any("SUBACK" in line for line in iter(listening.stdout.readline, ""))
    photo = shared / "images" / "imagenet-500" / "0002.jpg"
    publish = ["mosquitto_pub", "-V", version, "-p", port, "-t", f"{model}/infer", "-q", "1", "-f", str(photo)]
    subprocess.run(publish, check=True, timeout=15)
    body = json.loads(next(line for line in listening.stdout if line.startswith("{")))
    listening.communicate(timeout=15)

    assert body["predictions"][0]["label"] == "great white shark"


def test_a_stateful_model_with_its_state_in_the_requests(serving: DaemonProcess, broker: Broker, shared: Path) -> None:
    """Three inputs, two outputs, no batch: each answer's state goes into the next request."""
    expected = json.loads((shared / "models" / "silero-vad-expected.json").read_text())["probabilities"][:CHUNKS]
    with wave.open(str(shared / "audio" / "speech-16k.wav")) as audio:
        samples = np.frombuffer(audio.readframes(512 * CHUNKS), "<i2").astype(np.float32) / 32768
    state: Array = np.zeros((2, 1, 128), np.float32)
    context: Array = np.zeros(64, np.float32)
    found = []
    with Client(broker.url, device=DEVICE) as client:
        for chunk in samples.reshape(-1, 512):
            feeds = {"input": np.concatenate([context, chunk])[np.newaxis], "state": state, "sr": np.array(16000)}
            answer = client.infer("silero-vad-16k", feeds)
            state, context = answer.outputs["stateN"], chunk[-64:]
            found.append(float(answer.outputs["output"].item()))

    np.testing.assert_allclose(expected, found, atol=2e-4)
