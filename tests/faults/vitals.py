"""What a process holds, from /proc: memory, threads, descriptors, and the processor time it has used."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Vitals:
    rss_bytes: int
    threads: int
    fds: int
    cpu_s: float


def vitals(pid: int) -> Vitals | None:
    """None if there is no such process, or not any more."""
    place = Path(f"/proc/{pid}")
    try:
        # The name in the second field may hold anything; what follows its bracket does not.
        fields = (place / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return Vitals(
            rss_bytes=int(fields[21]) * _PAGE,
            threads=int(fields[17]),
            fds=len(list((place / "fd").iterdir())),
            cpu_s=(int(fields[11]) + int(fields[12])) * _TICK_S,
        )
    except (OSError, ValueError, IndexError):
        return None


def disk_bytes(folder: Path) -> int:
    """What lies in a folder and below it."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.lstat().st_size
        except OSError:
            continue
    return total
