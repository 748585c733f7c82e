"""A trace from a client's program through a broker to a daemon, and from both to a collector."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.errors import SettingsError
from edge_sdk.mqtt import tracing
from edge_sdk.mqtt.client import Client
from edge_sdk.mqtt.transports.base import Message
from tests.brokers import Broker
from tests.daemon.processes import running_daemon
from tests.daemon.test_requests import Wire
from tests.packages import make_package, scaling

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")

PROGRAM = """
import sys
import numpy as np
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from edge_sdk import Client

exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
with Client(sys.argv[1], device="traced", timeout_s=30) as client:
    with trace.get_tracer("program").start_as_current_span("whole"):
        client.infer("scale", {"x": np.ones((1, 4), np.float32)})
    try:
        client.infer("none", {"x": np.ones((1, 4), np.float32)})
    except Exception:
        pass
for span in exporter.get_finished_spans():
    context = span.get_span_context()
    parent = span.parent.span_id if span.parent else 0
    print(span.name, span.kind.name, f"{context.trace_id:x}", context.span_id, parent, span.status.status_code.name)
"""


class Collector:
    """Takes what OTLP sends over HTTP, and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
                    ExportTraceServiceRequest,
                    ExportTraceServiceResponse,
                )

                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.resources.append({a.key: a.value.string_value for a in resource.resource.attributes})
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, format: str, *args: Any) -> None:
                """Its spans say enough."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    try:
        yield collector
    finally:
        collector.close()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    make_package(folder / "scale", scaling(2.0), name="scale")
    return folder


def test_a_trace_from_the_program_to_the_engine(broker: Broker, engines: Path, tmp_path: Path) -> None:
    """One trace: the program's span, the client's below it, the device's below that, and its stages; the last spans are
    sent before the daemon ends."""
    with collecting() as collector:
        settings = {"device": "traced", "tracing__endpoint": f"{collector.url}/v1/traces"}
        with running_daemon(engines, broker.url, tmp_path, ready=["scale"], **settings) as daemon:
            command = [sys.executable, "-c", PROGRAM, broker.url]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert 0 == done.returncode, done.stderr
            assert 0 == daemon.stop()
        theirs = {kind: rest for _, kind, *rest in (line.split() for line in done.stdout.splitlines()[:2])}
        spans = [span for span in collector.spans if f"{int.from_bytes(span.trace_id, 'big'):x}" == theirs["CLIENT"][0]]
        by_name = {span.name: span for span in spans if span.kind == 1}
        (server,) = [span for span in spans if span.kind == 2]
        refused = [span for span in collector.spans if span.kind == 2 and span is not server]
        failed = done.stdout.splitlines()[2].split()

    assert theirs["CLIENT"][2] == theirs["INTERNAL"][1]  # the client's span is below the program's
    assert int(theirs["CLIENT"][1]) == int.from_bytes(server.parent_span_id, "big")
    assert {"queue", "infer", "publish"} <= set(by_name) <= {"queue", "decode", "infer", "encode", "publish"}
    assert {server.span_id} == {span.parent_span_id for span in by_name.values()}
    assert all(server.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano for s in by_name.values())
    assert {"service.name": "edge-sdk", "service.instance.id": "traced"}.items() <= collector.resources[0].items()
    assert ["model_not_found"] == [a.value.string_value for a in refused[0].attributes if a.key == "error.type"]
    assert ("CLIENT", "ERROR") == (failed[1], failed[-1])


def test_opentelemetrys_own_variables_are_enough(broker: Broker, engines: Path, tmp_path: Path) -> None:
    """Any client's context is taken up, and the answer carries the device's back."""
    with collecting() as collector:
        with running_daemon(engines, broker.url, tmp_path, device="own") as daemon:
            daemon.kill()
            daemon.start(
                ready=["scale"], extra={"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_SERVICE_NAME": "plant"}
            )
            wire = Wire(broker.url, name="tracing")
            body = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}'
            told = f"00-{'ab' * 16}-{'cd' * 8}-01"
            answer = wire.ask(body, topic="edge/v1/own/models/scale/infer", user={"traceparent": told})
            plain = wire.ask(body, topic="edge/v1/own/models/scale/infer")
            wire.transport.close()
            daemon.stop()
        server = next(span for span in collector.spans if span.kind == 2 and span.parent_span_id == b"\xcd" * 8)

    assert f"00-{'ab' * 16}-{server.span_id.hex()}-01" == answer.properties.user_value("traceparent")
    assert (plain.properties.user_value("traceparent") or "")[3:35] not in ("", "ab" * 16)
    assert "plant" == collector.resources[0]["service.name"]


def test_a_collector_that_is_away_costs_no_answer(broker: Broker, engines: Path, tmp_path: Path) -> None:
    """Requests are answered, the log says it once, and the daemon stops in time."""
    settings = {"device": "alone", "tracing__endpoint": "http://127.0.0.1:9/v1/traces", "log_format": "json"}
    with running_daemon(engines, broker.url, tmp_path, ready=["scale"], **settings) as daemon:
        wire = Wire(broker.url, name="lonely")
        body = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}'
        statuses = {
            wire.ask(body, topic="edge/v1/alone/models/scale/infer").properties.user_value("status") for _ in range(20)
        }
        wire.transport.close()
        code = daemon.stop()
    said = [json.loads(line)["message"] for line in daemon.said().splitlines()]

    assert ({"200"}, 0) == (statuses, code)
    assert not [line for line in said if "Traceback" in line]
    assert 1 >= len([line for line in said if line.startswith("Traces cannot be sent")])


def test_nothing_is_traced_where_nobody_asks(broker: Broker, engines: Path, tmp_path: Path) -> None:
    """And nothing of OpenTelemetry is loaded."""
    with running_daemon(engines, broker.url, tmp_path, ready=["scale"], device="quiet") as daemon:
        with Client(broker.url, device="quiet") as client:
            client.infer("scale", b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}')
        wire = Wire(broker.url, name="silent")
        body = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}'
        told = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
        answer: Message = wire.ask(body, topic="edge/v1/quiet/models/scale/infer", user=told)
        wire.transport.close()
        assert daemon.process is not None
        maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()

    assert None is answer.properties.user_value("traceparent")
    assert "google/_upb" not in maps  # protobuf, which OTLP is written with


def test_without_the_extra_the_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for traces is told what to install."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"edge-sdk\[otel\]"):
        tracing.begin_tracing("http://127.0.0.1:4318/v1/traces", "dev")
