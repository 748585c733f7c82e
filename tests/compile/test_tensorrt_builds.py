"""Engines for RTX cards, compiled by the real builder of tensorrt_rtx, which needs no GPU: nothing here is simulated.

Every model is calibrated and judged once in each precision, through `build_engine`; for the other cards the package's
graph is compiled again, as a device does it. What these engines answer only a GPU can tell (`tests/gpu`); how good the
graphs are is judged here, on onnxruntime, with the very nodes that TensorRT is given.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from edge_sdk import resources
from edge_sdk.backends.base import EngineOrder
from edge_sdk.backends.registry import backend
from edge_sdk.compile.pipeline import build_engine
from edge_sdk.errors import ModelError, ProfileError
from edge_sdk.package import EnginePackage, EngineRecord
from edge_sdk.profiles import Precision, load_profile
from edge_sdk.spec import Axis, Calibration, EngineSpec, Preprocess, Validation, load_spec
from edge_sdk.tasks.images import decode_image
from edge_sdk.tensors import Array
from tests.compile.nets import LENGTH, encoder, photos, resnet50, sentences
from tests.compile.test_known_models import BGR, photo_engine

pytest.importorskip("tensorrt_rtx", reason="RTX engines cannot be compiled without the extra `rtx`")

CARDS = ("desktop-rtx-40", "desktop-rtx-50", "desktop-rtx-portable")
"""Besides desktop-rtx-30, which `build_engine` builds for."""
LENGTHS = {"L": Axis(min=1, best=40, max=LENGTH), "N": Axis(min=1, best=4, max=8)}

MIN_SNR_DB = {"digits": 20.0, "squeezenet": 18.0, "fastestdet": 9.0, "resnet50": 23.0, "encoder": 25.0}
"""Of the INT8 graphs' outputs against FP32's. FP16 has to reach 40 dB everywhere.

FastestDet's depthwise convolutions lose the most: 12.5 dB in this scheme, and 14 in the CPU's asymmetric one.
"""


def _spec(folder: Path, name: str, model: bytes, **data: Array) -> EngineSpec:
    """A spec without a range for any axis."""
    (folder / f"{name}.onnx").write_bytes(model)
    np.savez(folder / f"{name}.npz", **cast("Any", data))
    calibration = Calibration(data=str(folder / f"{name}.npz"), samples=12, method="mse")
    return EngineSpec(name=name, model=folder / f"{name}.onnx", calibration=calibration)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[str], EngineSpec]:
    """A model with its data, by name; made when it is first asked for."""
    folder = tmp_path_factory.mktemp("specs")

    @functools.cache
    def made(name: str) -> EngineSpec:
        if name == "digits":
            return load_spec(resources.EXAMPLES / "digits")
        if name == "resnet50":
            return _spec(folder, name, resnet50().SerializeToString(), image=photos(20, 224))
        if name == "encoder":
            unranged = _spec(folder, name, encoder().SerializeToString(), tokens=sentences(48, 40))
            return unranged.model_copy(update={"axes": LENGTHS})
        shared: Path = request.getfixturevalue("shared")
        if name == "squeezenet":
            place = photo_engine(folder / name, shared, "squeezenet.onnx", BGR)
            for number, photo in enumerate(sorted((place / "validation").iterdir())):
                if number % 5:
                    photo.unlink()
            photographic = load_spec(place)
            assert photographic.validation is not None
            lenient = photographic.validation.model_copy(update={"max_drop": 6.0})
            return photographic.model_copy(update={"validation": lenient})
        prepared = Preprocess(resize=(352, 352), color="BGR", scale=1 / 255)
        some = sorted((shared / "images" / "imagenet-500").glob("*.jpg"))[::25]
        images = np.concatenate([decode_image(photo.read_bytes(), prepared) for photo in some])
        model = (shared / "models" / "fastestdet.onnx").read_bytes()
        np.savez(folder / "others.npz", x=images[12:].astype(np.float32))
        budget = Validation(data=str(folder / "others.npz"), min_snr_db=MIN_SNR_DB[name])
        detector = _spec(folder, name, model, x=images[:12].astype(np.float32))
        return detector.model_copy(update={"validation": budget})

    return made


@pytest.fixture(scope="module")
def package(
    spec: Callable[[str], EngineSpec], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Precision], EnginePackage]:
    """The package of a model in a precision for desktop-rtx-30; built when it is first asked for."""
    folder = tmp_path_factory.mktemp("packages")

    @functools.cache
    def built(name: str, precision: Precision) -> EnginePackage:
        output = folder / f"{name}-{precision}"
        return build_engine(spec(name), profile="desktop-rtx-30", precision=precision, output=output)

    return built


MODELS = ("digits", "squeezenet", "fastestdet", "resnet50", "encoder")


@pytest.mark.parametrize("precision", ["int8", "fp16"])
@pytest.mark.parametrize("model", MODELS)
def test_engines_build_for_every_card(
    package: Callable[[str, Precision], EnginePackage], tmp_path: Path, model: str, precision: Precision
) -> None:
    """The package holds an engine for its card, and its graph makes one for each other card, and one for all."""
    built = package(model, precision)
    manifest = built.manifest
    built.verify()

    assert "tensorrt" == manifest.backend.name
    assert manifest.backend.missing is None
    assert manifest.backend.engine is not None
    assert manifest.backend.engine.bytes == manifest.files[manifest.backend.engine.file].bytes
    assert ["8.6"] == json.loads(built.read(manifest.backend.engine.sidecar))["compute_capabilities"]
    assert manifest.backend.engine.peak_bytes > 2**20
    with ThreadPoolExecutor(2) as pool:
        records = list(pool.map(functools.partial(_for_card, built, tmp_path), CARDS))
    for card, record in zip(CARDS, records):
        sidecar = json.loads((tmp_path / card / record.sidecar).read_text())

        assert (card, card == "desktop-rtx-portable") == (sidecar["profile"], sidecar["portable"])
        assert (tmp_path / card / record.file).stat().st_size == record.bytes


def _for_card(package: EnginePackage, folder: Path, card: str) -> EngineRecord:
    """The package's graph, compiled for a card into a folder of the card's name."""
    (folder / card).mkdir()
    wanted = replace(EngineOrder.of(package, here=False), profile=load_profile(card))
    record = backend("tensorrt").build(wanted, folder / card)
    assert record is not None
    return record


@pytest.mark.parametrize("model", MODELS)
def test_graphs_are_as_good_as_fp32(package: Callable[[str, Precision], EnginePackage], model: str) -> None:
    """Symmetric INT8 and FP16, judged on samples that were not calibrated on; golden requests go with them."""
    int8, fp16 = package(model, "int8").manifest.measurements, package(model, "fp16").manifest.measurements

    assert int8 is not None
    assert fp16 is not None
    assert (int8.snr_db or 0) >= MIN_SNR_DB[model]
    assert (fp16.snr_db or 0) >= 40
    assert int8.engine.bytes < fp16.engine.bytes < int8.reference.bytes
    assert package(model, "int8").golden()


def test_squeezenet_names_the_same_things(package: Callable[[str, Precision], EnginePackage]) -> None:
    """In TensorRT's scheme, with half the steps behind a Relu: as often right as FP32, and mostly of its opinion."""
    measured = package("squeezenet", "int8").manifest.measurements

    assert measured is not None
    assert 75 == measured.samples
    assert (measured.engine.top1_percent or 0) >= (measured.reference.top1_percent or 100) - 3
    assert (measured.agreement_percent or 0) >= 85


def test_int8_resnet_is_a_third_of_fp32(
    package: Callable[[str, Precision], EnginePackage], spec: Callable[[str], EngineSpec], tmp_path: Path
) -> None:
    """The weights are in the engine in 8 bits: its plan has at most 0.40 of the FP32 plan's bytes."""
    int8 = package("resnet50", "int8").manifest.backend.engine
    order = EngineOrder.of(package("resnet50", "int8"), here=False)
    fp32 = backend("tensorrt").build(replace(order, graph=spec("resnet50").model.read_bytes()), tmp_path)

    assert int8 is not None
    assert fp32 is not None
    assert int8.bytes <= 0.40 * fp32.bytes


@pytest.mark.parametrize("model", ["digits", "resnet50", "encoder"])
def test_turing_builds_in_fp16(package: Callable[[str, Precision], EnginePackage], tmp_path: Path, model: str) -> None:
    """Whose tensor cores have no FP32 matrix products: FP16 graphs build for it."""
    record = _for_card(package(model, "fp16"), tmp_path, "desktop-rtx-20")
    sidecar = json.loads((tmp_path / "desktop-rtx-20" / record.sidecar).read_text())

    assert ["7.5"] == sidecar["compute_capabilities"]


@pytest.mark.parametrize("model", ["digits", "encoder"])
def test_turing_takes_int8_with_fp16_products(spec: Callable[[str], EngineSpec], tmp_path: Path, model: str) -> None:
    """`auto` finds what builds; FP32 is what it is measured against, and cannot be asked for."""
    package = build_engine(spec(model), profile="desktop-rtx-20", output=tmp_path / "package")
    measured = package.manifest.measurements

    assert "int8" == package.manifest.precision
    assert package.manifest.backend.engine is not None
    assert measured is not None
    assert "fp32" == measured.reference.precision
    assert measured.decision.startswith("INT8 with an FP16 rest: ")
    with pytest.raises(ProfileError):
        build_engine(spec(model), profile="desktop-rtx-20", precision="fp32", output=tmp_path / "other")


def test_a_free_length_needs_a_range(spec: Callable[[str], EngineSpec], tmp_path: Path) -> None:
    """The error names the axis and the table to write, and nothing is left behind."""
    unranged = spec("encoder").model_copy(update={"axes": {}})
    with pytest.raises(ModelError) as caught:
        build_engine(unranged, profile="desktop-rtx-30", precision="fp16", output=tmp_path / "package")

    assert "L" in caught.value.problem
    assert "[axes]" in caught.value.fix
    assert not list(tmp_path.iterdir())


def test_what_tensorrt_refuses_is_said(shared: Path, tmp_path: Path) -> None:
    """A model that came quantised asymmetrically: no package, and the error names a node and what is wrong with it."""
    with pytest.raises(ModelError) as caught:
        build_engine(shared / "models" / "mobilenetv2-qlinear.onnx", profile="desktop-rtx-40", output=tmp_path / "p")

    assert "zero point" in caught.value.problem
    assert caught.value.fix
    assert not list(tmp_path.iterdir())


def test_wishes_and_progress_reach_the_builder(spec: Callable[[str], EngineSpec], tmp_path: Path) -> None:
    """engine.toml's [tensorrt] is in what the package packs and what the builder used; its progress runs to the end."""
    wishes = spec("digits").tensorrt.model_copy(update={"optimization_level": 1})
    wished = spec("digits").model_copy(update={"tensorrt": wishes})
    steps: list[tuple[int, int]] = []
    package = build_engine(
        wished,
        profile="desktop-rtx-50",
        precision="fp32",
        output=tmp_path / "package",
        progress=lambda step, done, total: steps.append((done, total)) if step == "compiling the engine" else None,
    )
    packed = package.profile().tensorrt
    engine = package.manifest.backend.engine

    assert packed is not None
    assert engine is not None
    assert 1 == packed.optimization_level
    assert 1 == json.loads(package.read(engine.sidecar))["settings"]["optimization_level"]
    assert (0, 100) == steps[0]
    assert (100, 100) == steps[-1]
    assert len(steps) > 4
    assert steps == sorted(steps)
    assert "has not run" in package.read("report.md").decode()
