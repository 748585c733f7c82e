"""A log is no place for the rate of strangers."""

from __future__ import annotations

from edge_sdk.seldom import Seldom


def test_the_first_is_told_and_then_one_a_minute() -> None:
    """Whatever the rate; all of them are counted."""
    seldom = Seldom()
    told = [now for now in range(180) if seldom.happened(1000.0 + now)]

    assert [0, 60, 120] == told
    assert 180 == seldom.count


def test_silence_is_not_saved_up() -> None:
    """After an hour without any there is one line, not sixty."""
    seldom = Seldom()

    assert [True, True, False] == [seldom.happened(now) for now in (0.0, 3600.0, 3601.0)]
