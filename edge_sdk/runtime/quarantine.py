"""Which requests ended the process that computed them, and what becomes of them when they come again: pure decisions.

A request whose computation takes the process down is not acknowledged, so the broker gives it to the next process, for
ever. And whatever was in the same batch looks just as guilty. So, of the keys that were being computed at a crash:

* After one crash each is a *suspect*. It is computed alone, with nothing else under way in the whole process (see
  `solitary`): if the process lives, it is acquitted; if not, there is no doubt left.
* After `CRASHES` it is *barred*: answered with an error, and not computed before `BARRED_S` have passed.
* A process that was killed may have been killed by anybody, for any reason, and again. So that makes suspects, too, and
  bars only after `ENDS`: whoever was alone each time, so often in a row, did not meet somebody's `kill -9` by chance.

    quarantine = Quarantine(records)        # what former processes left
    quarantine.ended(keys, now, killed=...) # what the last one was computing when it ended
    quarantine.verdict(key, now)            # "clear", "suspect" or "barred"
    quarantine.acquit(key)                  # it was computed, and the process lives

Times are seconds of a clock that outlives the process and starts anew with the machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

CRASHES = 2
"""A first one may have been anybody's: the request beside it, memory that ran out elsewhere."""
ENDS = 8
"""Crashes and kills together."""
BARRED_S = 3600.0
"""As long as a broker keeps a session by our default settings: what it holds back for us is older then."""
MAX_RECORDS = 256
"""The newest stay. One batch is the most that a crash adds, times the models that computed."""

Verdict = Literal["clear", "suspect", "barred"]


@dataclass(frozen=True)
class Record:
    """How often the process ended while it computed the request of this key, and when it last did."""

    key: int
    crashes: int
    """It ended by itself: a fatal signal, a hang, memory that ran out."""
    kills: int
    """It was ended by somebody, or left no trace."""
    at: float


class Quarantine:
    """The requests that are under suspicion. They only become fewer while a process lives."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._records = {record.key: record for record in records}

    def __bool__(self) -> bool:
        return bool(self._records)

    def ended(self, keys: Iterable[int], now: float, *, killed: bool = False) -> None:
        """Note that a process ended while it computed the requests of these `keys`; by itself, or `killed`."""
        self._lapse(now)
        for key in dict.fromkeys(keys):
            former = self._records.pop(key, Record(key, 0, 0, now))  # the newest last
            crashes, kills = former.crashes + (not killed), former.kills + killed
            self._records[key] = Record(key, crashes, kills, now)
        while len(self._records) > MAX_RECORDS:
            del self._records[next(iter(self._records))]

    def verdict(self, key: int, now: float) -> Verdict:
        """What to do with the request of this `key`."""
        record = self._records.get(key)
        if record is None or _has_lapsed(record, now):
            return "clear"
        if record.crashes >= CRASHES or record.crashes + record.kills >= ENDS:
            return "barred"
        return "suspect"

    def acquit(self, key: int) -> None:
        """It was computed alone, and the process lives."""
        self._records.pop(key, None)

    def ends(self, key: int) -> int:
        """How often the process ended while it computed this one."""
        record = self._records.get(key)
        return record.crashes + record.kills if record is not None else 0

    def barred_s(self, key: int, now: float) -> float:
        """How long a barred request stays so, in seconds."""
        record = self._records.get(key)
        return max(0.0, record.at + BARRED_S - now) if record is not None else 0.0

    def records(self, now: float) -> tuple[Record, ...]:
        """What the next process has to know, the oldest first."""
        self._lapse(now)
        return tuple(self._records.values())

    def count(self, verdict: Verdict, now: float) -> int:
        """How many requests are under this verdict."""
        return sum(self.verdict(key, now) == verdict for key in list(self._records))

    def _lapse(self, now: float) -> None:
        for record in list(self._records.values()):
            if _has_lapsed(record, now):
                self._records.pop(record.key, None)


def _has_lapsed(record: Record, now: float) -> bool:
    """A moment that is still to come is one of another clock: of the machine before it was started anew."""
    return not record.at <= now < record.at + BARRED_S
