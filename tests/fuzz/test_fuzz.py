"""A short run over every target: what is known to be of interest, and what lies near it. The long one is a command."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import KEPT, Target, targets

ROOT = Path(__file__).resolve().parents[2]
TARGETS = targets()

Edit = tuple[str, int, bytes]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["put", "insert", "cut", "again"]), st.integers(0, 1 << 14), st.binary(min_size=1, max_size=6)
    ),
    min_size=1,
    max_size=5,
)


def edited(data: bytes, edits: list[Edit]) -> bytes:
    """`data` after each edit at its place; places go round."""
    for act, place, piece in edits:
        at = place % (len(data) + 1)
        behind = {
            "put": data[at + len(piece) :],
            "insert": data[at:],
            "cut": data[at + piece[0] :],
            "again": data[at // 2 :],
        }[act]
        data = data[:at] + (piece if act in ("put", "insert") else b"") + behind
    return data


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What a decoder says of each of a thousand inputs helps nobody, and numpy warns of files of Python 2."""
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@cache
def seeds(target: Target) -> list[bytes]:
    return target.seeds()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_promises_are_kept(target: Target) -> None:
    """For the seeds, for what once broke a promise, and for three hundred inputs near them; none takes longer than a
    second of processor time."""

    def check(data: bytes) -> None:
        begun = time.process_time()
        target.check(data)

        assert time.process_time() - begun < 1.0

    for seed in [b"", *seeds(target)]:
        check(seed)

    @settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(seeds(target)), EDITS)
    def near(seed: bytes, edits: list[Edit]) -> None:
        check(edited(seed, edits)[: target.max_bytes])

    near()


def test_every_target_states_its_promise() -> None:
    assert [] == [target.name for target in TARGETS.values() if len(target.promise) < 30]


def test_what_is_kept_belongs_to_a_target() -> None:
    assert {folder.name for folder in KEPT.iterdir()} <= set(TARGETS)


def test_every_decoder_that_is_promised_has_a_target() -> None:
    """The table of docs/reliability.md lists the targets that there are."""
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z-]+)` \|", page.partition("## Fuzzing")[2].partition("\n## ")[0], re.MULTILINE)

    assert sorted(TARGETS) == sorted(listed)


def test_the_command_runs_guided_by_coverage(tmp_path: Path) -> None:
    """It learns: from the seeds of a target it finds inputs that reach more."""
    pytest.importorskip("atheris", reason="the extra `fuzz` is not installed")
    command = [sys.executable, "-m", "tests.fuzz", "--target", "puback", "--runs", "2000", "--corpus", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    assert 0 == done.returncode, done.stderr
    assert "Done 2000 runs" in done.stderr
    assert (tmp_path / "puback" / "seed-0").is_file()


def test_the_bytes_of_a_file_can_be_tried(tmp_path: Path) -> None:
    """As a crash's are, to see it again: silence, or the error."""
    file = tmp_path / "input"
    file.write_bytes(b"\0\7")
    command = [sys.executable, "-m", "tests.fuzz", "--target", "puback", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    assert (0, "") == (done.returncode, done.stderr)
