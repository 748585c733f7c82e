"""Clients that keep asking what they know the answer to, and write down what they hear.

Three kinds, each with MQTT 5 and 3.1.1. The client library (`sdk`) shows one answer for each request, however often it
came. Bare messages through paho (`wire`) show every message, and are sent again, under their id, when the answer takes
long. `patient` clients are like these and never send again: as long as the broker lives, what it accepted is the
daemon's to answer. paho is there for being somebody else's: it shares no code with the daemon.

Every question is another one: the answer to a neighbour's would be noticed. One in twenty is no question at all, and is
to be answered 400.
"""

from __future__ import annotations

import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties

from edge_sdk.errors import EdgeSdkError, RequestError
from edge_sdk.mqtt.client import Answer, Client
from edge_sdk.mqtt.topics import DEFAULT_ROOT, Topics
from tests.brokers import eventually
from tests.faults.history import Accepted, Answered, Asked, Availability, History, Link, SentAgain, digest

FACTOR = 2.0
"""The model that is asked multiplies by this."""
BROKEN = b'{"inputs": ['
SEND_AGAIN_S = 3.0


@dataclass(frozen=True)
class Question:
    payload: bytes
    reference: str
    expected: tuple[int, ...] = (200,)


@dataclass(frozen=True)
class Load:
    """What each client of a fleet does."""

    device: str
    model: str = "scale"
    in_flight: int = 4
    pause_s: float = 0.02
    """Between one question and the next."""
    timeout_s: float = 60.0
    width: int = 4
    expected: tuple[int, ...] = (200,)
    """What a good question may be answered with."""


def question(number: int, asker: int, load: Load) -> Question:
    """The `number`th question of a client: some numbers, and their double."""
    width = load.width
    if number % 20 == 19:
        return Question(BROKEN, "", (400, *load.expected[1:]))
    row = [float(number), float(asker), *[0.5] * (width - 2)]
    tensor = {"name": "x", "shape": [1, width], "datatype": "FP32", "data": row}
    return Question(
        json.dumps({"inputs": [tensor]}).encode(), _meaning([FACTOR * value for value in row]), load.expected
    )


def meaning(body: bytes) -> str:
    """The digest of the outputs in an answer; of an answer that cannot be read, one that fits no reference."""
    try:
        (output,) = json.loads(body)["outputs"]
        if (output["name"], output["datatype"]) != ("y", "FP32") or output["shape"] != [1, len(output["data"])]:
            return "not the model's output"
        return _meaning(output["data"])
    except (ValueError, KeyError, TypeError):
        return "unreadable"


def _meaning(values: list[float]) -> str:
    return digest(json.dumps([float(value) for value in values]).encode())


class Asker(ABC):
    """One client. `start`, then `stop` asking, then `close` when nothing is open any more."""

    def __init__(self, name: str, index: int, history: History, load: Load) -> None:
        self.name = name
        self.history = history
        self.load = load
        self.open: dict[str, float] = {}
        """Ids without an answer, and when they were sent last."""
        self._index = index
        self._number = 0
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No new questions."""
        self._enough.set()
        if self._thread.is_alive():
            self._thread.join(30)
        assert not self._thread.is_alive(), f"{self.name} hangs"

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _ask(self, number: int, request_id: str, asked: Question) -> None:
        """Send it; `open` and the history know of it already."""

    def look(self) -> None:  # noqa: B027  # most have nothing to do
        """Now and then: whatever a client does on its own, such as sending again."""

    def _run(self) -> None:
        while not self._enough.wait(self.load.pause_s):
            self.look()
            if len(self.open) >= self.load.in_flight:
                continue
            self._number += 1
            request_id = f"{self.name}/{self._number}"
            asked = question(self._number, self._index, self.load)
            self.open[request_id] = time.monotonic()
            self.history.note(
                Asked,
                id=request_id,
                client=self.name,
                reference=asked.reference,
                timeout_s=self.load.timeout_s,
                expected=asked.expected,
            )
            self._ask(self._number, request_id, asked)


class SdkAsker(Asker):
    """edge-sdk's own client library, and what its caller sees."""

    def __init__(self, name: str, index: int, history: History, load: Load, url: str, protocol: str) -> None:
        super().__init__(name, index, history, load)
        self._client = Client(
            url, device=load.device, timeout_s=load.timeout_s, wait_for_device_s=load.timeout_s, protocol=protocol  # type: ignore[arg-type]  # one of the three
        )  # fmt: skip

    def close(self) -> None:
        self._client.close()

    def _ask(self, number: int, request_id: str, asked: Question) -> None:
        future = self._client.submit(self.load.model, asked.payload)
        future.add_done_callback(lambda done: self._ended(request_id, done))

    def _ended(self, request_id: str, done: Future[Answer]) -> None:
        facts: dict[str, Any] = {"id": request_id, "client": self.name, "on_wire": False}
        error = done.exception()
        if error is None:
            answer = done.result()
            facts |= {"status": answer.status, "body": digest(answer.raw), "outputs": meaning(answer.raw)}
        else:
            status = error.status if isinstance(error, RequestError) else 0
            text = str(error) if isinstance(error, EdgeSdkError) else repr(error)
            facts |= {"status": status, "body": "", "outputs": "", "detail": text}
        self.history.note(Answered, **facts)
        self.open.pop(request_id, None)


class WireAsker(Asker):
    """paho, and every message that came."""

    def __init__(
        self, name: str, index: int, history: History, load: Load, port: int, version: int, *, patient: bool
    ) -> None:
        super().__init__(name, index, history, load)
        self._five = version == 5
        self._patient = patient
        topics = Topics(DEFAULT_ROOT, load.device)
        self._topics = topics
        self._replies = f"{DEFAULT_ROOT}/reply/{name}" if self._five else topics.results_for(name)
        self._payloads: dict[str, bytes] = {}
        self._ids: dict[int, str] = {}  # paho's message ids -> ours
        self._early: dict[int, int] = {}  # acknowledged before `publish` came back with the message id -> code
        self._lock = threading.Lock()  # of those two; never held while paho is called, which has locks of its own
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=name,
            protocol=MQTTProtocolVersion.MQTTv5 if self._five else MQTTProtocolVersion.MQTTv311,
            clean_session=None if self._five else False,
        )
        self._client.reconnect_delay_set(0.1, 1.0)  # type: ignore[arg-type]  # it takes fractions
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_publish = self._on_publish
        self._client.on_message = self._on_message
        self._subscribed = threading.Event()
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        if self._five:
            told = PahoProperties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            told.SessionExpiryInterval = 600
            self._client.connect("127.0.0.1", port, keepalive=10, clean_start=False, properties=told)
        else:
            self._client.connect("127.0.0.1", port, keepalive=10)
        self._client.loop_start()
        assert self._subscribed.wait(15), f"{name} could not subscribe"

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _ask(self, number: int, request_id: str, asked: Question) -> None:
        self._payloads[request_id] = asked.payload
        self._publish(request_id)

    def look(self) -> None:
        if self._patient:
            return
        now = time.monotonic()
        for request_id in [request_id for request_id, sent in list(self.open.items()) if now - sent > SEND_AGAIN_S]:
            if request_id in self.open and self._client.is_connected():
                self.open[request_id] = now
                self.history.note(SentAgain, id=request_id)
                self._publish(request_id)

    def _publish(self, request_id: str) -> None:
        payload = self._payloads.get(request_id)
        if payload is None:
            return  # answered a moment ago
        number = request_id.rpartition("/")[2]
        topic, told = self._topics.infer_from(self.load.model, self.name, number), None
        if self._five:
            topic = self._topics.infer(self.load.model)
            told = PahoProperties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            told.ResponseTopic = self._replies
            told.CorrelationData = request_id.encode()
            told.MessageExpiryInterval = round(self.load.timeout_s)
        sent = self._client.publish(topic, payload, qos=1, properties=told)
        with self._lock:
            code = self._early.pop(sent.mid, None)
            if code is None:
                self._ids[sent.mid] = request_id
        if code is not None:
            self.history.note(Accepted, id=request_id, code=code)

    def _on_connect(self, client: Any, _userdata: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if not reason.is_failure:
            self.history.note(Link, client=self.name, up=True)
            client.subscribe(self._replies, qos=1)

    def _on_disconnect(self, *_: Any) -> None:
        self.history.note(Link, client=self.name, up=False)

    def _on_publish(self, _client: Any, _userdata: Any, mid: int, reason: Any, _properties: Any) -> None:
        with self._lock:
            request_id = self._ids.pop(mid, None)
            if request_id is None:
                self._early[mid] = reason.value
        if request_id is not None:
            self.history.note(Accepted, id=request_id, code=reason.value)

    def _on_message(self, _client: Any, _userdata: Any, message: Any) -> None:
        user: dict[str, str] = {}
        if self._five:
            user = dict(getattr(message.properties, "UserProperty", []))
            request_id = bytes(getattr(message.properties, "CorrelationData", b"")).decode(errors="replace")
            status = int(user.get("status", "0"))
        else:
            request_id = f"{self.name}/{message.topic.rpartition('/')[2]}"
            status = json.loads(message.payload).get("status", 200)
        good = status == 200
        self.history.note(
            Answered,
            id=request_id,
            client=self.name,
            status=status,
            body=digest(message.payload),
            outputs=meaning(message.payload) if good else "",
            duplicate="duplicate" in user,
            detail="" if good else message.payload[:200].decode(errors="replace"),
        )
        self.open.pop(request_id, None)
        self._payloads.pop(request_id, None)


KINDS = ("sdk 5", "sdk 3.1.1", "wire 5", "wire 3.1.1")
PATIENT = ("sdk 5", "wire 3.1.1", "patient 5", "patient 3.1.1")
"""For faults that leave the broker alone: then nobody needs to send anything again."""


class Fleet:
    """Clients of several kinds, asking until told to stop."""

    def __init__(self, port: int, history: History, load: Load, kinds: Sequence[str] = KINDS) -> None:
        self.load = load
        self.askers: list[Asker] = []
        for index, kind in enumerate(kinds):
            what, protocol = kind.split()
            name = f"{what}{protocol.replace('.', '')}-{index}"
            if what == "sdk":
                url = f"mqtt://127.0.0.1:{port}"
                self.askers.append(SdkAsker(name, index, history, load, url, protocol))
            else:
                version = 5 if protocol == "5" else 4
                self.askers.append(WireAsker(name, index, history, load, port, version, patient=what == "patient"))

    @property
    def open(self) -> int:
        """How many requests have no answer yet."""
        return sum(len(asker.open) for asker in self.askers)

    def start(self) -> None:
        for asker in self.askers:
            asker.start()

    def stop(self) -> None:
        """No new questions."""
        for asker in self.askers:
            asker.stop()

    def drain(self) -> None:
        """Wait until nothing is open, or every deadline is over; whoever sends again, goes on doing so."""

        def settled() -> bool:
            for asker in self.askers:
                asker.look()
            return not self.open

        give_up_at = time.monotonic() + self.load.timeout_s + 2
        while not settled() and time.monotonic() < give_up_at:
            time.sleep(0.02)

    def close(self) -> None:
        for asker in self.askers:
            asker.close()


class Bystander:
    """A client that only watches the availability of a device."""

    def __init__(self, port: int, device: str, history: History) -> None:
        self.history = history
        self.last = ""
        self._topic = Topics(DEFAULT_ROOT, device).availability
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id=f"bystander-{device}")
        self._client.reconnect_delay_set(0.1, 1.0)  # type: ignore[arg-type]  # it takes fractions
        self._client.on_connect = lambda client, *_: client.subscribe(self._topic, qos=1)
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", port, keepalive=10)
        self._client.loop_start()

    def sees(self, payload: str, deadline_s: float = 15.0) -> None:
        eventually(lambda: self.last == payload, f"availability is {payload}; it is {self.last!r}", deadline_s)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_message(self, _client: Any, _userdata: Any, message: Any) -> None:
        self.last = message.payload.decode(errors="replace")
        self.history.note(Availability, payload=self.last)
