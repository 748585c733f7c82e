"""Durable delivery: answers are written before they go out, and the next daemon gives the same ones."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import SettingsError
from edge_sdk.mqtt.journal import Journal
from edge_sdk.mqtt.session import REMEMBERED_S, Publish, Record, Recorded, ReplyRoute, Session
from edge_sdk.mqtt.transports.base import Acknowledged, BrokerLimits, Message, Properties, Received

ROUTE = ReplyRoute("edge/v1/reply/me", b"7")
ANSWER = Message(
    ROUTE.topic,
    b"\x00answer",
    properties=Properties(
        correlation_data=b"7", content_type="application/json", message_expiry_s=30, user=(("status", "200"),)
    ),
)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path / "answers.db")
    yield made
    made.close()


def session() -> Session:
    made = Session(
        packet_size=lambda message: len(message.payload), too_large=lambda answer, limit: answer, durable=True
    )
    made.connected(BrokerLimits())
    return made


def ask(asked: Session, payload: bytes = b"question", packet_id: int = 1) -> tuple[int, str]:
    intake = asked.received(Received(Message("t", payload), packet_id, False, 1), ROUTE, 0.0)
    return intake.ticket, intake.fate


def recorded(until: float = 60.0, key: bytes = b"7", **changes: bool) -> Recorded:
    return Recorded(("t", ROUTE.topic, key), b"f" * 32, ANSWER, until, **changes)


def test_an_answer_is_written_down_before_it_is_published() -> None:
    """Record is the first of what is due, so a daemon killed at any moment between has it."""
    asked = session()
    ticket, _ = ask(asked)
    asked.answered(ticket, ANSWER, 0.0)
    first, second = asked.due()

    assert isinstance(first, Record)
    assert ANSWER == first.answers[0].answer
    assert isinstance(second, Publish)


def test_answers_without_a_connection_are_written_down_too() -> None:
    asked = session()
    ticket, _ = ask(asked)
    asked.closed()
    asked.answered(ticket, ANSWER, 0.0)

    assert [Record] == [type(action) for action in asked.due()]
    assert [] == asked.due()


@pytest.mark.parametrize("taken", [False, True])
def test_the_next_daemon_knows_what_was_answered(taken: bool, journal: Journal) -> None:
    """What the broker did not take goes out again; a repeated request gets the same bytes; another payload under the
    same id is refused."""
    former = session()
    ticket, _ = ask(former)
    former.answered(ticket, ANSWER, 0.0)
    for action in former.due():
        if isinstance(action, Record):
            journal.write(action, 0.0, 1000.0)
        elif isinstance(action, Publish):
            former.published(action, 1)
    if taken:
        former.acknowledged(Acknowledged(1, 0))
        for action in former.due():
            if isinstance(action, Record):
                journal.write(action, 0.0, 1000.0)

    successor = session()
    successor.restore(journal.load(500.0, 1010.0), 500.0)
    sent = [action.message for action in successor.due() if isinstance(action, Publish)]

    assert ([] if taken else [ANSWER.payload]) == [message.payload for message in sent]
    assert all(("duplicate", "1") in message.properties.user for message in sent)
    assert "replayed" == ask(successor, packet_id=2)[1]
    again = [action.message for action in successor.due() if isinstance(action, Publish)]
    assert [(ANSWER.payload, b"7", "application/json")] == [
        (message.payload, message.properties.correlation_data, message.properties.content_type) for message in again
    ]
    assert "reused" == ask(successor, b"another question", packet_id=3)[1]


def test_what_the_next_daemon_got_rid_of_is_sent_no_third_time(journal: Journal) -> None:
    """An answer that a former daemon left, and the broker took from this one, is noted as taken."""
    journal.write(Record((recorded(until=60.0),), ()), 0.0, 1000.0)
    successor = session()
    successor.restore(journal.load(0.0, 1000.0), 0.0)
    for action in successor.due():
        if isinstance(action, Publish):
            successor.published(action, 1)
    successor.acknowledged(Acknowledged(1, 0))
    for action in successor.due():
        if isinstance(action, Record):
            journal.write(action, 0.0, 1000.0)

    assert [True] == [one.taken for one in journal.load(0.0, 1000.0)]


def test_what_is_past_its_time_is_forgotten(journal: Journal) -> None:
    journal.write(Record((recorded(until=60.0), recorded(until=130.0, key=b"8")), ()), 0.0, 1000.0)

    assert [b"8"] == [one.key[2] for one in journal.load(0.0, 1100.0)]
    assert [pytest.approx(30.0)] == [one.until for one in journal.load(0.0, 1100.0)]


def test_the_journal_is_bounded(tmp_path: Path) -> None:
    """Above its limit the older half goes; the newest answer stays."""
    small = Journal(tmp_path / "answers.db", max_bytes=200_000)
    big = Message(ROUTE.topic, bytes(10_000))
    for number in range(100):
        key = ("t", ROUTE.topic, number.to_bytes(2, "big"))
        small.write(Record((Recorded(key, b"f", big, 60.0 + number),), ()), 0.0, 0.0)
    kept = small.load(0.0, 0.0)
    small.close()

    assert len(kept) * 10_000 <= 250_000
    assert (99).to_bytes(2, "big") == kept[-1].key[2]


def test_one_daemon_has_a_journal(journal: Journal, tmp_path: Path) -> None:
    """Two daemons with one folder would give each other's answers."""
    with pytest.raises(SettingsError, match="Another daemon writes the journal"):
        Journal(tmp_path / "answers.db")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(SettingsError, match="cannot be written"):
        Journal(tmp_path / "file" / "answers.db")


@pytest.mark.parametrize("damage", [b"no database at all" * 100, b"SQLite format 3\0" + bytes(4096)])
def test_a_broken_journal_is_put_aside(damage: bytes, tmp_path: Path) -> None:
    """It is kept for whoever wants to look at it, and a new one is begun."""
    file = tmp_path / "answers.db"
    file.write_bytes(damage)
    journal = Journal(file)
    journal.write(Record((recorded(),), ()), 0.0, 0.0)

    assert 1 == len(journal.load(0.0, 0.0))
    assert damage == (tmp_path / "answers.db.broken").read_bytes()
    journal.close()


def altered(file: Path, statement: str) -> list[Recorded]:
    """What is left of three answers after somebody else had his way with the file."""
    journal = Journal(file)
    journal.write(Record((recorded(key=b"1"), recorded(key=b"2"), recorded(key=b"3")), ()), 0.0, 1000.0)
    journal.close()
    with closing(sqlite3.connect(file)) as database, database:
        database.execute(statement)
    reopened = Journal(file)
    found = reopened.load(0.0, 1000.0)
    reopened.write(Record((recorded(key=b"4"),), ()), 0.0, 1000.0)
    assert "" == reopened.problem
    reopened.close()
    return found


@pytest.mark.parametrize(
    "change",
    [
        "until = 'soon'", "user = '{'", "user = '[1]'", "user = '[[1, 2]]'", "user = x'00'", "payload = 'text'",
        "content_type = x'00'", "echoed = 'text'", "fingerprint = 5", "taken = 'x'", "reply_topic = ''",
        "reply_topic = 'a/+'", "request_topic = x'ff'",
    ],
)  # fmt: skip
def test_a_row_that_is_none_of_ours_is_left_out(change: str, tmp_path: Path) -> None:
    """A disk that altered one answer costs that one at most, and never a daemon's start."""
    found = altered(tmp_path / "answers.db", f"UPDATE answers SET {change} WHERE correlation = x'32'")

    assert [(b"1", ANSWER.payload), (b"3", ANSWER.payload)] == [(one.key[2], one.answer.payload) for one in found]


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE answers",
        "UPDATE answers SET user = CAST(x'ff' AS TEXT)",  # text that is not UTF-8
        "ALTER TABLE answers DROP COLUMN user",
        "ALTER TABLE answers RENAME COLUMN until TO since",
    ],
)
def test_a_journal_of_another_layout_is_begun_anew(statement: str, tmp_path: Path) -> None:
    assert [] == altered(tmp_path / "answers.db", statement)


def test_a_clock_that_went_back_keeps_no_answer_for_longer(journal: Journal) -> None:
    """A board without a battery starts in 1970: what was to be kept for a minute is kept for a minute."""
    journal.write(Record((recorded(until=60.0),), ()), 0.0, 1.8e9)
    (found,) = journal.load(5.0, 0.0)

    assert 5.0 + REMEMBERED_S == found.until
    assert REMEMBERED_S == found.answer.properties.message_expiry_s


def test_a_full_disk_costs_the_journal_and_not_the_answer(tmp_path: Path) -> None:
    """A write that fails is noted, not raised; some time later it is tried again."""
    journal = Journal(tmp_path / "answers.db")
    assert journal._database is not None
    journal._database.execute("PRAGMA max_page_count = 1")  # SQLite's own way of a disk without room
    big = Recorded(("t", "r", b"1"), b"f", Message("r", bytes(100_000)), 60.0)
    journal.write(Record((big,), ()), 0.0, 0.0)

    assert "full" in journal.problem

    journal.write(Record((recorded(),), ()), 1.0, 0.0)  # too early to try again
    assert [] == journal.load(1.0, 0.0)
    journal.write(Record((recorded(),), ()), 11.0, 0.0)
    assert ("", 1) == (journal.problem, len(journal.load(11.0, 0.0)))
    journal.close()


def test_a_killed_process_loses_nothing_it_wrote(tmp_path: Path) -> None:
    """kill -9 right after `write` came back: the next process reads it, and nobody holds the file."""
    file = tmp_path / "answers.db"
    script = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, os.getcwd())\n"
        "from tests.mqtt.test_journal import *\n"
        f"Journal(Path({os.fspath(file)!r})).write(Record((recorded(),), ()), 0.0, 0.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False)
    journal = Journal(file)

    assert -signal.SIGKILL == done.returncode
    assert [recorded().key] == [one.key for one in journal.load(0.0, 0.0)]
    journal.close()


@given(
    correlation=st.binary(max_size=128),
    payload=st.binary(max_size=200),
    content_type=st.none() | st.text(max_size=20),
    user=st.lists(st.tuples(st.text(max_size=10), st.text(max_size=10)), max_size=4),
)
def test_what_is_written_comes_back(
    correlation: bytes,
    payload: bytes,
    content_type: str | None,
    user: list[tuple[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Any answer that MQTT can carry."""
    properties = Properties(
        correlation_data=correlation, content_type=content_type, message_expiry_s=60, user=tuple(user)
    )
    one = Recorded(("t", "r", correlation), b"f", Message("r", payload, properties=properties), 60.0)
    journal = Journal(tmp_path_factory.mktemp("journal") / "answers.db")
    journal.write(Record((one,), ()), 0.0, 5e8)
    found = journal.load(0.0, 5e8)
    journal.close()

    assert [one] == found
