"""The journal of `durable` delivery: answers on disk before they are on the wire.

    journal = Journal(folder / "answers.db")
    session.restore(journal.load(now, wall), now)      # what a former daemon had answered
    journal.write(record, now, wall)                   # one transaction for everything that came up in a turn

What it adds: an answer that was computed is not computed again by the next daemon, and its repetition is the same
bytes. What it is not needed for: losing no request. The broker keeps each request until its answer was taken, with or
without a journal.

SQLite in WAL mode with `synchronous=NORMAL`: a killed process loses nothing, a power failure at most the last moments,
whose requests the broker delivers again. One transaction a turn makes it one write for many answers. The file is this
process's alone, as long as it is open: a second daemon with the same folder is refused.

A disk may alter what was written. What cannot be an answer of ours is left out, what cannot be read is put aside, and
neither keeps a daemon from starting.

A disk that is full, read-only or gone costs the journal, never an answer: `write` says so once, and tries again later.
Moments are a monotonic clock's in the session and the wall clock's on disk. A step of the wall clock lets answers be
forgotten early or kept late, by REMEMBERED_S at most.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from edge_sdk.errors import SettingsError
from edge_sdk.mqtt.session import REMEMBERED_S, Key, Record, Recorded
from edge_sdk.mqtt.transports.base import Message, Properties

log = logging.getLogger(__name__)

_RETRY_S = 10.0
_LAYOUT = 1
_CREATE = """
CREATE TABLE IF NOT EXISTS answers (
    request_topic TEXT NOT NULL, reply_topic TEXT NOT NULL, correlation BLOB NOT NULL,
    fingerprint BLOB NOT NULL,
    payload BLOB NOT NULL, content_type TEXT, echoed BLOB, user TEXT NOT NULL,
    until REAL NOT NULL, taken INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (request_topic, reply_topic, correlation)
) WITHOUT ROWID
"""

_BROKEN = (sqlite3.Error, UnicodeError)
"""What a file may make sqlite3 raise; the second where its error message quotes bytes of the file."""

_COLUMNS = (
    "request_topic", "reply_topic", "correlation", "fingerprint", "payload", "content_type", "echoed", "user",
    "until", "taken",
)  # fmt: skip

_DROP_OLDER_HALF = """
DELETE FROM answers WHERE until <=
    (SELECT until FROM answers ORDER BY until LIMIT 1 OFFSET (SELECT COUNT(*) / 2 FROM answers))
"""


class Journal:
    """Answers of one daemon, in one SQLite file. Used by the thread that owns the session."""

    def __init__(self, file: Path, *, max_bytes: int = 64 * 1024 * 1024) -> None:
        """Open or make it. SettingsError if it cannot be written, or another daemon has it.

        A file that is no journal of ours, or a broken one, is put aside as `*.broken` and a new one is begun. Above
        `max_bytes` on disk the oldest answers are dropped.
        """
        self.problem = ""
        """Why nothing is being written; empty while all is well."""
        self._file = file
        self._max_bytes = max_bytes
        self._retry_at = 0.0
        self._database: sqlite3.Connection | None = self._open()

    def load(self, now: float, wall: float) -> list[Recorded]:
        """What was answered and may still be asked for, oldest first. Forgets what is past its time."""
        if self._database is None:
            return []
        try:
            with self._database as database:
                database.execute("DELETE FROM answers WHERE until <= ?", (wall,))
            rows = database.execute("SELECT * FROM answers ORDER BY until").fetchall()
        except _BROKEN as exc:
            self.close()
            if self._is_of_the_place(exc):
                self._give_up(exc, now)
            else:
                self._put_aside(exc)
                self._database = self._open()
            return []
        answers = [answer for row in rows if (answer := _recorded(row, now, wall)) is not None]
        if len(answers) < len(rows):
            log.error("%d of %d answers in the journal %s are broken.", len(rows) - len(answers), len(rows), self._file)
        return answers

    def write(self, record: Record, now: float, wall: float) -> None:
        """Write down what `record` says, in one transaction. A failure is logged once and noted in `problem`."""
        if self.problem and now < self._retry_at:
            return
        try:
            if self._database is None:
                self._database = self._open()
            with self._database as database:
                database.executemany(
                    "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (_row(recorded, now, wall) for recorded in record.answers),
                )
                database.executemany(
                    "UPDATE answers SET taken = 1 WHERE request_topic = ? AND reply_topic = ? AND correlation = ?",
                    record.taken,
                )
                self._drop_oldest(database, wall)
        except (*_BROKEN, SettingsError) as exc:
            self._give_up(exc, now)
        else:
            if self.problem:
                log.info("The journal %s is written again.", self._file)
            self.problem = ""

    @property
    def size_bytes(self) -> int:
        """What the journal takes on disk, with what SQLite keeps beside it."""
        size = 0
        for file in (self._file, self._file.with_name(f"{self._file.name}-wal")):
            with suppress(OSError):
                size += file.stat().st_size
        return size

    def close(self) -> None:
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
        self._database = None

    def _open(self) -> sqlite3.Connection:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            try:
                return _opened(self._file)
            except _BROKEN as exc:
                if self._is_of_the_place(exc):
                    raise
                self._put_aside(exc)
                return _opened(self._file)
        except sqlite3.OperationalError as exc:
            if "locked" in str(exc):
                raise SettingsError(
                    f"Another daemon writes the journal {self._file}.",
                    fix="Give each daemon a `state` folder of its own.",
                ) from exc
            raise SettingsError(
                f"The journal {self._file} cannot be written: {exc}.",
                fix="Name a folder that can be written with `state`, or choose another `delivery`.",
            ) from exc
        except OSError as exc:
            raise SettingsError(
                f"The journal {self._file} cannot be written: {exc.strerror or exc}.",
                fix="Name a folder that can be written with `state`, or choose another `delivery`.",
            ) from exc

    def _is_of_the_place(self, exc: Exception) -> bool:
        """Whether the disk or another process is at fault, and not what the file holds.

        sqlite has no class for it, and its codes are told from Python 3.11 on only; the texts are `sqlite3_errstr`'s.
        """
        if "readonly" in str(exc):  # a file can say so of itself
            return not (os.access(self._file, os.W_OK) and os.access(self._file.parent, os.W_OK))
        told = ("locked", "unable to open", "disk I/O", "is full", "out of memory")
        return isinstance(exc, sqlite3.OperationalError) and any(text in str(exc) for text in told)

    def _put_aside(self, exc: Exception) -> None:
        log.error("The journal %s is broken (%s); it is put aside and begun anew.", self._file, exc)
        self._file.replace(self._file.with_name(f"{self._file.name}.broken"))
        for tail in ("-wal", "-shm"):
            self._file.with_name(self._file.name + tail).unlink(missing_ok=True)

    def _drop_oldest(self, database: sqlite3.Connection, wall: float) -> None:
        """Forget what is past its time, and beyond that as much as the bound asks for."""
        database.execute("DELETE FROM answers WHERE until <= ?", (wall,))
        (pages,), (free,), (size,) = (
            database.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "freelist_count", "page_size")
        )
        if (pages - free) * size > self._max_bytes:
            database.execute(_DROP_OLDER_HALF)

    def _give_up(self, exc: Exception, now: float) -> None:
        if not self.problem:
            log.error(
                "The journal %s cannot be written (%s). Answers go out all the same; a restart would not know them.",
                self._file, exc,
            )  # fmt: skip
        self.problem = f"the journal cannot be written: {exc}"
        self._retry_at = now + _RETRY_S
        self.close()


def _opened(file: Path) -> sqlite3.Connection:
    database = sqlite3.connect(file, timeout=1.0, check_same_thread=False)
    try:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        (layout,) = database.execute("PRAGMA user_version").fetchone()
        if layout not in (0, _LAYOUT):
            raise sqlite3.DatabaseError(f"it has layout {layout}, not {_LAYOUT}")
        with database:
            database.execute(_CREATE)
            database.execute(f"PRAGMA user_version = {_LAYOUT}")
        columns = tuple(name for _, name, *_ in database.execute("PRAGMA table_info(answers)"))
        if columns != _COLUMNS:
            raise sqlite3.DatabaseError(f"it has the columns {columns}")
        with closing(database.execute("SELECT COUNT(*) FROM answers")) as counted:
            counted.fetchone()
    except BaseException:
        database.close()
        raise
    return database


def _row(recorded: Recorded, now: float, wall: float) -> tuple[Any, ...]:
    properties = recorded.answer.properties
    return (
        *recorded.key,
        recorded.fingerprint,
        recorded.answer.payload,
        properties.content_type,
        properties.correlation_data,
        json.dumps(properties.user),
        wall + (recorded.until - now),
        int(recorded.taken),
    )


def _recorded(row: tuple[Any, ...], now: float, wall: float) -> Recorded | None:
    """The answer in a row; None if it cannot be one that we wrote."""
    try:
        request, reply, correlation, fingerprint, payload, content_type, echoed, user, until, taken = row
        pairs = tuple((name, value) for name, value in json.loads(user))
        remaining_s = min(until - wall, REMEMBERED_S)
        expiry_s = max(1, round(remaining_s))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    texts = (request, reply, content_type or "", *itertools.chain(*pairs))
    blobs = (correlation, fingerprint, payload, echoed or b"")
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(blob, bytes) for blob in blobs):
        return None
    if taken not in (0, 1) or not reply or set(reply) & set("+#\0"):  # a broker closes the connection for such a topic
        return None
    key: Key = (request, reply, correlation)
    properties = Properties(correlation_data=echoed, content_type=content_type, message_expiry_s=expiry_s, user=pairs)
    return Recorded(key, fingerprint, Message(reply, payload, properties=properties), now + remaining_s, bool(taken))
