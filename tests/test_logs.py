"""The log: lines for a person, objects for a machine, priorities for the journal; nobody else writes a line of it."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.logs import FIELDS, LogFormat, begin_logging, is_journal
from edge_sdk.mqtt.client import Client
from edge_sdk.mqtt.transports.base import Message, Properties
from tests.brokers import Broker
from tests.daemon.conftest import broker  # noqa: F401  # pytest finds the fixture by this name
from tests.daemon.processes import running_daemon
from tests.daemon.test_requests import Wire
from tests.packages import make_package, misbehaving

log = logging.getLogger("edge_sdk.tests")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("edge_sdk")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    logging.captureWarnings(False)


def written(form: LogFormat, *what: Any, level: int = logging.WARNING, **how: Any) -> str:
    stream = io.StringIO()
    begin_logging(form, "debug", stream=stream)
    log.log(level, *what, **how)
    return stream.getvalue()


def test_a_person_reads_time_level_and_message() -> None:
    line = written("text", "%s failed.", "digits", extra={"model": "digits"})

    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING digits failed\.\n", line), line


def test_a_machine_reads_an_object() -> None:
    """The fields that the line knows, and no others; the time is UTC and has an offset."""
    told = json.loads(written("json", "%s failed.", "digits", extra={"model": "digits", "ticket": 7, "client": None}))

    at = datetime.fromisoformat(told.pop("time").replace("Z", "+00:00"))

    assert abs((datetime.now(timezone.utc) - at).total_seconds()) < 60
    assert {
        "level": "warning",
        "logger": "edge_sdk.tests",
        "message": "digits failed.",
        "model": "digits",
        "ticket": 7,
    } == told


def test_a_traceback_is_a_field() -> None:
    """One line, also for what is many to a person."""
    try:
        raise ValueError("broken")
    except ValueError:
        lines = written("json", "A defect.", exc_info=True).splitlines()

    assert 1 == len(lines)
    assert json.loads(lines[0])["exception"].endswith("ValueError: broken")


@given(st.text(max_size=60), st.sampled_from(["text", "json"]))
def test_nobody_writes_a_line_of_his_own(text: str, form: LogFormat) -> None:
    """Whatever a stranger's topic holds, it is one line, and none of it moves a terminal's cursor."""
    line = written(form, "A message on %s.", text)

    assert 1 == len(line.splitlines())
    assert line.endswith("\n")
    assert form == "json" or not any(ord(character) < 32 for character in line[:-1])


def test_the_level_is_ours_alone() -> None:
    """`debug` lets our debug lines through, and not those of every library."""
    stream = io.StringIO()
    begin_logging("text", "debug", stream=stream)
    logging.getLogger("edge_sdk.x").debug("ours")
    logging.getLogger("other").debug("theirs")
    logging.getLogger("other").warning("theirs, too")

    messages = [line.split(" ", 3)[3] for line in stream.getvalue().splitlines()]

    assert ["ours", "theirs, too"] == messages


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_journal_is_told_the_priority_of_each_line(
    form: LogFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sd-daemon(3) reads it, before each line of a traceback too; the journal has the time."""
    with (tmp_path / "journal").open("w+") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        begin_logging(form, "info", stream=stream)
        log.info("An information.")
        log.error("A failure.", exc_info=(ValueError, ValueError("broken"), None))
        stream.flush()
        stream.seek(0)
        first, *rest = stream.read().splitlines()

    assert first.startswith("<6>INFO An" if form == "text" else '<6>{"time":')
    assert {"<3>"} == {line[:3] for line in rest}
    assert ("broken" in rest[-1], form == "text") == (True, len(rest) > 1)


def test_another_stream_is_not_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is inherited by what a service starts, and redirects: only the stream that it names counts."""
    monkeypatch.setenv("JOURNAL_STREAM", "8:123456789")

    assert not is_journal(sys.__stderr__ or sys.stderr)
    assert not is_journal(io.StringIO())


def test_a_daemon_logs_objects(broker: Broker, tmp_path: Path) -> None:  # noqa: F811
    """Every line of it is one; a model that does not load is told with its name and version."""
    engines = tmp_path / "engines"
    make_package(engines / "odd", misbehaving([{"do": "raise"}]), name="odd", backend="reference")
    settings = {"device": "structured", "log_format": "json"}
    with running_daemon(engines, broker.url, tmp_path, **settings) as daemon:
        with Client(broker.url, device="structured") as client:
            daemon.wait_for_state(client, "odd", "UNAVAILABLE")
        daemon.stop()
    lines = [json.loads(line) for line in daemon.said().splitlines()]
    failed = next(line for line in lines if "did not load" in line["message"])

    known = {"time", "level", "logger", "message"}

    assert lines
    assert all(known <= set(line) <= {*known, "exception", *FIELDS} for line in lines)
    assert ("error", "odd", "1") == (failed["level"], failed["model"], failed["version"])


def test_a_failing_request_is_told_with_its_particulars(broker: Broker, tmp_path: Path) -> None:  # noqa: F811
    """Model, version, ticket, client and code; and of a message without a way back, its topic."""
    engines = tmp_path / "engines"
    make_package(engines / "odd", misbehaving([{"do": "raise", "when": 666.0}]), name="odd", backend="reference")
    settings = {"device": "telling", "log_format": "json"}
    with running_daemon(engines, broker.url, tmp_path, ready=["odd"], **settings) as daemon:
        wire = Wire(broker.url, name="asker")
        body = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[666,0,0,0]}]}'
        answer = wire.ask(body, topic="edge/v1/telling/models/odd/infer")
        elsewhere = Properties(response_topic="elsewhere/x", correlation_data=b"1")
        wire.send(Message("edge/v1/telling/models/odd/infer", body, properties=elsewhere))
        wire.ask(body, topic="edge/v1/telling/models/odd/infer")
        wire.transport.close()
        daemon.stop()
    lines = [json.loads(line) for line in daemon.said().splitlines()]
    failed = next(line for line in lines if "failed on a request" in line["message"])
    unroutable = next(line for line in lines if "was not answered" in line["message"])

    assert "500" == answer.properties.user_value("status")
    assert ("odd", "1", "inference_failed") == (failed["model"], failed["version"], failed["code"])
    assert isinstance(failed["ticket"], int)
    assert failed["client"]
    assert "edge/v1/telling/models/odd/infer" == unroutable["topic"]
