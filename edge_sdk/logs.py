"""The daemon's log on stderr: for a person, or one JSON object a line for what collects logs.

    WARNING squeezenet failed on a request: Not enough memory. (3 so far.)
    {"time":"2026-11-22T17:25:39.120Z","level":"warning","logger":"edge_sdk.runtime.worker","message":"squeezenet failed
     on a request: ...","model":"squeezenet","version":"1","ticket":17,"client":"line-3","code":"out_of_memory"}

In JSON, what a line is about stands in fields of their own (FIELDS; a line has those that it knows), and a traceback in
`exception`. Only what Python logs is JSON: native code of a runtime writes to stderr as it likes.

Under systemd, where stderr is the journal (systemd.exec(5), JOURNAL_STREAM), each line begins with its priority as
`<4>`, which journald takes off and keeps as PRIORITY (sd-daemon(3)): `journalctl -p warning -u edge-sdk` works. The
journal has the time, so a line for a person does not.

Texts of others come into a log, a topic for one: control characters in a message are escaped, so that nobody can write
a line of his own.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]

FIELDS = ("model", "version", "ticket", "client", "code", "topic")
"""What a line may be about, given to a logger as `extra`. `code` is the wire contract's."""

_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
"""syslog's: critical, error, warning, informational, debug."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def begin_logging(form: LogFormat, level: str, *, stream: TextIO | None = None) -> None:
    """Log to `stream` (None: stderr) from now on, in the place of what was set up before."""
    stream = stream or sys.stderr
    journal = is_journal(stream)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines(form, journal=journal))
    logging.basicConfig(handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("edge_sdk").setLevel(level.upper())


def is_journal(stream: TextIO) -> bool:
    """Whether what is written there goes to journald: systemd names the device and inode of the socket it gave."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class Lines(logging.Formatter):
    """A record as a line; as several where a person is shown a traceback."""

    def __init__(self, form: LogFormat, *, journal: bool = False) -> None:
        super().__init__()
        self._is_json = form == "json"
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        lines = self._json(record) if self._is_json else self._text(record)
        if not self._journal:
            return lines
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in lines.split("\n"))

    def _text(self, record: logging.LogRecord) -> str:
        line = f"{record.levelname} {_CONTROL.sub(_escaped, record.getMessage())}"
        if not self._journal:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(record.created))},{record.msecs:03.0f} {line}"
        return f"{line}\n{self._traceback(record)}" if record.exc_info else line

    def _json(self, record: logging.LogRecord) -> str:
        told: dict[str, object] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        told.update((name, value) for name in FIELDS if (value := getattr(record, name, None)) is not None)
        if record.exc_info:
            told["exception"] = self._traceback(record)
        return json.dumps(told, separators=(",", ":"), default=str)

    def _traceback(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info) if record.exc_info else ""


def _escaped(found: re.Match[str]) -> str:
    return f"\\x{ord(found.group()):02x}"
