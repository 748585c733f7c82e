"""What is fuzzed: one target for each decoder, a function of bytes whose docstring states what holds for all of them.

    @target(seeds=lambda: [encode_puback(7)[2:]])
    def puback(data: bytes) -> None:
        "A packet id and a reason code, or MalformedPacket."

A target returns when its promise held, and raises whatever broke it: an error that is not its decoder's own, or an
AssertionError. That it ends in time and in bounded memory is for the caller to watch; see `LIMITS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOMS = ("wire", "payloads", "files")
"""The modules of this folder that define targets."""

KEPT = Path(__file__).parent / "kept"
"""Inputs that once broke a promise, as `<target>/<what it was>`; every run begins with them."""


@dataclass(frozen=True)
class Limits:
    seconds: int
    """Of one input; the slowest, a picture of 50 million pixels, takes one."""
    memory_mb: int
    """Resident, of the whole process."""


LIMITS = Limits(seconds=10, memory_mb=1536)


@dataclass(frozen=True)
class Target:
    name: str
    check: Callable[[bytes], None]
    make_seeds: Callable[[], list[bytes]]
    max_bytes: int
    words: tuple[str, ...]
    """What a grammar is made of; a fuzzer that knows them need not find them letter by letter."""

    @property
    def promise(self) -> str:
        return (self.check.__doc__ or "").strip()

    def seeds(self) -> list[bytes]:
        """Well-formed inputs to start from, and all that were ever found to be of interest."""
        kept = sorted(file for file in (KEPT / self.name).glob("*") if file.is_file())
        return [*self.make_seeds(), *(file.read_bytes() for file in kept)]


_found: dict[str, Target] = {}


def target(
    *, seeds: Callable[[], list[bytes]], max_bytes: int = 4096, words: Sequence[str] = ()
) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Make a target of a function; its name is the function's, with hyphens."""

    def keep(check: Callable[[bytes], None]) -> Callable[[bytes], None]:
        name = check.__name__.replace("_", "-")
        _found[name] = Target(name, check, seeds, max_bytes, tuple(words))
        return check

    return keep


def targets() -> dict[str, Target]:
    """All of them, by name."""
    for room in ROOMS:
        importlib.import_module(f"tests.fuzz.{room}")
    return dict(_found)


class Pieces:
    """Bytes taken apart from the front, for a target that needs more than one value; at the end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def byte(self) -> int:
        first, self._data = self._data[:1], self._data[1:]
        return first[0] if first else 0

    def number(self) -> int:
        return self.byte() << 8 | self.byte()

    def take(self) -> bytes:
        """A piece that says its own length, in one byte."""
        length = self.byte()
        piece, self._data = self._data[:length], self._data[length:]
        return piece

    def text(self) -> str:
        """As MQTT allows it: UTF-8 without NUL."""
        return self.take().decode("utf-8", "replace").replace("\0", "")

    def maybe_text(self) -> str | None:
        return self.text() if self.byte() & 1 else None

    def rest(self) -> bytes:
        piece, self._data = self._data, b""
        return piece


def pieces(*values: bytes | int) -> bytes:
    """What `Pieces` takes apart: a number is a byte, bytes say their length."""
    return b"".join(bytes((v,)) if isinstance(v, int) else bytes((len(v),)) + v for v in values)
