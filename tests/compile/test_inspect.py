"""Whatever a file holds, reading it gives a sound model or a ModelError: nothing else, nothing outside its folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper

from edge_sdk.compile.inspect import ends_in_softmax, inspect_model, read_model
from edge_sdk.errors import ModelError
from edge_sdk.tensors import TensorSpec
from tests.compile.graphs import conv_net, model

NET = conv_net().SerializeToString()


def _written(folder: Path, data: bytes) -> Path:
    file = folder / "model.onnx"
    file.write_bytes(data)
    return file


def test_summary_of_a_model(tmp_path: Path) -> None:
    """The summary says what a caller must feed and gets back, and what the graph is made of."""
    summary = inspect_model(_written(tmp_path, NET))

    assert (TensorSpec("image", "float32", ("N", 3, 16, 16)),) == summary.inputs
    assert (TensorSpec("scores", "float32", ("N", 10)),) == summary.outputs
    assert 17 == summary.opset
    assert 5 == summary.operators["Conv"]
    assert summary.batchable
    assert not summary.already_quantized
    assert not summary.control_flow
    assert "opset 17" in str(summary)
    assert summary.to_dict()["parameters"] == summary.parameters == 8268


def test_weights_listed_as_inputs_are_not_inputs(tmp_path: Path) -> None:
    """Files of IR 3 list every weight as an input; a caller does not feed them."""
    old = conv_net()
    old.ir_version = 3
    for tensor in old.graph.initializer:
        old.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))

    assert ["image"] == [spec.name for spec in inspect_model(_written(tmp_path, old.SerializeToString())).inputs]


def test_softmax_is_seen_through_reshapes() -> None:
    """Scores are probabilities if a softmax made them, whatever reshaped them afterwards; otherwise logits."""
    nodes = [
        helper.make_node("Softmax", ["x"], ["s"]),
        helper.make_node("Identity", ["s"], ["i"]),
        helper.make_node("Flatten", ["i"], ["y"]),
    ]

    assert ends_in_softmax(model(nodes, {"x": [1, 10]}, {"y": [1, 10]}))
    assert not ends_in_softmax(conv_net())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"PK\x03\x04" + bytes(100), "ZIP"),
        (b"\x00\x00\x00\x00TFL3" + bytes(50), "TensorFlow Lite"),
        (b"hello, world", "not an ONNX file"),
        (NET[: len(NET) // 2], "cut short"),
        (ModelProto(ir_version=8).SerializeToString(), "no graph"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, data: bytes, words: str) -> None:
    """A file that is not a model gets an error that says what it is, or what is wrong with it."""
    with pytest.raises(ModelError) as caught:
        read_model(_written(tmp_path, data))

    assert words in caught.value.problem


@pytest.mark.timeout(10)
def test_fifos_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    """A FIFO that nobody writes to does not make a build wait; a folder is not a model."""
    os.mkfifo(tmp_path / "fifo.onnx")

    for path in (tmp_path / "fifo.onnx", tmp_path, tmp_path / "absent.onnx"):
        with pytest.raises(ModelError):
            read_model(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=12))
def test_flipped_bits_give_a_model_or_a_model_error(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    """No damage to a file reaches the caller as anything but a ModelError."""
    data = bytearray(model_of_few_weights())
    for position, value in flips:
        data[position % len(data)] = value
    with contextlib.suppress(ModelError):
        read_model(_written(tmp_path, bytes(data)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_any_bytes_give_a_model_or_a_model_error(tmp_path: Path, data: bytes) -> None:
    """The same for bytes that were never a model."""
    with contextlib.suppress(ModelError):
        read_model(_written(tmp_path, data))


def model_of_few_weights() -> bytes:
    """Mostly structure, so that most flips hit it."""
    nodes = [helper.make_node("Gemm", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    weights = {"w": np.ones((4, 4), np.float32)}
    data: bytes = model(nodes, {"x": ["N", 4]}, {"y": ["N", 4]}, weights).SerializeToString()
    return data


def test_shapes_must_be_filled(tmp_path: Path) -> None:
    """A tensor that claims more than it brings is refused before anybody allocates what it claims."""
    liar = conv_net()
    liar.graph.initializer[0].dims[:] = [2**40, 2**40]

    with pytest.raises(ModelError) as caught:
        read_model(_written(tmp_path, liar.SerializeToString()))

    assert "claims" in caught.value.problem


def test_sequences_are_refused_with_advice(tmp_path: Path) -> None:
    """Outputs that are no tensors (scikit-learn's ZipMap) are refused, and the error says what to do."""
    nodes = [helper.make_node("SequenceConstruct", ["x"], ["y"])]
    made = model(nodes, {"x": [1]}, {"y": [1]})
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    made.graph.output[0].CopyFrom(helper.make_value_info("y", helper.make_sequence_type_proto(kind)))

    with pytest.raises(ModelError) as caught:
        read_model(_written(tmp_path, made.SerializeToString()))

    assert "sequence" in caught.value.problem
    assert "zipmap" in caught.value.fix


# Weights in other files


def _with_external_weight(location: str, **entries: int | str) -> bytes:
    made = ModelProto.FromString(model_of_few_weights())
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    data: bytes = made.SerializeToString()
    return data


WEIGHT = np.arange(16, dtype=np.float32)


def test_weights_beside_the_model_are_read(tmp_path: Path) -> None:
    """A plain file in the model's folder is read from where the entry says, and is inside the model afterwards."""
    (tmp_path / "weights.bin").write_bytes(bytes(8) + WEIGHT.tobytes())
    made = read_model(_written(tmp_path, _with_external_weight("weights.bin", offset=8, length=64)))

    assert WEIGHT.tobytes() == made.graph.initializer[0].raw_data
    assert not made.graph.initializer[0].external_data


def _hidden(graph: GraphProto) -> ModelProto:
    """A model whose weight lies outside it and deep inside: in a branch, in an If, in a model-local function."""
    chosen = helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=graph)
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("mine", "Choose", ["c"], ["y"], [chosen], opsets)
    value = helper.make_tensor_value_info
    main = helper.make_graph(
        [helper.make_node("Choose", ["c"], ["y"], domain="mine")],
        "test",
        [value("c", TensorProto.BOOL, [])],
        [value("y", TensorProto.FLOAT, [4])],
    )
    made = helper.make_model(main, functions=[function], opset_imports=[*opsets, helper.make_opsetid("mine", 1)])
    made.ir_version = 8
    return made


def _external() -> TensorProto:
    tensor = TensorProto(name="w", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.bin")
    return tensor


def _branch(weight: TensorProto) -> GraphProto:
    output = helper.make_tensor_value_info("b", TensorProto.FLOAT, [4])
    return helper.make_graph([helper.make_node("Identity", ["w"], ["b"])], "branch", [], [output], [weight])


def test_weights_inside_functions_are_read_from_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However deep they are nested, and never from the current directory."""
    (tmp_path / "model").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights.bin").write_bytes(np.full(4, 666, np.float32).tobytes())
    monkeypatch.chdir(elsewhere)
    file = _written(tmp_path / "model", _hidden(_branch(_external())).SerializeToString())
    with pytest.raises(ModelError):
        read_model(file)
    wanted = np.arange(4, dtype=np.float32).tobytes()
    (tmp_path / "model" / "weights.bin").write_bytes(wanted)

    for attribute in read_model(file).functions[0].node[0].attribute:
        assert wanted == attribute.g.initializer[0].raw_data


def test_weights_where_none_belong_are_refused(tmp_path: Path) -> None:
    """A tensor outside the model, in a place that no reader is meant to look at, is not left there."""
    made = conv_net()
    made.graph.node[0].attribute.add(name="hidden", type=AttributeProto.INT, i=1).t.CopyFrom(_external())
    np.zeros(4, np.float32).tofile(tmp_path / "weights.bin")

    with pytest.raises(ModelError) as caught:
        read_model(_written(tmp_path, made.SerializeToString()))

    assert "'w'" in caught.value.problem


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/hostname", "sub/weights.bin", "..", ".", "", "weights.bin\0"]
)
def test_weights_elsewhere_are_refused(tmp_path: Path, location: str) -> None:
    """No path leads out of the model's folder, nor into another one."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for file in (tmp_path / "secret.bin", folder / "sub" / "weights.bin"):
        file.write_bytes(WEIGHT.tobytes())

    with pytest.raises(ModelError) as caught:
        read_model(_written(folder, _with_external_weight(location)))

    assert "plain file" in caught.value.problem


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("kind", "words"), [("symlink", "symbolic link"), ("hardlink", "hard link"), ("fifo", "regular"), ("folder", "")]
)
def test_weights_that_are_no_plain_file_are_refused(tmp_path: Path, kind: str, words: str) -> None:
    """Links may lead to another's file, and a FIFO never ends; none of them is opened for its content."""
    secret, planted = tmp_path / "secret.bin", tmp_path / "model" / "weights.bin"
    secret.write_bytes(WEIGHT.tobytes())
    planted.parent.mkdir()
    match kind:
        case "symlink":
            planted.symlink_to(secret)
        case "hardlink":
            planted.hardlink_to(secret)
        case "fifo":
            os.mkfifo(planted)
        case _:
            planted.mkdir()

    with pytest.raises(ModelError) as caught:
        read_model(_written(planted.parent, _with_external_weight("weights.bin")))

    assert words in caught.value.problem


@pytest.mark.parametrize(
    "entries",
    [{"offset": 8}, {"offset": -64}, {"length": 60}, {"length": 2**60}, {"offset": "x"}, {"offset": 2**70}],
)
def test_weights_must_lie_inside_their_file(tmp_path: Path, entries: dict[str, int | str]) -> None:
    """Offset and length must point into the file, and be what the shape takes."""
    (tmp_path / "weights.bin").write_bytes(WEIGHT.tobytes())

    with pytest.raises(ModelError):
        read_model(_written(tmp_path, _with_external_weight("weights.bin", **entries)))
