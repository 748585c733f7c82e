"""The command that counts what a million requests leave behind, over a few thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.brokers import MOSQUITTO
from tests.faults.million import Reading, judged, run


def readings(*sizes: int, threads: int = 9, fds: int = 20) -> list[Reading]:
    return [Reading(1000 * (n + 1), float(n), size, threads, fds) for n, size in enumerate(sizes)]


def test_growth_is_found() -> None:
    """After the warm-up, in memory, threads or descriptors; what came before does not count."""
    calm = readings(50, *[1000] * 12)
    grown = [*readings(*[1000] * 11), Reading(12_000, 12.0, 1021, 9, 20)]
    threads = [*readings(*[1000] * 11), Reading(12_000, 12.0, 1000, 10, 20)]
    fds = [*readings(*[1000] * 11), Reading(12_000, 12.0, 1000, 9, 21)]

    assert [True, False, False, False] == [
        judged(each, warm_up=2000, wrong=0, drift_percent=2.0).kept for each in (calm, grown, threads, fds)
    ]
    assert not judged(calm, warm_up=2000, wrong=1, drift_percent=2.0).kept
    with pytest.raises(ValueError, match="too few"):
        judged(calm, warm_up=12_000, wrong=0, drift_percent=2.0)


@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
def test_a_few_thousand_requests_are_counted(tmp_path: Path) -> None:
    """The whole way, for a hundredth of the time: every answer right, threads and descriptors as they were."""
    found = run(20_000, in_flight=32, folder=tmp_path, drift_percent=5.0)

    assert found["summary"]["kept"], found["text"]
    assert 20 == len(found["readings"])
