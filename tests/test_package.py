"""Engine packages: whole or refused, exchanged in one step, and never trusted further than their digests."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_sdk import build_engine, load_engine
from edge_sdk.errors import EngineFailed, PackageError
from edge_sdk.package import (
    GRAPH,
    LABELS,
    MANIFEST,
    BackendRecord,
    EnginePackage,
    _take_place,
    package_folders,
    seal,
    writing,
)  # fmt: skip
from edge_sdk.package import PROFILE as PROFILE_FILE
from edge_sdk.profiles import Machine, load_profile
from tests.packages import ARCHITECTURE, PROFILE, make_package, scaling

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def package(tmp_path: Path) -> EnginePackage:
    return make_package(tmp_path / "double", scaling(), labels=("a", "b"))


def rewrite(package: EnginePackage, change: Change) -> None:
    """Change the manifest behind the package's back."""
    file = package.path / MANIFEST
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def test_a_round_trip(package: EnginePackage) -> None:
    """What is sealed is read: manifest, graph and labels, and the same package has the same digest."""
    again = EnginePackage.open(package.path)
    again.verify()

    assert package == again
    assert scaling().SerializeToString() == again.read(GRAPH)
    assert ("a", "b") == again.labels()
    assert ("double", "1", "double 1 (fp32") == (again.name, again.version, str(again).split(",", maxsplit=1)[0])


def test_a_key_of_a_newer_release_is_ignored(package: EnginePackage) -> None:
    """Minor releases may add to the manifest, at any depth, and older readers go on reading."""
    rewrite(package, lambda data: data.update(novelty={"a": 1}))
    rewrite(package, lambda data: data["batching"].update(novelty=1))

    assert package.manifest == EnginePackage.open(package.path).manifest


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: (path / MANIFEST).unlink(), "not an engine package"),
        (lambda path: (path / MANIFEST).write_bytes(b""), "not JSON"),
        (lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe"), "not JSON"),
        (lambda path: (path / MANIFEST).write_bytes(b"[" * 200_000), "not JSON"),
        (lambda path: (path / MANIFEST).write_bytes(b"[]"), "format None"),
        (lambda path: (path / MANIFEST).write_bytes(b'{"format": 2}'), "format 2"),
        (lambda path: (path / MANIFEST).write_bytes(b'{"format": 1}'), "`name` is missing"),
        (lambda path: (path / GRAPH).unlink(), f"{GRAPH} cannot be read"),
        (lambda path: (path / GRAPH).write_bytes(b"x"), "altered after the build"),
        (lambda path: (path / LABELS).write_bytes(b"b\na\n"), "altered after the build"),
    ],
)
def test_damage_is_found(package: EnginePackage, damage: Callable[[Path], object], complaint: str) -> None:
    """A missing, broken or altered file is a PackageError that names it, and nothing is half-loaded."""
    damage(package.path)
    with pytest.raises(PackageError, match=complaint):
        EnginePackage.open(package.path).verify()


@pytest.mark.parametrize("name", ["../../secret", "/dev/zero", "", "..", "a/b", "a\0b"])
def test_a_manifest_names_no_file_elsewhere(package: EnginePackage, name: str) -> None:
    """A hostile manifest cannot make the device read outside the package."""
    rewrite(package, lambda data: data["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(PackageError, match="lie in its own folder"):
        EnginePackage.open(package.path)


def test_a_file_is_lent_as_it_was_checked(package: EnginePackage) -> None:
    """A library may open it by the path, whatever takes the package's place meanwhile."""
    seen: list[bytes] = []
    expected = (package.path / GRAPH).read_bytes()
    with package.lent(GRAPH, lambda data: seen.append(bytes(data))) as file:
        make_package(package.path, scaling(3.0))

        assert [expected, expected] == [*seen, file.read_bytes()]


def test_a_file_that_is_written_to_while_it_is_lent_is_not_used(package: EnginePackage) -> None:
    """What a library read of it may be neither the one nor the other."""
    with pytest.raises(PackageError, match="was written to"), package.lent(GRAPH, lambda data: None):
        (package.path / GRAPH).write_bytes(b"another")


def test_what_is_wrong_with_a_lent_file_is_said(package: EnginePackage) -> None:
    """The complaint of the check comes through, and an altered or missing file is none that is lent."""

    def complain(data: bytes | memoryview) -> None:
        raise EngineFailed(f"{len(data)} bytes are too many")

    with pytest.raises(EngineFailed, match="too many"), package.lent(GRAPH, complain):
        pass
    (package.path / GRAPH).write_bytes(b"")
    with pytest.raises(PackageError, match="altered"), package.lent(GRAPH, lambda data: None):
        pass
    (package.path / GRAPH).unlink()
    with pytest.raises(PackageError, match="cannot be read"), package.lent(GRAPH, lambda data: None):
        pass


def test_a_file_that_is_not_listed_is_not_read(package: EnginePackage) -> None:
    """Only what the manifest vouches for is part of the package."""
    (package.path / "extra").write_bytes(b"x")
    with pytest.raises(PackageError, match="no file 'extra'"):
        package.read("extra")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda data: data["inputs"][0].update(dtype="complex64"), "complex64"),
        (lambda data: data["outputs"][0].update(dtype="tensor(bfloat16)"), "bfloat16"),
        (lambda data: data["outputs"][0].update(dtype="x" * 100_000), "x{40}'"),
        (lambda data: data["batching"].update(max_batch=1025), "1024"),
        (lambda data: data["batching"].update(best_batch=9), "best_batch"),
    ],
    ids=["complex", "bfloat16", "long", "max_batch", "best_batch"],
)
def test_a_manifest_is_checked_where_it_is_read(package: EnginePackage, change: Change, complaint: str) -> None:
    """What no engine of ours could have is refused at the door, and not in the middle of a daemon."""
    rewrite(package, change)
    with pytest.raises(PackageError, match=complaint) as caught:
        EnginePackage.open(package.path)

    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_nothing_behind(package: EnginePackage, interruption: type[BaseException]) -> None:
    """The old package stays, and no half-written folder beside it."""

    def interrupted() -> None:
        with writing(package.path) as folder:
            (folder / GRAPH).write_bytes(b"half")
            raise interruption

    with pytest.raises(interruption):
        interrupted()

    assert [package.path] == list(package.path.parent.iterdir())
    EnginePackage.open(package.path).verify()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file where a folder should be is a PackageError with the way out."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PackageError, match="--output"), writing(tmp_path / "file" / "package"):
        pass


def test_a_full_disk_is_named(package: EnginePackage) -> None:
    """A file that cannot be written to its end is a PackageError with the way out; the old package stays."""
    program = f"""
import resource
from pathlib import Path
from edge_sdk.errors import EngineFailed, PackageError
from edge_sdk.package import writing

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with writing(Path({str(package.path)!r})) as folder:
        (folder / "graph.onnx").write_bytes(bytes(8192))
except PackageError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert f"The package {package.path} could not be written: File too large." in done.stdout
    assert "Free some space, or give another place with --output." in done.stdout
    assert [package.path] == list(package.path.parent.iterdir())
    EnginePackage.open(package.path).verify()


def test_the_old_package_comes_back(package: EnginePackage) -> None:
    """Where two names cannot be exchanged, and the second of two renames fails, the first is undone."""
    with pytest.raises(OSError, match="No such file"):
        _take_place(package.path.with_name("vanished"), package.path)

    assert [package.path] == list(package.path.parent.iterdir())
    EnginePackage.open(package.path).verify()


def test_replacing_a_package_is_one_step_for_a_reader(tmp_path: Path) -> None:
    """While one thread replaces a package, a reader finds one at every moment, old or new, and never a mixture.

    A reader whose look straddles the exchange holds the old manifest and meets the new files: their digests differ, so
    it is refused, and finds a whole package when it looks again. With the folder held open it does not even see that.
    """
    folder = tmp_path / "double"
    make_package(folder, scaling(0.0), version="0")
    digests: dict[str, str] = {}
    straddled = looks = 0
    writer = threading.Thread(
        target=lambda: [make_package(folder, scaling(float(n)), version=str(n)) for n in range(1, 51)]
    )
    writer.start()
    while writer.is_alive() or looks == 0:
        looks += 1
        seen = EnginePackage.open(folder)  # at any moment there is one, and it is sound
        digests.setdefault(seen.version, seen.digest)
        assert digests[seen.version] == seen.digest
        try:
            graph = seen.read(GRAPH)
        except PackageError:
            straddled += 1
            assert seen.digest != EnginePackage.open(folder).digest
        else:
            assert scaling(float(seen.version)).SerializeToString() == graph
    writer.join()

    assert "50" == EnginePackage.open(folder).version
    assert [folder] == list(tmp_path.iterdir())
    assert straddled < looks


def test_mismatches_are_reasons(package: EnginePackage) -> None:
    """No reason on a machine of its architecture; on another, a sentence that names both."""
    here = dataclasses.replace(Machine.read(), architecture=ARCHITECTURE)
    elsewhere = dataclasses.replace(here, architecture="riscv64")

    assert () == package.mismatches(here)
    assert [True] == [ARCHITECTURE in reason and "riscv64" in reason for reason in package.mismatches(elsewhere)]


@pytest.mark.parametrize(
    ("profile", "precision", "machine", "reason"),
    [
        ("cpu-x86", "int8", ("x86_64", "avx2"), "avx512_vnni or avx_vnni"),
        ("cpu-x86-avx2", "int8", ("x86_64", "sse4_2"), "avx2"),
        ("cpu-x86", "int8", ("x86_64", "avx2", "avx_vnni"), None),
        ("cpu-x86", "fp32", ("x86_64", "avx2"), None),
        ("cpu-x86", "int8", ("x86_64",), None),  # its flags could not be read: nothing is known against it
        ("raspberry-pi-5", "int8", ("aarch64",), None),
        ("raspberry-pi-5", "int8", ("x86_64",), "aarch64"),
        ("datacenter-h100", "int8", ("x86_64", "avx2"), None),
    ],
)
def test_int8_needs_the_instructions_it_was_made_for(
    tmp_path: Path, profile: str, precision: str, machine: tuple[str, ...], reason: str | None
) -> None:
    """Where 8-bit products would saturate, a package does not fit; one that merely runs as well as any other does."""
    reasons = built_for(tmp_path, profile, precision).mismatches(machine_with(*machine))

    assert (reason is None) is (reasons == ())
    assert reason is None or reason in reasons[0]


@pytest.mark.parametrize(
    ("profile", "machine", "notes"),
    [
        ("cpu-x86", ("x86_64", "avx2", "avx_vnni"), []),
        ("cpu-x86", ("x86_64", "avx2"), ["not measured for"]),
        ("raspberry-pi-5", ("aarch64",), ["not measured for"]),
        ("datacenter-h100", ("x86_64", "avx2"), ["not measured for"]),
        ("raspberry-pi-5", ("x86_64",), []),  # there is more to say than a note: it does not fit
    ],
)
def test_notes_are_no_reasons(tmp_path: Path, profile: str, machine: tuple[str, ...], notes: list[str]) -> None:
    """A package for another device works here; that its figures are not this machine's is said apart."""
    found = built_for(tmp_path, profile, "fp32").notes(machine_with(*machine))

    assert len(notes) == len(found)
    assert all(note in text and load_profile(profile).title in text for note, text in zip(notes, found))


def test_a_missing_engine_file_is_a_note(tmp_path: Path) -> None:
    """A package without the engine its profile prefers says so, with the reason its manifest gives."""
    backend = BackendRecord(name="onnxruntime", missing="tensorrt is not installed")
    package = make_package(tmp_path / "double", scaling())
    package = dataclasses.replace(package, manifest=package.manifest.model_copy(update={"backend": backend}))

    assert "tensorrt is not installed" in package.notes(machine_with(ARCHITECTURE, "avx_vnni"))[0]


def test_a_broken_profile_is_no_reason(tmp_path: Path) -> None:
    """Whether a package fits can be asked of any package; that its profile is altered is said when it is loaded."""
    package = built_for(tmp_path, "cpu-x86", "int8")
    (package.path / PROFILE_FILE).write_bytes(b"altered")

    assert () == package.mismatches(machine_with("x86_64"))
    assert () == package.notes(machine_with("x86_64"))
    with pytest.raises(PackageError, match="altered"):
        package.verify()


def built_for(folder: Path, profile: str, precision: str) -> EnginePackage:
    described = load_profile(profile)
    made = make_package(
        folder / "double", scaling(), profile=profile, architecture=described.architecture, precision=precision
    )
    (made.path / PROFILE_FILE).write_text(described.model_dump_json(), encoding="utf-8")
    seal(made.path, made.manifest)
    return EnginePackage.open(made.path)


def machine_with(architecture: str, *flags: str) -> Machine:
    return Machine(architecture, frozenset(flags), 4, 8 << 30, "", ())


@pytest.mark.parametrize("layout", ["", "double", "double/1", "double/build/cpu-x86"])
def test_packages_are_found_where_people_put_them(tmp_path: Path, layout: str) -> None:
    """Itself, `<name>`, `<name>/<version>` and `<name>/build/<profile>`; hidden folders are somebody's half work."""
    folder = tmp_path / "engines"
    make_package(folder / layout, scaling(), name="double")
    make_package(folder / ".hidden" / "double", scaling())
    make_package(folder / "too" / "deep" / "for" / "us", scaling())

    assert [folder / layout] == package_folders(folder)


def test_nothing_is_left_open(package: EnginePackage) -> None:
    """Reading and replacing packages all day uses up no file descriptors."""
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    for _ in range(5):
        make_package(package.path, scaling()).verify()

    assert before == len(list(descriptors.iterdir()))


def test_a_package_carries_its_profile(tmp_path: Path) -> None:
    """A package built for a profile of one's own loads where nobody has that file."""
    mine = load_profile(PROFILE).model_copy(update={"name": "my-device"})
    model = tmp_path / "double.onnx"
    model.write_bytes(scaling().SerializeToString())
    built = build_engine(model, profile=mine, output=tmp_path / "package")

    assert mine == EnginePackage.open(built.path).profile()
    with load_engine(built) as engine:
        assert ["x"] == [spec.name for spec in engine.inputs]
