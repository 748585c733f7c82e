"""`edge-sdk quickstart`: the whole journey on this machine, in a minute, with nothing left running.

    broker -> build the bundled digits engine -> daemon in a process of its own -> ask it over MQTT -> figures

It is right if every held-out picture was answered over MQTT, each exactly as the package answers in this process, and
INT8 lost no more than the spec allows. The package stays (in the cache folder), for the commands to try next.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from edge_sdk import console, resources
from edge_sdk.bench import BenchResult, drive
from edge_sdk.compile.pipeline import build
from edge_sdk.errors import BackendError, BrokerError, NoAnswer
from edge_sdk.local import in_process
from edge_sdk.mqtt.access import BrokerAccess
from edge_sdk.mqtt.broker import find_broker, start_broker, tied_to_us
from edge_sdk.mqtt.client import Client
from edge_sdk.mqtt.negotiation import ProtocolSetting
from edge_sdk.package import EnginePackage, Measurements
from edge_sdk.settings import load_settings
from edge_sdk.spec import EngineSpec, load_spec
from edge_sdk.tasks.base import Payload
from edge_sdk.tasks.oip import decode_response

DEVICE = "quickstart"
CONCURRENCY = 8
_START_LIMIT_S = 30.0
_LEAST_RIGHT_PERCENT = 97.5
"""The example's FP32 accuracy is above 98 %, and INT8 may lose half a point."""


@dataclass(frozen=True)
class Report:
    """What quickstart found."""

    package: str
    measured: Measurements
    asked: int
    right_percent: float
    same_as_local: int
    throughput: BenchResult
    broker: str
    verdict: str
    """Empty if everything was right."""

    @property
    def right(self) -> bool:
        return not self.verdict

    def to_dict(self) -> dict[str, Any]:
        described = asdict(self)
        described["measured"] = self.measured.model_dump(mode="json", exclude_none=True)
        return {**described, "right": self.right}

    def text(self) -> str:
        reference, engine = self.measured.reference, self.measured.engine
        rows = [
            ("digits", "FP32", "INT8"),
            ("accuracy", console.percent(reference.top1_percent), console.percent(engine.top1_percent)),
            ("size", console.size(reference.bytes), console.size(engine.bytes)),
            ("latency, batch 1", console.milliseconds(reference.latency_ms), console.milliseconds(engine.latency_ms)),
        ]
        t = self.throughput
        program = console.program()
        package, engines, picture = (
            shlex.quote(str(path)) for path in (self.package, Path(self.package).parent, _a_picture())
        )
        return (
            f"\n{console.table(rows)}\n\n"
            f"Over MQTT ({self.broker}): {self.asked} held-out pictures answered, {self.right_percent:.2f} % right;\n"
            f"{t.per_second:,.0f} requests/s with {t.concurrency} in flight, p50 {t.p50_ms:.2f} ms, "
            f"p99 {t.p99_ms:.2f} ms.\n\n"
            "Try next:\n"
            f"  {program} infer --local {package} --input {picture}\n"
            f"  {program} bench {package} --concurrency 8\n"
            f"  {program} serve --engines {engines} --broker mqtt://localhost:1883   # a broker of yours"
        )


def run(*, broker: str | None, seconds: float, say: Callable[[str], None], quiet: bool) -> Report:
    """Do all of it. Raises EdgeSdkError where a part cannot be done; whatever was started is stopped."""
    with ExitStack() as stack:
        stack.enter_context(_ending_in_order())
        if broker is None:
            started = stack.enter_context(start_broker())
            kind: str
            protocol: ProtocolSetting
            broker, protocol, kind = started.url, started.protocol, f"{started.kind} on loopback"
        else:
            protocol, kind = "auto", _reached(broker, _access(broker))
        say(f"Broker: {broker}, {kind}")
        spec = load_spec(resources.EXAMPLES / "digits")
        package = _built(spec, quiet)
        say(f"Package: {package.path}")
        log = package.path.parent / "daemon.log"
        daemon = stack.enter_context(_daemon(package.path.parent, broker, protocol, log))
        with Client(broker, access=_access(broker), device=DEVICE, protocol=protocol) as client:
            _wait_until_ready(client, package.name, daemon, log)
            say("Daemon: ready; asking it over MQTT")
            return _asked(client, package, spec, f"{broker}, {kind}", seconds)


def _access(broker: str) -> BrokerAccess:
    """The way in that the daemon will take: it gets the same address and the same environment."""
    return load_settings(None, {"broker": {"url": broker}}).access()


def _reached(broker: str, access: BrokerAccess) -> str:
    """What answers there; BrokerError before anything is built if nothing does."""
    found = find_broker(broker, access=access)
    if not found.reachable:
        raise BrokerError(found.detail, fix="Without --broker, quickstart starts one of its own.")
    return found.detail


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM and a closed terminal end the block as Ctrl-C does: what it started must not outlive it."""
    former: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            former[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _built(spec: EngineSpec, quiet: bool) -> EnginePackage:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with console.Progress(quiet=quiet) as progress:
        output = cache / "edge-sdk" / "quickstart" / spec.name
        return build(spec, precision="int8", output=output, force=True, progress=progress).package


@contextmanager
def _daemon(engines: Path, broker: str, protocol: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The real daemon, as a process that ends with this block; what it says goes to `log`.

    It is tied to us for the moment in which an interrupt may come: after it was started, before we know of it.
    """
    command = [sys.executable, "-m", "edge_sdk", "serve", "--engines", str(engines), "--broker", broker]
    with log.open("wb") as said:
        process = subprocess.Popen(
            tied_to_us([*command, "--device", DEVICE]),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env={**os.environ, "EDGE_SDK_BROKER__PROTOCOL": protocol},
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(client: Client, model: str, daemon: subprocess.Popen[bytes], log: Path) -> None:
    give_up_at = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < give_up_at and daemon.poll() is None:
        try:
            if client.metadata(model)["state"] in ("READY", "BUILDING"):  # both answer
                return
        except NoAnswer:
            pass  # it has not said anything yet
        time.sleep(0.05)
    raise BackendError(
        f"The daemon did not become ready within {_START_LIMIT_S:.0f} s. It said: {log.read_text()[-500:].strip()}",
        fix="`edge-sdk doctor` looks for what is missing.",
    )


def _asked(client: Client, package: EnginePackage, spec: EngineSpec, broker: str, seconds: float) -> Report:
    assert spec.validation is not None
    pictures = sorted(Path(spec.validation.data).rglob("*.png"))
    contents = [picture.read_bytes() for picture in pictures]
    answers = [future.result() for future in [client.submit(package.name, data) for data in contents]]
    given = [answer.predictions[0].label for answer in answers]
    expected = _local_labels(package, contents)
    right = sum(label == picture.parent.name for label, picture in zip(given, pictures))
    same = sum(one == other for one, other in zip(given, expected))
    sample = contents[0]
    throughput = drive(lambda: client.submit(package.name, sample), concurrency=CONCURRENCY, seconds=seconds)
    measured = package.manifest.measurements
    assert measured is not None
    report = Report(
        package=str(package.path),
        measured=measured,
        asked=len(answers),
        right_percent=100 * right / len(pictures),
        same_as_local=same,
        throughput=throughput,
        broker=broker,
        verdict="",
    )
    return Report(**{**report.__dict__, "verdict": _verdict(report, spec.validation.max_drop)})


def _verdict(report: Report, max_drop: float) -> str:
    """What is wrong, or nothing."""
    if report.same_as_local != report.asked:
        wrong = report.asked - report.same_as_local
        return f"{wrong} of {report.asked} answers over MQTT differ from what the package answers in this process."
    if report.right_percent < _LEAST_RIGHT_PERCENT:
        return (
            f"Only {report.right_percent:.2f} % of the pictures were read rightly; "
            f"at least {_LEAST_RIGHT_PERCENT} % were expected."
        )
    lost = (report.measured.reference.top1_percent or 100.0) - report.right_percent
    if lost > max_drop:
        return f"INT8 loses {lost:.2f} points of accuracy against FP32; the spec allows {max_drop}."
    if report.throughput.errors:
        return f"{report.throughput.errors} requests failed under load: {report.throughput.first_error}"
    return ""


def _local_labels(package: EnginePackage, contents: list[bytes]) -> list[str]:
    with in_process(package) as submit:
        bodies = [submit(Payload(data)).result() for data in contents]
    return [decode_response(body.data).extra["predictions"][0]["label"] for body in bodies]


def _a_picture() -> Path:
    return min((resources.EXAMPLES / "digits" / "heldout" / "7").glob("*.png"))
