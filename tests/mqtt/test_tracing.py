"""Traces across MQTT: the device's spans are children of the client's, tell where the time went, and cost nothing where
nobody traces."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from edge_sdk.errors import InferenceFailed, QueueFull, RequestError
from edge_sdk.mqtt.tracing import RequestSpans, client_span
from edge_sdk.mqtt.transports.base import Message, Properties
from edge_sdk.runtime.messages import Answer, Timing
from edge_sdk.tasks.base import Body

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

TRACE, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
SAMPLED, DROPPED = (f"00-{TRACE:032x}-{PARENT:016x}-{flags}" for flags in ("01", "00"))
MS = 1_000_000


class Clocks:
    """A monotonic clock at 100 s when the wall's is at 1000 s."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wall_ns(self) -> int:
        return int((self.now + 900) * 1e9)


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter, clocks: Clocks) -> Iterator[RequestSpans]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield RequestSpans(provider, device="dev", clock=clocks.monotonic, wall_ns=clocks.wall_ns)
    provider.shutdown()


def asked(**user: str) -> Message:
    return Message("edge/v1/dev/models/m/infer", b"question", properties=Properties(user=tuple(user.items())))


ANSWER = Message("edge/v1/reply/me", b"answer", properties=Properties(user=(("status", "200"),)))


def answer(ticket: int, result: Body | RequestError = Body(b"answer"), **timing: Any) -> Answer:
    return Answer(ticket, result, "3", Timing(**timing) if timing else None)


def context(span: ReadableSpan) -> Any:
    found = span.get_span_context()
    assert found is not None
    return found


def test_the_devices_span_is_a_child_of_the_clients(spans: RequestSpans, exporter: InMemorySpanExporter) -> None:
    """The trace goes on, with its state, and the answer says with which span."""
    spans.began(7, asked(traceparent=SAMPLED, tracestate="vendor=x"), 100.0)
    sent = spans.finished(answer(7, queue_ms=0.0, infer_ms=0.0), ANSWER)
    server = next(span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER)

    assert (TRACE, PARENT) == (context(server).trace_id, server.parent.span_id if server.parent else 0)
    assert "vendor=x" == context(server).trace_state.to_header()
    assert (("status", "200"), ("traceparent", f"00-{TRACE:032x}-{context(server).span_id:016x}-01")) == (
        sent.properties.user[:2]
    )
    assert "vendor=x" == sent.properties.user_value("tracestate")
    assert ANSWER.payload == sent.payload
    assert {"edge_sdk.status": 200, "edge_sdk.model.version": "3", "edge_sdk.device": "dev"}.items() <= dict(
        server.attributes or {}
    ).items()


def test_stages_follow_each_other_and_fill_the_span(
    spans: RequestSpans, exporter: InMemorySpanExporter, clocks: Clocks
) -> None:
    """Waiting, decoding, computing, phrasing as long as `server-timing` says; what is left is handing over."""
    spans.began(1, asked(), 100.0)
    clocks.now += 0.050
    spans.finished(answer(1, queue_ms=10.0, infer_ms=20.0, decode_ms=5.0, encode_ms=3.0), ANSWER)
    server = next(span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER)
    stages = [span for span in exporter.get_finished_spans() if span is not server]
    began = 1_000 * 1_000 * MS

    assert {context(server).span_id} == {span.parent.span_id for span in stages if span.parent is not None}
    assert [
        ("queue", 0, 10), ("decode", 10, 15), ("infer", 15, 35), ("encode", 35, 38), ("publish", 38, 50),
    ] == [
        (span.name, round(((span.start_time or 0) - began) / MS), round(((span.end_time or 0) - began) / MS))
        for span in stages
    ]  # fmt: skip
    assert (0, 50) == tuple(round(((at or 0) - began) / MS) for at in (server.start_time, server.end_time))


def test_requests_of_a_batch_link_each_other(spans: RequestSpans, exporter: InMemorySpanExporter) -> None:
    """Also those that were answered before; a batch of one links nobody."""
    for ticket in (1, 2, 3):
        spans.began(ticket, asked(), 100.0)
    for ticket in (1, 2, 3):
        spans.finished(answer(ticket, queue_ms=1.0, infer_ms=2.0, batch=3, together=(1, 2, 3)), ANSWER)
    spans.began(4, asked(), 100.0)
    spans.finished(answer(4, queue_ms=1.0, infer_ms=2.0), ANSWER)
    found = exporter.get_finished_spans()
    servers = [context(span).span_id for span in found if span.kind is SpanKind.SERVER]
    computed = [span for span in found if span.name == "infer" and span.kind is not SpanKind.SERVER]

    assert [set(servers[:3]) - {own} for own in servers[:3]] + [set()] == [
        {link.context.span_id for link in span.links} for span in computed
    ]
    assert [3, 3, 3, 1] == [dict(span.attributes or {})["edge_sdk.batch"] for span in computed]


def test_what_the_client_does_not_sample_is_not_recorded(spans: RequestSpans, exporter: InMemorySpanExporter) -> None:
    """Its decision holds; the answer says so in turn."""
    spans.began(1, asked(traceparent=DROPPED), 100.0)
    sent = spans.finished(answer(1, queue_ms=1.0, infer_ms=2.0), ANSWER)

    assert () == exporter.get_finished_spans()
    assert (sent.properties.user_value("traceparent") or "").endswith("-00")


@pytest.mark.parametrize("traceparent", ["", "nonsense", f"00-{0:032x}-{0:016x}-01", "00-" + "f" * 10_000, "\ud800"])
def test_nonsense_begins_a_trace_of_its_own(
    traceparent: str, spans: RequestSpans, exporter: InMemorySpanExporter
) -> None:
    spans.began(1, asked(traceparent=traceparent, tracestate="=,=;" * 100), 100.0)
    spans.finished(answer(1), ANSWER)
    (server,) = exporter.get_finished_spans()

    assert server.parent is None


@pytest.mark.parametrize(
    ("error", "status"),
    [(InferenceFailed("It failed."), StatusCode.ERROR), (QueueFull("Full.", retry_after_ms=5), StatusCode.UNSET)],
)
def test_errors_are_told(
    error: RequestError, status: StatusCode, spans: RequestSpans, exporter: InMemorySpanExporter
) -> None:
    """By their code; the device's own are errors of the span, a client's are not."""
    spans.began(1, asked(), 100.0)
    spans.finished(answer(1, error), ANSWER)
    (server,) = exporter.get_finished_spans()

    assert (error.code, status) == (dict(server.attributes or {})["error.type"], server.status.status_code)


def test_an_answer_to_nobody_goes_out_as_it_is(spans: RequestSpans) -> None:
    assert ANSWER is spans.finished(answer(1), ANSWER)


def test_a_million_requests_leave_nothing_behind(spans: RequestSpans) -> None:
    """What is remembered for links is bounded."""
    for ticket in range(3_000):
        spans.began(ticket, asked(traceparent=DROPPED), 100.0)
        spans.finished(answer(ticket, queue_ms=1.0, infer_ms=2.0), ANSWER)

    assert (0, 1024) == (len(spans._open), len(spans._finished))


def test_a_program_that_does_not_trace_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where OpenTelemetry is loaded without a provider, nor where it is not."""
    assert None is client_span("m", "dev")

    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    assert None is client_span("m", "dev")
