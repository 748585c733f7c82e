"""Calibration and validation samples: where they come from, which are taken, and what label each has.

A source is a folder of images, a `.npz` or `.npy` file, or a Python callable `module:function`. Samples are streamed:
whatever the size of the source, one is in memory at a time. Order is fixed (by name, or as stored), a choice of N is
spread evenly over the whole, and a digest over the content says later which data it was. Data is never made up.

    samples = open_samples("calibration/", reader)
    for sample in samples.spread(128):
        engine.infer(sample.feeds)
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import re
import sys
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np

from edge_sdk.errors import DataError, EdgeSdkError, RequestError
from edge_sdk.spec import is_callable_name
from edge_sdk.tensors import Array, Feeds, TensorSpec, check_array, dtype_name

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
LABELS_CSV = "labels.csv"


@dataclass(frozen=True)
class Sample:
    """What a model is asked once: feeds whose first axis is 1 (or what the model fixes), and the right class."""

    name: str
    feeds: Feeds
    label: int | None = None


@dataclass(frozen=True)
class Reader:
    """What a source must know of the model to read samples for it."""

    inputs: tuple[TensorSpec, ...]
    decode_image: Callable[[bytes], Feeds] | None = None
    """From the bytes of an image file to feeds; None where the spec does not say how ([preprocess])."""
    labels: tuple[str, ...] = ()
    """The model's classes, to understand folders named after them."""
    folder: Path = Path()
    """Where Python callables are imported from: the spec's folder."""


class Samples(ABC):
    """A sequence of samples that can be walked any number of times, always in the same order.

    `indices` are those of the source's samples that are taken.
    """

    def __init__(self, source: str, reader: Reader, indices: Sequence[int]) -> None:
        self.source = source
        self._reader = reader
        self._indices = tuple(indices)
        self._labels_count = True

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Sample]:
        for name, content, label in self._contents(self._indices):
            yield Sample(name, self._feeds(name, content), label if self._labels_count else None)

    @property
    def is_labelled(self) -> bool:
        """Whether every sample has a label: they all do or none does, which `open_samples` sees to."""
        return self._labels_count and self._has_labels()

    def without_labels(self) -> Samples:
        """The same samples, whatever looks like a label ignored: calibration data needs none, and its file names may
        be numbers that mean something else."""
        other = self._taking(self._indices)
        other._labels_count = False
        return other

    def _has_labels(self) -> bool:
        return False

    def spread(self, count: int) -> Samples:
        """At most `count` of these, evenly spaced."""
        if count >= len(self):
            return self
        return self._taking([self._indices[i * len(self) // count] for i in range(count)])

    def without(self, others: Samples) -> Samples:
        """These but for those of `others`, which must be of the same source."""
        taken = set(others._indices)
        return self._taking([index for index in self._indices if index not in taken])

    def digest(self) -> str:
        """sha256 over the content, names and labels of the samples, in order."""
        digest = hashlib.sha256()
        for name, content, label in self._contents(self._indices):
            digest.update(f"{name}\0{label}\0".encode())
            for part in [content] if isinstance(content, bytes) else _array_parts(content):
                digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()

    def _taking(self, indices: Sequence[int]) -> Samples:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._indices = tuple(indices)
        return other

    def _feeds(self, name: str, content: bytes | Feeds) -> Feeds:
        if not isinstance(content, bytes):
            return _fitted(content, self._reader.inputs, name)
        if self._reader.decode_image is None:
            raise DataError(
                f"{self.source} holds images, but nothing says how an image becomes the model's input.",
                fix="Write an engine.toml with a [preprocess] table, or give the data as .npz.",
            )
        try:
            decoded = self._reader.decode_image(content)
        except RequestError as exc:  # tasks speak to the sender of a request; here that is whoever chose the data
            raise DataError(f"The image {name} cannot be used: {exc.problem}", fix="Replace or remove it.") from exc
        return _fitted(decoded, self._reader.inputs, name)

    @abstractmethod
    def _contents(self, indices: Sequence[int]) -> Iterator[tuple[str, bytes | Feeds, int | None]]:
        """Name, content (the bytes of an image, or arrays) and label of the samples at ascending `indices`."""


def open_samples(source: str, reader: Reader, *, limit: int | None = None) -> Samples:
    """The samples of `source`: a folder of images, a .npz or .npy file, or `module:function`.

    `limit` is how many are taken from a callable, which may never end. Raises DataError where there is nothing to use.
    """
    if is_callable_name(source):
        return _CallableSamples(source, reader, limit)
    path = Path(source)
    if path.is_dir():
        return _ImageFolder(path, reader)
    if not path.exists():
        raise DataError(f"There is no data at {path}.", fix="Give a folder of images, a .npz or a .npy file.")
    if path.suffix in {".npz", ".npy"}:
        return _ArrayFile(path, reader)
    raise DataError(
        f"{path} is not data that can be read.",
        fix="Give a folder of images (.jpg, .jpeg, .png), a .npz or .npy file, or a callable module:function.",
    )


# Images


class _ImageFolder(Samples):
    def __init__(self, folder: Path, reader: Reader) -> None:
        files = sorted(file for file in folder.rglob("*") if _is_image(file, folder))
        if not files:
            raise DataError(f"There are no images in {folder}.", fix="It is searched for .jpg, .jpeg and .png files.")
        super().__init__(str(folder), reader, range(len(files)))
        self._folder = folder
        self._files = files
        self._labels = _image_labels(folder, files, reader.labels)

    def _has_labels(self) -> bool:
        return self._labels is not None

    def _contents(self, indices: Sequence[int]) -> Iterator[tuple[str, bytes | Feeds, int | None]]:
        for index in indices:
            file = self._files[index]
            try:
                data = file.read_bytes()
            except OSError as exc:
                raise DataError(f"The image {file} cannot be read: {exc.strerror or exc}.") from exc
            yield file.relative_to(self._folder).as_posix(), data, self._labels[index] if self._labels else None


def _is_image(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in IMAGE_SUFFIXES and not hidden and file.is_file()


def _image_labels(folder: Path, files: Sequence[Path], classes: tuple[str, ...]) -> list[int] | None:
    """The label of each file: from labels.csv, else from subfolders, else from the number a file's name begins with.

    None if no file has one; DataError if only some have, because a figure over some of the data misleads.
    """
    if (folder / LABELS_CSV).is_file():
        table = _read_labels_csv(folder / LABELS_CSV, classes)
        found = [table.get(file.relative_to(folder).as_posix(), table.get(file.name)) for file in files]
    elif all(file.parent != folder for file in files):
        found = [_class_index(file.relative_to(folder).parts[0], classes) for file in files]
    else:
        numbers = [re.match(r"\d+", file.stem) for file in files]
        found = [int(number.group()) if number else None for number in numbers]
    if all(label is None for label in found):
        return None
    for file, label in zip(files, found):
        if label is None:
            raise DataError(
                f"{file.relative_to(folder)} in {folder} has no label, but other images there have one.",
                fix="Label all of them (subfolders, a number before the name, or labels.csv), or none.",
            )
    return [label for label in found if label is not None]


def _read_labels_csv(file: Path, classes: tuple[str, ...]) -> dict[str, int]:
    table: dict[str, int] = {}
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            for row in csv.reader(stream):
                if len(row) < 2 or (not table and row[0].strip() == "file"):
                    continue
                label = _class_index(row[1].strip(), classes)
                if label is None:
                    raise DataError(
                        f"{file} gives {row[0]} the label {row[1]!r}, which is neither a number nor a known label."
                    )
                table[row[0].strip()] = label
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"{file} cannot be read: {exc}.", fix="It holds lines of: file,label.") from exc
    return table


def _class_index(text: str, classes: tuple[str, ...]) -> int | None:
    """A class by its label, or by its number. The label comes first: a digit's label is a number too."""
    if text in classes:
        return classes.index(text)
    return int(text) if re.fullmatch(r"\d{1,9}", text) else None


# Arrays


class _ArrayFile(Samples):
    """A .npy file, or a .npz with one array for each input (or `x`), and labels in `y`. The first axis is samples.

    Rows are read one after the other from the open file, so that an archive larger than memory is no trouble.
    """

    def __init__(self, file: Path, reader: Reader) -> None:
        self._file = file
        with self._opened() as members:
            self._labels = _npz_labels(file, members.pop("y", None))
            if set(members) in ({"x"}, {""}):
                self._names = {_only_input(reader, str(file)): next(iter(members))}
            else:
                self._names = {spec.name: spec.name for spec in reader.inputs}
            missing = sorted(set(self._names.values()) - set(members))
            if missing:
                wanted = " and ".join(repr(name) for name in self._names)
                raise DataError(
                    f"{file} holds {', '.join(map(repr, sorted(members))) or 'nothing'}, but no {missing[0]!r}.",
                    fix=f"Save one array for each input ({wanted}), or `x` if there is one input.",
                )
            lengths = {inner: _Rows(members[inner], f"{file}:{inner}").count for inner in self._names.values()}
        if self._labels is not None:
            lengths["y"] = len(self._labels)
        if len(set(lengths.values())) != 1:
            raise DataError(f"The arrays in {file} differ in length: {lengths}.", fix="The first axis is samples.")
        super().__init__(str(file), reader, range(next(iter(lengths.values()))))
        if not len(self):
            raise DataError(f"{file} holds no samples: its arrays are empty.")

    def _has_labels(self) -> bool:
        return self._labels is not None

    def _contents(self, indices: Sequence[int]) -> Iterator[tuple[str, bytes | Feeds, int | None]]:
        with self._opened() as members:
            rows = {name: _Rows(members[inner], f"{self._file}:{inner}") for name, inner in self._names.items()}
            for index in indices:
                label = int(self._labels[index]) if self._labels is not None else None
                yield f"{self._file.name}[{index}]", {name: r.at(index) for name, r in rows.items()}, label

    @contextmanager
    def _opened(self) -> Iterator[dict[str, IO[bytes]]]:
        """The streams of the arrays, by name; a .npy file is one array without a name."""
        try:
            if self._file.suffix == ".npy":
                with self._file.open("rb") as stream:
                    yield {"": stream}
            else:
                with ExitStack() as stack:
                    archive = stack.enter_context(zipfile.ZipFile(self._file))
                    names = archive.namelist()
                    yield {name.removesuffix(".npy"): stack.enter_context(_member(archive, name)) for name in names}
        except (OSError, zipfile.BadZipFile, EOFError, zlib.error) as exc:
            raise DataError(f"{self._file} cannot be read: {exc}.", fix="Save it again with numpy.savez.") from exc


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    try:
        return archive.open(name)
    except RuntimeError as exc:  # encrypted; as NotImplementedError also compressed in a way that Python does not know
        raise DataError(
            f"{archive.filename}:{name} cannot be read: it is encrypted, or compressed in a way that is unknown here.",
            fix="Save it again with numpy.savez.",
        ) from exc


class _Rows:
    """The rows of one array in numpy's file format, read in ascending order without loading the array."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream = stream
        self._name = name
        try:
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, self._dtype = header(stream)
        except ValueError as exc:
            raise DataError(f"{name} is not a numpy array: {exc}.", fix="Save it with numpy.save or savez.") from exc
        if self._dtype.hasobject:
            raise DataError(f"{name} holds Python objects, which are never unpickled.", fix="Save plain numbers.")
        if not shape or (fortran and len(shape) > 1):
            raise DataError(f"{name} cannot be read row by row.", fix="Save it with numpy.ascontiguousarray.")
        self.count, *row = shape
        self._shape = tuple(row)
        self._row_bytes = int(np.prod(row, dtype=np.int64)) * self._dtype.itemsize
        self._next = 0

    def at(self, index: int) -> Array:
        self._stream.seek((index - self._next) * self._row_bytes, 1)
        raw = self._stream.read(self._row_bytes)
        self._next = index + 1
        if len(raw) != self._row_bytes:
            raise DataError(f"{self._name} ends before its sample {index}.", fix="It was cut short; save it again.")
        return np.frombuffer(raw, self._dtype).reshape(self._shape)


def _npz_labels(file: Path, stream: IO[bytes] | None) -> Array | None:
    if stream is None:
        return None
    try:
        labels: Array = np.lib.format.read_array(stream, allow_pickle=False)
    except ValueError as exc:
        raise DataError(f"{file}:y is not a plain numpy array: {exc}.") from exc
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"{file}:y is {labels.dtype}{list(labels.shape)}; labels are whole numbers along one axis.")
    return labels


# Callables


class _CallableSamples(Samples):
    """What `module:function` yields: dicts of arrays by input name, or single arrays for a model with one input.

    It is called afresh for every walk, so it should yield the same samples each time. Since it may never end, its
    first samples are taken, not a spread.
    """

    def __init__(self, source: str, reader: Reader, limit: int | None) -> None:
        super().__init__(source, reader, ())
        self._function = _imported(source, reader.folder)
        count = sum(1 for _ in islice(self._yielded(), limit))
        if not count:
            raise DataError(f"{source} yielded no samples.")
        self._indices = tuple(range(count))

    def _contents(self, indices: Sequence[int]) -> Iterator[tuple[str, bytes | Feeds, int | None]]:
        wanted = set(indices)
        for index, feeds in enumerate(islice(self._yielded(), max(indices, default=-1) + 1)):
            if index in wanted:
                yield f"{self.source}[{index}]", feeds, None

    def _yielded(self) -> Iterator[Feeds]:
        try:
            for item in self._function():
                if isinstance(item, Mapping):
                    yield {str(name): np.asarray(array) for name, array in item.items()}
                else:
                    yield {_only_input(self._reader, self.source): np.asarray(item)}
        except EdgeSdkError:
            raise
        except Exception as exc:  # the user's own code
            raise DataError(f"{self.source} failed: {type(exc).__name__}: {exc}.") from exc


def _imported(source: str, folder: Path) -> Callable[[], Any]:
    module_name, _, function_name = source.partition(":")
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()  # the file may be younger than Python's listing of the folder
        function = getattr(_module(module_name, folder.resolve()), function_name)
    except Exception as exc:  # the user's own code
        raise DataError(
            f"{source} cannot be imported from {folder}: {type(exc).__name__}: {exc}.",
            fix="A callable is written module:function; the module lies beside engine.toml.",
        ) from exc
    finally:
        sys.path.remove(str(folder))
        _forget(set(sys.modules) - before, folder.resolve())
    if not callable(function):
        raise DataError(f"{source} is not callable.", fix="It is a function that yields arrays.")
    return function  # type: ignore[no-any-return]  # whatever the user wrote


def _module(name: str, folder: Path) -> ModuleType:
    """The module `name` of `folder`, or one that is installed.

    A module of the folder is imported afresh, as part of a package named after the folder's path: under its own name
    another spec's module, or one of the standard library, might be there already.
    """
    stem = folder.joinpath(*name.split("."))
    if not stem.with_name(f"{stem.name}.py").is_file() and not (stem / "__init__.py").is_file():
        return importlib.import_module(name)
    package = f"_edge_sdk_callables_{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    for known in [known for known in sys.modules if known.partition(".")[0] == package]:
        del sys.modules[known]
    parent = ModuleType(package)
    parent.__path__ = [str(folder)]
    sys.modules[package] = parent
    return importlib.import_module(f"{package}.{name}")


def _forget(names: set[str], folder: Path) -> None:
    """Take those modules that lie in `folder` itself out of Python's list, for the next spec may have others so named.

    Whoever imported one keeps it.
    """
    for name in names:
        top = name.partition(".")[0]
        file = Path(getattr(sys.modules[name], "__file__", None) or "/").resolve()
        if file == folder / f"{top}.py" or file.is_relative_to(folder / top):
            del sys.modules[name]


# Fitting samples to the model


def _only_input(reader: Reader, source: str) -> str:
    if len(reader.inputs) != 1:
        names = ", ".join(repr(spec.name) for spec in reader.inputs)
        raise DataError(f"{source} has one array without an input's name, but the model has the inputs {names}.")
    return reader.inputs[0].name


def _fitted(feeds: Feeds, inputs: tuple[TensorSpec, ...], sample: str) -> Feeds:
    """`feeds` as the model takes them, or DataError naming the sample."""
    if set(feeds) != {spec.name for spec in inputs}:
        wanted = ", ".join(repr(spec.name) for spec in inputs)
        raise DataError(f"{sample} has the arrays {', '.join(map(repr, sorted(feeds)))}; the model takes {wanted}.")
    return {spec.name: _fitted_array(feeds[spec.name], spec, sample) for spec in inputs}


def _fitted_array(array: Array, spec: TensorSpec, sample: str) -> Array:
    """The array, given a first axis if it lacks one, and repeated along it where the model fixes its length."""
    if array.dtype.kind == "f" and spec.dtype.startswith("float"):
        array = array.astype(spec.dtype, copy=False)
    if array.ndim == len(spec.shape) - 1:
        array = array[np.newaxis]
    if array.ndim == len(spec.shape) > 0 and array.shape[0] == 1 and isinstance(spec.shape[0], int):
        array = np.repeat(array, spec.shape[0], axis=0) if spec.shape[0] > 1 else array
    try:
        check_array(array, spec)
    except RequestError as exc:
        raise DataError(
            f"{sample} is {dtype_name(array)}{list(array.shape)}; the model's input is {spec}.",
            fix="Prepare the data as the model takes it, or correct [preprocess].",
        ) from exc
    return np.asarray(array, order="C")  # ascontiguousarray would make a scalar an array of one


def _array_parts(feeds: Feeds) -> Iterator[bytes]:
    for name in sorted(feeds):
        array = feeds[name]
        yield f"{name}{array.dtype}{array.shape}".encode()
        yield np.ascontiguousarray(array).tobytes()
