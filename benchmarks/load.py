"""A load generator: a closed loop of requests over MQTT, as lean as it can be, so that it measures the server.

    python benchmarks/load.py PORT TOPIC PAYLOAD_BYTES CONCURRENCY SECONDS

It prints one line of JSON: requests, seconds, errors, and p50 and p99 of the round trip in milliseconds. A tenth of the
time is warm-up and is not counted.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np

from edge_sdk.mqtt.transports.base import (
    Connected,
    ConnectOptions,
    Message,
    Properties,
    Received,
    Subscribed,
    Transport,
)
from edge_sdk.mqtt.transports.choice import new_transport


def connected(port: int, name: str, replies: str, *, receive_maximum: int) -> Transport:
    """A connection to the broker on `port` that hears what comes on `replies`."""
    transport = new_transport()
    options = ConnectOptions("127.0.0.1", port, name, clean_start=True, receive_maximum=receive_maximum)
    transport.open(options, timeout_s=5)
    subscribed = False
    while not subscribed:
        for event in transport.poll(1.0):
            if isinstance(event, Connected):
                transport.subscribe([replies])
            subscribed = subscribed or isinstance(event, Subscribed)
    return transport


def main(port: int, topic: str, payload_bytes: int, concurrency: int, seconds: float) -> None:
    name = f"load-{os.getpid()}"
    replies = f"edge/v1/reply/{name}"
    transport = connected(port, name, replies, receive_maximum=1000)
    payload = np.random.default_rng(0).random(payload_bytes // 4, dtype=np.float32).tobytes()
    user = (("accept", "application/octet-stream"),)
    started: dict[bytes, float] = {}
    last = 0

    def ask() -> None:
        nonlocal last
        last += 1
        key = b"%d" % last
        properties = Properties(replies, key, "application/octet-stream", user=user)
        started[key] = time.perf_counter()
        transport.publish(Message(topic, payload, properties=properties))

    for _ in range(concurrency):
        ask()
    begin = time.perf_counter() + seconds / 10
    end = begin + seconds
    latencies = []
    errors = 0
    while (now := time.perf_counter()) < end:
        for event in transport.poll(1.0):
            if not isinstance(event, Received):
                continue
            transport.acknowledge(event)
            now = time.perf_counter()
            sent = started.pop(event.message.properties.correlation_data or b"", None)
            errors += event.message.payload.startswith(b'{"error"')
            if sent is None:
                continue
            if now >= begin:
                latencies.append(now - sent)
            ask()
    transport.close()
    p50, p99 = (float(np.percentile(latencies, q)) * 1e3 if latencies else 0.0 for q in (50, 99))
    report = {"requests": len(latencies), "seconds": seconds, "errors": errors, "p50_ms": p50, "p99_ms": p99}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
