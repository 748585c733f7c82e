"""This daemon against the naive one and against the raw onnxruntime loop, interleaved in one run.

    python -m benchmarks.serving [--models DIR] [--rounds 5] [--seconds 3] [--json FILE]

The same models, the same payload bytes (one float32 image as a raw tensor, QoS 1), the same broker, the same machine.
In every round each server is asked in turn, the order changing, and figures are medians over the rounds: machines
drift, ratios taken side by side do not. What is printed first is the ratio to the naive daemon; a ratio above 1 is
better for throughput and worse for CPU and latency.

It needs mosquitto, psutil and the models `tiny.onnx` and `mobilenetv2-int8-random.onnx` (random weights; made for
speed measurements).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from edge_sdk import console
from edge_sdk.compile.pipeline import build
from edge_sdk.errors import NoAnswer
from edge_sdk.mqtt.broker import start_broker
from edge_sdk.mqtt.client import Client

HERE = Path(__file__).resolve().parent
MODELS = {"tiny": ("tiny.onnx", (3, 32, 32)), "mbv2": ("mobilenetv2-int8-random.onnx", (3, 224, 224))}
CONCURRENCIES = (1, 8, 32)
DEVICE = "bench"


@dataclass(frozen=True)
class Server:
    """A process that answers requests for one model."""

    name: str
    process: psutil.Process
    topic: str


@dataclass(frozen=True)
class Sample:
    """One turn of one server."""

    server: str
    model: str
    concurrency: int
    per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    """CPU time of the server for one request, in milliseconds."""
    resident_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", type=Path, default=HERE.parents[1] / "shared" / "models")
    parser.add_argument("--only", choices=sorted(MODELS), help="one model instead of all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path, help="write every sample here")
    options = parser.parse_args()
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="edge-sdk-bench-") as folder, start_broker(kind="mosquitto") as broker:
        for model in [options.only] if options.only else MODELS:
            samples += measure(model, options.models, Path(folder), broker.port, options.rounds, options.seconds)
            print(report(model, samples), flush=True)
        print(start_and_idle(options.models, Path(folder) / "idle", broker.url))
    if options.json:
        options.json.write_text(json.dumps([asdict(sample) for sample in samples], indent=1))


def measure(model: str, models: Path, folder: Path, port: int, rounds: int, seconds: float) -> list[Sample]:
    """Every server at every concurrency, `rounds` times, in an order that changes."""
    file, shape = MODELS[model]
    payload_bytes = int(np.prod(shape)) * 4
    samples = []
    draw = random.Random(0)
    with ExitStack() as stack:
        built = build(models / file, output=folder / model / model).package
        best = built.manifest.batching.best_batch
        print(f"\n{model}: {built}, best batch {best}, {built.profile().onnxruntime}", flush=True)
        servers = [
            stack.enter_context(ours(built.name, folder / model, port)),
            stack.enter_context(naive(models / file, port)),
        ]
        for _ in range(rounds):
            samples.append(raw_loop(model, models / file, shape, seconds))
            for concurrency in CONCURRENCIES:
                for server in draw.sample(servers, len(servers)):
                    samples.append(turn(server, model, port, payload_bytes, concurrency, seconds))
    return samples


@contextmanager
def ours(model: str, engines: Path, port: int) -> Iterator[Server]:
    """`edge-sdk serve`, its model READY."""
    url = f"mqtt://127.0.0.1:{port}"
    command = [sys.executable, "-m", "edge_sdk", "serve", "--engines", str(engines), "--broker", url]
    process = subprocess.Popen([*command, "--device", DEVICE], stderr=subprocess.DEVNULL)
    try:
        with Client(url, device=DEVICE) as client:
            wait_until_ready(client, model)
        yield Server("edge-sdk", psutil.Process(process.pid), f"edge/v1/{DEVICE}/models/{model}/infer")
    finally:
        process.terminate()
        process.wait()


@contextmanager
def naive(file: Path, port: int) -> Iterator[Server]:
    topic = "naive/infer"
    process = subprocess.Popen([sys.executable, str(HERE / "naive.py"), str(port), str(file), topic])
    try:
        time.sleep(1.5)  # it tells nobody when it is ready
        yield Server("naive", psutil.Process(process.pid), topic)
    finally:
        process.kill()
        process.wait()


def wait_until_ready(client: Client, model: str) -> None:
    give_up_at = time.monotonic() + 30
    while time.monotonic() < give_up_at:
        try:
            if client.metadata(model)["state"] == "READY":
                return
        except NoAnswer:
            pass  # not there yet
        time.sleep(0.01)
    raise SystemExit(f"{model} did not become ready")


def turn(server: Server, model: str, port: int, payload_bytes: int, concurrency: int, seconds: float) -> Sample:
    """Ask one server for `seconds`, from a process of its own."""
    before = server.process.cpu_times()
    command = [sys.executable, str(HERE / "load.py"), str(port), server.topic, str(payload_bytes)]
    done = subprocess.run([*command, str(concurrency), str(seconds)], capture_output=True, text=True, check=True)
    after = server.process.cpu_times()
    found = json.loads(done.stdout)
    if found["errors"]:
        raise SystemExit(f"{server.name} answered {found['errors']} errors")
    cpu_s = after.user + after.system - before.user - before.system
    rate = found["requests"] / seconds
    return Sample(
        server=server.name,
        model=model,
        concurrency=concurrency,
        per_second=rate,
        p50_ms=found["p50_ms"],
        p99_ms=found["p99_ms"],
        cpu_ms=cpu_s / (rate * seconds * 1.1) * 1e3,
        resident_mb=server.process.memory_info().rss / 1e6,
    )


def raw_loop(model: str, file: Path, shape: tuple[int, ...], seconds: float) -> Sample:
    """onnxruntime in a bare loop at batch 1, in a process of its own: what no server can exceed without batching."""
    code = (
        "import sys, time, os, numpy as np, onnxruntime\n"
        "file, seconds, *shape = sys.argv[1:]\n"
        "session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])\n"
        "feeds = {session.get_inputs()[0].name: np.random.rand(1, *map(int, shape)).astype(np.float32)}\n"
        "for _ in range(50): session.run(None, feeds)\n"
        "began, cpu, times = time.perf_counter(), time.process_time(), []\n"
        "while time.perf_counter() - began < float(seconds):\n"
        "    t = time.perf_counter(); session.run(None, feeds); times.append(time.perf_counter() - t)\n"
        "cpu = time.process_time() - cpu\n"
        "print(len(times), sum(times), np.percentile(times, 50), np.percentile(times, 99), cpu)\n"
    )
    command = [sys.executable, "-c", code, str(file), str(seconds), *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, busy, p50, p99, cpu = map(float, done.stdout.split())
    return Sample("raw loop", model, 1, count / busy, p50 * 1e3, p99 * 1e3, cpu / count * 1e3, 0.0)


def report(model: str, samples: list[Sample]) -> str:
    """Medians, and the ratios that matter."""
    rows = [
        (
            "server",
            "in flight",
            "requests/s",
            "p50 ms",
            "p99 ms",
            "CPU ms",
            "RSS MB",
            "x naive",
            "CPU x naive",
            "of raw",
        )
    ]
    raw = median([s for s in samples if (s.model, s.server) == (model, "raw loop")], "per_second")
    for concurrency in CONCURRENCIES:
        by_server = {
            name: [s for s in samples if (s.model, s.server, s.concurrency) == (model, name, concurrency)]
            for name in ("edge-sdk", "naive")
        }
        # Ratios are taken round by round: each pair was measured seconds apart.
        for name, found in by_server.items():
            speed = statistics.median(a.per_second / b.per_second for a, b in zip(found, by_server["naive"]))
            cpu = statistics.median(a.cpu_ms / b.cpu_ms for a, b in zip(found, by_server["naive"]))
            rows.append(
                (
                    name,
                    str(concurrency),
                    f"{median(found, 'per_second'):,.0f}",
                    f"{median(found, 'p50_ms'):.2f}",
                    f"{median(found, 'p99_ms'):.2f}",
                    f"{median(found, 'cpu_ms'):.3f}",
                    f"{median(found, 'resident_mb'):.0f}",
                    f"{speed:.2f}",
                    f"{cpu:.2f}",
                    f"{median(found, 'per_second') / raw:.2f}",
                )
            )
    cpu_ms = median([s for s in samples if (s.model, s.server) == (model, "raw loop")], "cpu_ms")
    rows.append(("raw loop", "-", f"{raw:,.0f}", "-", "-", f"{cpu_ms:.3f}", "-", "-", "-", "1.00"))
    return console.table(rows)


def median(samples: list[Sample], field: str) -> float:
    return float(statistics.median(getattr(sample, field) for sample in samples))


def start_and_idle(models: Path, engines: Path, url: str) -> str:
    """Seconds from exec to READY=1 (after the first warm-up), and resident memory then, with tiny alone."""
    build(models / MODELS["tiny"][0], output=engines / "tiny")
    seconds = []
    resident = 0
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
            ear.bind(f"{folder}/notify")
            ear.settimeout(30)
            command = [sys.executable, "-m", "edge_sdk", "serve", "--engines", str(engines), "--broker", url]
            environment = {**os.environ, "NOTIFY_SOCKET": f"{folder}/notify"}
            began = time.perf_counter()
            process = subprocess.Popen([*command, "--device", "idle"], env=environment, stderr=subprocess.DEVNULL)
            while b"READY=1" not in ear.recv(4096):
                pass
            seconds.append(time.perf_counter() - began)
            resident = psutil.Process(process.pid).memory_info().rss
            process.terminate()
            process.wait()
    ready_s = statistics.median(seconds)
    return f"\nready after {ready_s:.2f} s (median of 5); idle memory {resident / 1e6:.0f} MB (tiny alone)"


if __name__ == "__main__":
    main()
