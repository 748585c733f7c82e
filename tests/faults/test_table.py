"""docs/reliability.md has a row for each of the 68 faults, and what a row says of its tests is so."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"

RESULTS = ("kept", "in part", "known defect", "not built yet", "not run here")


@dataclass(frozen=True)
class Row:
    number: int
    fault: str
    expected: str
    tests: tuple[str, ...]
    result: str


def rows() -> list[Row]:
    found = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \|(.*?)\| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    return [Row(int(n), fault, expected, tuple(re.findall(r"`(\S+?\.py::\w+)`", tests)), result)
            for n, fault, expected, tests, result in found]  # fmt: skip


@cache
def functions(file: str) -> dict[str, bool]:
    """The tests of a file, and whether each is expected to fail."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {
        node.name: any("xfail" in ast.unparse(decorator) for decorator in node.decorator_list)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_fault_has_a_row() -> None:
    assert list(range(1, 69)) == [row.number for row in rows()]


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.number:02}")
def test_a_row_is_true(row: Row) -> None:
    """Its tests exist; without one there is a reason; it speaks of a defect if and only if a test shows one."""
    named = [tuple(test.split("::")) for test in row.tests]
    missing = [test for test in named if test[1] not in functions(test[0])]
    defects = [test for test in named if test not in missing and functions(test[0])[test[1]]]
    result = next((result for result in RESULTS if row.result.startswith(result)), None)

    assert [] == missing
    assert result is not None, row.result
    assert bool(row.tests) == (result in ("kept", "in part", "known defect"))
    assert bool(defects) == (result == "known defect")
    assert result == "kept" or len(row.result) > len(result) + 2  # the others say why


def test_every_test_of_a_fault_is_in_its_row() -> None:
    """A test that is named after a number stands in that row."""
    listed = {row.number: row.tests for row in rows()}
    forgotten = [
        test
        for file in sorted(TESTS.glob("faults/test_*.py"))
        for test in functions(f"faults/{file.name}")
        for number in re.findall(r"_(\d\d)(?=_)", test.partition("test_case")[2])
        if f"faults/{file.name}::{test}" not in listed[int(number)]
    ]

    assert [] == forgotten
