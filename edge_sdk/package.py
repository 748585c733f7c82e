"""Engine packages: what a build hands to a device, and what a device checks before it trusts one.

A package is a directory:

    manifest.json     what it is: I/O, task, profile, precision, provenance, measurements, a digest of every file
    graph.onnx        the portable graph; INT8 is in it as Q/DQ nodes, so any backend can be given it
    labels.txt        where the task has labels
    profile.json      the device profile it was built for
    golden.npz        a few requests, on which an engine compiled later is compared with the graph
    report.json       the figures; report.md says them to a person
    engine.*          where a backend has one: a cache entry that can be rebuilt from the graph

It is written beside its place and moved there in one step: a reader sees the old one or the new one, never a half.
Every file is checked against its digest when it is read, so an altered package is refused and never half-loaded.
The format is specified in docs/package-format.md.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import mmap
import os
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edge_sdk.errors import PackageError, ProfileError, RequestError, SpecError
from edge_sdk.profiles import (
    DeviceProfile,
    Machine,
    OnnxRuntimeOptions,
    Precision,
    fitting_conditions,
    lacking_cpu_flags,
    load_profile,
)
from edge_sdk.sequence import SequenceRules
from edge_sdk.spec import NAME, Axis, Postprocess, Preprocess, Serving, TaskName, fixed_sizes
from edge_sdk.tensors import Array, Feeds, TensorSpec, check_feeds, element_count
from edge_sdk.toml import describe

FORMAT = 1
GRAPH = "graph.onnx"
MANIFEST = "manifest.json"
LABELS = "labels.txt"
PROFILE = "profile.json"
GOLDEN = "golden.npz"
MAX_GOLDEN_REQUESTS = 16
MAX_GOLDEN_BYTES = 64 << 20
"""Of all golden requests together, unpacked."""


class Record(BaseModel):
    """A part of the manifest: immutable; keys of a newer minor release are kept out of the way, not refused."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class SourceRecord(Record):
    """The ONNX file a package was built from."""

    file: str
    sha256: str
    bytes: int
    opset: int
    ir_version: int
    already_quantized: bool = False


class CalibrationRecord(Record):
    """The data behind the INT8 ranges, so that it can be asked for years later."""

    data: str
    sha256: str
    samples: int
    method: str


class Figures(Record):
    """What one graph measured on the machine that built it. Latency is the median, in milliseconds, at batch 1.

    It is None where the package was built for another kind of device: this machine's speed says nothing there.
    """

    precision: Precision
    bytes: int
    top1_percent: float | None = None
    latency_ms: float | None = None
    per_second_at_batch: Mapping[int, float] = {}


class Measurements(Record):
    """The engine beside FP32, measured interleaved in one run; what it was judged on; what was decided, and why."""

    reference: Figures
    engine: Figures
    samples: int
    judged_on: str
    agreement_percent: float | None = None
    snr_db: float | None = None
    decision: str


class BatchingRecord(Record):
    max_batch: int = Field(gt=0, le=1024)
    """As in engine.toml: memory for this many rows is set aside when the package is loaded."""
    best_batch: int = Field(gt=0)
    """The batch with the most inferences a second when it was built."""
    max_wait_ms: float = 0.0
    newest_wins: bool = False
    """As in engine.toml: of each client only the latest request waits."""

    @model_validator(mode="after")
    def _best_is_possible(self) -> BatchingRecord:
        if self.best_batch > self.max_batch:
            raise ValueError(f"best_batch {self.best_batch} is more than max_batch {self.max_batch}")
        return self


class WayRecord(Record):
    """A way in which onnxruntime may run the graph, and what it cost where it was tried, at batch 1."""

    intra_op_threads: int
    spinning: bool
    latency_ms: float = Field(gt=0)
    """The median."""
    cpu_ms: float
    """Processor time of one inference, of all threads, where every few of them are followed by as long a rest."""


class RunningRecord(Record):
    """How onnxruntime runs the graph best, as the build found out; it holds for the same kind of processor alone."""

    intra_op_threads: int = Field(ge=1)
    spinning: bool
    processor: str
    """Where it was measured, as `profiles.processor` says."""
    tried: tuple[WayRecord, ...] = ()


class EngineRecord(Record):
    """A compiled engine that lies in the package, and what it took to build it."""

    file: str
    sidecar: str
    """The file that says what the engine fits."""
    bytes: int
    seconds: float
    peak_bytes: int
    """The most memory the building process held."""
    notes: tuple[str, ...] = ()
    """What a person should know of it: layers that a DLA did not take, say."""
    latency_ms: float | None = None
    """Median at batch 1; None where the machine that built it cannot run it."""
    per_second_at_batch: Mapping[int, float] = {}


class BackendRecord(Record):
    name: str
    """The backend the profile prefers. Where it has no engine to load, the profile's next one runs the graph."""
    engine: EngineRecord | None = None
    missing: str | None = None
    """Why there is no engine although this backend has them: it was not to be had where the package was built."""


class FileRecord(Record):
    sha256: str
    bytes: int


class Manifest(Record):
    """manifest.json, format 1."""

    format: Literal[1] = 1
    name: str = Field(pattern=NAME)
    version: str = Field(pattern=NAME)
    task: TaskName
    preprocess: Preprocess | None = None
    postprocess: Postprocess = Postprocess()
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: str = Field(pattern=r"^[a-z0-9-]{1,64}$")
    architecture: str
    precision: Precision
    batching: BatchingRecord
    serving: Serving = Serving()
    """As in engine.toml."""
    running: RunningRecord | None = None
    """None where it was not measured: then, as on any other processor, the profile's options count."""
    axes: Mapping[str, Axis] = {}
    """Free axes beside the batch, and the sizes a compiled engine takes along them."""
    sequence: SequenceRules | None = None
    """Of a stateful model: what the device keeps between the requests of a sequence."""
    backend: BackendRecord
    source: SourceRecord
    calibration: CalibrationRecord | None = None
    tools: Mapping[str, str]
    measurements: Measurements | None = None
    build_key: str
    """Digest of everything the build depended on; the same key means the same package."""
    created: str
    files: Mapping[str, FileRecord] = {}

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: Mapping[str, FileRecord]) -> Mapping[str, FileRecord]:
        for name in files:
            if not name or name in (".", "..") or "/" in name or "\0" in name:
                raise ValueError("a package's files lie in its own folder")
        return files

    @model_validator(mode="after")
    def _sequence_fits(self) -> Manifest:
        if self.sequence is not None:
            try:
                self.sequence.check(self.inputs, self.outputs, self.sizes)
            except SpecError as exc:
                raise ValueError(exc.problem) from exc
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """The free axes that have a single size."""
        return fixed_sizes(self.axes)

    @property
    def asked(self) -> tuple[TensorSpec, ...]:
        """What one request brings: the inputs, but for what the device keeps of a sequence."""
        return self.inputs if self.sequence is None else self.sequence.asked(self.inputs, self.sizes)

    @property
    def answered(self) -> tuple[TensorSpec, ...]:
        """What one request gets."""
        return self.outputs if self.sequence is None else self.sequence.answered(self.outputs)


@dataclass(frozen=True)
class EnginePackage:
    """A package on disk whose manifest has been read and is well-formed. Files are checked as they are read."""

    path: Path
    manifest: Manifest
    digest: str
    """One digest for the whole package: the manifest's, which holds every file's."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> EnginePackage:
        """The package in the directory `path`; PackageError if there is none, or its manifest is not sound."""
        folder = Path(path)
        try:
            raw = (folder / MANIFEST).read_bytes()
        except OSError as exc:
            raise PackageError(
                f"{folder} is not an engine package: it has no readable {MANIFEST}.",
                fix="`edge-sdk build-engine` makes one and prints where it is.",
            ) from exc
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError) as exc:
            raise PackageError(f"{folder / MANIFEST} is not JSON: {exc}.", fix="Build the package again.") from exc
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise PackageError(
                f"{folder} has package format {found!r}; this edge-sdk reads format {FORMAT}.",
                fix="Build it again with this edge-sdk.",
            )
        try:
            return cls(folder, Manifest.model_validate(data), hashlib.sha256(raw).hexdigest())
        except ValidationError as exc:
            raise PackageError(f"{folder / MANIFEST}: {describe(exc)}.", fix="Build the package again.") from exc

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version

    def read(self, name: str) -> bytes:
        """The bytes of a file of the package, checked against its digest."""
        with self._opened(name) as file:
            data = file.read()
        self._compare(name, data)
        return data

    @contextmanager
    def lent(self, name: str, check: Callable[[bytes | memoryview], None]) -> Iterator[Path]:
        """A file of the package for a library that opens it itself: a path that leads to what was checked.

        So it is in memory once, as the library has it. Its bytes are compared with its digest and given to `check`
        first. What is done with the path counts only if the block ends without a PackageError, which says that somebody
        wrote to the file meanwhile. A package that is replaced as a whole does not disturb.
        """
        with self._opened(name) as file:
            before = _state_of(file)
            with _read_aside(file) as data:
                self._compare(name, data)
                check(data)
            place = Path(f"/proc/self/fd/{file.fileno()}")
            try:
                yield place if place.exists() else self.path / name
            finally:
                if _state_of(file) != before:
                    raise PackageError(
                        f"{self.path / name} was written to while it was being loaded.",
                        fix="Replace packages as a whole, as `edge-sdk build-engine` does, and load it again.",
                    )

    @contextmanager
    def _opened(self, name: str) -> Iterator[io.BufferedReader]:
        if name not in self.manifest.files:
            raise PackageError(f"The package {self.path} has no file {name!r}.", fix="Build the package again.")
        try:
            with (self.path / name).open("rb") as file:
                yield file
        except OSError as exc:
            raise PackageError(
                f"{self.path / name} cannot be read: {exc.strerror or exc}.", fix="Build the package again."
            ) from exc

    def _compare(self, name: str, data: bytes | memoryview) -> None:
        record = self.manifest.files[name]
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise PackageError(
                f"{self.path / name} was altered after the build: {len(data):,} bytes whose digest is not the "
                f"manifest's ({record.bytes:,} bytes, sha256 {record.sha256[:12]}...).",
                fix="Build the package again, or copy it again from where it came.",
            )

    def verify(self) -> None:
        """Check every file against its digest; PackageError names the first that differs."""
        for name in self.manifest.files:
            self.read(name)

    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the model's classes; empty where the package has none."""
        if LABELS not in self.manifest.files:
            return ()
        return tuple(self.read(LABELS).decode("utf-8").splitlines())

    def golden(self) -> list[Feeds]:
        """The requests on which an engine is compared with the graph; none where the package holds none.

        PackageError unless they are plain numbers, of a bounded size, and fit the manifest's inputs.
        """
        if GOLDEN not in self.manifest.files:
            return []
        try:
            requests = _unpacked_requests(self.read(GOLDEN))
            for feeds in requests:
                check_feeds(feeds, self.manifest.inputs)
        except PackageError:
            raise
        except RequestError as exc:
            raise self._bad_golden(exc.problem) from exc
        except Exception as exc:  # zipfile and numpy's header parser let through what their own parsers raise
            raise self._bad_golden(str(exc) or type(exc).__name__) from exc
        return requests

    def _bad_golden(self, why: str) -> PackageError:
        return PackageError(
            f"{self.path / GOLDEN} does not hold requests for the model: {why[:300].rstrip('.')}.",
            fix="Build the package again.",
        )

    def profile(self) -> DeviceProfile:
        """The device profile it was built for, with the options for TensorRT that were measured to be fastest.

        A package carries it, so that it means the same wherever it is taken.
        """
        if PROFILE not in self.manifest.files:
            return load_profile(self.manifest.profile)
        try:
            return DeviceProfile.model_validate_json(self.read(PROFILE))
        except ValidationError as exc:
            raise PackageError(
                f"{self.path / PROFILE}: {describe(exc)}.", fix="Build the package again with this edge-sdk."
            ) from exc

    def onnxruntime_options(self, profile: DeviceProfile, here: str) -> OnnxRuntimeOptions:
        """How onnxruntime is to run the graph on the processor `here`: as measured, if that was on such a one."""
        running = self.manifest.running
        if running is None or running.processor != here:
            return profile.onnxruntime
        measured = {"intra_op_threads": running.intra_op_threads, "spinning": running.spinning}
        return profile.onnxruntime.model_copy(update=measured)

    def mismatches(self, machine: Machine) -> tuple[str, ...]:
        """Every reason why the package cannot be used on `machine`; empty if it can. Backends are not asked here.

        Another architecture is one. Missing CPU flags are one for INT8: a scheme for VNNI saturates without it, and
        gives other results than were judged. Neither needs the GPU's driver.
        """
        if self.manifest.architecture != machine.architecture:
            return (
                f"it was built for {self.manifest.architecture} (profile {self.manifest.profile}), "
                f"this machine is {machine.architecture}",
            )
        flags_matter = self.manifest.precision == "int8" and machine.cpu_flags  # none: they could not be read
        profile = self._profile_if_sound() if flags_matter else None
        if profile is not None and (lacking := lacking_cpu_flags(machine, profile)):
            return (
                f"its INT8 was made for {profile.title}, this machine's CPU has no {lacking}, "
                "and could compute other results",
            )
        return ()

    def notes(self, machine: Machine) -> tuple[str, ...]:
        """What to know of a package that can be used on `machine`; empty if there is nothing, or it cannot be used."""
        if self.mismatches(machine):
            return ()
        notes = []
        profile = self._profile_if_sound()
        if profile is not None and fitting_conditions(machine, profile) is None:
            notes.append(f"it was built for {profile.title}: it works here, but was not measured for this machine")
        if self.manifest.backend.missing:
            notes.append(self.manifest.backend.missing)
        return tuple(notes)

    def _profile_if_sound(self) -> DeviceProfile | None:
        """The profile, or None where it is altered or unknown: which is said when the package is loaded."""
        try:
            return self.profile()
        except (PackageError, ProfileError):
            return None

    def __str__(self) -> str:
        m = self.manifest
        return f"{m.name} {m.version} ({m.precision}, profile {m.profile})"


def package_folders(folder: Path) -> list[Path]:
    """Every package directory in `folder`: itself, `<name>`, `<name>/<version>` and `<name>/build/<profile>`."""
    patterns = (MANIFEST, f"*/{MANIFEST}", f"*/*/{MANIFEST}", f"*/build/*/{MANIFEST}")
    return sorted({file.parent for pattern in patterns for file in folder.glob(pattern) if _visible(file, folder)})


def _visible(file: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A fresh directory to fill, which takes the place of `target` when the block ends well and vanishes otherwise.

    Raises PackageError if it cannot be written, to its end and in its place: what was there before is there still.

    >>> with writing(Path("build/cpu-x86")) as folder:
    ...     (folder / "graph.onnx").write_bytes(graph)
    ...     seal(folder, manifest)
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.parent / f".{target.name}.{secrets.token_hex(4)}"
        staged.mkdir()
    except OSError as exc:
        raise PackageError(
            f"{target.parent} cannot be written: {exc.strerror or exc}.", fix="Give another place with --output."
        ) from exc
    try:
        yield staged
        _sync(staged)
        _take_place(staged, target)
    except OSError as exc:
        raise PackageError(
            f"The package {target} could not be written: {exc.strerror or exc}.",
            fix="Free some space, or give another place with --output.",
        ) from exc
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write `manifest` with the digest of every file that lies in `folder`; gives back what it wrote."""
    files = {
        file.name: FileRecord(sha256=file_sha256(file), bytes=file.stat().st_size)
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST
    }
    sealed = manifest.model_copy(update={"files": files})
    (folder / MANIFEST).write_text(
        json.dumps(sealed.model_dump(mode="json", exclude_none=True), indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    return sealed


def packed_requests(requests: Sequence[Feeds]) -> bytes:
    """The bytes of a golden.npz: one array for each input of each request, named `<number of the request>/<input>`."""
    packed = io.BytesIO()
    arrays: dict[str, Any] = {
        f"{index}/{name}": array for index, feeds in enumerate(requests) for name, array in feeds.items()
    }
    np.savez_compressed(packed, **arrays)
    return packed.getvalue()


def _unpacked_requests(data: bytes) -> list[Feeds]:
    """What `packed_requests` packed. ValueError where it is something else, and whatever zipfile and numpy raise."""
    requests: list[Feeds] = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > MAX_GOLDEN_BYTES:
            raise ValueError(f"its requests have more than {MAX_GOLDEN_BYTES:,} bytes")
        for member in members:
            number, _, name = member.filename.removesuffix(".npy").partition("/")
            if number == str(len(requests)) and len(requests) < MAX_GOLDEN_REQUESTS:
                requests.append({})
            if not requests or number != str(len(requests) - 1):
                raise ValueError(f"{member.filename[:80]!r} is not of the next request, or of too many")
            requests[-1][name] = _array(archive.read(member))
    return requests


def _array(data: bytes) -> Array:
    """The array of plain numbers that `data` holds in numpy's format; nothing is allocated on its header's word."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.kind not in "biuf" or (fortran and len(shape) > 1):
        raise ValueError(f"an array of {str(dtype)[:40]} is not one of plain numbers in C order")
    count = element_count(shape)
    if len(data) - stream.tell() != count * dtype.itemsize:
        raise ValueError("an array's header promises another size than it has")
    return np.frombuffer(data, dtype, count, stream.tell()).reshape(shape)


@contextmanager
def _read_aside(file: io.BufferedReader) -> Iterator[memoryview]:
    """The bytes of a file, in memory that goes back to the system at once: the heap would keep a hole of their size."""
    size = os.fstat(file.fileno()).st_size
    with (
        mmap.mmap(-1, max(1, size)) as room,
        memoryview(room) as whole,
        whole[:size] as place,
        place[: file.readinto(place)] as data,  # fewer if it was cut meanwhile, which its digest will tell
    ):
        yield data


def _state_of(file: io.BufferedReader) -> tuple[int, int]:
    """Changes with each write to the file."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _take_place(staged: Path, target: Path) -> None:
    """Put `staged` where `target` is, in one step where the kernel can exchange two names (Linux 3.15 and later).

    Afterwards `staged` names what was there before, if anything; the caller removes it.
    """
    if not target.exists():
        staged.rename(target)
    elif not _exchange(staged, target):
        aside = staged.with_name(staged.name + ".old")
        target.rename(aside)
        try:
            staged.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync_directory(target.parent)


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; False where the C library or the file system cannot."""
    try:
        renameat2: Any = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
