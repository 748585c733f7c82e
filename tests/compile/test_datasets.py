"""Samples come in a fixed order, one at a time, labelled as the files say; what cannot be used is named."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_sdk.compile.datasets import Reader, open_samples
from edge_sdk.compile.verify import decoder_for
from edge_sdk.errors import DataError
from edge_sdk.spec import Preprocess
from edge_sdk.tensors import TensorSpec
from tests.compile.graphs import pictures

INPUTS = (TensorSpec("image", "float32", ("N", 3, 16, 16)),)
READER = Reader(INPUTS, decoder_for(Preprocess(resize=(16, 16)), INPUTS), labels=("cat", "dog", "owl"))


def _png(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (shade, shade, shade)).save(stream, "PNG")
    return stream.getvalue()


def _images(folder: Path, *names: str) -> Path:
    for shade, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_png(shade))
    return folder


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("0.png", "1_house.png", "0002.png"), [0, 2, 1]),
        (("dog/a.png", "cat/b.png", "owl/sub/c.png"), [0, 1, 2]),
        (("2/a.png", "1/b.png"), [1, 2]),
        (("a.png", "b.png"), [None, None]),
    ],
)
def test_labels_of_images(tmp_path: Path, names: tuple[str, ...], labels: list[int | None]) -> None:
    """From subfolders, by label or number; else from the number a name begins with; else there are none."""
    samples = open_samples(str(_images(tmp_path, *names)), READER)

    assert labels == [sample.label for sample in samples]
    assert (None not in labels) == samples.is_labelled


def test_labels_csv_comes_first(tmp_path: Path) -> None:
    """labels.csv overrules names, by path or by file name, with labels or numbers."""
    folder = _images(tmp_path, "7.png", "sub/8.png")
    (folder / "labels.csv").write_text("file,label\n7.png,owl\nsub/8.png,1\n")

    assert [2, 1] == [sample.label for sample in open_samples(str(folder), READER)]


def test_partly_labelled_images_are_refused(tmp_path: Path) -> None:
    """A figure over some of the data would mislead."""
    with pytest.raises(DataError) as caught:
        open_samples(str(_images(tmp_path, "1.png", "unknown.png")), READER)

    assert "unknown.png" in caught.value.problem


def test_choice_is_even_and_the_rest_is_the_rest(tmp_path: Path) -> None:
    """A spread takes from the whole, in order; what it leaves is everything else."""
    samples = open_samples(str(_images(tmp_path, *(f"{i}.png" for i in range(9)))), READER)
    chosen = samples.spread(3)

    assert ["0.png", "3.png", "6.png"] == [sample.name for sample in chosen]
    assert 6 == len(samples.without(chosen))
    assert 9 == len(samples.spread(100))


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    """Another place is the same data; one other pixel is not, and neither is another label."""
    here, there = _images(tmp_path / "here", "1.png", "2.png"), _images(tmp_path / "there", "1.png", "2.png")
    digest = open_samples(str(here), READER).digest()

    assert digest == open_samples(str(there), READER).digest()
    (there / "2.png").write_bytes(_png(200))
    assert digest != open_samples(str(there), READER).digest()
    (here / "labels.csv").write_text("1.png,2\n2.png,2\n")
    assert digest != open_samples(str(here), READER).digest()


def test_broken_image_is_named(tmp_path: Path) -> None:
    """The error says which of a thousand files it is."""
    folder = _images(tmp_path, "good.png")
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff not a picture")

    with pytest.raises(DataError) as caught:
        list(open_samples(str(folder), READER))

    assert "bad.jpg" in caught.value.problem


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_is_read_row_by_row(tmp_path: Path, compressed: bool) -> None:
    """Arrays by input name or as `x`, labels as `y`, compressed or not; the same rows come back."""
    images = pictures(8)
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "named.npz", image=images)
    save(tmp_path / "x.npz", x=images.astype(np.float64), y=np.arange(8))
    by_name = open_samples(str(tmp_path / "named.npz"), READER)
    by_x = open_samples(str(tmp_path / "x.npz"), READER)

    assert not by_name.is_labelled
    assert list(range(8)) == [sample.label for sample in by_x]
    for row, one, other in zip(images, by_name, by_x):
        np.testing.assert_array_equal(row[np.newaxis], one.feeds["image"])
        np.testing.assert_array_equal(one.feeds["image"], other.feeds["image"])
    np.testing.assert_array_equal(images[[0, 4]], [s.feeds["image"][0] for s in by_name.spread(2)])


def test_encrypted_npz_is_a_data_error(tmp_path: Path) -> None:
    """There is no password to read it with."""
    file = tmp_path / "some.npz"
    np.savez(file, image=pictures(2))
    data = bytearray(file.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + flags] |= 1
    file.write_bytes(data)

    with pytest.raises(DataError) as caught:
        open_samples(str(file), READER)

    assert "encrypted" in caught.value.problem


def test_npy_is_one_array(tmp_path: Path) -> None:
    """A .npy file holds the samples of a model with one input."""
    np.save(tmp_path / "x.npy", pictures(3))

    assert 3 == len(list(open_samples(str(tmp_path / "x.npy"), READER)))


def test_fixed_batch_is_filled(tmp_path: Path) -> None:
    """A model that fixes a batch of four gets each sample four times."""
    np.save(tmp_path / "x.npy", pictures(3))
    inputs = (TensorSpec("image", "float32", (4, 3, 16, 16)),)

    assert (4, 3, 16, 16) == next(iter(open_samples(str(tmp_path / "x.npy"), Reader(inputs)))).feeds["image"].shape


def test_scalars_stay_scalars(tmp_path: Path) -> None:
    """An input without axes is fed an array without axes."""
    np.savez(tmp_path / "two.npz", image=pictures(2), rate=np.array([16000, 8000]))
    reader = Reader((*INPUTS, TensorSpec("rate", "int64", ())))

    assert [(), ()] == [s.feeds["rate"].shape for s in open_samples(str(tmp_path / "two.npz"), reader)]


def test_callable_beside_the_spec(tmp_path: Path) -> None:
    """`module:function` is imported from the spec's folder and called afresh for each walk; it may never end."""
    (tmp_path / "endless_samples.py").write_text(
        "import itertools, numpy\n"
        "def samples():\n"
        "    for i in itertools.count():\n"
        "        yield {'image': numpy.full((3, 16, 16), i, 'float32')}\n"
    )
    samples = open_samples("endless_samples:samples", Reader(INPUTS, folder=tmp_path), limit=5)

    for _ in range(2):
        assert [0, 1, 2, 3, 4] == [int(s.feeds["image"].flat[0]) for s in samples]


def _callable(folder: Path, source: str, files: dict[str, str]) -> float:
    """The first number of the first sample that `source` yields, its code being `files` in `folder`."""
    for name, code in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)
    sample = next(iter(open_samples(source, Reader(INPUTS, folder=folder), limit=1)))
    return float(sample.feeds["image"].flat[0])


_YIELDS = "import numpy as np\ndef samples():\n    yield np.full((3, 16, 16), {}, np.float32)\n"


@pytest.mark.parametrize("module", ["calib", "calendar", "pkg.calib"])
def test_callables_are_those_of_the_spec(tmp_path: Path, module: str) -> None:
    """Neither another spec's module of that name nor the standard library's stands in for the one beside the spec."""
    file = module.replace(".", "/") + ".py"

    assert 1.0 == _callable(tmp_path / "one", f"{module}:samples", {file: _YIELDS.format(1)})
    assert 2.0 == _callable(tmp_path / "two", f"{module}:samples", {file: _YIELDS.format(2)})


@pytest.mark.parametrize("statement", ["from numbers_of_mine import N", "from .numbers_of_mine import N"])
def test_modules_that_a_callable_imports_are_those_of_the_spec(tmp_path: Path, statement: str) -> None:
    """What lies beside it can be imported as usual, and is not mistaken for another spec's either."""
    code = f"{statement}\n" + _YIELDS.format("N")
    for number in (1, 2):
        files = {"calib.py": code, "numbers_of_mine.py": f"N = {number}\n"}

        assert number == _callable(tmp_path / str(number), "calib:samples", files)


def test_installed_callables_are_imported(tmp_path: Path) -> None:
    """Without such a file beside the spec, a module is looked for where Python does."""
    with pytest.raises(DataError) as caught:
        open_samples("math:sqrt", Reader(INPUTS, folder=tmp_path))

    assert "math.sqrt() takes exactly one argument" in caught.value.problem


def test_failing_callable_is_a_data_error(tmp_path: Path) -> None:
    """The user's own code is named, with what it raised."""
    (tmp_path / "failing_samples.py").write_text("def samples():\n    yield 1 / 0\n")

    with pytest.raises(DataError) as caught:
        open_samples("failing_samples:samples", Reader(INPUTS, folder=tmp_path), limit=5)

    assert "ZeroDivisionError" in caught.value.problem


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"image": np.zeros((4, 3, 8, 8), np.float32)}, "the model's input is image"),
        ({"image": np.zeros((4, 3, 16, 16), np.uint8)}, "uint8"),
        ({"other": np.zeros((4, 3, 16, 16), np.float32)}, "no 'image'"),
        ({"x": np.zeros((4, 3, 16, 16), np.float32), "y": np.zeros(3, int)}, "differ in length"),
        ({"x": np.zeros((0, 3, 16, 16), np.float32)}, "no samples"),
        ({"x": np.array([object()])}, "never unpickled"),
        ({"x": np.zeros((4, 3, 16, 16), np.float32), "y": np.zeros(4)}, "whole numbers"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    """The error says what came and what the model takes."""
    np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]  # numpy's stub takes no dict of arrays

    with pytest.raises(DataError) as caught:
        list(open_samples(str(tmp_path / "data.npz"), READER))

    assert words in caught.value.problem


def test_places_without_data(tmp_path: Path) -> None:
    """Nothing there, nothing usable there, an archive cut short: each is said."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "data.csv").write_text("1,2,3")
    for source in ("absent", "empty", "cut.npz", "data.csv"):
        with pytest.raises(DataError):
            open_samples(str(tmp_path / source), READER)


def test_images_need_preprocessing(tmp_path: Path) -> None:
    """Nobody guesses how a photo becomes a tensor."""
    with pytest.raises(DataError) as caught:
        list(open_samples(str(_images(tmp_path, "a.png")), Reader(INPUTS)))

    assert "[preprocess]" in caught.value.fix
