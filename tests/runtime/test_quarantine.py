"""Which requests are computed, computed alone, or not at all, after processes that ended while they were computed."""

from __future__ import annotations

from edge_sdk.runtime.quarantine import BARRED_S, ENDS, MAX_RECORDS, Quarantine, Record


def test_two_crashes_bar_and_one_makes_suspect() -> None:
    """Whoever was there at the first crash is a suspect; who was there at the second, too, is barred."""
    quarantine = Quarantine()
    quarantine.ended([1, 2, 3], 100.0)
    after_one = [quarantine.verdict(key, 101.0) for key in (1, 2, 3, 4)]
    quarantine.ended([2], 110.0)
    after_two = [quarantine.verdict(key, 111.0) for key in (1, 2, 3, 4)]

    assert ["suspect", "suspect", "suspect", "clear"] == after_one
    assert ["suspect", "barred", "suspect", "clear"] == after_two
    assert (2, 1) == (quarantine.count("suspect", 111.0), quarantine.count("barred", 111.0))


def test_a_kill_may_be_anybodys() -> None:
    """It makes suspects as a crash does; to be barred takes so many that chance is out of the question."""
    quarantine = Quarantine()
    verdicts = []
    for number in range(ENDS):
        quarantine.ended([1], float(number), killed=True)
        verdicts.append(quarantine.verdict(1, number + 0.5))

    assert ["suspect"] * (ENDS - 1) + ["barred"] == verdicts
    assert ENDS == quarantine.ends(1)


def test_a_crash_after_a_kill_is_the_first() -> None:
    quarantine = Quarantine()
    quarantine.ended([1], 0.0, killed=True)
    quarantine.ended([1], 1.0)
    before = quarantine.verdict(1, 2.0)
    quarantine.ended([1], 3.0)

    assert "suspect" == before
    assert "barred" == quarantine.verdict(1, 4.0)


def test_one_crash_counts_once() -> None:
    """The same key twice among what was computed is one crash."""
    quarantine = Quarantine()
    quarantine.ended([5, 5], 0.0)

    assert "suspect" == quarantine.verdict(5, 1.0)


def test_who_is_acquitted_begins_anew() -> None:
    """Computed alone, and the process lives: one more crash makes a suspect again, no culprit."""
    quarantine = Quarantine()
    quarantine.ended([7], 0.0)
    quarantine.acquit(7)
    acquitted = quarantine.verdict(7, 1.0)
    quarantine.ended([7], 2.0)

    assert "clear" == acquitted
    assert "suspect" == quarantine.verdict(7, 3.0)


def test_nothing_is_barred_for_ever() -> None:
    """It lapses a while after the last crash, and `barred_s` says how long that is."""
    quarantine = Quarantine([Record(7, 2, 0, 1000.0)])

    assert BARRED_S - 10 == quarantine.barred_s(7, 1010.0)
    assert "barred" == quarantine.verdict(7, 1000.0 + BARRED_S - 1)
    assert "clear" == quarantine.verdict(7, 1000.0 + BARRED_S)
    assert () == quarantine.records(1000.0 + BARRED_S)


def test_a_moment_to_come_is_of_another_clock() -> None:
    """The machine was started anew and its clock with it: what it says of then means nothing."""
    quarantine = Quarantine([Record(7, 2, 0, 1000.0)])

    assert "clear" == quarantine.verdict(7, 10.0)


def test_it_is_bounded_and_the_newest_stay() -> None:
    quarantine = Quarantine()
    quarantine.ended(range(1, MAX_RECORDS + 1), 0.0)
    quarantine.ended([1, 9_999], 1.0)
    left = [record.key for record in quarantine.records(2.0)]

    assert MAX_RECORDS == len(left)
    assert [1, 9_999] == left[-2:]
    assert 2 not in left


def test_what_is_written_is_what_is_known() -> None:
    """The records of one are the beginning of the next."""
    former = Quarantine()
    former.ended([1, 2], 0.0)
    former.ended([2], 1.0)
    following = Quarantine(former.records(2.0))

    assert ["suspect", "barred"] == [following.verdict(key, 3.0) for key in (1, 2)]
