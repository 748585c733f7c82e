"""Which packages a folder offers, and what has changed since the last look: pure but for reading manifests.

`scan` lists the packages in the engines folder, one for each model and version: where several profiles of the same
model lie side by side, the one that fits this machine, and among those the profile that was detected. `to_load`
compares with what is served, by digest, so a reload touches only what is new, different or gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.errors import PackageError
from edge_sdk.package import EnginePackage, package_folders
from edge_sdk.profiles import DeviceProfile, Machine

Key = tuple[str, str]
"""Model and version."""

NO_VERSION = "0"
"""Of a package that cannot say which it is."""


@dataclass(frozen=True)
class Entry:
    """A package that is to be served: or, where it cannot be opened, why not."""

    model: str
    version: str
    digest: str
    package: EnginePackage | None
    problem: str = ""

    @property
    def key(self) -> Key:
        return self.model, self.version


def scan(
    folder: Path, machine: Machine, profile: DeviceProfile | None, served: Mapping[Path, Key] | None = None
) -> dict[Key, Entry]:
    """Every model and version in `folder`. A package that cannot be opened is an entry with a problem.

    `served` says what came from where at the last look: a package that broke since is still that model's.
    """
    found: dict[Key, list[Entry]] = {}
    for path in package_folders(folder):
        entry = _read(path, (served or {}).get(path))
        found.setdefault(entry.key, []).append(entry)
    return {key: max(entries, key=lambda entry: _preference(entry, machine, profile)) for key, entries in found.items()}


def to_load(served: Mapping[Key, str], wanted: Mapping[Key, Entry]) -> list[Entry]:
    """What is new, or has another digest than what is served now (key -> digest)."""
    return [entry for key, entry in wanted.items() if served.get(key) != entry.digest]


def newest_first(versions: Iterable[str]) -> list[str]:
    """Versions in the order in which a request without one prefers them: `10` before `9`, `2.0` before `1.12`."""
    return sorted(versions, key=_natural, reverse=True)


def called_like(folder: Path) -> str:
    """What a package is called that cannot say so itself: like its folder, in characters that a topic can carry."""
    # engines/<name>/build/<profile>, or a package folder called like its model
    name = folder.parent.parent.name if folder.parent.name == "build" else folder.name
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:64]


def _natural(version: str) -> list[tuple[int, int | str]]:
    parts = re.findall(r"\d+|\D+", version)
    return [(1, int(part)) if part.isdigit() else (0, part) for part in parts]


def _read(path: Path, known: Key | None) -> Entry:
    try:
        package = EnginePackage.open(path)
        return Entry(package.name, package.version, package.digest, package)
    except PackageError as exc:
        if known is not None:
            return Entry(*known, "", None, str(exc))
        return Entry(called_like(path), NO_VERSION, "", None, str(exc))


def _preference(entry: Entry, machine: Machine, profile: DeviceProfile | None) -> tuple[bool, bool, bool, str]:
    if entry.package is None:
        return False, False, False, ""
    return (
        True,
        not entry.package.mismatches(machine),
        profile is not None and entry.package.manifest.profile == profile.name,
        entry.package.manifest.created,
    )
