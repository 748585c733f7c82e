"""A device for tests of the client library: answers requests over a real connection, as well or as badly as told."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from edge_sdk.errors import BrokerError
from edge_sdk.mqtt.topics import Topics
from edge_sdk.mqtt.transports.base import (
    Closed,
    Connected,
    ConnectOptions,
    Message,
    Properties,
    Received,
    Subscribed,
    Transport,
)
from tests.brokers import eventually

Reply = Callable[[Message, int], list[bytes]]
"""The bodies to answer with, given the request and how often it has come."""


def echo(message: Message, _times: int) -> list[bytes]:
    """One tensor: the number of bytes that came."""
    output = {"name": "size", "datatype": "INT64", "shape": [1], "data": [len(message.payload)]}
    return [json.dumps({"model_name": "m", "model_version": "1", "outputs": [output]}).encode()]


def error(status: int, code: str, **more: object) -> bytes:
    return json.dumps({"error": f"it is {code}", "code": code, "status": status, **more}).encode()


class Responder:
    """Use as a context manager: it is online when the block begins."""

    def __init__(
        self,
        transport: Transport,
        options: ConnectOptions,
        reply: Reply = echo,
        *,
        device: str = "dev",
        quiet: bool = False,
    ) -> None:
        self.topics = Topics("edge/v1", device)
        self.transport = transport
        self.options = options
        self.reply = reply
        self.quiet = quiet
        """Without availability, like a device that somebody else wrote."""
        self.seen: Counter[tuple[str, bytes]] = Counter()
        self.requests: list[Message] = []
        self.online = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="responder")

    def __enter__(self) -> Responder:
        self._thread.start()
        assert self.online.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.transport.wake()
        self._thread.join()

    def _run(self) -> None:
        connected = opened = False
        while not self._stop.is_set():
            if not opened:
                try:
                    self.transport.open(self.options, timeout_s=5)
                    opened = True
                except BrokerError:
                    self._stop.wait(0.02)
                    continue
            for event in self.transport.poll(1):
                if isinstance(event, Connected):
                    self.transport.subscribe(self.topics.subscriptions(), retained=False)
                elif isinstance(event, Subscribed):
                    connected = True
                    self._say("online")
                    self.online.set()
                elif isinstance(event, Received):
                    self._answer(event)
                elif isinstance(event, Closed):
                    opened = connected = False
                    self.online.clear()
        if connected:
            self._say("offline")
        self.transport.close()

    def _say(self, availability: str) -> None:
        if not self.quiet:
            self.transport.publish(Message(self.topics.availability, availability.encode(), retain=True))

    def _answer(self, received: Received) -> None:
        message = received.message
        address = self.topics.parse_infer(message.topic)
        assert address is not None
        self.requests.append(message)
        topic = message.properties.response_topic or self.topics.result(address)
        key = (topic, message.properties.correlation_data or b"")
        self.seen[key] += 1
        for body in self.reply(message, self.seen[key]):
            status = "200" if not body.startswith(b'{"error"') else str(json.loads(body).get("status", 500))
            properties = Properties(
                correlation_data=message.properties.correlation_data,
                content_type="application/json",
                user=(
                    ("status", status),
                    ("device", self.topics.device),
                    ("server-timing", "queue;dur=1.2, infer;dur=5.8"),
                ),
            )
            self.transport.publish(
                Message(topic, body, properties=properties if self.options.version == 5 else Properties())
            )
        self.transport.acknowledge(received)


def reconnected(responder: Responder) -> None:
    eventually(responder.online.is_set, "the responder is back")


def with_version(options: ConnectOptions, version: int) -> ConnectOptions:
    return replace(options, version=4 if version == 4 else 5)
