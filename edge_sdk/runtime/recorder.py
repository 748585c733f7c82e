"""What is being computed at this moment, noted where the end of the process does not reach it.

    recorder = FlightRecorder.open(file)
    flight = recorder.begin(model, requests)    # before anything of them is decoded or computed
    recorder.end(flight)
    recorder.close()                            # a clean end: nothing was being computed

A *flight* is a batch on its way. Its requests' keys lie in a small file that is mapped into memory: a store into a page
of the kernel's, no system call, no lock. If the process ends in between, by whatever means, the next one finds them
there and puts them into `quarantine`. The file outlives the process and not the machine, so nothing is ever synced; it
belongs in a folder that lies in memory.

Whose doing the end was, three things tell: a fatal signal leaves *last words* in a file beside it (the stack of every
thread, by faulthandler; systemd's watchdog sends such a signal), who ends the process on purpose says so (`confess`,
`excuse`), and the kernel counts what it kills when memory runs out. Without any of them somebody killed it.

Layout, in the machine's own byte order: MAGIC; a number that stands for the machine's current life; what the kernel had
killed for memory when the process began; whether it confessed; CELLS keys of 8 bytes that are being computed, 0 where
nothing is; MAX_RECORDS records (key, crashes, kills, moment) of 8 bytes each.

Without a file the flights are known to this process alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import logging
import math
import mmap
import os
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from edge_sdk import host
from edge_sdk.runtime.messages import SELF_TEST, Request
from edge_sdk.runtime.quarantine import MAX_RECORDS, Quarantine, Record

try:
    import fcntl
except ImportError:  # Windows, where a second daemon of the same name is not noticed here
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

MAGIC = b"edgefly2"
CELLS = 4096
"""Requests that can be on their way at a time; what is beyond them is computed all the same, and not noted."""

_HEADER = struct.Struct("=8sQQQ")
_CONFESSED_AT = _HEADER.size - 8
_RECORD = struct.Struct("=QQQd")
_RECORDS_AT = _HEADER.size + 8 * CELLS
_SIZE = _RECORDS_AT + _RECORD.size * MAX_RECORDS

_LAST_WORDS = ".last-words"
"""Of the file beside ours, what its name ends in."""
_TOLD = 4000
"""Characters of the last words that the log is given: the thread that did it comes first."""


class Flight:
    """A batch on its way, and who asked for it."""

    __slots__ = ("cells", "limit_s", "model", "number", "requests", "waits")

    def __init__(self, number: int, model: str, requests: Sequence[Request], limit_s: float) -> None:
        self.number = number
        self.limit_s = limit_s
        """What it takes at most, unless it hangs."""
        self.model = model
        self.requests = requests
        self.cells: list[int] = []
        self.waits: Callable[[], bool] | None = None
        """Whether it waits for others that compute, and so stands still without hanging."""

    def __str__(self) -> str:
        if self.requests[0].ticket == SELF_TEST:
            return f"a self-test of {self.model}"
        tickets = ", ".join(str(request.ticket) for request in self.requests[:8])
        more = f" and {len(self.requests) - 8} more" if len(self.requests) > 8 else ""
        return f"request{'s' if len(self.requests) > 1 else ''} {tickets}{more} of {self.model}"


class FlightRecorder:
    """The flights of one process. Safe to use from any thread; `begin` and `end` of one flight need not share one."""

    def __init__(self) -> None:
        """One without a file; see `open`."""
        self.quarantine = Quarantine()
        """The requests that former processes ended with."""
        self._numbers = itertools.count(1)
        self._open: dict[int, Flight] = {}
        self._file: int | None = None
        self._last_words: int | None = None
        self._map: mmap.mmap | None = None
        self._cells: memoryview | None = None
        self._free: list[int] = []  # cells that were used and are free again; the last is taken first
        self._fresh = itertools.count()

    @classmethod
    def open(cls, file: Path) -> FlightRecorder:
        """One that writes to `file`, with what is left there of former processes taken up.

        Where that cannot be (another daemon has it, the folder cannot be written), the log says so, and the recorder
        has no file.
        """
        recorder = cls()
        try:
            recorder._attach(file)
        except OSError as exc:
            recorder.close()
            log.warning(
                "What is being computed is not noted in %s: %s. A request that ends this process will be computed "
                "again by each that follows.", file, exc.strerror or exc,
            )  # fmt: skip
        return recorder

    def begin(self, model: str, requests: Sequence[Request], limit_s: float = math.inf) -> Flight:
        """Note that `requests` are about to be computed."""
        flight = Flight(next(self._numbers), model, requests, limit_s)
        self._open[flight.number] = flight
        if (cells := self._cells) is not None:
            free = self._free
            for request in requests:
                if key := request.key:
                    try:
                        cell = free.pop()
                    except IndexError:
                        cell = next(self._fresh)
                    if cell < CELLS:
                        cells[cell] = key
                        flight.cells.append(cell)
        return flight

    def end(self, flight: Flight) -> None:
        """Note that a flight has landed."""
        del self._open[flight.number]
        if (cells := self._cells) is not None:
            for cell in flight.cells:
                cells[cell] = 0
                self._free.append(cell)

    def in_flight(self) -> list[Flight]:
        """Everything that is being computed at this moment."""
        return list(self._open.values())

    def write_down(self) -> None:
        """Keep the quarantine, as it is now, for the next process."""
        if self._map is None:
            return
        records = b"".join(
            _RECORD.pack(record.key, record.crashes, record.kills, record.at)
            for record in self.quarantine.records(time.monotonic())
        )
        self._map[_RECORDS_AT:] = records.ljust(_RECORD.size * MAX_RECORDS, b"\0")

    def confess(self) -> None:
        """The process ends now, and what it computes is why."""
        if self._map is not None:
            self._map[_CONFESSED_AT] = 1

    def excuse(self) -> None:
        """The process ends now, and that is not the fault of what it computes."""
        if self._map is not None and self._cells is not None:
            self._cells = None
            self._map[_HEADER.size : _RECORDS_AT] = bytes(8 * CELLS)

    def close(self) -> None:
        """A clean end. What is left on its way is not under suspicion."""
        self.excuse()
        if self._file is not None:
            if fcntl is not None:  # the map, which somebody may still be using, would hold on to it
                fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = None
        if self._last_words is not None:
            faulthandler.disable()
            os.close(self._last_words)
            self._last_words = None

    def _attach(self, file: Path) -> None:
        _make_private(file.parent)
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600)
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise OSError(exc.errno, "another daemon of the same name is using it") from exc
        _allocate(self._file)
        self._map = mmap.mmap(self._file, _SIZE)
        words = self._listen(file.with_name(file.name + _LAST_WORDS))
        this_life, kills = _life_of_machine(), host.memory_kills()
        magic, life, kills_then, confessed = _HEADER.unpack_from(self._map)
        if (magic, life) == (MAGIC, this_life):
            self.quarantine = Quarantine(_records_in(self._map))
            keys = [key for key in struct.unpack_from(f"={CELLS}Q", self._map, _HEADER.size) if key]
            itself = bool(words or confessed or kills != kills_then)
            self.quarantine.ended(keys, time.monotonic(), killed=not itself)
            _tell_of_the_end(keys, words, itself)
        self.write_down()
        self._map[:_RECORDS_AT] = _HEADER.pack(MAGIC, this_life, kills, 0).ljust(_RECORDS_AT, b"\0")
        self._cells = memoryview(self._map)[_HEADER.size : _RECORDS_AT].cast("Q")

    def _listen(self, file: Path) -> str:
        """The last words of the last process, and a place for ours; unless somebody else listens for those already."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        place = os.open(file, flags, 0o600)
        words = os.read(place, _TOLD).decode(errors="replace")
        os.ftruncate(place, 0)
        os.lseek(place, 0, os.SEEK_SET)
        if faulthandler.is_enabled():
            os.close(place)
        else:
            faulthandler.enable(place)
            self._last_words = place
        return words


def _tell_of_the_end(keys: Sequence[int], words: str, itself: bool) -> None:
    if words:
        log.error("The last process ended with a fatal signal; its last words:\n%s", words.rstrip())
    if keys:
        log.warning(
            "The last process %s while it computed %d requests. They are computed alone.",
            "ended" if itself else "was killed", len(keys),
        )  # fmt: skip


def _records_in(mapped: mmap.mmap) -> Iterable[Record]:
    for place in range(MAX_RECORDS):
        key, crashes, kills, at = _RECORD.unpack_from(mapped, _RECORDS_AT + place * _RECORD.size)
        if key:
            yield Record(key, crashes, kills, at)


def _make_private(folder: Path) -> None:
    """A folder that only we can write to: in a folder for everybody, the name alone says nothing about its owner."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid not in (os.getuid(), 0)):
        raise OSError(0, f"{folder} belongs to somebody else")


def _allocate(file: int) -> None:
    """Give the file its size and its place: a store into a mapped page for which the disk has none ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, _SIZE)
    os.ftruncate(file, _SIZE)


def _life_of_machine() -> int:
    """A number that is another one after each start of the machine; 0 where it does not tell."""
    with contextlib.suppress(OSError):
        return zlib.crc32(Path("/proc/sys/kernel/random/boot_id").read_bytes())
    return 0
