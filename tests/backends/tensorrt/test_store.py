"""The store keeps engines by content, within a limit, for this machine alone; its key is nobody else's."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edge_sdk.backends.tensorrt.sidecar import PLAN, SIDECAR
from edge_sdk.backends.tensorrt.store import KEY, EngineStore, default_folder, entry_name, open_engine
from edge_sdk.errors import BackendUnavailable, EngineFailed

GRAPH = hashlib.sha256(b"graph").hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "cache" / "engines")


def add(store: EngineStore, name: str, size: int = 100, filled: bytes = b"p") -> Path:
    """An engine of `size` bytes of no meaning."""
    with store.adding(name) as folder:
        (folder / PLAN).write_bytes(filled * (size - 10))
        (folder / SIDECAR).write_bytes(b"{}".ljust(10))
    return store.folder / name


def age(entry: Path, seconds: float) -> None:
    """Let an engine have been used so long ago."""
    then = time.time() - seconds
    os.utime(entry, (then, then))


# The key


def test_the_key_is_made_once_and_is_its_owners_alone(store: EngineStore) -> None:
    key = store.key()
    place = store.folder / KEY

    assert (32, key) == (len(key), store.key())
    assert 0o600 == stat.S_IMODE(place.stat().st_mode)
    assert [KEY] == [file.name for file in store.folder.iterdir()]
    assert key != EngineStore(store.folder.with_name("another")).key()


def test_processes_that_need_a_key_at_once_have_the_same(store: EngineStore) -> None:
    """Four threads and four processes, none of which finds a key: each comes away with the one that stayed."""
    program = (
        "import sys, pathlib; from edge_sdk.backends.tensorrt.store import EngineStore;"
        "sys.stdin.readline(); print(EngineStore(pathlib.Path(sys.argv[1])).key().hex())"
    )
    ready = [
        subprocess.Popen(
            [sys.executable, "-c", program, store.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in ready:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    with ThreadPoolExecutor(4) as threads:
        keys = {key.hex() for key in threads.map(lambda _: store.key(), range(4))}
    keys |= {process.communicate()[0].strip() for process in ready}

    assert {store.key().hex()} == keys
    assert [KEY] == [file.name for file in store.folder.iterdir()]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_key_that_others_can_use_is_refused(store: EngineStore, mode: int) -> None:
    store.key()
    (store.folder / KEY).chmod(mode)

    with pytest.raises(BackendUnavailable, match=f"can be used by others .mode {mode:04o}, not 0600") as raised:
        store.key()

    assert "Delete it" in raised.value.fix
    assert raised.value.problem == store.check().why_not


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_of_another_user_is_refused(store: EngineStore) -> None:
    store.key()
    os.chown(store.folder / KEY, 12345, -1)

    with pytest.raises(BackendUnavailable, match="belongs to user 12345, not to 0"):
        store.key()


@pytest.mark.parametrize("content", [b"", b"k" * 31, b"k" * 33])
def test_a_damaged_key_is_refused(store: EngineStore, content: bytes) -> None:
    """A half-written key would sign what nothing can check later."""
    store.key()
    (store.folder / KEY).write_bytes(content)

    with pytest.raises(BackendUnavailable, match="is damaged: it is no file of 32 bytes"):
        store.key()


def test_a_key_is_no_link_and_no_pipe(store: EngineStore, tmp_path: Path) -> None:
    """A link may lead to a file that somebody else knows; a pipe would wait for ever."""
    store.folder.mkdir(parents=True)
    (tmp_path / "known").write_bytes(b"k" * 32)
    (tmp_path / "known").chmod(0o600)
    (store.folder / KEY).symlink_to(tmp_path / "known")
    with pytest.raises(BackendUnavailable, match="cannot be read"):
        store.key()

    (store.folder / KEY).unlink()
    os.mkfifo(store.folder / KEY, 0o600)
    with pytest.raises(BackendUnavailable, match="is damaged"):
        store.key()


# Where it is


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"CACHE_DIRECTORY": "/var/cache/edge-sdk", "XDG_CACHE_HOME": "/x"}, "/var/cache/edge-sdk/engines"),
        ({"CACHE_DIRECTORY": "/var/cache/a:/var/cache/b"}, "/var/cache/a/engines"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/edge-sdk/engines"),
        ({"XDG_CACHE_HOME": "relative"}, f"{Path.home()}/.cache/edge-sdk/engines"),
        ({}, f"{Path.home()}/.cache/edge-sdk/engines"),
    ],
)
def test_the_default_folder(environment: dict[str, str], folder: str) -> None:
    """The service's cache, or else the user's."""

    assert Path(folder) == default_folder(environment)


def test_a_store_that_cannot_be_written_is_said_without_touching_it(tmp_path: Path) -> None:
    """Before anything was tried; and whatever is tried says the same."""
    (tmp_path / "file").write_bytes(b"")
    store = EngineStore(tmp_path / "file" / "engines")
    health = store.check()

    assert not health
    assert f"{tmp_path / 'file'} is no folder" in health.why_not
    assert "CacheDirectory=edge-sdk" in health.fix
    with pytest.raises(BackendUnavailable, match=r"cannot be (read|made)"):
        store.key()
    with pytest.raises(EngineFailed, match="could not be kept in"), store.adding(entry_name(GRAPH)):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    assert f"{tmp_path} cannot be written" in EngineStore(tmp_path / "engines").check().why_not


def test_looking_changes_nothing(store: EngineStore, tmp_path: Path) -> None:
    health = store.check()

    assert (True, False, 0, 0) == (bool(health), health.has_key, health.engines, health.bytes)
    assert [] == list(tmp_path.iterdir())


def test_a_look_counts(store: EngineStore) -> None:
    store.key()
    add(store, entry_name(GRAPH), 100)
    add(store, entry_name(OTHER), 50)
    health = store.check()

    assert (True, 2, 150) == (health.has_key, health.engines, health.bytes)


# Engines


def test_engines_are_found_by_their_graph(store: EngineStore) -> None:
    """The one used last first; another graph's never; its name says what it depends on."""
    old, new = (add(store, entry_name(GRAPH, version=version)) for version in ("10.3.0", "10.4.0"))
    add(store, entry_name(OTHER, version="10.3.0"))
    age(old, 20)
    age(new, 10)

    assert [new, old] == store.engines(GRAPH)
    store.used(old)
    assert [old, new] == store.engines(GRAPH)
    assert [] == store.engines(hashlib.sha256(b"unknown").hexdigest())
    assert entry_name(GRAPH, a=1, b=2) == entry_name(GRAPH, b=2, a=1)


def test_an_engine_appears_whole_or_not_at_all(store: EngineStore) -> None:
    with contextlib.suppress(KeyboardInterrupt), store.adding(entry_name(GRAPH)) as folder:
        (folder / PLAN).write_bytes(b"half")
        assert [] == store.engines(GRAPH)
        raise KeyboardInterrupt

    assert [] == list(store.folder.iterdir())


def test_the_same_engine_built_twice_at_once(store: EngineStore) -> None:
    """Both builds end well; a reader sees the plan and the sidecar of one of them, never a mixture."""
    name = entry_name(GRAPH)

    def build(number: int) -> None:
        for _ in range(20):
            with store.adding(name) as folder:
                (folder / PLAN).write_bytes(bytes([number]) * 1000)
                (folder / SIDECAR).write_bytes(bytes([number]))

    build(0)
    with ThreadPoolExecutor(3) as threads:
        builds = [threads.submit(build, number) for number in (1, 2)]
        read = 0
        while not all(done.done() for done in builds):
            try:
                file, sidecar = open_engine(store.folder / name)
            except FileNotFoundError:  # what it had opened was dropped: the caller takes the next candidate
                continue
            assert sidecar * 1000 == file.read()
            read += 1
        for done in builds:
            done.result()

    assert read
    assert [name] == [file.name for file in store.folder.iterdir()]


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    """The limit holds after each build; the engine just built stays even if it is larger than the limit alone."""
    store = EngineStore(tmp_path, limit_bytes=250)
    store.key()
    first, second = add(store, entry_name(GRAPH, n=1), 100), add(store, entry_name(GRAPH, n=2), 100)
    age(first, 20)
    age(second, 10)
    store.used(first)
    third = add(store, entry_name(GRAPH, n=3), 100)

    assert {first, third} == set(store.engines(GRAPH))
    giant = add(store, entry_name(GRAPH, n=4), 1000)
    assert [giant] == store.engines(GRAPH)
    assert (store.folder / KEY).is_file()


def test_leftovers_of_killed_builds_are_swept(store: EngineStore) -> None:
    """Old ones only: what is young may be another process's build."""
    store.key()
    old, young = store.folder / f".{entry_name(GRAPH)}.abcd", store.folder / f".{entry_name(OTHER)}.abcd"
    for leftover in (old, young):
        leftover.mkdir()
        (leftover / PLAN).write_bytes(b"half")
    age(old, 3 * 24 * 3600)
    add(store, entry_name(GRAPH))

    assert (False, True) == (old.exists(), young.exists())


def test_a_dropped_engine_is_gone(store: EngineStore) -> None:
    """Except for those who have it open: an engine in use can be loaded again."""
    entry = add(store, entry_name(GRAPH))
    file, _ = open_engine(entry)
    store.drop(entry)
    store.drop(entry)
    store.used(entry)

    assert [] == store.engines(GRAPH)
    assert [] == list(store.folder.iterdir())
    assert b"p" * 90 == file.read()


def test_a_disk_that_refuses_is_an_error_of_ours(store: EngineStore) -> None:
    """The next step is said, and nothing stays behind."""
    with pytest.raises(EngineFailed, match="No space left on device") as raised, store.adding(entry_name(GRAPH)):
        raise OSError(28, "No space left on device")

    assert "Free some space" in raised.value.fix
    assert [] == list(store.folder.iterdir())


def test_a_timing_cache_is_one_versions_and_one_gpus(store: EngineStore) -> None:
    files = {store.timing_cache(version=v, gpu=g) for v in ("10.3.0", "10.4.0") for g in ("Orin", "Thor")}

    assert 4 == len(files)
    assert {store.folder} == {file.parent for file in files}
