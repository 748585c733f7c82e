"""Processor time that the daemon's own thread spends on a request, from the bytes of a PUBLISH to those of its answer.

    python -m benchmarks.hotpath [--model tiny] [--batch 8] [--requests 2400] [--profile cumtime]

No socket and no broker: a pipe in memory gives the daemon so many requests at once, and acknowledges what it publishes.
So what is left is the daemon itself, on one thread, whatever else the machine does; the tenth percentile is printed
beside the median, as neighbours on the same core cost a third more. With `--profile`, cProfile's table instead.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import struct
import tempfile
import time
from collections import deque
from pathlib import Path
from unittest import mock

import numpy as np

from edge_sdk.compile.pipeline import build
from edge_sdk.daemon import Daemon
from edge_sdk.mqtt.transports import stream
from edge_sdk.mqtt.transports.base import Message, Properties
from edge_sdk.mqtt.transports.choice import new_transport
from edge_sdk.mqtt.transports.packets import MAX_REMAINING_LENGTH, PUBACK, PUBLISH, Inbox, encode_publish
from edge_sdk.mqtt.transports.pipes import Piece, Pipe, Progress
from edge_sdk.settings import load_settings

MODELS = {"tiny": ("tiny.onnx", 12_288), "mbv2": ("mobilenetv2-int8-random.onnx", 602_112)}
SHARED = Path(__file__).resolve().parents[2] / "shared" / "models"
CONNACK = b"\x20\x03\x00\x00\x00"
CONNECT, SUBSCRIBE = 0x10, 0x80


class MemoryPipe(Pipe):
    """A pipe to a broker that agrees to everything, at once. Its own time is counted in `spent_s`."""

    tells_empty = True

    def __init__(self) -> None:
        self.spent_s = 0.0
        self.acknowledged = 0
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._to_daemon = bytearray()
        self._inbox = Inbox(MAX_REMAINING_LENGTH)

    def fileno(self) -> int:
        return self._event

    def bring(self, data: bytes) -> None:
        """Let the daemon find `data`."""
        if not self._to_daemon:
            os.eventfd_write(self._event, 1)
        self._to_daemon += data

    def receive(self, room: memoryview) -> int | None:
        count = min(len(room), len(self._to_daemon))
        if not count:
            return None
        room[:count] = self._to_daemon[:count]
        del self._to_daemon[:count]
        if not self._to_daemon:
            os.eventfd_read(self._event)
        return count

    def send(self, outbox: deque[Piece]) -> int | None:
        began, size = time.thread_time(), 0
        for piece in outbox:
            size += len(piece)
            self._hear(bytes(piece))
        while (packet := self._inbox.next_packet()) is not None:
            self._answer(*packet)
        self.spent_s += time.thread_time() - began
        return size

    def progress(self) -> Progress | None:
        return None

    def close(self) -> None:
        pass

    def _hear(self, data: bytes) -> None:
        while data:
            room = self._inbox.room()
            count = min(len(room), len(data))
            room[:count] = data[:count]
            self._inbox.filled(count)
            data = data[count:]

    def _answer(self, first: int, body: memoryview) -> None:
        kind = first & 0xF0
        if kind == CONNECT:
            self.bring(CONNACK)
        elif kind == SUBSCRIBE:
            codes = b"\x01" * bytes(body).count(b"/infer")
            self.bring(bytes((0x90, 3 + len(codes))) + body[:2] + b"\0" + codes)
        elif kind == PUBLISH and first & 6:
            topic_end = 2 + int.from_bytes(body[:2], "big")
            self.bring(b"\x40\x02" + body[topic_end : topic_end + 2])
        elif kind == PUBACK:
            self.acknowledged += 1


class Questions:
    """Requests as bytes, each with an id of its own."""

    def __init__(self, topic: str, payload_bytes: int) -> None:
        self._topic = topic
        self._payload = np.random.default_rng(0).random(payload_bytes // 4, dtype=np.float32).tobytes()
        self._asked = 0

    def next(self, count: int) -> bytes:
        return b"".join(self._one() for _ in range(count))

    def _one(self) -> bytes:
        self._asked += 1
        user = (("accept", "application/octet-stream"),)
        key = struct.pack("!Q", self._asked)
        properties = Properties("edge/v1/reply/hotpath", key, "application/octet-stream", 30, user)
        message = Message(self._topic, self._payload, properties=properties)
        return encode_publish(message, self._asked % 60_000 + 1, 5) + self._payload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", type=Path, default=SHARED)
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--batch", type=int, default=8, help="how many requests come together")
    parser.add_argument("--requests", type=int, default=2400)
    parser.add_argument("--profile", metavar="ORDER", help="print cProfile's table in this order, as `cumtime`")
    options = parser.parse_args()
    file, payload_bytes = MODELS[options.model]
    pipe = MemoryPipe()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(stream, "open_pipe", return_value=pipe):
        name = build(options.models / file, output=Path(folder) / options.model).package.name
        # Nothing polls busily here, and even a slow model computes on the daemon's own thread.
        given = {"engines": folder, "device": "hotpath", "serving": {"busy_poll_us": 0, "inline_ms": 1000}}
        daemon = Daemon(load_settings(None, given, {}), new_transport())
        daemon._service.start()
        while not daemon._ready:
            daemon._turn(taking=True)
        measure(daemon, pipe, Questions(f"edge/v1/hotpath/models/{name}/infer", payload_bytes), options)
    os._exit(0)  # the daemon was never run, so nothing stops its threads


def measure(daemon: Daemon, pipe: MemoryPipe, questions: Questions, options: argparse.Namespace) -> None:
    profile = cProfile.Profile() if options.profile else None
    spent_us = []
    for number in range(options.requests // options.batch + 30):
        pipe.bring(questions.next(options.batch))
        pipe.acknowledged, pipe.spent_s, spent_s = 0, 0.0, 0.0
        while pipe.acknowledged < options.batch:
            began = time.thread_time()
            if profile is not None and number >= 30:
                profile.enable()
            daemon._turn(taking=True)
            if profile is not None:
                profile.disable()
            spent_s += time.thread_time() - began
            daemon._link.wake()  # what is queued leaves with the next poll, which then has nothing to wait for
        spent_us.append((spent_s - pipe.spent_s) / options.batch * 1e6)
    warm = np.array(spent_us[30:])
    if profile is not None:
        pstats.Stats(profile).sort_stats(options.profile).print_stats(60)
    else:
        tenth, half = np.percentile(warm, (10, 50))
        print(f"{options.model}, {options.batch} together: {tenth:.0f} us a request (median {half:.0f})", flush=True)


if __name__ == "__main__":
    main()
