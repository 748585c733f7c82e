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

A disk that is full, read-only or gone costs the journal, never an answer: `write` says so once, and tries again later.
Moments are a monotonic clock's in the session and the wall clock's on disk. A step of the wall clock lets answers be
forgotten early or kept late, within `remembered_s`.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from edge_sdk.errors import SettingsError
from edge_sdk.mqtt.session import Key, Record, Recorded
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
        with self._database:
            self._database.execute("DELETE FROM answers WHERE until <= ?", (wall,))
        rows = self._database.execute("SELECT * FROM answers ORDER BY until")
        return [_recorded(row, now, wall) for row in rows]

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
        except (sqlite3.Error, SettingsError) as exc:
            self._give_up(exc, now)
        else:
            if self.problem:
                log.info("The journal %s is written again.", self._file)
            self.problem = ""

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
            except sqlite3.DatabaseError as exc:
                if isinstance(exc, sqlite3.OperationalError):
                    raise
                log.error("The journal %s is broken (%s); it is put aside and begun anew.", self._file, exc)
                self._file.replace(self._file.with_name(f"{self._file.name}.broken"))
                for tail in ("-wal", "-shm"):
                    self._file.with_name(self._file.name + tail).unlink(missing_ok=True)
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


def _recorded(row: Iterator[Any], now: float, wall: float) -> Recorded:
    request, reply, correlation, fingerprint, payload, content_type, echoed, user, until, taken = row
    remaining_s = until - wall
    key: Key = (request, reply, correlation)
    properties = Properties(
        correlation_data=echoed,
        content_type=content_type,
        message_expiry_s=max(1, round(remaining_s)),
        user=tuple((name, value) for name, value in json.loads(user)),
    )
    answer = Message(reply, payload, properties=properties)
    return Recorded(key, fingerprint, answer, now + remaining_s, bool(taken))
