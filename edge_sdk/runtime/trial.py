"""An engine that was built and is not proven yet: noted on disk, so that the next process knows what ended this one.

    trial = Trial(package, store)
    trial.note("building")      # then it is built, and lies in the store for everybody to load
    trial.note("proving")       # then it is loaded for the first time, and asked
    trial.end()                 # it answers as it should, or it was discarded

A process that finds the note of another one knows that this one ended in between. An engine that was never proven is
not loaded as if it had been. And one whose trial ended the process - a defect in native code, a lost device - is not
built again at once: else a device would build, crash and start for ever.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Literal

from edge_sdk.backends.registry import trial_mark
from edge_sdk.package import EnginePackage

Stage = Literal["building", "proving"]

_THIS_PROCESS = secrets.token_hex(8)
"""Process ids come again, in a container even at once."""


class Trial:
    """The note about one package's engine."""

    def __init__(self, package: EnginePackage, store: Path | None) -> None:
        self._mark = trial_mark(package, store=store)

    def note(self, stage: Stage) -> None:
        """Best effort: where nothing can be written, no engine will lie either."""
        try:
            self._mark.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._mark.write_text(f"{stage} {_THIS_PROCESS}\n", encoding="ascii")
        except OSError:
            pass

    def interrupted(self) -> Stage | None:
        """At which stage another process ended; None if none did."""
        try:
            stage, _, process = self._mark.read_text(encoding="ascii", errors="replace").strip().partition(" ")
        except OSError:
            return None
        if process == _THIS_PROCESS:
            return None
        return "building" if stage == "building" else "proving"

    def end(self) -> None:
        try:
            self._mark.unlink(missing_ok=True)
        except OSError:
            pass
