"""What `edge-sdk stats` shows a person."""

from __future__ import annotations

from edge_sdk.overview import overview
from tests.test_health import STATS


def test_who_holds_what_is_a_line_each() -> None:
    """Each holder and each model; one that is out of memory says so, and a figure that is not known is a dash."""
    said = overview(STATS).splitlines()
    lines = {line.split()[0]: line.split() for line in said if line}

    assert ["models", "11.0", "MB", "of", "at", "most", "300.0", "MB"] == lines["models"]
    assert ["digits/1", "READY", "11.0", "MB", "9.0", "MB", "11.0", "MB", "40.0", "kB"] == lines["digits/1"][:10]
    assert ["away/1", "READY,", "away", "0", "B", "5.0", "MB", "-"] == lines["away/1"][:8]
    assert any("3 times a model made room, 2 times one came back; 1 requests could not wait" in line for line in said)
    assert any("cpu-thermal 51.5 °C" in line and "power mode 15W" in line for line in said)


def test_a_device_that_says_less_is_shown_all_the_same() -> None:
    """An older one has no memory in its figures, and one that has just started no answers."""
    said = overview({"uptime_s": 7384.0, "memory_bytes": 84_000_000, "answers": {}, "models": {}, "mqtt": {}})

    assert "up 2 h 3 min, 84.0 MB resident\nanswers: none yet; 0 waiting" == said
