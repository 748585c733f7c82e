"""This daemon against the naive one, other servers and the raw onnxruntime loop, interleaved in one run.

    python -m benchmarks.serving [--peers DIR] [--models DIR] [--rounds 5] [--seconds 3] [--json FILE]

The same models, the same image (float32, as a raw tensor, QoS 1 over MQTT), the same broker, the same machine. In every
round each server is asked in turn, the order changing, and figures are medians over the rounds: machines drift, ratios
taken side by side do not. A ratio above 1 is better for throughput and worse for CPU and latency.

*Naive* is the daemon that people write first, *bare* the least that one in Python can do (where mqtt5 is installed).

CPU is that of the server with all its processes; *overhead* adds the broker's and takes away what the raw loop needs
for an image. Memory is the proportional share (PSS) of all its processes, idle before the first round and at its most.
`--peers` installs the servers of `benchmarks.peers` in environments below DIR, where they are not there yet.

It needs mosquitto, psutil and the models `tiny.onnx` and `mobilenetv2-int8-random.onnx` (random weights; made for
speed measurements).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from subprocess import DEVNULL

import numpy as np
import psutil

from benchmarks import peers
from edge_sdk import console
from edge_sdk.compile.pipeline import build
from edge_sdk.mqtt.broker import start_broker

HERE = Path(__file__).resolve().parent
MODELS = {"tiny": ("tiny.onnx", (3, 32, 32)), "mbv2": ("mobilenetv2-int8-random.onnx", (3, 224, 224))}
CONCURRENCIES = (1, 8, 32)
DEVICE = "bench"


@dataclass(frozen=True)
class Server:
    """Processes that answer requests for one model, and the command that asks them: concurrency and seconds follow."""

    name: str
    process: psutil.Process
    load: tuple[str, ...]
    broker: psutil.Process | None
    start_s: float
    idle_mb: float
    installed_mb: float | None = None


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
    broker_cpu_ms: float
    memory_mb: float


@dataclass(frozen=True)
class Place:
    """What every server is given."""

    model: str
    file: Path
    payload_bytes: int
    port: int
    """The broker's."""
    broker: psutil.Process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", type=Path, default=HERE.parents[1] / "shared" / "models")
    parser.add_argument("--only", choices=sorted(MODELS), help="one model instead of all")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="other servers too, installed below DIR")
    parser.add_argument("--peer", choices=sorted(peers.PEERS), action="append", help="of these only some")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the peers' environments")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path, help="write every sample here")
    options = parser.parse_args()
    wanted = options.peer or sorted(peers.PEERS) if options.peers else []
    others = {name: peers.install(name, options.peers, options.python) for name in wanted}
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="edge-sdk-bench-") as folder, start_broker(kind="mosquitto") as broker:
        for model in [options.only] if options.only else MODELS:
            file, shape = MODELS[model]
            size = int(np.prod(shape)) * 4
            place = Place(model, options.models / file, size, broker.port, psutil.Process(broker.pid))
            samples += measure(place, Path(folder), others, options.rounds, options.seconds)
    if options.json:
        options.json.write_text(json.dumps([asdict(sample) for sample in samples], indent=1))


def measure(place: Place, folder: Path, others: dict[str, Path], rounds: int, seconds: float) -> list[Sample]:
    """Every server at every concurrency, `rounds` times, in an order that changes; prints the report."""
    samples = []
    draw = random.Random(0)
    with ExitStack() as stack:
        built = build(place.file, output=folder / place.model / place.model).package
        best = built.manifest.batching.best_batch
        way = built.manifest.running
        assert way is not None  # measured, as it was built here
        threads = f"{way.intra_op_threads} threads{', spinning' if way.spinning else ''}"
        print(f"\n{place.model}: {built}, best batch {best}, {threads}", flush=True)
        servers = [
            stack.enter_context(ours(place, built.name, folder / place.model)),
            stack.enter_context(script("naive", place)),
        ]
        if importlib.util.find_spec("mqtt5") is not None:
            servers.append(stack.enter_context(script("bare", place)))
        for name, python in others.items():
            try:
                servers.append(stack.enter_context(peer(name, python, place)))
            except (OSError, RuntimeError) as err:
                print(f"{name} is left out: {err}", flush=True)
        for _ in range(rounds):
            samples.append(raw_loop(place, seconds))
            for concurrency in CONCURRENCIES:
                for server in draw.sample(servers, len(servers)):
                    samples.append(turn(server, place, concurrency, seconds))
        print(report(servers, samples), flush=True)
    return samples


@contextmanager
def ours(place: Place, name: str, engines: Path) -> Iterator[Server]:
    began = time.perf_counter()
    with daemon(engines, place.port) as process:
        topic = f"edge/v1/{DEVICE}/models/{name}/infer"
        yield mqtt_server("edge-sdk", process, topic, place, time.perf_counter() - began)


@contextmanager
def daemon(engines: Path, port: int, environment: dict[str, str] | None = None) -> Iterator[psutil.Process]:
    """`edge-sdk serve`, once it says to systemd that it is ready."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(f"{folder}/notify")
        ear.settimeout(60)
        command = [sys.executable, "-m", "edge_sdk", "serve", "--engines", str(engines)]
        address = ["--broker", f"mqtt://127.0.0.1:{port}", "--device", DEVICE]
        with running([*command, *address], {**(environment or {}), "NOTIFY_SOCKET": f"{folder}/notify"}) as process:
            while b"READY=1" not in ear.recv(4096):
                pass
            yield process


@contextmanager
def script(name: str, place: Place) -> Iterator[Server]:
    """A daemon of one file beside this one, NAME.py; ready when it answers, for it tells nobody."""
    command = [sys.executable, str(HERE / f"{name}.py"), str(place.port), str(place.file), f"{name}/infer"]
    began = time.perf_counter()
    with running(command) as process:
        server = mqtt_server(name, process, f"{name}/infer", place, 0.0)
        wait_until_it_answers(server)
        yield replace(server, start_s=time.perf_counter() - began, idle_mb=memory_mb(process))


@contextmanager
def peer(name: str, python: Path, place: Place) -> Iterator[Server]:
    """A server of another make, once it answers. RuntimeError if it never does."""
    port = peers.free_ports()
    began = time.perf_counter()
    with running(peers.server(name, python, port, place.file)) as process:
        load = tuple(peers.load(name, python, port, place.payload_bytes))
        server = Server(name, process, load, None, 0.0, 0.0, peers.installed_mb(python))
        wait_until_it_answers(server)
        yield replace(server, start_s=time.perf_counter() - began, idle_mb=memory_mb(process))


@contextmanager
def running(command: Sequence[str], environment: dict[str, str] | None = None) -> Iterator[psutil.Process]:
    """A process and its children, which end with the context."""
    child = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdout=DEVNULL, stderr=DEVNULL)
    process = psutil.Process(child.pid)
    try:
        yield process
    finally:
        family = [process, *process.children(recursive=True)] if process.is_running() else []
        child.terminate()
        _, left = psutil.wait_procs(family, timeout=5)
        for one in left:
            one.kill()
        child.wait()


def mqtt_server(name: str, process: psutil.Process, topic: str, place: Place, start_s: float) -> Server:
    load = (sys.executable, str(HERE / "load.py"), str(place.port), topic, str(place.payload_bytes))
    return Server(name, process, load, place.broker, start_s, memory_mb(process))


def wait_until_it_answers(server: Server) -> None:
    """Poll it; RuntimeError if it ends, or answers nothing for two minutes."""
    give_up_at = time.monotonic() + 120
    while time.monotonic() < give_up_at and server.process.is_running():
        done = subprocess.run([*server.load, "1", "0.2"], capture_output=True, text=True, check=False)
        if not done.returncode and (found := json.loads(done.stdout))["requests"] and not found["errors"]:
            return
    raise RuntimeError("it did not come to answer")


def memory_mb(process: psutil.Process) -> float:
    family = [process, *process.children(recursive=True)]
    return float(sum(one.memory_full_info().pss for one in family)) / 1e6


def cpu_s(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def turn(server: Server, place: Place, concurrency: int, seconds: float) -> Sample:
    """Ask one server for `seconds`, from a process of its own."""
    before, broker_before = cpu_s(server.process), cpu_s(server.broker)
    done = subprocess.run([*server.load, str(concurrency), str(seconds)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    if found["errors"]:
        raise SystemExit(f"{server.name} answered {found['errors']} errors")
    everything = found["requests"] * 1.1  # the warm-up's too
    return Sample(
        server=server.name,
        model=place.model,
        concurrency=concurrency,
        per_second=found["requests"] / seconds,
        p50_ms=found["p50_ms"],
        p99_ms=found["p99_ms"],
        cpu_ms=(cpu_s(server.process) - before) / everything * 1e3,
        broker_cpu_ms=(cpu_s(server.broker) - broker_before) / everything * 1e3,
        memory_mb=memory_mb(server.process),
    )


def raw_loop(place: Place, seconds: float) -> Sample:
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
    shape = MODELS[place.model][1]
    command = [sys.executable, "-c", code, str(place.file), str(seconds), *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, busy, p50, p99, cpu = map(float, done.stdout.split())
    return Sample("raw loop", place.model, 1, count / busy, p50 * 1e3, p99 * 1e3, cpu / count * 1e3, 0.0, 0.0)


def report(servers: Sequence[Server], samples: Sequence[Sample]) -> str:
    """Medians, and the ratios that matter. They are taken round by round: each pair was measured seconds apart."""
    raw = [sample for sample in samples if sample.server == "raw loop"]
    rows: list[tuple[str, ...]] = [
        ("in flight", "server", "requests/s", "x naive", "of raw", "p50 ms", "x naive", "p99 ms", "CPU ms", "x naive",
         "overhead ms", "x naive"),
    ]  # fmt: skip
    for concurrency in CONCURRENCIES:
        found = {
            one.name: [s for s in samples if (s.server, s.concurrency) == (one.name, concurrency)] for one in servers
        }
        base = found["naive"]
        for name, ours in found.items():
            speed = [one.per_second / other.per_second for one, other in zip(ours, base)]
            delay = [one.p50_ms / other.p50_ms for one, other in zip(ours, base)]
            cpu = [one.cpu_ms / other.cpu_ms for one, other in zip(ours, base)]
            overheads = [overhead_ms(one, bare) for one, bare in zip(ours, raw)]
            naive_overheads = [overhead_ms(one, bare) for one, bare in zip(base, raw)]
            rows.append(
                (
                    str(concurrency),
                    name,
                    f"{median(ours, 'per_second'):,.0f}",
                    f"{statistics.median(speed):.2f}",
                    f"{statistics.median(one.per_second / bare.per_second for one, bare in zip(ours, raw)):.2f}",
                    f"{median(ours, 'p50_ms'):.2f}",
                    f"{statistics.median(delay):.2f}",
                    f"{median(ours, 'p99_ms'):.2f}",
                    f"{median(ours, 'cpu_ms'):.3f}",
                    f"{statistics.median(cpu):.2f}",
                    f"{statistics.median(overheads):.3f}",
                    f"{statistics.median(one / other for one, other in zip(overheads, naive_overheads)):.2f}",
                )
            )
    bare = f"raw loop: {median(raw, 'per_second'):,.0f}/s, CPU {median(raw, 'cpu_ms'):.3f} ms"
    box: list[tuple[str, ...]] = [("server", "memory MB idle", "at most", "ready after s", "installed MB")]
    for one in servers:
        most = max(sample.memory_mb for sample in samples if sample.server == one.name)
        installed = "-" if one.installed_mb is None else f"{one.installed_mb:.0f}"
        box.append((one.name, f"{one.idle_mb:.0f}", f"{most:.0f}", f"{one.start_s:.2f}", installed))
    return f"{console.table(rows)}\n{bare}\n\n{console.table(box)}"


def overhead_ms(sample: Sample, raw: Sample) -> float:
    """What a request costs beside the inference: the server's CPU and the broker's, without the raw loop's."""
    return max(1e-6, sample.cpu_ms + sample.broker_cpu_ms - raw.cpu_ms)


def median(samples: Sequence[Sample], field: str) -> float:
    return float(statistics.median(getattr(sample, field) for sample in samples))


if __name__ == "__main__":
    main()
