"""What a process holds and may hold, as the kernel says; and how it gives back what it does not use.

Whatever cannot be read is 0 or None: a figure in the stats, and never a reason to fail.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

_ROOT = Path("/")
_LARGE_BYTES = 4 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""As in glibc's malloc.h."""


def resident_bytes() -> int:
    """Memory of this process that is really there, the libraries it maps included."""
    return memory_of("self")[0]


def private_bytes() -> int:
    """The same without what lies in files: what grows with each model, where its runtime's library is there already."""
    return memory_of("self")[1]


def memory_of(process: int | str) -> tuple[int, int]:
    """Both of the above of any process, by its id."""
    try:
        _, resident, from_files, *_ = map(int, Path(f"/proc/{process}/statm").read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return 0, 0
    page = os.sysconf("SC_PAGE_SIZE")
    return resident * page, (resident - from_files) * page


def limit_bytes(root: Path = _ROOT) -> int | None:
    """What the control groups of this process let it have, swap left aside; None where they set no limit.

    Every group on the way up counts (systemd's `MemoryMax=` is one, a container's limit another), in version 2 as in 1.
    `root` stands for the root of the file system, for tests.
    """
    found = [int(text) for file in _limit_files(root) if (text := _text(file).strip()).isdigit()]
    return min((limit for limit in found if limit < 1 << 60), default=None)  # version 1 says "none" in a large number


def memory_kills(root: Path = _ROOT) -> int:
    """How many processes the kernel has ended because memory ran out: in our control group, else on the machine."""
    for path in re.findall(r"^0::/(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE):
        for mount in (root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"):
            if found := re.search(r"^oom_kill (\d+)$", _text(mount / path / "memory.events"), re.MULTILINE):
                return int(found[1])
    found = re.search(r"^oom_kill (\d+)$", _text(root / "proc/vmstat"), re.MULTILINE)
    return int(found[1]) if found else 0


def trim() -> None:
    """Give what was freed back to the system. glibc keeps it otherwise, for the process to use again; others do not."""
    if (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)


def return_large_pieces() -> None:
    """Let what is freed in pieces of 4 MB and more go back to the system at once, for the life of this process.

    glibc begins so, at 128 kB, and learns to keep what is freed: after the first model of 10 MB, pieces up to that size
    leave holes in its heap. With a fixed bound the load of a 10 MB graph peaks at 20 MB, without at 34 (measured). What
    requests bring stays below it, and is used again as before.
    """
    try:
        mallopt: Any = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES)  # as glibc couples them itself


@cache
def _malloc_trim() -> Any:
    """glibc's function; None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


def _limit_files(root: Path) -> Iterator[Path]:
    """Where the limits of our groups may stand. In a container, the group's path may be one of the host's."""
    groups = root / "sys/fs/cgroup"
    for controllers, path in re.findall(r"^\d+:([^:]*):/(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE):
        if not controllers:
            mounts, name = [groups, groups / "unified"], "memory.max"
        elif "memory" in controllers.split(","):
            mounts, name = [groups / "memory"], "memory.limit_in_bytes"
        else:
            continue
        for mount in mounts:
            place = mount / path
            while place.is_relative_to(mount):
                yield place / name
                place = place.parent


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
