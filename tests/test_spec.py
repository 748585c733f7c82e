"""Engine specs: a good one is anchored to its folder, a bad one says which key and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_sdk import resources
from edge_sdk.errors import SpecError
from edge_sdk.spec import data_source, is_callable_name, load_spec, read_labels, spec_for_model

PICTURES = 'task = "image-classification"\n[preprocess]\n'


def spec_file(folder: Path, text: str) -> Path:
    file = folder / "engine.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("file", sorted(resources.EXAMPLES.glob("*/engine.toml")), ids=lambda file: file.parent.name)
def test_shipped_specs_load(file: Path) -> None:
    """Every example is a sound spec, by its file and by its folder, and its model is there."""
    spec = load_spec(file)

    assert spec == load_spec(file.parent)
    assert spec.model.is_file()


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    """A spec can be moved with its folder; a callable is not a path."""
    file = spec_file(
        tmp_path,
        'name = "m"\nmodel = "m.onnx"\n[postprocess]\nlabels = "labels.txt"\n'
        '[calibration]\ndata = "photos"\n[validation]\ndata = "my.data:samples"\n',
    )
    spec = load_spec(file)

    assert (tmp_path / "m.onnx", tmp_path / "labels.txt") == (spec.model, spec.postprocess.labels)
    assert spec.calibration is not None
    assert spec.validation is not None
    assert (str(tmp_path / "photos"), "my.data:samples") == (spec.calibration.data, spec.validation.data)
    assert "my.data:samples" == data_source("my.data:samples", tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('name = "m"', "`model` is missing"),
        ('name = "a/b"\nmodel = "m.onnx"', "`name`"),
        ('name = ".m"\nmodel = "m.onnx"', "must not begin with a dot"),
        ('name = "m"\nmodel = "m.onnx"\nversion = ".."', "must not begin with a dot"),
        ('name = "m"\nmodel = "m.onnx"\nmax_batch = 4', "`max_batch` is not a known key"),
        ('name = "m"\nmodel = "m.onnx"\n[batching]\nmax_batch = 0', r"`batching.max_batch`.*\(it is 0\)"),
        ('name = "m"\nmodel = "m.onnx"\ntask = "image-classification"', "needs a \\[preprocess\\] table"),
        (f'name = "m"\nmodel = "m.onnx"\n{PICTURES}', "exactly one of `resize` and `resize_short_side`"),
        (f'name = "m"\nmodel = "m.onnx"\n{PICTURES}resize = [8, 8]\nresize_short_side = 8', "exactly one"),
        (f'name = "m"\nmodel = "m.onnx"\n{PICTURES}resize = [8, 0]', "1 to 8192 pixels"),
        (f'name = "m"\nmodel = "m.onnx"\n{PICTURES}resize = [8, 8]\nmean = [1.0, 2.0]', "wants 1 or 3"),
        (f'name = "m"\nmodel = "m.onnx"\n{PICTURES}resize = [8, 8]\ncolor = "L"\nstd = [1.0, 1.0, 1.0]', "1 or 1"),
        (f'name = "m"\nmodel = "m.onnx"\n{PICTURES}resize = [8, 8]\nstd = 0.0', "`preprocess.std`"),
        (f'name = "m"\nmodel = "m.onnx"\n{PICTURES}resize = [8, 8]\nstd = [0.0]', "`std` has a zero"),
        ("name = ", "not valid TOML"),
    ],
)
def test_a_bad_spec_names_the_key(tmp_path: Path, text: str, complaint: str) -> None:
    """SpecError says the file, the key, what is wrong with it and what came."""
    file = spec_file(tmp_path, text)
    with pytest.raises(SpecError, match=complaint) as caught:
        load_spec(file)

    assert str(file) in str(caught.value)


def test_a_spec_that_is_no_text_or_not_there(tmp_path: Path) -> None:
    """Bytes that are not UTF-8, and a folder without engine.toml, are errors for a person."""
    (tmp_path / "engine.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(SpecError, match="not UTF-8"):
        load_spec(tmp_path)
    with pytest.raises(SpecError, match=r"has no engine\.toml"):
        load_spec(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "name"), [("net.onnx", "net"), ("my net (1).onnx", "my-net-1"), (".onnx", "onnx"), ("é.onnx", "model")]
)
def test_a_bare_model_is_a_spec(tmp_path: Path, file: str, name: str) -> None:
    """An ONNX file is named after itself, in characters a topic can carry, and passes tensors through."""
    spec = spec_for_model(tmp_path / file)

    assert (name, "tensors", tmp_path / file) == (spec.name, spec.task, spec.model)


def test_labels_are_lines(tmp_path: Path) -> None:
    """One label a line, in order; blank lines at the end do not count, and a missing file is a SpecError."""
    file = tmp_path / "labels.txt"
    file.write_text("golden retriever\nCrème brûlée\n\n", encoding="utf-8")

    assert ("golden retriever", "Crème brûlée") == read_labels(file)
    with pytest.raises(SpecError, match="cannot be read"):
        read_labels(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("text", "expected"), [("a:b", True), ("a.b:c", True), ("C:/x", False), ("a/b.py", False), ("a:b:c", False)]
)
def test_callables_are_told_from_paths(text: str, expected: bool) -> None:
    """`module:function` and nothing else."""

    assert expected is is_callable_name(text)
