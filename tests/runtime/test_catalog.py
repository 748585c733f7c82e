"""What a folder offers: one entry for each model and version, and what has changed since."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.package import MANIFEST
from edge_sdk.profiles import Machine
from edge_sdk.runtime.catalog import newest_first, scan, to_load
from tests.packages import ARCHITECTURE, PROFILE, make_package, profile, scaling

HERE = dataclasses.replace(Machine.read(), architecture=ARCHITECTURE)


def test_one_entry_for_each_model_and_version(tmp_path: Path) -> None:
    """Versions are models of their own; a folder that is not there offers nothing."""
    for version in ("1", "2"):
        make_package(tmp_path / "double" / version, scaling(), name="double", version=version)
    make_package(tmp_path / "triple", scaling(3.0))
    found = scan(tmp_path, HERE, None)

    assert {("double", "1"), ("double", "2"), ("triple", "1")} == set(found)
    assert {} == scan(tmp_path / "nowhere", HERE, None)


def test_of_several_builds_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    """This machine's architecture first, then the profile that was detected, then the newest."""
    build = tmp_path / "double" / "build"
    builds: dict[str, dict[str, Any]] = {
        "elsewhere": {"architecture": "riscv64", "created": "2030"},
        "other": {"profile": "other", "created": "2028"},
        "old": {"created": "2025"},
        "new": {"created": "2026"},
    }
    for folder, fields in builds.items():
        make_package(build / folder, scaling(), name="double", **fields)
    preferred = scan(tmp_path, HERE, profile())["double", "1"]
    without = scan(tmp_path, HERE, None)["double", "1"]

    assert preferred.package is not None
    assert without.package is not None
    assert ("new", PROFILE) == (preferred.package.path.name, preferred.package.manifest.profile)
    assert "other" == without.package.path.name


@pytest.mark.parametrize("layout", ["my net", "my net/build/cpu"])
def test_a_broken_package_is_an_entry_with_its_reason(tmp_path: Path, layout: str) -> None:
    """It is called like its folder, in characters a topic can carry; what was served from there keeps its name."""
    package = make_package(tmp_path / layout, scaling(), name="net", version="3")
    make_package(tmp_path / "sound", scaling())
    (package.path / MANIFEST).write_text("{", encoding="utf-8")
    fresh = scan(tmp_path, HERE, None)
    served = scan(tmp_path, HERE, None, {package.path: ("net", "3")})

    assert {("my-net", "0"), ("sound", "1")} == set(fresh)
    assert {("net", "3"), ("sound", "1")} == set(served)
    assert None is fresh["my-net", "0"].package
    assert "not JSON" in served["net", "3"].problem


def test_changes_are_told_by_digest(tmp_path: Path) -> None:
    """New and altered packages are to be loaded, the same one is left alone."""
    same, altered = make_package(tmp_path / "same", scaling()), make_package(tmp_path / "altered", scaling())
    served = {("same", "1"): same.digest, ("altered", "1"): altered.digest}
    make_package(tmp_path / "same", scaling())
    make_package(tmp_path / "altered", scaling(3.0))
    make_package(tmp_path / "new", scaling())
    todo = to_load(served, scan(tmp_path, HERE, None))

    assert {"altered", "new"} == {entry.model for entry in todo}


def test_newest_first() -> None:
    """As people count, not as strings sort."""

    assert ["10", "9", "2.0", "1.12", "1.2", "1"] == newest_first(["1.2", "9", "1", "1.12", "10", "2.0"])
    assert ["v2", "v1-b", "v1-a"] == newest_first(["v1-a", "v2", "v1-b"])
    assert {"1", "a", "1a", "a1"} == set(newest_first(["1", "a", "1a", "a1"]))
