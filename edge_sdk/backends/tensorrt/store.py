"""Engines compiled on this machine that belong to no package, and the key that vouches for every engine here.

    ~/.cache/edge-sdk/engines/
        key                                 32 random bytes that only their owner can read
        1f0c...-93ab.../engine.plan         named after the graph, and after what else the engine depends on
        1f0c...-93ab.../engine.json
        timing-...                          what TensorRT measured, for its next build

An engine is written beside its place and moved there in one step, so two processes may build the same one. The place
is found by content, never by a model's name: the same graph under two names has one engine, and a graph that changed
has none. What was used longest ago is dropped when the store grows beyond its limit; a dropped engine costs a build.

Under systemd the store is in the service's `CacheDirectory`, which the service alone can write.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.backends.tensorrt.sidecar import MAX_SIDECAR_BYTES, PLAN, SIDECAR
from edge_sdk.errors import BackendUnavailable, EngineFailed, PackageError
from edge_sdk.package import writing

KEY = "key"
KEY_BYTES = 32
LIMIT_BYTES = 8 << 30
"""A few dozen engines of common size, and less than a tenth of a Jetson's disk."""

_ENTRY = re.compile(r"^[0-9a-f]{32}-[0-9a-f]{16}$")
_READ_AT_ONCE = 1 << 30
"""Linux reads no more than 2 GiB at once."""
_ABANDONED_S = 2 * 24 * 3600.0
"""What lies half written for this long was left by a process that was killed: no build takes days."""


def default_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The service's cache under systemd, otherwise the user's."""
    given = environment.get("CACHE_DIRECTORY", "").split(":")[0]  # systemd's, one for each that the unit names
    if given:
        return Path(given) / "engines"
    cache = environment.get("XDG_CACHE_HOME", "")
    if cache.startswith("/"):  # others are to be ignored: XDG Base Directory Specification
        return Path(cache) / "edge-sdk" / "engines"
    try:
        return Path.home() / ".cache" / "edge-sdk" / "engines"
    except RuntimeError:  # a user without a home; `check` says whether it can be written
        return Path("/var/cache/edge-sdk/engines")


@dataclass(frozen=True)
class StoreHealth:
    """What a look at the store found, without changing anything. `why_not` is empty if engines can be kept in it."""

    folder: Path
    why_not: str
    fix: str
    has_key: bool
    engines: int
    bytes: int
    limit_bytes: int

    def __bool__(self) -> bool:
        return not self.why_not


class EngineStore:
    """>>> store = EngineStore()
    >>> with store.adding(entry_name(graph_sha256, version="10.3.0")) as folder:
    ...     (folder / PLAN).write_bytes(plan)
    ...     (folder / SIDECAR).write_bytes(encode(signed(sidecar, store.key())))
    >>> store.engines(graph_sha256)
    """

    def __init__(self, folder: Path | None = None, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = folder if folder is not None else default_folder()
        self.limit_bytes = limit_bytes

    def __repr__(self) -> str:
        return f"<EngineStore {self.folder}>"

    # The key

    def key(self) -> bytes:
        """The key that signs and checks this machine's engines, made when it is first needed.

        BackendUnavailable if it cannot be made or read, or if somebody else could have read or written it.
        """
        if (key := self.existing_key()) is not None:
            return key
        try:
            self._make_key()
            return self._read_key()
        except OSError as exc:
            raise self._unusable(f"A key cannot be made in {self.folder}: {exc.strerror or exc}.") from exc

    def existing_key(self) -> bytes | None:
        """As `key`, but None where there is none yet."""
        try:
            return self._read_key()
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise self._unusable(
                f"The key that vouches for this machine's engines, {self.folder / KEY}, cannot be read: "
                f"{exc.strerror or exc}."
            ) from exc

    def _make_key(self) -> None:
        """Complete in one step, and never in the place of one that another process made meanwhile."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        staged = self.folder / f".{KEY}.{secrets.token_hex(4)}"
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                os.write(descriptor, secrets.token_bytes(KEY_BYTES))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            try:
                os.link(staged, self.folder / KEY)
            except FileExistsError:
                pass
        finally:
            staged.unlink()

    def _read_key(self) -> bytes:
        place = self.folder / KEY
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            data = os.read(descriptor, KEY_BYTES + 1) if stat.S_ISREG(found.st_mode) else b""
        finally:
            os.close(descriptor)
        if found.st_uid != os.geteuid():
            raise self._bad_key(f"belongs to user {found.st_uid}, not to {os.geteuid()} who runs this")
        if found.st_mode & 0o077:
            raise self._bad_key(f"can be used by others (mode {stat.S_IMODE(found.st_mode):04o}, not 0600)")
        if len(data) != KEY_BYTES:
            raise self._bad_key(f"is damaged: it is no file of {KEY_BYTES} bytes")
        return data

    def _bad_key(self, what: str) -> BackendUnavailable:
        return BackendUnavailable(
            f"The key that vouches for this machine's engines, {self.folder / KEY}, {what}.",
            fix="Delete it, and the folders beside it: a new key is made, and the engines are built again.",
        )

    def _unusable(self, problem: str) -> BackendUnavailable:
        return BackendUnavailable(problem, fix=self._fix())

    def _fix(self) -> str:
        return (
            "Under systemd give the service CacheDirectory=edge-sdk; elsewhere make the folder writable, or set "
            "XDG_CACHE_HOME to one that is."
        )

    # The engines

    def engines(self, graph_sha256: str) -> list[Path]:
        """The folders of the engines built from a graph, the one used last first."""
        return [entry for entry, _ in reversed(self._by_use()) if entry.name.startswith(f"{graph_sha256[:32]}-")]

    @contextmanager
    def adding(self, name: str) -> Iterator[Path]:
        """A folder to put an engine in, which takes its place when the block ends well, and vanishes otherwise.

        Afterwards what was used longest ago is dropped, as far as the limit demands. EngineFailed if the disk refuses.
        """
        target = self.folder / name
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with writing(target) as staged:
                yield staged
        except (PackageError, OSError) as exc:
            cause = exc.__cause__ if isinstance(exc, PackageError) else exc
            said = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause or exc)
            raise EngineFailed(
                f"The engine could not be kept in {self.folder}: {said}.",
                fix="Free some space on that disk."
                if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
                else self._fix(),
            ) from exc
        self._shrink(target)

    def used(self, entry: Path) -> None:
        """Say that an engine was loaded just now."""
        try:
            os.utime(entry)
        except OSError:  # dropped by another process, or a store that cannot be written any more
            pass

    def drop(self, entry: Path) -> None:
        """Forget an engine; harmless if it is gone."""
        aside = entry.with_name(f".dropped.{secrets.token_hex(4)}")
        try:
            entry.rename(aside)  # nobody finds half an engine
        except OSError:
            return
        shutil.rmtree(aside, ignore_errors=True)

    def timing_cache(self, *, version: str, gpu: str) -> Path:
        """Where TensorRT of this version keeps what it measured on this GPU; it is of use to no other."""
        return self.folder / f"timing-{_digest({'version': version, 'gpu': gpu})[:16]}"

    def check(self) -> StoreHealth:
        """Look whether engines can be kept here, and what there is. Changes nothing, raises nothing."""
        entries = self._by_use()
        why_not, fix, has_key = self._why_not_writable(), "", False
        if why_not:
            fix = self._fix()
        try:
            has_key = bool(self._read_key())
        except BackendUnavailable as exc:
            why_not, fix = exc.problem, exc.fix
        except OSError:  # there is none yet, or the folder cannot be reached: which was said
            pass
        return StoreHealth(
            self.folder, why_not, fix, has_key, len(entries), sum(size for _, size in entries), self.limit_bytes
        )

    def _why_not_writable(self) -> str:
        place = self.folder
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        if not place.is_dir():
            return f"Engines cannot be kept in {self.folder}: {place} is no folder."
        if not os.access(place, os.W_OK | os.X_OK):  # says no for a read-only file system, too
            return f"Engines cannot be kept in {self.folder}: {place} cannot be written."
        return ""

    def _by_use(self) -> list[tuple[Path, int]]:
        """Every engine with its size in bytes, the one used longest ago first."""
        found = []
        try:
            entries = [entry for entry in self.folder.iterdir() if _ENTRY.match(entry.name)]
        except OSError:
            return []
        for entry in entries:
            try:
                size = sum(file.stat().st_size for file in entry.iterdir())
                found.append((entry.stat().st_mtime_ns, entry, size))
            except OSError:  # dropped meanwhile
                continue
        return [(entry, size) for _, entry, size in sorted(found)]

    def _shrink(self, kept: Path) -> None:
        entries = self._by_use()
        total = sum(size for _, size in entries)
        for entry, size in entries:
            if total <= self.limit_bytes:
                break
            if entry != kept:
                self.drop(entry)
                total -= size
        for leftover in self.folder.glob(".*"):
            try:
                if time.time() - leftover.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()
            except OSError:
                continue


def entry_name(graph_sha256: str, **depends_on: object) -> str:
    """The name of an engine's folder: by its graph, and by everything else that makes it this engine and no other."""
    return f"{graph_sha256[:32]}-{_digest(depends_on)[:16]}"


class PlanFile:
    """A plan on disk, open: it can be read whatever becomes of its name. It is closed when it is forgotten."""

    def __init__(self, folder: int, name: str) -> None:
        """The file `name` in an open folder; OSError if it cannot be opened."""
        self._descriptor = _opened(name, folder)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self) -> bytes:
        """All of it. OSError."""
        parts = []
        at = 0
        while part := os.pread(self._descriptor, _READ_AT_ONCE, at):
            parts.append(part)
            at += len(part)
        return b"".join(parts)


def open_engine(folder: Path, plan: str = PLAN, sidecar: str = SIDECAR) -> tuple[PlanFile, bytes]:
    """A plan and what its sidecar says, from one folder even while another process exchanges it. Raises OSError."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os.fdopen(_opened(sidecar, directory), "rb") as described:
            return PlanFile(directory, plan), described.read(MAX_SIDECAR_BYTES + 1)
    finally:
        os.close(directory)


def _opened(name: str, folder: int) -> int:
    """A file in an open folder, to be read. OSError also for what is no file: nobody may ever write into a pipe."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{name} is no file")
    return descriptor


def _digest(value: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
