"""The requests that travel with a package: from the data, or plainly made up; few, bounded, and answered."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from edge_sdk.compile.pipeline import build_engine
from edge_sdk.errors import PackageError
from edge_sdk.package import GOLDEN, EnginePackage, file_sha256
from edge_sdk.profiles import DeviceProfile
from edge_sdk.spec import Axis, EngineSpec, Preprocess, spec_for_model
from tests.compile.graphs import conv_net, model
from tests.compile.nets import VOCABULARY, encoder


def _note(package: EnginePackage) -> str:
    return " ".join(note for note in json.loads(package.read("report.json"))["notes"] if "golden" in note)


def test_they_are_samples_of_the_data(engine_folder: Path, jetson: DeviceProfile) -> None:
    """Four of the 64 validation samples, evenly spread, exactly as the model is given them."""
    package = build_engine(engine_folder, profile=jetson)
    wanted = np.load(engine_folder / "validation.npz")["image"][::16]
    found = [feeds["image"] for feeds in package.golden()]

    assert 4 == len(found)
    np.testing.assert_array_equal(wanted, np.concatenate(found))
    assert "4 samples of " in _note(package)


def test_samples_of_other_sizes_than_an_engine_takes_are_left_out(tmp_path: Path, jetson: DeviceProfile) -> None:
    """An engine is compiled for the ranges of [axes]; asked for anything else it could only refuse."""
    (tmp_path / "net.onnx").write_bytes(encoder().SerializeToString())
    (tmp_path / "texts.py").write_text(
        "import numpy as np\ndef some():\n    return [np.full((1, 9 + n), n, np.int64) for n in range(24)]\n"
    )
    (tmp_path / "engine.toml").write_text(
        'name = "net"\nmodel = "net.onnx"\n[calibration]\ndata = "texts:some"\n[axes]\nL = { best = 8, max = 16 }\n'
    )
    package = build_engine(tmp_path, profile=jetson, precision="fp32")
    (tmp_path / "engine.toml").write_text((tmp_path / "engine.toml").read_text().replace("max = 16", "max = 8"))
    other = build_engine(tmp_path, profile=jetson, precision="fp32", output=tmp_path / "other")

    assert package.golden()
    assert all(9 <= feeds["tokens"].shape[1] <= 16 for feeds in package.golden())
    assert [] == other.golden()
    assert "[axes]" in _note(other)


def test_packages_of_devices_that_load_the_graph_have_none(engine_folder: Path, cpu: DeviceProfile) -> None:
    """Nothing would be compared on them there, and they are somebody's data."""
    package = build_engine(engine_folder, profile=cpu, precision="fp32")

    assert GOLDEN not in package.manifest.files
    assert [] == package.golden()


def test_without_data_they_are_made_up_and_said_to_be(tmp_path: Path, jetson: DeviceProfile) -> None:
    """Random, the same each time, and good enough to judge FP16 on."""
    (tmp_path / "net.onnx").write_bytes(conv_net().SerializeToString())
    one, other = (
        build_engine(tmp_path / "net.onnx", profile=jetson, output=tmp_path / name) for name in ("one", "other")
    )

    assert one.read(GOLDEN) == other.read(GOLDEN)
    assert {(1, 3, 16, 16)} == {feeds["image"].shape for feeds in one.golden()}
    assert "random" in _note(one)
    assert one.manifest.measurements is not None
    assert "random" in one.manifest.measurements.judged_on
    assert 4 == one.manifest.measurements.samples


def test_made_up_tokens_are_in_the_vocabulary(tmp_path: Path, jetson: DeviceProfile) -> None:
    """Numbers that pick rows of a table pick some that are there; free axes get the sizes that [axes] calls best."""
    (tmp_path / "net.onnx").write_bytes(encoder().SerializeToString())
    axes = {"L": Axis(best=17, max=32), "N": Axis(best=3, max=8)}
    spec = EngineSpec(name="net", model=tmp_path / "net.onnx", axes=axes)
    tokens = [feeds["tokens"] for feeds in build_engine(spec, profile=jetson).golden()]

    assert {(3, 17)} == {array.shape for array in tokens}
    assert all(0 <= array.min() and 100 < array.max() < VOCABULARY for array in tokens)


def test_sizes_that_nobody_knows_are_not_made_up(tmp_path: Path, jetson: DeviceProfile) -> None:
    """Without data and without [axes] there is nothing to judge FP16 on, and the decision and the report say so."""
    (tmp_path / "net.onnx").write_bytes(encoder().SerializeToString())
    package = build_engine(tmp_path / "net.onnx", profile=jetson)

    assert [] == package.golden()
    assert "[axes]" in _note(package)
    assert "fp32" == package.manifest.precision
    assert package.manifest.measurements is not None
    assert "could not be judged" in package.manifest.measurements.decision


def test_made_up_photos_are_prepared_as_photos_are(tmp_path: Path, jetson: DeviceProfile) -> None:
    """Pixels of 0 to 255, then [preprocess]."""
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)]
    (tmp_path / "net.onnx").write_bytes(
        model(nodes, {"x": ["N", 3, 8, 8]}, {"y": ["N", 3]}).SerializeToString()
    )  # fmt: skip
    preprocess = Preprocess(resize=(8, 8), scale=1 / 255, mean=(0.5, 0.0, 0.0), std=(0.5, 1.0, 0.1))
    spec = spec_for_model(tmp_path / "net.onnx").model_copy(
        update={"preprocess": preprocess, "task": "image-classification"}
    )
    photos = np.concatenate([feeds["x"] for feeds in build_engine(spec, profile=jetson).golden()])
    ranges = [(float(photos[:, channel].min()), float(photos[:, channel].max())) for channel in range(3)]

    np.testing.assert_allclose([(-1, 1), (0, 1), (0, 10)], ranges, atol=0.5)


def test_large_requests_are_few(tmp_path: Path, jetson: DeviceProfile) -> None:
    """As many as make about a megabyte, and one whatever it takes."""
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=0)]
    for side, count in ((350, 2), (1000, 1)):
        net = model(nodes, {"x": [1, side * side]}, {"y": [1]})
        (tmp_path / f"net{side}.onnx").write_bytes(net.SerializeToString())

        assert count == len(build_engine(tmp_path / f"net{side}.onnx", profile=jetson).golden())


def test_requests_that_the_model_does_not_answer_are_left_out(tmp_path: Path, jetson: DeviceProfile) -> None:
    """A logarithm of random numbers is NaN: there are no golden requests, and that is said."""
    net = model([helper.make_node("Log", ["x"], ["y"])], {"x": ["N", 64]}, {"y": ["N", 64]})
    (tmp_path / "net.onnx").write_bytes(net.SerializeToString())
    package = build_engine(tmp_path / "net.onnx", profile=jetson)

    assert [] == package.golden()
    assert "does not answer" in _note(package)


def _archive(**members: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return packed.getvalue()


def _npy(array: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(array))
    return stream.getvalue()


GOOD = np.zeros((1, 3, 16, 16), np.float32)
CLAIM = _npy(GOOD).replace(b"(1, 3, 16, 16)", b"(9, 3, 99, 99)")


@pytest.mark.parametrize(
    "content",
    [
        lambda: b"no archive",
        lambda: _archive(**{"0/image.npy": b"no array"}),
        lambda: _archive(**{"0/image.npy": CLAIM}),
        lambda: _archive(**{"0/image.npy": _npy(GOOD.astype(np.float64))}),
        lambda: _archive(**{"0/image.npy": _npy(GOOD[:, :, :, :9])}),
        lambda: _archive(**{"0/other.npy": _npy(GOOD)}),
        lambda: _archive(**{"1/image.npy": _npy(GOOD)}),
        lambda: _archive(**{"../image.npy": _npy(GOOD)}),
        lambda: _archive(**{"0/image.npy": _npy(np.array([{}], object))}),
        lambda: _archive(**{f"{number}/image.npy": _npy(GOOD) for number in range(17)}),
        lambda: _archive(**{"0/image.npy": bytes(65 << 20)}),
        lambda: _archive(**{"0/image.npy": _npy(GOOD)})[:-30],
    ],
    ids=["bytes", "text", "claim", "dtype", "shape", "input", "number", "path", "pickle", "many", "bomb", "cut"],
)
def test_hostile_requests_are_refused(engine_folder: Path, jetson: DeviceProfile, content: Callable[[], bytes]) -> None:
    """Whoever writes a package can write its digests: what is in the archive is not believed either."""
    package = build_engine(engine_folder, profile=jetson, precision="fp32")
    (package.path / GOLDEN).write_bytes(content())
    manifest = json.loads((package.path / "manifest.json").read_text())
    manifest["files"][GOLDEN]["sha256"] = file_sha256(package.path / GOLDEN)
    (package.path / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(PackageError, match=r"golden\.npz does not hold requests"):
        EnginePackage.open(package.path).golden()


def test_text_is_not_packed(tmp_path: Path, jetson: DeviceProfile) -> None:
    """Strings are Python objects to numpy: a model that takes some has no golden requests."""
    net = model([helper.make_node("Identity", ["x"], ["y"])], {"x": ["N"]}, {"y": ["N"]}, dtype=TensorProto.STRING)
    (tmp_path / "net.onnx").write_bytes(net.SerializeToString())
    package = build_engine(tmp_path / "net.onnx", profile=jetson)

    assert [] == package.golden()
    assert "text" in _note(package)
