"""What stands still, in a time that is passed in."""

from __future__ import annotations

from edge_sdk.runtime.standstill import STEP_S, Mark, Standstill

BATCH = Mark("batch 1", 10.0, "batch 1")


def looked(standstill: Standstill, moments: list[float], *marks: Mark) -> list[list[Mark]]:
    return [standstill.look(marks, moment) for moment in moments]


def test_who_shows_the_same_for_its_limit_stands_still() -> None:
    found = looked(Standstill(), [0.0, 3.0, 6.0, 9.0, 12.0], BATCH)

    assert [[], [], [], [], [BATCH]] == found


def test_who_moves_does_not() -> None:
    """A loop that shows another turn at each look is fine, however long."""
    standstill = Standstill()
    found = [standstill.look([Mark(("turn", number), 5.0, "")], number * 3.0) for number in range(20)]

    assert not any(found)


def test_each_has_its_own_limit() -> None:
    quick = Mark("suspect", 5.0, "suspect")
    found = looked(Standstill(), [0.0, 3.0, 6.0], BATCH, quick)

    assert [[], [], [quick]] == found


def test_a_process_that_was_stopped_is_not_at_fault() -> None:
    """An hour between two looks counts as one look's time: nothing could move."""
    found = looked(Standstill(), [0.0, 3.0, 3600.0, 3600.0 + 10.0 - 3.0 - STEP_S], BATCH)

    assert [[], [], [], [BATCH]] == found


def test_what_is_gone_is_forgotten() -> None:
    """A mark that comes back begins anew."""
    standstill = Standstill()
    looked(standstill, [0.0, 5.0], BATCH)
    standstill.look([], 6.0)

    assert [[], []] == looked(standstill, [7.0, 12.0], BATCH)
