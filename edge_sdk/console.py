"""What the command line shows a person: tables, sizes, progress bars. Nothing here decides or measures."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import click


def table(rows: Sequence[Sequence[str]], *, indent: int = 0) -> str:
    """`rows` as aligned columns, the first row being the heading; columns of numbers are set to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = [all(_is_number(row[column]) for row in rows[1:]) and len(rows) > 1 for column in range(len(widths))]
    lines = []
    for row in rows:
        cells = [text.rjust(width) if flush else text.ljust(width) for text, width, flush in zip(row, widths, right)]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    lines.insert(1, " " * indent + "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def program() -> str:
    """How this program is called from the shell we were started in, for commands that a person is to paste."""
    script = Path(sys.argv[0])
    if script.name != "edge-sdk":
        return f"{shlex.quote(sys.executable)} -m edge_sdk"
    found = shutil.which("edge-sdk")
    return "edge-sdk" if found is not None and script.resolve() == Path(found).resolve() else shlex.quote(sys.argv[0])


def size(size_bytes: int) -> str:
    """Bytes as a person reads them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} B"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} ms" if value < 10 else f"{value:.1f} ms"


class Progress:
    """One bar after another on stderr, as steps report how far they are; a line for each where nobody watches.

    >>> with Progress() as progress:
    ...     build_engine(spec, progress=progress)
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._step = ""
        self._bar: Any = None
        self._done = 0

    def __call__(self, step: str, done: int, total: int) -> None:
        if self._quiet:
            return
        if step != self._step:
            self._end_bar()
            self._step, self._done = step, 0
            self._bar = click.progressbar(
                length=max(1, total), label=f"{step[:28]:<28}", file=sys.stderr, show_eta=total > 20, width=30
            )
            self._bar.__enter__()
        self._bar.update(done - self._done)
        self._done = done

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_bar()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


def _is_number(text: str) -> bool:
    return text == "-" or text[:1].isdigit() or text[:1] in "+-"
