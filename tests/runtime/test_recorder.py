"""The flight recorder: what the next process finds of one that ended, with processes that really end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk import host
from edge_sdk.runtime.messages import Request
from edge_sdk.runtime.recorder import CELLS, FlightRecorder
from edge_sdk.tasks.base import Payload


def request(key: int) -> Request:
    return Request(key, "odd", Payload(b""), 0.0, 1e9, key=key)


def ending(file: Path, how: str) -> None:
    """A process that ends while it computes the keys 3 and 4, and after it computed 1 and 2."""
    program = f"""
import os, signal, sys
from pathlib import Path
from tests.runtime.test_recorder import request
from edge_sdk.runtime.recorder import FlightRecorder
recorder = FlightRecorder.open(Path(sys.argv[1]))
landed = recorder.begin("odd", [request(1), request(2)])
recorder.begin("odd", [request(3), request(4)])
recorder.end(landed)
{how}
"""
    subprocess.run([sys.executable, "-c", program, str(file)], check=False, timeout=60, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "how", ["os.abort()", "os._exit(7)", "os.kill(os.getpid(), signal.SIGKILL)", "import ctypes; ctypes.string_at(0)"]
)
def test_what_was_computed_when_a_process_ended_is_under_suspicion(tmp_path: Path, how: str) -> None:
    """However it ends; what it had finished is not."""
    file = tmp_path / "new" / "flights"
    ending(file, how)
    recorder = FlightRecorder.open(file)
    verdicts = [recorder.quarantine.verdict(key, _now()) for key in (1, 2, 3, 4)]
    recorder.close()

    assert ["clear", "clear", "suspect", "suspect"] == verdicts


def test_twice_is_barred_also_after_clean_ends(tmp_path: Path) -> None:
    """Two crashes, then a life in which nothing happens: the next one still knows."""
    file = tmp_path / "flights"
    ending(file, "os.abort()")
    ending(file, "os.abort()")
    FlightRecorder.open(file).close()
    recorder = FlightRecorder.open(file)
    recorder.close()

    assert "barred" == recorder.quarantine.verdict(3, _now())


@pytest.mark.parametrize(
    ("how", "barred"),
    [
        ("os.abort()", True),
        ("import ctypes; ctypes.string_at(0)", True),
        ("recorder.confess(); os._exit(7)", True),
        ("os.kill(os.getpid(), signal.SIGKILL)", False),
        ("os._exit(7)", False),
    ],
)
def test_whose_doing_it_was(tmp_path: Path, how: str, barred: bool) -> None:
    """Twice by itself bars; twice by somebody's hand, or without a trace, does not."""
    file = tmp_path / "flights"
    ending(file, how)
    ending(file, how)
    recorder = FlightRecorder.open(file)
    recorder.close()

    assert ("barred" if barred else "suspect") == recorder.quarantine.verdict(3, _now())


def test_memory_that_ran_out_is_its_own_doing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts what it kills for memory: one more than when the process began."""
    file = tmp_path / "flights"
    for _ in range(2):
        ending(file, "os.kill(os.getpid(), signal.SIGKILL)")
        count = host.memory_kills()
        monkeypatch.setattr(host, "memory_kills", lambda count=count: count + 1)
        recorder = FlightRecorder.open(file)
        monkeypatch.undo()
        recorder.close()

    assert "barred" == recorder.quarantine.verdict(3, _now())


def test_last_words_are_told_once(tmp_path: Path) -> None:
    """The stack that a fatal signal left is in the log of the next process, and in no other's."""
    file = tmp_path / "flights"
    ending(file, "os.abort()")
    program = "import logging, sys; logging.basicConfig(); from pathlib import Path\n"
    program += "from edge_sdk.runtime.recorder import FlightRecorder\nFlightRecorder.open(Path(sys.argv[1])).close()"
    logs = [
        subprocess.run([sys.executable, "-c", program, str(file)], check=True, capture_output=True, text=True).stderr
        for _ in range(2)
    ]

    assert "Fatal Python error: Aborted" in logs[0]
    assert "" == logs[1]


@pytest.mark.parametrize("how", ["recorder.close()", "recorder.excuse(); os._exit(1)"])
def test_a_planned_end_is_nobodys_fault(tmp_path: Path, how: str) -> None:
    file = tmp_path / "flights"
    ending(file, how)
    recorder = FlightRecorder.open(file)
    recorder.close()

    assert not recorder.quarantine


def test_who_is_acquitted_stays_so(tmp_path: Path) -> None:
    file = tmp_path / "flights"
    ending(file, "os.abort()")
    recorder = FlightRecorder.open(file)
    recorder.quarantine.acquit(3)
    recorder.write_down()
    recorder.close()
    following = FlightRecorder.open(file)
    following.close()

    assert ["clear", "suspect"] == [following.quarantine.verdict(key, _now()) for key in (3, 4)]


def test_a_file_has_one_daemon(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second one goes without, says so, and disturbs nothing; a closed one gives the file free."""
    file = tmp_path / "flights"
    first = FlightRecorder.open(file)
    first.begin("odd", [request(1)])
    before = file.read_bytes()
    second = FlightRecorder.open(file)
    second.end(second.begin("odd", [request(2)]))
    second.close()
    after = file.read_bytes()
    first.close()
    caplog.clear()
    third = FlightRecorder.open(file)
    third.close()

    assert before == after
    assert "" == caplog.text


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root gives folders away")
def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, 12_345, 12_345)
    recorder = FlightRecorder.open(folder / "flights")
    recorder.end(recorder.begin("odd", [request(1)]))
    recorder.close()

    assert "belongs to somebody else" in caplog.text
    assert [] == list(folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 100_000])
def test_any_file_is_taken(tmp_path: Path, content: bytes) -> None:
    """One that something else wrote holds no suspects, and serves."""
    file = tmp_path / "flights"
    file.write_bytes(content)
    recorder = FlightRecorder.open(file)
    found = bool(recorder.quarantine)
    recorder.close()
    ending(file, "os.abort()")
    following = FlightRecorder.open(file)
    following.close()

    assert not found
    assert "suspect" == following.quarantine.verdict(3, _now())


def test_more_than_there_is_room_for_is_computed_all_the_same(tmp_path: Path) -> None:
    """Cells come back when a flight lands; what has none is not noted."""
    recorder = FlightRecorder.open(tmp_path / "flights")
    flights = [recorder.begin("odd", [request(key) for key in range(1, 1001)]) for _ in range(5)]
    noted = sum(len(flight.cells) for flight in flights)
    for flight in flights:
        recorder.end(flight)
    again = recorder.begin("odd", [request(key) for key in range(1, CELLS + 1)])
    recorder.close()

    assert CELLS == noted
    assert CELLS == len(again.cells)


def test_a_flight_says_what_it_is() -> None:
    recorder = FlightRecorder()
    tickets = [range(1), range(1, 2), range(1, 4), range(1, 21)]
    flights = [recorder.begin("odd", [request(ticket) for ticket in each]) for each in tickets]

    assert ["a self-test of odd", "request 1 of odd", "requests 1, 2, 3 of odd"] == [str(f) for f in flights[:3]]
    assert str(flights[3]).endswith("8 and 12 more of odd")
    assert flights == recorder.in_flight()


def _now() -> float:
    import time

    return time.monotonic()
