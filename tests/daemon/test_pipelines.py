"""A pipeline in a real daemon: a photo in, the things on it and what each of them is out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_sdk.cli import main
from edge_sdk.compile.pipeline import build_engine
from edge_sdk.engine import load_engine
from edge_sdk.errors import Malformed, Unavailable, UnsupportedType
from edge_sdk.mqtt.client import Client
from edge_sdk.spec import Preprocess
from edge_sdk.stages import build_pipeline
from edge_sdk.tasks.boxes import crops
from edge_sdk.tasks.images import decode_image, open_picture
from tests.brokers import Broker
from tests.daemon.processes import DaemonProcess, running_daemon

pytest.importorskip("PIL", reason="pictures need the extra `vision`")

DEVICE = "seeing"
DETECTOR = Preprocess(resize=(352, 352), color="BGR", scale=1 / 255)
CLASSIFIER = Preprocess(resize_short_side=256, center_crop=224, color="BGR", mean=(104.0, 117.0, 123.0))

WIRING = """
name = "things"

[[stage]]
name = "detector"
model = "fastestdet"
picture = "request"

[[stage]]
name = "found"
op = "fastestdet-boxes"
inputs = {head = "detector.758"}
labels = "%(labels)s"

[[stage]]
name = "parts"
op = "crop"
picture = "request"
inputs = {boxes = "found.boxes"}

[[stage]]
name = "classifier"
model = "squeezenet"
picture = "parts.pictures"

[outputs]
boxes = "found.boxes"
scores = "found.scores"
labels = "found.labels"
kinds = "classifier.classification"
"""


@pytest.fixture(scope="module")
def packages(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector, the classifier and the pipeline, each built as a user would."""
    folder = tmp_path_factory.mktemp("things")
    models, images = shared / "models", shared / "images"
    for name, body in {
        "fastestdet": f'model = "{models / "fastestdet.onnx"}"\n[preprocess]\nresize = [352, 352]\ncolor = "BGR"\n'
        f"scale = {DETECTOR.scale!r}\n",
        "squeezenet": f'model = "{models / "squeezenet.onnx"}"\ntask = "image-classification"\n[preprocess]\n'
        'resize_short_side = 256\ncenter_crop = 224\ncolor = "BGR"\nmean = [104.0, 117.0, 123.0]\n'
        f'[postprocess]\nlabels = "{images / "imagenet-labels.txt"}"\n',
    }.items():
        (folder / name).mkdir()
        (folder / name / "engine.toml").write_text(f'name = "{name}"\n{body}')
        build_engine(folder / name, precision="fp32", output=folder / "engines" / name)
    (folder / "things").mkdir()
    (folder / "things" / "engine.toml").write_text(WIRING % {"labels": images / "coco-labels.txt"})
    output = ["--output", str(folder / "engines" / "things")]
    main(["build-engine", str(folder / "things"), *output], standalone_mode=False)
    return folder / "engines"


@pytest.fixture(scope="module")
def seeing(packages: Path, broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    ready = ["fastestdet", "squeezenet", "things"]
    with running_daemon(packages, broker.url, tmp_path_factory.mktemp("seeing"), ready=ready, device=DEVICE) as daemon:
        yield daemon


def test_things_on_a_photo(seeing: DaemonProcess, broker: Broker, packages: Path, shared: Path) -> None:
    """The published boxes, and for each the class that its part of the photo has by hand."""
    expected = json.loads((shared / "models" / "fastestdet-expected.json").read_text())
    with Client(broker.url, device=DEVICE) as client, load_engine(packages / "squeezenet") as classifier:
        for name, boxes in expected.items():
            photo = (shared / "images" / "detect" / name).read_bytes()
            answer = client.infer("things", photo)
            width, height = open_picture(photo).size
            scale = np.array([width, height, width, height])

            assert [box["label"].encode() for box in boxes] == answer.outputs["labels"].tolist()
            assert np.allclose([box["box_xyxy"] for box in boxes], answer.outputs["boxes"] * scale, atol=0.1)
            assert np.allclose([box["score"] for box in boxes], answer.outputs["scores"], atol=1e-3)
            for part, kinds in zip(crops(photo, answer.outputs["boxes"]), answer.outputs["kinds"], strict=True):
                scores = classifier.infer({"data_0": decode_image(part, CLASSIFIER)})["softmaxout_1"].ravel()
                best, number, _ = kinds[0].split(b":", 2)

                assert int(scores.argmax()) == int(number)
                assert float(scores.max()) == pytest.approx(float(best), abs=1e-4)
            assert {"queue", "infer", "detector", "found", "parts", "classifier"} == set(answer.timing)


def test_a_pipeline_answers_as_much_without_a_daemon(
    seeing: DaemonProcess, broker: Broker, packages: Path, shared: Path
) -> None:
    """`infer --local` runs it in its own process, and says what the daemon says; `bench` measures the whole of it."""
    photo, runner = str(shared / "images" / "detect" / "0.jpg"), CliRunner()
    here, there, measured = (
        json.loads(runner.invoke(main, [*arguments, "--json"], catch_exceptions=False).stdout)
        for arguments in (
            ["infer", "--local", str(packages / "things"), "--input", photo],
            ["infer", "things", "--broker", broker.url, "--device", DEVICE, "--input", photo],
            ["bench", str(packages / "things"), "--input", photo, "--seconds", "0.3", "--concurrency", "2"],
        )
    )

    assert DEVICE == there.pop("device")
    assert there == here
    assert {"boxes", "scores", "labels", "kinds"} == {output["name"] for output in here["outputs"]}
    assert (2, 0) == (measured["concurrency"], measured["errors"])
    assert 0 < measured["p50_ms"] <= measured["p99_ms"]


def test_a_photo_of_nothing_has_no_parts(seeing: DaemonProcess, broker: Broker, shared: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    with Client(broker.url, device=DEVICE) as client:
        answer = client.infer("things", tmp_path / "black.png")

    assert (0, 4) == answer.outputs["boxes"].shape
    assert 0 == len(answer.outputs["kinds"])


def test_many_at_once_are_all_answered(seeing: DaemonProcess, broker: Broker, shared: Path) -> None:
    """Pipelines and their own models asked side by side: nobody waits for anybody for ever, and answers are right."""
    photo = (shared / "images" / "detect" / "0.jpg").read_bytes()
    with Client(broker.url, device=DEVICE, timeout_s=60) as client:
        alone = client.infer("things", photo)
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: client.infer("things", photo), range(12)))
            others = list(pool.map(lambda _: client.infer("squeezenet", photo), range(6)))

    assert all(np.array_equal(alone.outputs["boxes"], answer.outputs["boxes"]) for answer in answers)
    assert all(alone.outputs["kinds"].tolist() == answer.outputs["kinds"].tolist() for answer in answers)
    assert 6 == len(others)


def test_an_error_names_its_stage(seeing: DaemonProcess, broker: Broker, shared: Path) -> None:
    photo = (shared / "images" / "detect" / "0.jpg").read_bytes()
    with Client(broker.url, device=DEVICE) as client:
        with pytest.raises(Malformed, match=r"Stage 'detector': .* broken"):
            client.infer("things", photo[:5000])
        with pytest.raises(UnsupportedType, match="JPEG or PNG"):
            client.infer("things", np.zeros((1, 3), np.float32))
        metadata = client.metadata("things")

    assert "pipeline" == metadata["task"]
    assert ["detector", "found", "parts", "classifier"] == metadata["stages"]


def test_a_stage_that_is_missing_is_said_and_awaited(
    packages: Path, broker: Broker, shared: Path, tmp_path: Path
) -> None:
    """UNAVAILABLE with the reason until its model is there; READY then, without a restart."""
    engines = tmp_path / "engines"
    engines.mkdir()
    for name in ("fastestdet", "things"):
        (engines / name).symlink_to(packages / name)
    photo = shared / "images" / "detect" / "1.jpg"
    with (
        running_daemon(engines, broker.url, tmp_path, ready=["fastestdet"], device="lacking") as daemon,
        Client(broker.url, device="lacking") as client,
    ):
        metadata = daemon.wait_for_state(client, "things", "UNAVAILABLE")
        with pytest.raises(Unavailable, match="'squeezenet' is not on this device"):
            client.infer("things", photo)
        (engines / "squeezenet").symlink_to(packages / "squeezenet")
        daemon.hang_up()
        daemon.wait_for_state(client, "things", "READY")

        assert "stage 'classifier': the model 'squeezenet' is not on this device" == metadata["reason"]
        assert 1 == len(client.infer("things", photo).outputs["boxes"])


def test_a_stage_may_live_on_another_device(
    seeing: DaemonProcess, packages: Path, broker: Broker, shared: Path, tmp_path: Path
) -> None:
    """Asked over MQTT: the same answer. One that is not there is an error with the name of the stage."""
    photo = shared / "images" / "detect" / "0.jpg"
    engines = tmp_path / "engines"
    (engines / "fastestdet").parent.mkdir()
    (engines / "fastestdet").symlink_to(packages / "fastestdet")
    for name, device in (("far", DEVICE), ("lost", "nobody")):
        spec = (WIRING % {"labels": shared / "images" / "coco-labels.txt"}).replace("things", name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "engine.toml").write_text(
            spec.replace('model = "squeezenet"', f'model = "squeezenet"\ndevice = "{device}"')
        )
        build_pipeline(tmp_path / name / "engine.toml", engines / name)
    with (
        running_daemon(engines, broker.url, tmp_path, ready=["fastestdet", "far"], device="near") as daemon,
        Client(broker.url, timeout_s=30) as client,
    ):
        here, there = client.infer("things", photo, device=DEVICE), client.infer("far", photo, device="near")
        with pytest.raises(Unavailable, match="Stage 'classifier': The device 'nobody' gave no answer"):
            client.infer("lost", photo, device="near", timeout_s=2)

        assert here.outputs["kinds"].tolist() == there.outputs["kinds"].tolist()
        assert np.array_equal(here.outputs["boxes"], there.outputs["boxes"])
        assert 0 == daemon.stop()
