"""What others may ask a daemon over HTTP, on this machine: `/metrics`, `/healthz`, `/readyz`.

    health = Health(("127.0.0.1", 9464), max_silence_s=15, on_asked=...)
    health.update(ready=True)              # at least every few seconds, from the thread whose life is being watched
    if health.is_asked:                    # soon after `on_asked`, from that thread
        health.tell(stats)
    health.close()

`/healthz` is 200 while `update` keeps being called, and every model answers its self-test: it tells whether the daemon
moves, not whether this thread does.
`/readyz` is 200 while requests can come in and a model can answer them. `/metrics` is the figures in Prometheus's text
format, and needs the extra `metrics`. They are worked out when somebody asks, which most seconds nobody does, and at
most once a second: a slow or hostile reader costs the daemon next to nothing.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from edge_sdk.errors import SettingsError

Stats = Mapping[str, Any]
"""What the stats topic says: counts and timings, of the service and of each model."""

_TEXT = "text/plain; charset=utf-8"
_REQUEST_TIMEOUT_S = 5.0
FRESH_S = 1.0
"""Figures that are no older are told again."""
PATIENCE_S = 2.0
"""How long a reader waits for fresh ones: what was told last says more than nothing."""


@dataclass(frozen=True)
class _State:
    ready: bool
    at: float
    ailing: str = ""


class Health:
    """Serves from a thread of its own until `close`."""

    def __init__(
        self,
        address: tuple[str, int],
        *,
        max_silence_s: float,
        on_asked: Callable[[], None] = lambda: None,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """SettingsError if nothing can listen at `address`. Port 0 takes a free one; `port` tells which.

        `on_asked` is called on a thread of ours when `is_asked` has become true; it must only take note.
        """
        self._max_silence_s = max_silence_s
        self._on_asked = on_asked
        self._patience_s = patience_s
        self._clock = clock
        self._state = _State(False, clock())
        self._stats: Stats = {}
        self._told_at = -math.inf
        self._told = threading.Condition()  # guards the two above, and `is_asked`
        self.is_asked = False
        """Whether somebody waits for the figures of now."""
        try:
            self._server = _Server(address, self)
        except OSError as exc:
            raise SettingsError(
                f"Nothing can listen at {address[0]}:{address[1]} for /metrics and /healthz: {exc.strerror or exc}.",
                fix="Choose another port with `health`.",
            ) from exc
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="edge-sdk-health", daemon=True).start()

    def update(self, *, ready: bool, ailing: str = "") -> None:
        """Say that the daemon moves, and whether it can answer. `ailing`: who has stopped answering."""
        self._state = _State(ready, self._clock(), ailing)

    def tell(self, stats: Stats) -> None:
        """Hand over the figures of now; they are not to be changed afterwards."""
        with self._told:
            self._stats, self._told_at, self.is_asked = stats, self._clock(), False
            self._told.notify_all()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, content type and body of what `path` asks."""
        state = self._state
        silence_s = self._clock() - state.at
        alive = silence_s <= self._max_silence_s
        match path.partition("?")[0]:
            case "/healthz" if alive and state.ailing:
                return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"no answer from {state.ailing}\n".encode()
            case "/healthz" if alive:
                return HTTPStatus.OK, _TEXT, b"ok\n"
            case "/healthz":
                return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, b"silent for %.1f s\n" % silence_s
            case "/readyz" if alive and state.ready:
                return HTTPStatus.OK, _TEXT, b"ready\n"
            case "/readyz":
                return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, b"not ready\n"
            case "/metrics":
                return _exposed(self._figures(), ready=alive and state.ready)
        return HTTPStatus.NOT_FOUND, _TEXT, b"There are /metrics, /healthz and /readyz.\n"

    def _figures(self) -> Stats:
        """Those of now; the last ones where the daemon does not tell others in time."""
        with self._told:
            if self._clock() - self._told_at <= FRESH_S:
                return self._stats
            self.is_asked = True
        self._on_asked()
        with self._told:
            self._told.wait_for(lambda: not self.is_asked, self._patience_s)
            return self._stats


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], health: Health) -> None:
        self.health = health
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that went away in the middle is nobody's fault."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _REQUEST_TIMEOUT_S
    server: _Server

    def do_GET(self) -> None:
        status, content_type, body = self.server.health.answer(self.path)
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is not worth a line each."""


def _exposed(stats: Stats, *, ready: bool) -> tuple[HTTPStatus, str, bytes]:
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
    except ImportError:
        text = b"The figures need prometheus-client: pip install 'edge-sdk[metrics]'.\n"
        return HTTPStatus.NOT_IMPLEMENTED, _TEXT, text
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(stats, ready))
    return HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(registry)


class _Collector:
    """The stats as Prometheus's metrics: seconds and bytes, counters ending in `_total`."""

    def __init__(self, stats: Stats, ready: bool) -> None:
        self._stats = stats
        self._ready = ready

    def describe(self) -> Iterator[Any]:
        return iter(())

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats = self._stats
        yield GaugeMetricFamily("edge_sdk_ready", "Whether requests can be answered", value=float(self._ready))
        for name, text, key in (
            ("edge_sdk_uptime_seconds", "Since the daemon started", "uptime_s"),
            ("edge_sdk_resident_bytes", "Memory of the daemon's process", "memory_bytes"),
            ("edge_sdk_client_certificate_days", "Until our certificate expires", "client_certificate_days"),
        ):
            if key in stats:
                yield GaugeMetricFamily(name, text, value=stats[key])
        if "self_test" in stats:
            failed = "failed" in stats["self_test"].values()
            text = "Whether what the device sends to itself does not come back"
            yield GaugeMetricFamily("edge_sdk_self_test_failed", text, value=float(failed))
        for key, value in stats.get("quarantine", {}).items():
            if key == "refused":
                yield CounterMetricFamily(
                    "edge_sdk_quarantine_refused", "Answers to requests that ended former processes", value=value
                )
            else:
                text = f"Requests that former processes ended with: {key}"
                yield GaugeMetricFamily(f"edge_sdk_quarantine_{key}", text, value=value)
        for key, value in stats.get("mqtt", {}).items():
            if key == "unsent":
                yield GaugeMetricFamily("edge_sdk_mqtt_unsent", "Answers that wait for the broker", value=value)
            elif isinstance(value, int):
                yield CounterMetricFamily(f"edge_sdk_mqtt_{key}", f"MQTT messages: {key}", value=value)
        yield from self._of_memory()
        yield from self._of_machine()
        yield from self._of_models()

    def _of_memory(self) -> Iterator[Any]:
        """Who holds what: the box, and each model by what it is booked with, was thought to take, and took."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        memory = self._stats.get("memory", {})
        if (budget := memory.get("budget_bytes")) is not None:
            yield GaugeMetricFamily("edge_sdk_memory_budget_bytes", "What all models may hold together", value=budget)
        held = GaugeMetricFamily("edge_sdk_memory_bytes", "What is held, by holder", labels=["holder"])
        for holder in ("models", "queue", "answer_cache", "outbox", "journal"):
            if (key := f"{holder}_bytes") in memory:
                held.add_metric([holder], memory[key])
        yield held
        for key, text in (
            ("evictions", "Models that made room for others"),
            ("reloads", "Models that came back"),
            ("refusals", "Requests that could not wait for their model to come back"),
        ):
            if key in memory:
                yield CounterMetricFamily(f"edge_sdk_memory_{key}", text, value=memory[key])
        families = {
            key: GaugeMetricFamily(name, text, labels=["model", "version"])
            for key, name, text in (
                ("held_bytes", "edge_sdk_model_memory_bytes", "What a model holds; 0 while it is away"),
                ("declared_bytes", "edge_sdk_model_declared_bytes", "What its package makes one expect"),
                ("measured_bytes", "edge_sdk_model_measured_bytes", "What it took when it was loaded last"),
                ("resident", "edge_sdk_model_resident", "Whether it is in memory"),
            )
        }
        for name, figures in self._stats.get("models", {}).items():
            for key, family in families.items():
                if (value := figures.get("memory", {}).get(key)) is not None:
                    family.add_metric(name.split("/", 1), value)
        yield from families.values()

    def _of_machine(self) -> Iterator[Any]:
        """What `edge_sdk.sensors` reads, in base units; a figure that the machine does not tell has no metric."""
        from prometheus_client.core import GaugeMetricFamily

        machine = self._stats.get("machine", {})
        for key, name, text, factor in (
            ("throttled", "throttled", "Whether the machine slows itself down now", 1),
            ("under_voltage", "under_voltage", "Whether its supply is too weak now", 1),
            ("cpu_mhz", "cpu_hertz", "Clock of the CPUs, on average", 1e6),
            ("cpu_max_mhz", "cpu_max_hertz", "The highest clock of any CPU", 1e6),
            ("gpu_load_percent", "gpu_load_ratio", "How busy the GPU is", 0.01),
            ("load_1min", "load1", "Processes that run or want to, over a minute", 1),
            ("memory_total_bytes", "memory_total_bytes", "Memory of the machine", 1),
            ("memory_available_bytes", "memory_available_bytes", "Memory that is left on the machine", 1),
        ):
            if key in machine:
                yield GaugeMetricFamily(f"edge_sdk_machine_{name}", text, value=machine[key] * factor)
        for key, name, label, text in (
            ("temperature_c", "temperature_celsius", "sensor", "Temperature"),
            ("power_w", "power_watts", "rail", "Power drawn"),
        ):
            family = GaugeMetricFamily(f"edge_sdk_machine_{name}", text, labels=[label])
            for which, value in machine.get(key, {}).items():
                family.add_metric([which], value)
            yield family
        if "power_mode" in machine:
            info = GaugeMetricFamily("edge_sdk_machine_power_mode", "Always 1", labels=["mode"])
            info.add_metric([machine["power_mode"]], 1)
            yield info

    def _of_models(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        labels = ["model", "version"]
        answers = CounterMetricFamily("edge_sdk_answers", "Answers by status", labels=[*labels, "status"])
        batches = CounterMetricFamily("edge_sdk_batches", "Batches computed", labels=labels)
        waiting = GaugeMetricFamily("edge_sdk_waiting", "Requests that wait or are computed", labels=labels)
        timings = {
            "queue_ms": GaugeMetricFamily(
                "edge_sdk_queue_seconds", "Time in the queue, of the last thousand", labels=[*labels, "quantile"]
            ),
            "infer_ms": GaugeMetricFamily(
                "edge_sdk_infer_seconds", "Time to compute, of the last thousand", labels=[*labels, "quantile"]
            ),
        }
        for name, figures in self._stats.get("models", {}).items():
            of = list(name.split("/", 1))
            for status, count in figures["answers"].items():
                answers.add_metric([*of, status], count)
            batches.add_metric(of, figures["batches"])
            waiting.add_metric(of, figures["waiting"])
            for key, family in timings.items():
                for quantile, milliseconds in figures[key].items():
                    family.add_metric([*of, f"0.{quantile[1:]}".rstrip("0")], milliseconds / 1000)
        yield from (answers, batches, waiting, *timings.values())
