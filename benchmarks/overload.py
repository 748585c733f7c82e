"""The daemon when more comes than it can do, and when some of what comes is rubbish.

    python -m benchmarks.overload [--models DIR] [--rounds 3] [--seconds 8] [--json FILE]

MobileNetV2 (INT8) on photos as JPEG, QoS 1, one generator that sends on a fixed schedule, whatever comes back:

* *overload*: at 0.8, 1, 1.5, 2 and 3 times what the daemon can do (measured first, in the same run), each request with
  two seconds to live. Goodput is answers with status 200 in time, each second; the rest is counted by what became of
  it. (MQTT counts a life in whole seconds, so a broker may let a request live for one more: that is `late`.) Twice: as
  the daemon comes, where the excess waits in the broker (Receive Maximum 64), and with a Receive Maximum above
  `max_queue`, where the daemon has all of it and says 429.
* *rubbish*: good traffic alone, and with one bad request for each two good ones (truncated and lying pictures, broken
  JSON, tensors of the wrong size, unknown types), in turns; the good ones' p99 is compared. Both kinds come at random
  moments, as from many clients, the good ones at the same in every turn. They come at `GOOD_SHARE` of what the daemon
  can do: nearer to that, p99 is how long the queue happened to be, and takes minutes a turn to tell.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import statistics
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.load import connected
from benchmarks.serving import DEVICE, HERE, daemon
from edge_sdk import console
from edge_sdk.compile.pipeline import build_engine
from edge_sdk.mqtt.broker import start_broker
from edge_sdk.mqtt.transports.base import Message, Properties, Received

TOPIC = f"edge/v1/{DEVICE}/models/photos/infer"
PATIENCE_S = 2
LOADS = (0.8, 1.0, 1.5, 2.0, 3.0)
GOOD_SHARE = 0.3


@dataclass(frozen=True)
class Sending:
    """A payload and what it claims to be."""

    payload: bytes
    content_type: str
    good: bool = True


@dataclass
class Outcome:
    """What became of one stretch of traffic."""

    sent: int = 0
    seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    """Of the good requests: by status; `late` is a 200 after its time, `silence` no answer at all."""
    latencies_ms: list[float] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        return self.statuses["200"] / self.seconds

    def p99_ms(self) -> float:
        return float(np.percentile(self.latencies_ms, 99)) if self.latencies_ms else float("nan")


class Generator:
    """Requests on a schedule, over one connection."""

    def __init__(self, port: int, name: str) -> None:
        self._replies = f"edge/v1/reply/{name}"
        self._transport = connected(port, name, self._replies, receive_maximum=65_535)
        self._numbers = itertools.count(1)

    def run(self, timetable: Iterator[tuple[float, Sending]], seconds: float) -> Outcome:
        """Send what is due (in seconds after the start) for `seconds`, then wait until no answer can come any more."""
        found = Outcome(seconds=seconds)
        sent_at: dict[bytes, tuple[float, bool]] = {}
        begin = time.perf_counter()
        until = begin + seconds
        due_s, one = next(timetable)
        while (now := time.perf_counter()) < until + PATIENCE_S + 1.0 and (now < until or sent_at):
            while begin + due_s <= now < until:
                key = b"%d" % next(self._numbers)
                properties = Properties(self._replies, key, one.content_type, PATIENCE_S)
                self._transport.publish(Message(TOPIC, one.payload, properties=properties))
                sent_at[key] = now, one.good
                found.sent += one.good
                due_s, one = next(timetable)
            pause_s = min(0.05, max(0.0, begin + due_s - now)) if now < until else 0.05
            for event in self._transport.poll(pause_s):
                if isinstance(event, Received):
                    self._transport.acknowledge(event)
                    self._note(event.message, sent_at, found)
        found.statuses["silence"] += sum(good for _, good in sent_at.values())
        return found

    def peak(self, seconds: float, sendings: Iterator[Sending], in_flight: int = 32) -> float:
        """Answers a second in a closed loop: what the daemon can do."""
        found = Outcome(seconds=seconds)
        sent_at: dict[bytes, tuple[float, bool]] = {}
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or sent_at:
            while len(sent_at) < in_flight and time.perf_counter() < until:
                one = next(sendings)
                key = b"%d" % next(self._numbers)
                sent_at[key] = time.perf_counter(), True
                self._transport.publish(
                    Message(TOPIC, one.payload, properties=Properties(self._replies, key, one.content_type))
                )
            for event in self._transport.poll(1.0):
                if isinstance(event, Received):
                    self._transport.acknowledge(event)
                    self._note(event.message, sent_at, found)
        return found.goodput

    def _note(self, message: Message, sent_at: dict[bytes, tuple[float, bool]], found: Outcome) -> None:
        at, good = sent_at.pop(message.properties.correlation_data or b"", (0.0, False))
        if not good:
            return
        took_s = time.perf_counter() - at
        status = message.properties.user_value("status") or "?"
        if status == "200":
            found.latencies_ms.append(took_s * 1e3)
            status = "200" if took_s <= PATIENCE_S else "late"
        found.statuses[status] += 1


def evenly(rate: float, sendings: Sequence[Sending]) -> Iterator[tuple[float, Sending]]:
    """A timetable of so many a second, one every so often."""
    return ((number / rate, one) for number, one in enumerate(itertools.cycle(sendings)))


def at_random(rate: float, sendings: Sequence[Sending], seed: int) -> Iterator[tuple[float, Sending]]:
    """A timetable of so many a second, each on its own; of one seed always the same."""
    draw = random.Random(seed)
    moments = itertools.accumulate(iter(lambda: draw.expovariate(rate), None))
    return zip(moments, itertools.cycle(sendings))


def photos(models: Path) -> list[Sending]:
    files = sorted((models.parent / "images" / "imagenet-500").glob("*.jpg"))[:100]
    return [Sending(file.read_bytes(), "image/jpeg") for file in files]


def rubbish(photo: bytes) -> list[Sending]:
    """What a careless or hostile client sends."""
    lying = bytearray(photo)
    at = lying.find(b"\xff\xc0")
    if at > 0:
        lying[at + 5 : at + 9] = struct.pack(">HH", 65_500, 65_500)
    return [
        Sending(photo[: len(photo) // 2], "image/jpeg", good=False),
        Sending(bytes(lying), "image/jpeg", good=False),
        Sending(b'{"inputs": [' * 1000, "application/json", good=False),
        Sending(
            b'{"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1]}]}', "application/json", False
        ),
        Sending(bytes(1000), "application/octet-stream", good=False),
        Sending(b"\x93NUMPY\x01\x00\xff\xff", "application/x-npy", good=False),
        Sending(photo, "image/tiff", good=False),
        Sending(b"", "image/jpeg", good=False),
    ]


def overload(
    port: int, engines: Path, sendings: Sequence[Sending], rounds: int, seconds: float
) -> list[dict[str, object]]:
    rows: list[tuple[str, ...]] = [
        (
            "Receive Maximum",
            "load",
            "sent/s",
            "goodput/s",
            "of its peak",
            "200 %",
            "429 %",
            "408 %",
            "late %",
            "silence %",
            "p99 ms",
        )
    ]
    samples: list[dict[str, object]] = []
    for receive_maximum in (64, 4096):
        with daemon(engines, port, {"EDGE_SDK_BROKER__RECEIVE_MAXIMUM": str(receive_maximum)}):
            generator = Generator(port, f"overload-{receive_maximum}")
            peak = statistics.median(generator.peak(seconds / 2, itertools.cycle(sendings)) for _ in range(3))
            found: dict[float, list[Outcome]] = {load: [] for load in LOADS}
            for _ in range(rounds):
                for load in random.Random(0).sample(LOADS, len(LOADS)):
                    found[load].append(generator.run(evenly(load * peak, sendings), seconds))
            best = max(statistics.median(each.goodput for each in outcomes) for outcomes in found.values())
            for load, outcomes in found.items():
                goodput = statistics.median(each.goodput for each in outcomes)
                statuses = sum((each.statuses for each in outcomes), Counter[str]())
                sent = sum(each.sent for each in outcomes)
                shares = [f"{100 * statuses[one] / sent:.1f}" for one in ("200", "429", "408", "late", "silence")]
                p99 = statistics.median(each.p99_ms() for each in outcomes)
                rate = f"{sent / rounds / seconds:,.0f}"
                rows.append(
                    (
                        str(receive_maximum),
                        f"{load:.1f}",
                        rate,
                        f"{goodput:,.0f}",
                        f"{goodput / best:.2f}",
                        *shares,
                        f"{p99:,.0f}",
                    )
                )
                samples += [{"receive_maximum": receive_maximum, "load": load, **asdict(each)} for each in outcomes]
    print(console.table(rows), flush=True)
    return samples


def mixed(
    port: int, engines: Path, sendings: Sequence[Sending], rounds: int, seconds: float
) -> list[dict[str, object]]:
    bad = rubbish(sendings[0].payload)
    random.Random(1).shuffle(bad)
    ratios = []
    samples: list[dict[str, object]] = []
    with daemon(engines, port):
        generator = Generator(port, "mixed")
        peak = statistics.median(generator.peak(seconds / 2, itertools.cycle(sendings)) for _ in range(3))
        for turn in range(2 * rounds):
            pair = {}
            for kind in ("alone", "mixed") if turn % 2 else ("mixed", "alone"):
                rate = GOOD_SHARE * peak
                timetable = at_random(rate, sendings, turn)
                if kind == "mixed":
                    timetable = heapq.merge(timetable, at_random(rate / 2, bad, turn + 1000), key=lambda due: due[0])
                pair[kind] = generator.run(timetable, seconds)
                samples.append({"kind": kind, **asdict(pair[kind])})
            ratios.append(pair["mixed"].p99_ms() / pair["alone"].p99_ms())
    alone = statistics.median(_p99(one) for one in samples if one["kind"] == "alone")
    beside = statistics.median(_p99(one) for one in samples if one["kind"] == "mixed")
    print(
        f"\ngood traffic's p99: {alone:.1f} ms alone, {beside:.1f} ms beside rubbish; ratio "
        f"{statistics.median(ratios):.2f} (median of {len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )
    return samples


def _p99(sample: dict[str, object]) -> float:
    return float(np.percentile(sample["latencies_ms"], 99))  # type: ignore[call-overload]  # a list of floats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", type=Path, default=HERE.parents[1] / "shared" / "models")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--json", type=Path, help="write every sample here")
    options = parser.parse_args()
    sendings = photos(options.models)
    with tempfile.TemporaryDirectory(prefix="edge-sdk-bench-") as folder, start_broker(kind="mosquitto") as broker:
        engine = Path(folder) / "photos"
        engine.mkdir()
        (engine / "engine.toml").write_text(
            f'name = "photos"\nmodel = "{(options.models / "mobilenetv2-qlinear.onnx").resolve()}"\n'
            'task = "image-classification"\n[preprocess]\nresize_short_side = 256\ncenter_crop = 224\ncolor = "RGB"\n'
            f"scale = {1 / 255}\nmean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]\n"
        )
        build_engine(engine)
        samples = overload(broker.port, Path(folder), sendings, options.rounds, options.seconds)
        samples += mixed(broker.port, Path(folder), sendings, options.rounds, options.seconds)
    if options.json:
        options.json.write_text(json.dumps(samples))


if __name__ == "__main__":
    main()
