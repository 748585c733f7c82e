"""Traces that go on across MQTT: OpenTelemetry's spans, and W3C's `traceparent` and `tracestate` as user properties.

A client whose program traces (it has set a tracer provider) puts the context of a span into each request. The daemon,
where it is told to trace, makes its own span a child of that one, and says in the answer which it is:

    infer (client)
    `- infer (device)          from the message's arrival until its answer was handed to the connection
       |- queue                waiting, until its batch began to compute
       |- decode, infer, encode
       `- publish              from the phrased answer until it was handed over

The spans below the device's are made when the answer is there, of the times that `server-timing` tells: while a request
is computed nothing is done for them. `infer` is the batch's and links the other requests in it.

The one file that knows OpenTelemetry, and it is loaded where traces are wanted only. Without a sampling decision of the
client's, the SDK's own sampler decides (OTEL_TRACES_SAMPLER). On MQTT 3.1.1, which has no properties, each device's
span begins a trace of its own.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any

from edge_sdk import __version__
from edge_sdk.errors import EdgeSdkError, RequestError, SettingsError
from edge_sdk.mqtt.transports.base import Message
from edge_sdk.runtime.messages import Answer, Timing
from edge_sdk.seldom import Seldom

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.trace import Span, SpanContext

log = logging.getLogger(__name__)

FIELDS = ("traceparent", "tracestate")

_REMEMBERED = 1024
"""Finished spans that others of their batch may still want to name: as many as the largest batch has."""

_FLUSH_S = 2.0
"""What a stop may spend on sending the last spans; a collector that is away must not hold it up."""

UserProperties = tuple[tuple[str, str], ...]


class RequestSpans:
    """The spans of a daemon's requests. Used by the thread that owns the connection."""

    def __init__(
        self,
        provider: TracerProvider,
        *,
        device: str,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("edge_sdk", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._device = device
        self._clock = clock
        self._wall_ns = wall_ns
        self._open: dict[int, tuple[Span, float]] = {}
        self._finished: OrderedDict[int, SpanContext] = OrderedDict()

    def began(self, ticket: int, message: Message, received: float) -> None:
        """A request arrived at `received`, by the clock that was given."""
        from opentelemetry.trace import SpanKind

        user = message.properties.user
        carrier = {name: value for name, value in user if name in FIELDS} if user else {}
        span = self._tracer.start_span(
            "infer",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=self._wall_ns() - _ns(self._clock() - received),
            attributes={
                "messaging.system": "mqtt",
                "messaging.destination.name": message.topic[:200],
                "messaging.message.body.size": len(message.payload),
                "edge_sdk.device": self._device,
            },
        )
        self._open[ticket] = span, received

    def finished(self, answer: Answer, message: Message) -> Message:
        """`message`, which carries `answer` and goes out now, with the span that made it named in it."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        opened = self._open.pop(answer.ticket, None)
        if opened is None:
            return message
        span, received = opened
        now, now_ns = self._clock(), self._wall_ns()
        span.set_attribute("edge_sdk.status", answer.status)
        if answer.model_version is not None:
            span.set_attribute("edge_sdk.model.version", answer.model_version)
        if isinstance(answer.result, RequestError):
            span.set_attribute("error.type", answer.result.code)
            if answer.status >= 500:
                span.set_status(Status(StatusCode.ERROR, answer.result.code))
        if answer.timing is not None and span.is_recording():
            self._tell_stages(span, answer, answer.timing, now_ns - _ns(now - received), now_ns)
        span.end(now_ns)
        self._finished[answer.ticket] = span.get_span_context()
        if len(self._finished) > _REMEMBERED:
            self._finished.popitem(last=False)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        properties = message.properties
        return message._replace(properties=properties._replace(user=(*properties.user, *carrier.items())))

    def close(self) -> None:
        """Send what has not been sent, as far as that is possible quickly."""
        sending = threading.Thread(target=self._provider.force_flush, args=(int(_FLUSH_S * 1000),), daemon=True)
        sending.start()
        sending.join(_FLUSH_S)

    def _tell_stages(self, span: Span, answer: Answer, timing: Timing, began_ns: int, now_ns: int) -> None:
        from opentelemetry.trace import Link, set_span_in_context

        within = set_span_in_context(span)
        links = [Link(each) for ticket in timing.together if (each := self._context(ticket, answer.ticket)) is not None]
        stages = (
            ("queue", timing.queue_ms, ()),
            ("decode", timing.decode_ms, ()),
            ("infer", timing.infer_ms, links),
            ("encode", timing.encode_ms, ()),
        )
        at = began_ns
        for name, took_ms, linked in stages:
            if took_ms <= 0 and name in ("decode", "encode"):
                continue
            attributes = {"edge_sdk.batch": timing.batch} if name == "infer" else None
            stage = self._tracer.start_span(
                name, context=within, start_time=at, links=linked or None, attributes=attributes
            )
            at = min(at + _ns(max(0.0, took_ms) / 1000), now_ns)
            stage.end(at)
        self._tracer.start_span("publish", context=within, start_time=at).end(now_ns)

    def _context(self, ticket: int, own: int) -> SpanContext | None:
        """Of another request in the batch, answered or not."""
        if ticket == own:
            return None
        opened = self._open.get(ticket)
        return opened[0].get_span_context() if opened is not None else self._finished.get(ticket)


def begin_tracing(endpoint: str | None, device: str) -> RequestSpans:
    """Spans of a daemon, sent to `endpoint` by OTLP over HTTP; None: wherever OpenTelemetry's environment says.

    Raises SettingsError where the extra `otel` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    except ImportError as exc:
        raise SettingsError(
            f"Traces were asked for, and OpenTelemetry cannot be imported: {exc}.",
            fix="pip install 'edge-sdk[otel]', or take out [tracing] and the OTEL_* variables.",
        ) from exc

    class Exporter(SpanExporter):
        """OpenTelemetry's own, whose complaints come at the rate of its attempts."""

        def __init__(self) -> None:
            self._inner = OTLPSpanExporter(endpoint=endpoint) if endpoint is not None else OTLPSpanExporter()
            self._failures = Seldom()

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result = self._inner.export(spans)
            if result is not SpanExportResult.SUCCESS and self._failures.happened(time.monotonic()):
                log.warning(
                    "Traces cannot be sent to %s, and are dropped (%d times so far).",
                    endpoint or "the collector that OTEL_* names", self._failures.count,
                )  # fmt: skip
            return result

        def shutdown(self) -> None:
            self._inner.shutdown()  # type: ignore[no-untyped-call]  # it was left without types

    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "edge-sdk"}
    provider = TracerProvider(resource=Resource.create({**named, "service.instance.id": device}))
    provider.add_span_processor(BatchSpanProcessor(Exporter()))
    log.info("Requests are traced.")
    return RequestSpans(provider, device=device)


class ClientSpan:
    """The span of one request of a client, and the user properties that name it."""

    def __init__(self, span: Any) -> None:
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
        self.properties: UserProperties = tuple(carrier.items())
        self._span = span

    def end(self, future: Future[Any]) -> None:
        """As a future is done: with its answer or its error."""
        from opentelemetry.trace import Status, StatusCode

        try:
            error = future.exception()
        except CancelledError:
            self._span.set_attribute("error.type", "cancelled")
        else:
            if error is not None:
                kind = error.code if isinstance(error, RequestError) else type(error).__name__
                self._span.set_attribute("error.type", kind)
                said = error.problem if isinstance(error, EdgeSdkError) else ""
                self._span.set_status(Status(StatusCode.ERROR, said))
        self._span.end()


def client_span(model: str, device: str | None) -> ClientSpan | None:
    """A span for a request, below the caller's; None unless the program has set a tracer provider.

    To have set one it has loaded OpenTelemetry, so that nothing is loaded here to find out.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    provider = trace.get_tracer_provider()
    if isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider)):
        return None
    attributes = {"messaging.system": "mqtt", "edge_sdk.model": model, "edge_sdk.device": device or ""}
    tracer = provider.get_tracer("edge_sdk", __version__)
    return ClientSpan(tracer.start_span("infer", kind=trace.SpanKind.CLIENT, attributes=attributes))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
