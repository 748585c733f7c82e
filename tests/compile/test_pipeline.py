"""A build gives a package or raises; it decides on evidence, does nothing twice, and leaves nothing behind."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

import edge_sdk
from edge_sdk.compile import pipeline
from edge_sdk.compile.evaluate import evaluate
from edge_sdk.compile.modernize import ModernGraph
from edge_sdk.compile.pipeline import build, build_engine
from edge_sdk.errors import DataError, EdgeSdkError, ModelError, PackageError, ProfileError, SpecError
from edge_sdk.package import EnginePackage
from edge_sdk.profiles import DeviceProfile
from edge_sdk.spec import Axis, spec_for_model
from tests import packages
from tests.compile.graphs import conv_net, model, pictures


def _edit(folder: Path, old: str, new: str) -> None:
    file = folder / "engine.toml"
    file.write_text(file.read_text().replace(old, new))


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_int8_package_is_whole(engine_folder: Path, cpu: DeviceProfile) -> None:
    """The package says where it came from, what it measured and what was decided; its files are what it says."""
    package = build_engine(engine_folder, profile=cpu, precision="int8")
    manifest = package.manifest
    package.verify()

    assert engine_folder / "build" / "cpu-x86" == package.path
    assert {"graph.onnx", "profile.json", "report.json", "report.md"} == set(manifest.files)
    assert "int8" == manifest.precision
    assert manifest.calibration is not None
    assert 48 == manifest.calibration.samples
    assert manifest.measurements is not None
    assert 64 == manifest.measurements.samples
    assert (manifest.measurements.snr_db or 0) > 15
    assert manifest.measurements.decision.startswith("INT8, as asked: ")
    assert "onnxruntime" in manifest.tools
    assert "logits" == manifest.postprocess.scores
    assert 2 == manifest.batching.max_batch
    assert json.loads(package.read("report.json"))["model"]["opsets"] == {"": 17}
    assert manifest.measurements.decision in package.read("report.md").decode()


def test_package_loads_and_answers(engine_folder: Path, cpu: DeviceProfile) -> None:
    """What was built is what runs, batched or not."""
    package = build_engine(engine_folder, profile=cpu, precision="fp32")
    with edge_sdk.load_engine(package) as engine:
        assert (3, 10) == engine.infer({"image": pictures(3)})["scores"].shape


def test_unchanged_build_does_nothing(engine_folder: Path, cpu: DeviceProfile) -> None:
    """Keyed by content: nothing is done twice, and any change of what went in is noticed."""
    first = build(engine_folder, profile=cpu, precision="fp32")
    digest = first.package.digest

    assert not first.unchanged
    assert build(engine_folder, profile=cpu, precision="fp32").unchanged
    assert digest == build(engine_folder, profile=cpu, precision="fp32").package.digest
    assert not build(engine_folder, profile=cpu, precision="fp32", force=True).unchanged
    assert not build(engine_folder, profile=cpu, precision="int8").unchanged
    np.savez(engine_folder / "calibration.npz", image=pictures(64, seed=5))
    assert not build(engine_folder, profile=cpu, precision="int8").unchanged
    (engine_folder / "small.onnx").write_bytes(conv_net(seed=1).SerializeToString())
    assert not build(engine_folder, profile=cpu, precision="int8").unchanged


def test_altered_package_is_built_again(engine_folder: Path, cpu: DeviceProfile) -> None:
    """The right key on a damaged package is not good enough."""
    package = build(engine_folder, profile=cpu, precision="fp32").package
    (package.path / "graph.onnx").write_bytes(b"damaged")

    assert not build(engine_folder, profile=cpu, precision="fp32").unchanged


def test_auto_without_data_is_fp32_and_says_how_to_get_int8(tmp_path: Path, cpu: DeviceProfile) -> None:
    """A bare model has no data: FP32, and the decision says what to give."""
    (tmp_path / "bare net.onnx").write_bytes(conv_net().SerializeToString())
    package = build_engine(tmp_path / "bare net.onnx", profile=cpu)

    assert tmp_path / "bare-net" / "build" / "cpu-x86" == package.path
    assert "fp32" == package.manifest.precision
    assert package.manifest.measurements is not None
    assert "--calibration" in package.manifest.measurements.decision


def test_int8_without_data_is_refused(tmp_path: Path, cpu: DeviceProfile) -> None:
    """Never random data: the error says how to give some, and nothing is left behind."""
    (tmp_path / "net.onnx").write_bytes(conv_net().SerializeToString())

    with pytest.raises(DataError) as caught:
        build_engine(tmp_path / "net.onnx", profile=cpu, precision="int8")

    assert "--calibration" in caught.value.fix
    assert {"net.onnx"} == _files(tmp_path)


def test_data_can_be_given_to_a_bare_model(tmp_path: Path, cpu: DeviceProfile) -> None:
    """`calibration` and `samples` stand in for a spec; a part is held out to judge on."""
    (tmp_path / "net.onnx").write_bytes(conv_net().SerializeToString())
    np.save(tmp_path / "some.npy", pictures(40))
    package = build_engine(
        tmp_path / "net.onnx", profile=cpu, precision="int8", calibration=tmp_path / "some.npy", samples=20
    )

    assert package.manifest.calibration is not None
    assert 20 == package.manifest.calibration.samples
    assert package.manifest.measurements is not None
    assert "held-out" in package.manifest.measurements.judged_on


def test_few_samples_are_no_calibration(tmp_path: Path, cpu: DeviceProfile) -> None:
    """Below five there is nothing to hold out: INT8 is refused, and `auto` is FP32 for that reason."""
    (tmp_path / "net.onnx").write_bytes(conv_net().SerializeToString())
    np.save(tmp_path / "some.npy", pictures(4))
    with pytest.raises(DataError) as caught:
        build_engine(tmp_path / "net.onnx", profile=cpu, precision="int8", calibration=tmp_path / "some.npy")
    package = build_engine(tmp_path / "net.onnx", profile=cpu, calibration=tmp_path / "some.npy")

    assert re.search(r"\b4 .*at least 5", caught.value.problem)
    assert "hundred" in caught.value.fix
    assert "fp32" == package.manifest.precision
    assert package.manifest.measurements is not None
    assert re.search(r"FP32: .*\b4 .*at least 5", package.manifest.measurements.decision)
    assert "held-out" not in package.manifest.measurements.judged_on


def test_five_samples_are_enough(tmp_path: Path, cpu: DeviceProfile) -> None:
    """One of them is held out, and never calibrated on."""
    (tmp_path / "net.onnx").write_bytes(conv_net().SerializeToString())
    np.save(tmp_path / "some.npy", pictures(5))
    manifest = build_engine(
        tmp_path / "net.onnx", profile=cpu, precision="int8", calibration=tmp_path / "some.npy"
    ).manifest

    assert manifest.calibration is not None
    assert manifest.measurements is not None
    assert (4, 1) == (manifest.calibration.samples, manifest.measurements.samples)


def test_budget_is_kept(engine_folder: Path, cpu: DeviceProfile) -> None:
    """Outside it, `auto` falls back to FP32 with the figures, and an explicit wish is refused."""
    _edit(engine_folder, "min_snr_db = 15.0", "min_snr_db = 120.0")
    package = build_engine(engine_folder, profile=cpu)

    assert "fp32" == package.manifest.precision
    assert package.manifest.measurements is not None
    assert re.search(r"outside the accuracy budget: .* dB", package.manifest.measurements.decision)
    with pytest.raises(ModelError) as caught:
        build_engine(engine_folder, profile=cpu, precision="int8")
    assert "120 dB" in caught.value.problem


def test_other_devices_are_built_for_and_not_timed(engine_folder: Path, jetson: DeviceProfile) -> None:
    """The portable graph, judged on this CPU; what is missing here is said, and no speed is made up."""
    manifest = build_engine(engine_folder, profile=jetson).manifest

    assert "int8" == manifest.precision
    assert "aarch64" == manifest.architecture
    assert manifest.backend.missing is not None
    assert "tensorrt" in manifest.backend.missing
    assert manifest.measurements is not None
    assert manifest.measurements.engine.latency_ms is None
    assert "could not be measured" in manifest.measurements.decision


def test_fp16_where_the_profile_has_it(engine_folder: Path, cpu: DeviceProfile, jetson: DeviceProfile) -> None:
    """The precision asked for is built or refused, never replaced."""
    assert "fp16" == build_engine(engine_folder, profile=jetson, precision="fp16").manifest.precision
    with pytest.raises(ProfileError):
        build_engine(engine_folder, profile=cpu, precision="fp16")


def test_quantised_models_are_served_as_they_are(engine_folder: Path, cpu: DeviceProfile) -> None:
    """What a first build quantised, a second one packs byte for byte."""
    graph = build_engine(engine_folder, profile=cpu, precision="int8").read("graph.onnx")
    (engine_folder / "small.onnx").write_bytes(graph)
    package = build_engine(engine_folder, profile=cpu)

    assert graph == package.read("graph.onnx")
    assert package.manifest.source.already_quantized
    assert package.manifest.measurements is not None
    assert "came quantised" in package.manifest.measurements.decision
    with pytest.raises(ModelError):
        build_engine(engine_folder, profile=cpu, precision="fp32")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_interrupted_build_leaves_nothing_behind(
    engine_folder: Path, cpu: DeviceProfile, failure: type[BaseException]
) -> None:
    """Whenever it is interrupted, there is the old package or none, and no litter."""
    steps: set[str] = set()
    build(engine_folder, profile=cpu, precision="int8", progress=lambda step, done, total: steps.add(step))
    before = _files(engine_folder)
    digest = EnginePackage.open(engine_folder / "build" / "cpu-x86").digest
    for interrupted in steps:

        def interrupt(step: str, done: int, total: int, at: str = interrupted) -> None:
            if step == at:
                raise failure

        with pytest.raises(failure):
            build(engine_folder, profile=cpu, precision="int8", force=True, progress=interrupt)

        assert before == _files(engine_folder)
        assert digest == EnginePackage.open(engine_folder / "build" / "cpu-x86").digest
    assert {"reading the data", "calibrating", "choosing ranges", "verifying", "timing"} == steps


def test_progress_runs_to_its_end(engine_folder: Path, cpu: DeviceProfile) -> None:
    """Every step that began is seen to end."""
    last: dict[str, tuple[int, int]] = {}
    build(
        engine_folder,
        profile=cpu,
        precision="int8",
        progress=lambda step, done, total: last.update({step: (done, total)}),
    )

    assert all(done == total for done, total in last.values())


def test_only_packages_are_overwritten(engine_folder: Path, cpu: DeviceProfile, tmp_path: Path) -> None:
    """A build replaces a whole folder, so a folder of something else is refused."""
    with pytest.raises(PackageError):
        build_engine(engine_folder, profile=cpu, precision="fp32", output=tmp_path)

    assert (engine_folder / "engine.toml").is_file()


@pytest.mark.parametrize("manifest", ['{"name": "a web page"}', '{"format": 1, "name": "x"}', "[]", "no JSON"])
def test_other_manifests_are_not_packages(
    engine_folder: Path, cpu: DeviceProfile, tmp_path: Path, manifest: str
) -> None:
    """Web projects have a manifest.json, too."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "manifest.json").write_text(manifest)
    (project / "thesis.txt").write_text("three years")

    with pytest.raises(PackageError):
        build_engine(engine_folder, profile=cpu, precision="fp32", output=project)

    assert "three years" == (project / "thesis.txt").read_text()


@pytest.mark.parametrize("stray", ["thesis.txt", "notes/thesis.txt"])
def test_strays_in_a_package_are_kept(engine_folder: Path, cpu: DeviceProfile, stray: str) -> None:
    """Whatever lies in a package's folder without being of the package is named, and stays."""
    package = build_engine(engine_folder, profile=cpu, precision="fp32")
    (package.path / stray).parent.mkdir(exist_ok=True)
    (package.path / stray).write_text("three years")

    with pytest.raises(PackageError) as caught:
        build_engine(engine_folder, profile=cpu, precision="fp32", force=True)

    assert repr(stray.split("/")[0]) in caught.value.problem
    assert (package.path / stray).is_file()


def test_packages_of_another_format_are_overwritten(engine_folder: Path, cpu: DeviceProfile) -> None:
    """This release may not read them, but knows them for packages, and building again is what its errors advise."""
    package = build_engine(engine_folder, profile=cpu, precision="fp32")
    manifest = json.loads((package.path / "manifest.json").read_text())
    (package.path / "manifest.json").write_text(json.dumps(manifest | {"format": 2, "inputs": "otherwise"}))

    assert 1 == build_engine(engine_folder, profile=cpu, precision="fp32").manifest.format


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (('model = "small.onnx"', 'model = "absent.onnx"'), ModelError),
        (('data = "calibration.npz"', 'data = "absent"'), DataError),
        (("samples = 48", "samples = 0"), SpecError),
        (('name = "small"', 'name = "small"\ntask = "image-classification"'), SpecError),
        (('name = "small"', 'name = "small"\npostprocess.labels = "calibration.npz"'), SpecError),
    ],
)
def test_faults_are_told_apart(
    engine_folder: Path, cpu: DeviceProfile, change: tuple[str, str], error: type[EdgeSdkError]
) -> None:
    """The error says whose fault it is, and nothing is left behind."""
    _edit(engine_folder, *change)
    before = _files(engine_folder)

    with pytest.raises(error):
        build_engine(engine_folder, profile=cpu)

    assert before == _files(engine_folder)


def _photos(folder: Path, preprocess: str, **shape: list[int | str]) -> Path:
    """An engine spec for photos, whose model averages an input of `shape`."""
    (input_shape,) = shape.values()
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)]
    graph = model(nodes, {"x": input_shape}, {"y": [input_shape[0], input_shape[1]]})
    (folder / "net.onnx").write_bytes(graph.SerializeToString())
    (folder / "engine.toml").write_text(
        f'name = "net"\nmodel = "net.onnx"\ntask = "image-classification"\n[preprocess]\n{preprocess}\n'
    )
    return folder


@pytest.mark.parametrize(
    ("preprocess", "shape", "words"),
    [
        ("resize = [8, 8]", [4, 3, 8, 8], ["[4, 3, 8, 8]", "batch 1"]),
        ("resize = [8, 8]", ["N", 1, 8, 8], ["[1, 3, 8, 8]", "['N', 1, 8, 8]", "color"]),
        ('resize = [8, 8]\ncolor = "L"', ["N", 3, 8, 8], ["[1, 1, 8, 8]", "color"]),
        ("resize = [8, 9]", [1, 3, 8, 8], ["[1, 3, 8, 9]", "[1, 3, 8, 8]", "resize"]),
        ("resize_short_side = 9\ncenter_crop = 8", ["N", 3, 9, 9], ["[1, 3, 8, 8]", "center_crop"]),
        ("resize_short_side = 9", ["N", 3, 8, 8], ["resize_short_side"]),
        ('resize = [8, 8]\nlayout = "NHWC"', ["N", 3, 8, 8], ["[1, 8, 8, 3]", "layout"]),
    ],
)
def test_photos_must_fit_the_model(
    tmp_path: Path, cpu: DeviceProfile, preprocess: str, shape: list[int | str], words: list[str]
) -> None:
    """An engine that would answer every photo with an error is not built; both shapes are said, and what to change."""
    with pytest.raises(SpecError) as caught:
        build_engine(_photos(tmp_path, preprocess, shape=shape), profile=cpu, precision="fp32")

    for word in words:
        assert word.replace("'", "") in str(caught.value)


@pytest.mark.parametrize(
    ("preprocess", "shape"),
    [
        ("resize = [8, 9]", [1, 3, 8, 9]),
        ("resize = [8, 9]", ["N", 3, "H", "W"]),
        ("resize_short_side = 8", ["N", 3, "H", "W"]),
        ("resize_short_side = 9\ncenter_crop = 8", ["N", 3, 8, 8]),
        ("resize_short_side = 8", [1, 3, 8, 10]),
        ('resize = [8, 8]\nlayout = "NHWC"', ["N", 8, 8, 3]),
    ],
)
def test_photos_that_fit_are_built(tmp_path: Path, cpu: DeviceProfile, preprocess: str, shape: list[int | str]) -> None:
    """Free axes take what comes, and a short side alone leaves the other one to the photo."""
    assert "net" == build_engine(_photos(tmp_path, preprocess, shape=shape), profile=cpu, precision="fp32").name


@pytest.mark.parametrize(
    ("graph", "axes", "max_batch"),
    [
        (packages.texts(), {}, 8),
        (packages.texts(), {"length": Axis(best=5, max=9)}, 8),
        (packages.centring(), {}, 1),
    ],
    ids=["sizes guessed", "sizes given", "rows mixed"],
)
def test_requests_of_free_sizes_share_batches_where_they_may(
    tmp_path: Path, cpu: DeviceProfile, graph: ModelProto, axes: dict[str, Axis], max_batch: int
) -> None:
    """Found out by asking the graph, with sizes that engine.toml gives or with guesses: alone and beside another."""
    (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
    spec = spec_for_model(tmp_path / "model.onnx").model_copy(update={"axes": axes})
    package = build_engine(spec, profile=cpu, output=tmp_path / "package")

    assert max_batch == package.manifest.batching.max_batch
    assert bool(axes) == bool(package.manifest.measurements and package.manifest.measurements.engine.latency_ms)


@pytest.mark.parametrize("missing", ["inputs", "outputs"])
def test_models_without_inputs_or_outputs_are_refused(tmp_path: Path, cpu: DeviceProfile, missing: str) -> None:
    """There would be nothing to ask, or no answer."""
    nodes = [helper.make_node("Identity", ["w" if missing == "inputs" else "x"], ["y"])]
    weights = {"w": np.zeros(2, np.float32)}
    graph = model(nodes, {} if missing == "inputs" else {"x": [2]}, {} if missing == "outputs" else {"y": [2]}, weights)
    (tmp_path / "net.onnx").write_bytes(graph.SerializeToString())

    with pytest.raises(ModelError) as caught:
        build_engine(tmp_path / "net.onnx", profile=cpu)

    assert f"no {missing}" in caught.value.problem


@pytest.mark.parametrize("fault", ["unloadable", "shape", "dtype", "integers"])
@pytest.mark.parametrize("both", [False, True])
def test_graphs_that_answer_otherwise_are_not_trusted(
    tmp_path: Path, cpu: DeviceProfile, monkeypatch: pytest.MonkeyPatch, fault: str, both: bool
) -> None:
    """A simplified graph that fails, or answers in another form, is left out; if the other one does too, none is built.

    The faults stand for those of other people's graph surgery, which are not to be had to order.
    """
    nodes = [
        helper.make_node("Add", ["x", "w"], ["y"]),
        helper.make_node("ArgMax", ["y"], ["best"], axis=1, keepdims=0),
    ]
    weights = {"w": np.array([1, 3, 2], np.float32)}
    sound = model(nodes, {"x": ["N", 3]}, {"y": ["N", 3]}, weights)
    sound.graph.output.append(helper.make_tensor_value_info("best", TensorProto.INT64, ["N"]))
    (tmp_path / "net.onnx").write_bytes(sound.SerializeToString())
    broken = ModelProto()
    broken.CopyFrom(sound)
    add, best = broken.graph.node
    if fault == "unloadable":
        add.op_type = "NoSuchOperator"
    elif fault == "shape":
        best.attribute[1].i = 1
        del broken.graph.output[1].type.tensor_type.shape.dim[:]
        broken.graph.output[1].type.tensor_type.ClearField("shape")
    elif fault == "dtype":
        add.output[0] = "z"
        broken.graph.node.insert(1, helper.make_node("Cast", ["z"], ["y"], to=TensorProto.DOUBLE))
        broken.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    else:
        best.op_type = "ArgMin"
    monkeypatch.setattr(
        pipeline,
        "modern_graph",
        lambda model, summary, simplify=True: ModernGraph(broken if simplify or both else sound),
    )
    if both:
        with pytest.raises(ModelError):
            build_engine(tmp_path / "net.onnx", profile=cpu, precision="fp32")
        return
    package = build_engine(tmp_path / "net.onnx", profile=cpu, precision="fp32")

    assert "Simplifying" in package.read("report.md").decode()


def test_evaluate_beside_another_package(engine_folder: Path, cpu: DeviceProfile, tmp_path: Path) -> None:
    """Two packages on the same data: agreement and latency of both."""
    int8 = build_engine(engine_folder, profile=cpu, precision="int8", output=tmp_path / "int8")
    fp32 = build_engine(engine_folder, profile=cpu, precision="fp32", output=tmp_path / "fp32")
    np.savez(tmp_path / "data.npz", x=pictures(32, seed=3), y=np.arange(32) % 10)
    found = evaluate(int8, str(tmp_path / "data.npz"), against=fp32)

    assert 32 == found.samples
    assert (found.agreement_percent or 0) > 80
    assert found.against is not None
    assert found.package.top1_percent is not None
    assert found.package.bytes < found.against.bytes
    json.dumps(found.to_dict())


def test_both_builds_take_the_same_arguments() -> None:
    """`help(edge_sdk.build_engine)` names every argument with its type, and what comes back."""
    ours, theirs = inspect.signature(edge_sdk.build_engine), inspect.signature(build)

    assert theirs.parameters == ours.parameters
    assert "EnginePackage" == ours.return_annotation
    assert {"source", "profile", "precision", "calibration"} < set(ours.parameters)
