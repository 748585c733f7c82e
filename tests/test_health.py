"""What a daemon tells over HTTP: whether it moves, whether it can answer, and its figures."""

from __future__ import annotations

import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing

import pytest

from edge_sdk.errors import SettingsError
from edge_sdk.health import Health

STATS = {
    "uptime_s": 12.5,
    "memory_bytes": 84_000_000,
    "machine": {
        "temperature_c": {"cpu-thermal": 51.5},
        "throttled": True,
        "power_w": {"VDD_IN": 6.0},
        "power_mode": "15W",
        "cpu_mhz": 1120,
        "gpu_load_percent": 43.0,
        "memory_available_bytes": 3_072_000_000,
    },
    "self_test": {"requests": "failed"},
    "quarantine": {"suspects": 1, "barred": 2, "refused": 3},
    "memory": {
        "budget_bytes": 300_000_000,
        "models_bytes": 11_000_000,
        "queue_bytes": 40_000,
        "answer_cache_bytes": 2_048,
        "outbox_bytes": 0,
        "journal_bytes": 8_192,
        "evictions": 3,
        "reloads": 2,
        "refusals": 1,
    },
    "mqtt": {"received": 7, "duplicates": 1, "unsent": 2},
    "models": {
        "digits/1": {
            "answers": {"200": 5, "422": 2},
            "batches": 3,
            "mean_batch": 1.67,
            "queue_ms": {"p50": 1.0, "p99": 9.0},
            "infer_ms": {"p50": 0.5, "p99": 0.75},
            "waiting": 4,
            "state": "READY",
            "memory": {
                "resident": True,
                "held_bytes": 11_000_000,
                "declared_bytes": 9_000_000,
                "measured_bytes": 11_000_000,
                "evictions": 2,
                "reloads": 2,
                "queue_bytes": 40_000,
            },
        },
        "away/1": {
            "answers": {},
            "batches": 0,
            "mean_batch": 0.0,
            "queue_ms": {"p50": 0.0, "p99": 0.0},
            "infer_ms": {"p50": 0.0, "p99": 0.0},
            "waiting": 0,
            "state": "READY",
            "memory": {
                "resident": False,
                "held_bytes": 0,
                "declared_bytes": 5_000_000,
                "measured_bytes": None,
                "evictions": 1,
                "reloads": 0,
                "queue_bytes": 0,
            },
        },
    },
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Iterator[Health]:
    serving = Health(("127.0.0.1", 0), max_silence_s=15.0, patience_s=0.1, clock=clock)
    yield serving
    serving.close()


def get(health: Health, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{health.port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


def test_health_is_progress(health: Health, clock: Clock) -> None:
    """A daemon that has said nothing for too long does not move, whatever its other threads say."""
    health.update(ready=True)

    assert (200, "ok\n") == get(health, "/healthz")

    clock.now += 16.0
    assert (503, "silent for 16.0 s\n") == get(health, "/healthz")
    assert 503 == get(health, "/readyz")[0]


def test_ready_is_said_from_the_first_moment_on(health: Health) -> None:
    assert 503 == get(health, "/readyz")[0]

    health.update(ready=True)
    assert (200, "ready\n") == get(health, "/readyz")
    health.update(ready=False)
    assert 503 == get(health, "/readyz")[0]


def test_a_model_that_stopped_answering_is_no_health(health: Health) -> None:
    """It is named; requests still come in, and other models answer them."""
    health.update(ready=True, ailing="digits/1")

    assert (503, "no answer from digits/1\n") == get(health, "/healthz")
    assert 200 == get(health, "/readyz")[0]


def test_metrics_are_prometheus_text(health: Health) -> None:
    """Read back by Prometheus's own parser: base units, labels, counters."""
    parser = pytest.importorskip("prometheus_client.parser", reason="the extra `metrics` is not installed")
    health.tell(STATS)
    health.update(ready=True)
    status, text = get(health, "/metrics")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }

    assert 200 == status
    assert 1.0 == samples["edge_sdk_ready",]
    assert 5.0 == samples["edge_sdk_answers_total", "1", "200", "digits"]
    assert 4.0 == samples["edge_sdk_waiting", "1", "digits"]
    assert 0.009 == pytest.approx(samples["edge_sdk_queue_seconds", "0.99", "1", "digits"])
    assert 0.0005 == pytest.approx(samples["edge_sdk_infer_seconds", "0.5", "1", "digits"])
    assert 7.0 == samples["edge_sdk_mqtt_received_total",]
    assert 2.0 == samples["edge_sdk_mqtt_unsent",]
    assert 84e6 == samples["edge_sdk_resident_bytes",]
    assert 1.0 == samples["edge_sdk_self_test_failed",]
    assert (1.0, 2.0) == (samples["edge_sdk_quarantine_suspects",], samples["edge_sdk_quarantine_barred",])
    assert 3.0 == samples["edge_sdk_quarantine_refused_total",]


def test_metrics_tell_who_holds_what(health: Health) -> None:
    """The box by holder, each model by itself; what was not measured has no sample."""
    parser = pytest.importorskip("prometheus_client.parser", reason="the extra `metrics` is not installed")
    health.tell(STATS)
    samples = {
        (sample.name.removeprefix("edge_sdk_"), *sample.labels.values()): sample.value
        for family in parser.text_string_to_metric_families(get(health, "/metrics")[1])
        for sample in family.samples
    }

    assert 300e6 == samples["memory_budget_bytes",]
    assert 11e6 == samples["memory_bytes", "models"]
    assert 2048.0 == samples["memory_bytes", "answer_cache"]
    assert (3.0, 2.0, 1.0) == tuple(samples[f"memory_{what}_total",] for what in ("evictions", "reloads", "refusals"))
    assert 11e6 == samples["model_memory_bytes", "digits", "1"]
    assert (9e6, 5e6) == tuple(samples["model_declared_bytes", name, "1"] for name in ("digits", "away"))
    assert (1.0, 0.0) == tuple(samples["model_resident", name, "1"] for name in ("digits", "away"))
    assert ("model_measured_bytes", "away", "1") not in samples


def test_metrics_tell_how_the_machine_is(health: Health) -> None:
    """In base units; what it does not tell has no sample."""
    parser = pytest.importorskip("prometheus_client.parser", reason="the extra `metrics` is not installed")
    health.tell(STATS)
    samples = {
        (sample.name.removeprefix("edge_sdk_machine_"), *sample.labels.values()): sample.value
        for family in parser.text_string_to_metric_families(get(health, "/metrics")[1])
        for sample in family.samples
        if sample.name.startswith("edge_sdk_machine_")
    }

    assert {
        ("temperature_celsius", "cpu-thermal"): 51.5,
        ("throttled",): 1.0,
        ("power_watts", "VDD_IN"): 6.0,
        ("power_mode", "15W"): 1.0,
        ("cpu_hertz",): 1120e6,
        ("gpu_load_ratio",): 0.43,
        ("memory_available_bytes",): 3_072_000_000.0,
    } == samples


def test_before_the_first_figures_there_are_metrics_too(health: Health) -> None:
    pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")

    assert (200, True) == (get(health, "/metrics")[0], "edge_sdk_ready 0.0" in get(health, "/metrics")[1])


def test_figures_are_wanted_when_somebody_asks(clock: Clock) -> None:
    """And not before, nor again within a second: whoever asks a hundred times a second costs what one does."""
    pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")
    asked: list[float] = []

    def tell() -> None:
        asked.append(clock.now)
        threading.Thread(target=lambda: serving.tell({"uptime_s": clock.now})).start()

    serving = Health(("127.0.0.1", 0), max_silence_s=15.0, on_asked=tell, patience_s=30, clock=clock)
    with closing(serving):
        serving.update(ready=True)
        unasked = list(asked)
        texts = [get(serving, "/metrics")[1]]
        clock.now += 0.9
        texts += [get(serving, "/metrics")[1] for _ in range(3)]
        clock.now += 0.2
        texts.append(get(serving, "/metrics")[1])

    assert [] == unasked
    assert [100.0, clock.now] == asked
    assert [100.0] * 4 + [clock.now] == [uptime_in(text) for text in texts]


def uptime_in(text: str) -> float:
    (value,) = re.findall(r"^edge_sdk_uptime_seconds (\S+)$", text, re.MULTILINE)
    return float(value)


def test_a_daemon_that_does_not_tell_is_known_by_its_last_figures(health: Health, clock: Clock) -> None:
    """Nobody waits for it for ever, and it does not look ready."""
    pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")
    health.tell(STATS)
    health.update(ready=True)
    clock.now += 60
    status, text = get(health, "/metrics")

    assert 200 == status
    assert "edge_sdk_uptime_seconds 12.5" in text
    assert "edge_sdk_ready 0.0" in text
    assert health.is_asked


def test_anything_else_is_not_found(health: Health) -> None:
    assert 404 == get(health, "/")[0]
    assert 404 == get(health, "/../etc/passwd")[0]


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SettingsError, match="Nothing can listen"):
        Health(("127.0.0.1", other.getsockname()[1]), max_silence_s=1.0)


def test_a_reader_that_leaves_disturbs_nobody(health: Health) -> None:
    """Neither one that goes in the middle nor one that never asks."""
    with socket.create_connection(("127.0.0.1", health.port)) as lingering:
        with socket.create_connection(("127.0.0.1", health.port)) as leaving:
            leaving.sendall(b"GET /metr")
        health.update(ready=True)

        assert 200 == get(health, "/readyz")[0]
        lingering.sendall(b"GET")
