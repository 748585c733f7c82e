"""How far an engine has got from being built to being believed: noted on disk, for the next process.

    trial = Trial(package, store)
    trial.note("building")      # then it is built, and lies in the store for everybody to load
    trial.note("proving")       # then it is loaded for the first time, and asked
    trial.end()                 # it answers as it should, or it was discarded
    trial.give_up(version, why) # or there cannot be one: the runtime of that version does not take the graph, say

A process that finds the note of another one knows that this one ended in between. An engine that was never proven is
not loaded as if it had been. And one whose trial ended the process - a defect in native code, a lost device - is not
built again at once: else a device would build, crash and start for ever. What was given up is left alone until the
runtime is another: else every start would spend minutes on finding out the same.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Literal

from edge_sdk.backends.registry import trial_mark
from edge_sdk.package import EnginePackage

Stage = Literal["building", "proving"]

_GIVEN_UP = "given-up"
_THIS_PROCESS = secrets.token_hex(8)
"""Process ids come again, in a container even at once."""


class Trial:
    """The note about one package's engine."""

    def __init__(self, package: EnginePackage, store: Path | None) -> None:
        self._mark = trial_mark(package, store=store)

    def note(self, stage: Stage) -> None:
        self._write(f"{stage} {_THIS_PROCESS}\n")

    def interrupted(self) -> Stage | None:
        """At which stage another process ended; None if none did."""
        stage, process, *_ = self._read()
        if stage == _GIVEN_UP or process in ("", _THIS_PROCESS):
            return None
        return "building" if stage == "building" else "proving"

    def give_up(self, version: str, why: str) -> None:
        """Note that the runtime of this `version` has no engine for the package, and why."""
        self._write(f"{_GIVEN_UP} {_THIS_PROCESS} {version}\n{why}\n")

    def given_up(self, version: str) -> str:
        """Why another process gave up, with the runtime of this `version`; empty if none did.

        It is told once: who then asks for the model to be loaded again wants it tried again.
        """
        stage, process, noted, why = self._read()
        if stage != _GIVEN_UP or process == _THIS_PROCESS or noted != version:
            return ""
        self.give_up(version, why)
        return why

    def end(self) -> None:
        try:
            self._mark.unlink(missing_ok=True)
        except OSError:
            pass

    def _write(self, text: str) -> None:
        """Best effort: where nothing can be written, no engine will lie either."""
        try:
            self._mark.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._mark.write_text(text, encoding="utf-8")
        except OSError:
            pass

    def _read(self) -> tuple[str, str, str, str]:
        """Stage, process, version and reason; empty where there is no note, or no such part of it."""
        try:
            first, _, why = self._mark.read_text(encoding="utf-8", errors="replace").partition("\n")
        except OSError:
            return "", "", "", ""
        stage, process, version = [*first.split(" ", 2), "", "", ""][:3]
        return stage, process, version, why.strip()
