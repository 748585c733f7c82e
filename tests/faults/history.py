"""What a run of the harness was: who asked what and heard what, and what was done to the daemon meanwhile.

One JSON object a line, in the order of happening; `at` is seconds since the history began. The checker decides from
this file alone, so it can be read again long after the run, or by another program.

    history = History(folder / "history.jsonl")
    history.note(Asked, id="sdk-0/17", client="sdk-0", reference="9f3c...", timeout_s=30.0)
    ...
    check(read(folder / "history.jsonl"))
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal


@dataclass(frozen=True)
class Event:
    """Something that happened."""

    at: float


@dataclass(frozen=True)
class Promised(Event):
    """The bounds that this run is held to; the first line."""

    rss_bytes: int = 250_000_000
    rss_growth: float = 0.25
    """Of the resident size over the life of one daemon, beside what `GROWTH_BYTES` of the checker allows anyway."""
    threads: int = 16
    fds: int = 64
    disk_bytes: int = 10_000_000
    recovery_s: float = 5.0
    availability_s: float = 15.0
    """The will is delayed by 10 s, so that a daemon that restarts at once is never seen to leave."""


@dataclass(frozen=True)
class Asked(Event):
    """A client sent a request for the first time. `reference` is the digest of the outputs that are right."""

    id: str
    client: str
    reference: str
    timeout_s: float
    expected: tuple[int, ...] = (200,)
    """The statuses that are an answer to this question."""


@dataclass(frozen=True)
class SentAgain(Event):
    """The same request under the same id, by a client that lost patience or its connection."""

    id: str


@dataclass(frozen=True)
class Accepted(Event):
    """The broker acknowledged the publication; only clients of bare messages see it."""

    id: str
    code: int


@dataclass(frozen=True)
class Answered(Event):
    """An answer as `client` saw it. `on_wire`: one message; otherwise what a caller of the client library was given."""

    id: str
    client: str
    status: int
    body: str
    """Digest of the bytes."""
    outputs: str
    """Digest of what they mean; empty for an error."""
    duplicate: bool = False
    on_wire: bool = True
    detail: str = ""


@dataclass(frozen=True)
class Link(Event):
    """A client's connection came or went."""

    client: str
    up: bool


@dataclass(frozen=True)
class Fault(Event):
    name: str
    phase: Literal["begins", "ends"]


@dataclass(frozen=True)
class Life(Event):
    """A daemon came or went: `code` is its exit code, `expected` those that are right."""

    pid: int
    what: Literal["started", "ended"]
    code: int | None = None
    expected: tuple[int, ...] = ()


@dataclass(frozen=True)
class Availability(Event):
    """What a bystander was told of the device."""

    payload: str


@dataclass(frozen=True)
class Sampled(Event):
    """What the daemon held."""

    pid: int
    rss_bytes: int
    threads: int
    fds: int
    disk_bytes: int = 0


@dataclass(frozen=True)
class Said(Event):
    """A line of the daemon's log that should not be there."""

    line: str


KINDS: dict[str, type[Event]] = {
    kind.__name__.lower(): kind
    for kind in (Promised, Asked, SentAgain, Accepted, Answered, Link, Fault, Life, Availability, Sampled, Said)
}


class History:
    """Written by many threads, each event as it happens. `path` None keeps it in memory only."""

    def __init__(self, path: Path | None = None, **promises: Any) -> None:
        self.events: list[Event] = []
        self._file = path.open("w", encoding="utf-8") if path is not None else None
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self.note(Promised, **promises)

    def now(self) -> float:
        return round(time.monotonic() - self._began, 6)

    def note(self, kind: type[Event], **facts: Any) -> None:
        with self._lock:
            event = kind(at=self.now(), **facts)
            self.events.append(event)
            if self._file is not None:
                self._file.write(json.dumps({"kind": kind.__name__.lower(), **asdict(event)}) + "\n")

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> History:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path) -> Iterator[Event]:
    """The events of a history, as they were noted."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            facts: dict[str, Any] = json.loads(line)
            kind = KINDS[facts.pop("kind")]
            tuples = {field.name for field in fields(kind) if str(field.type).startswith("tuple")}
            values: dict[str, Any] = {key: tuple(value) if key in tuples else value for key, value in facts.items()}
            yield kind(**values)


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
