"""Faults of requests, on the wire, that tests/daemon/test_requests.py leaves open: cases 27 to 51."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from edge_sdk.mqtt.transports.base import Message, Properties
from tests.brokers import MOSQUITTO, Broker, eventually, running_mosquitto
from tests.daemon.processes import DaemonProcess, error_of, running_daemon
from tests.daemon.test_requests import Wire
from tests.faults.conftest import FULL_LENGTH, MODELS, POISON, OpenDaemon, alive, doubled, numbers, pid_of, stats_from
from tests.faults.fake_broker import FakeBroker
from tests.faults.fleet import FACTOR
from tests.faults.proxy import Proxy
from tests.faults.scene import DEVICE, make_engines
from tests.faults.vitals import vitals
from tests.packages import identity, make_package, misbehaving

BINARY = "application/octet-stream"
MAX_QUEUE = 16
SLOW_S = 0.2


@dataclass(frozen=True)
class Served:
    """A broker and a daemon with `scale`, `wide`, `slow` (one request at a time) and `odd` (fails at POISON)."""

    broker: Broker
    daemon: DaemonProcess

    def resident(self) -> int:
        held = vitals(pid_of(self.daemon))
        assert held is not None
        return held.rss_bytes

    def cpu_s(self) -> float:
        held = vitals(pid_of(self.daemon))
        assert held is not None
        return held.cpu_s


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    folder = tmp_path_factory.mktemp("served")
    engines = make_engines(folder / "engines")
    slow, odd = misbehaving([{"do": "sleep", "seconds": SLOW_S}]), misbehaving([{"do": "raise", "when": POISON}])
    make_package(engines / "slow", slow, name="slow", backend="reference", max_batch=1)
    make_package(engines / "odd", odd, name="odd", backend="reference", max_wait_ms=50.0)
    make_package(engines / "echo", identity(), name="echo")
    with (
        running_mosquitto(folder) as broker,
        running_daemon(
            engines,
            broker.url,
            folder,
            ready=["scale", "wide", "slow", "odd", "echo"],
            device=DEVICE,
            limits__max_queue=str(MAX_QUEUE),
            stats_interval_s="0.2",
        ) as daemon,
    ):
        yield Served(broker, daemon)


@pytest.fixture
def wire(served: Served) -> Iterator[Wire]:
    bare = Wire(served.broker.url)
    yield bare
    bare.transport.close()


def ask(wire: Wire, payload: bytes, model: str = "scale", **properties: Any) -> Message:
    return wire.ask(payload, topic=f"{MODELS}/{model}/infer", **properties)


def ask_together(wire: Wire, model: str, payloads: list[bytes], **told: Any) -> dict[bytes, tuple[Message, float]]:
    """Several requests at once; id -> its answer, and how long it took."""
    begun = time.monotonic()
    for number, payload in enumerate(payloads):
        properties = Properties(response_topic=wire.replies, correlation_data=b"%d-%f" % (number, begun), **told)
        wire.transport.publish(Message(f"{MODELS}/{model}/infer", payload, properties=properties))
    answers: dict[bytes, tuple[Message, float]] = {}

    def all_there() -> bool:
        wire.inbox.clear()
        wire._take(wire.transport.poll(0.01))
        for message in wire.inbox:
            number, _, when = (message.properties.correlation_data or b"").partition(b"-")
            if when == b"%f" % begun:
                answers[number] = (message, time.monotonic() - begun)
        return len(answers) == len(payloads)

    eventually(all_there, "an answer to each")
    return {number: answers[number] for number in sorted(answers, key=int)}


def status_of(answer: Message) -> int:
    return int(dict(answer.properties.user)["status"])


def test_case_27_delivered_again_while_it_is_computed(open_daemon: OpenDaemon, misbehaving_engines: Any) -> None:
    """The broker's second delivery (DUP) joins the first: one computation, one answer, and it is acknowledged."""
    slow = misbehaving_engines({"do": "sleep", "seconds": 0.8})
    with FakeBroker() as broker:
        open_daemon(broker.url, engines=slow)
        broker.wait(lambda: any(b"READY" in m.payload for m in broker.published(f"{MODELS}/odd")), "odd is ready")
        sent = broker.request(f"{MODELS}/odd/infer", numbers(1.0), correlation_data=b"one")
        broker.drop()
        broker.wait(lambda: broker.published(f"{MODELS}/odd", connection=2), "connected again")
        broker.request(f"{MODELS}/odd/infer", numbers(1.0), correlation_data=b"one", packet_id=sent, duplicate=True)
        broker.wait(lambda: broker.acknowledged(connection=2) == [sent], "acknowledged")
        answers = broker.published("edge/v1/reply/")

    assert [2.0] == [doubled(answer.payload)[0] for answer in answers]


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"", 400), (b"\0", 200), (b"a\0b" * 42, 200), (bytes(128), 200), (bytes(129), 400), (bytes(65_535), 400)],
    ids=["nothing", "a NUL", "NULs", "128 bytes", "129 bytes", "64 KB"],
)
def test_case_34_correlation_data(wire: Wire, data: bytes, status: int) -> None:
    """Echoed byte for byte, or refused with the same bytes."""
    answer = ask(wire, numbers(1.0), correlation_data=data)

    assert status == status_of(answer)
    assert data == answer.properties.correlation_data


HOSTILE_JSON = {
    "truncated": numbers(1.0)[:-7],
    "100,000 deep": b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 objects deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a key twice": b'{"inputs":[],"inputs":[]}',
    "an int of 100,000 digits": b'{"id":' + b"9" * 100_000 + b',"inputs":[]}',
    "a float of 100,000 digits": numbers(1.0).replace(b"1.0", b"1." + b"1" * 100_000 + b"e", 1),
    "NaN": numbers(1.0).replace(b"1.0", b"NaN", 1),
    "UTF-16": numbers(1.0).decode().encode("utf-16"),
    "a byte-order mark": b"\xef\xbb\xbf" + numbers(1.0),
    "a million brackets": b"[" * 1_000_000,
}


@pytest.mark.parametrize("payload", HOSTILE_JSON.values(), ids=HOSTILE_JSON.keys())
def test_case_35_json_that_means_harm(served: Served, wire: Wire, payload: bytes) -> None:
    """400, and within 50 ms of the daemon's processor time."""
    before = served.cpu_s()
    answer = ask(wire, payload, content_type="application/json")
    spent_s = served.cpu_s() - before

    assert (400, "malformed") == error_of(answer.payload)
    assert spent_s <= 0.05 + 0.02  # /proc counts in steps of 10 ms, and these are two of its readings


def lying(**changes: Any) -> bytes:
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0.0] * 4, **changes}
    return json.dumps({"inputs": [tensor]}).encode()


def lying_binary(size: Any, tensors: bytes, shape: tuple[int, ...] = (1, 4)) -> tuple[bytes, str]:
    tensor = {"name": "x", "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + tensors, str(len(head))


LIES: dict[str, tuple[bytes, str | None, int]] = {
    "a negative axis": (lying(shape=[-1, 4]), None, 422),
    "2^62 x 2^62": (lying(shape=[2**62, 2**62]), None, 422),
    "an axis of zero": (lying(shape=[1, 0], data=[]), None, 422),
    "zero times 2^62": (lying(shape=[0, 2**62], data=[]), None, 422),
    "another product": (lying(shape=[2, 4]), None, 422),
    "rank 40": (lying(shape=[1] * 40), None, 422),
    "a million rows": (lying(shape=[10**6, 4]), None, 422),
    "a header beyond the payload": (lying(), "9999999", 400),
    "a negative header": (lying(), "-1", 400),
    "a negative size": (*lying_binary(-16, bytes(16)), 400),
    "a size beyond the end": (*lying_binary(2**40, bytes(16)), 400),
    "bytes left over": (*lying_binary(16, bytes(17)), 400),
    "a shape of a terabyte": (*lying_binary(16, bytes(16), (2**36, 4)), 422),
    "a string past the end": (
        json.dumps({"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES",
                                "parameters": {"binary_data_size": 8}}]}).encode() + struct.pack("<I", 2**31) + b"abcd",
        None, 400,
    ),
}  # fmt: skip


def test_case_38_39_shapes_and_sizes_that_lie(served: Served, wire: Wire) -> None:
    """Each is refused for what it is, and no memory follows from what it claims."""
    found = {}
    ask(wire, numbers(1.0))
    before = served.resident()
    for name, (payload, header, _) in LIES.items():
        if name == "a string past the end":
            header = str(len(payload) - 8)
        user = {} if header is None else {"inference-header-content-length": header}
        content_type = "application/json" if header is None else BINARY
        found[name] = status_of(ask(wire, payload, content_type=content_type, user=user))

    assert {name: status for name, (_, _, status) in LIES.items()} == found
    assert served.resident() < before + 5_000_000


def test_case_40_numbers_that_are_none(wire: Wire) -> None:
    """NaN, infinity and denormals go in and come out in binary, and do no harm to whoever shares their batch."""
    rows = [[math.nan] * 4, [1.0, 2.0, 3.0, 4.0], [math.inf, -math.inf, 0.0, 1e-45], [5.0] * 4]
    payloads = [np.array(row, np.float32).tobytes() for row in rows]
    answers = ask_together(wire, "scale", payloads, content_type=BINARY, user=(("accept", BINARY),))
    in_json = ask(wire, payloads[0], content_type=BINARY)
    found = []
    for answer, _ in answers.values():
        length = int(dict(answer.properties.user)["inference-header-content-length"])
        found.append(np.frombuffer(answer.payload[length:], np.float32))

    for row, doubles in zip(rows, found):
        assert np.array_equal(np.array(row, np.float32) * np.float32(2), doubles, equal_nan=True)
    assert (500, "inference_failed") == error_of(in_json.payload)


def test_case_41_payloads_of_every_size(served: Served, wire: Wire) -> None:
    """Nothing: 400. One byte too many: 413. More than a packet may have: never delivered, and memory stays flat."""
    huge = 256_000_000 if FULL_LENGTH else 20_000_000
    before = served.resident()
    nothing, too_much = ask(wire, b""), ask(wire, bytes(1_900_001))
    told = Properties(response_topic=wire.replies, correlation_data=b"huge")
    wire.send(Message(f"{MODELS}/scale/infer", bytes(huge), properties=told))
    silent = wire.silent_for(0.3)
    small = ask(wire, numbers(2.0))

    assert (400, "malformed") == error_of(nothing.payload)
    assert (413, "too_large") == error_of(too_much.payload)
    assert silent
    assert 4.0 == doubled(small.payload)[0]
    assert served.resident() < before + 12_000_000


def test_case_45_no_answer_comes_late(wire: Wire) -> None:
    """More work than can be done by its deadline: each request is answered by then, with its result or with 408."""
    answers = ask_together(wire, "slow", [numbers(float(n)) for n in range(12)], message_expiry_s=1)
    statuses = [status_of(answer) for answer, _ in answers.values()]
    took = [seconds for _, seconds in answers.values()]

    assert {200, 408} == set(statuses)
    assert statuses.count(200) <= 1 / SLOW_S + 1
    assert max(took) < 1 + 1.2  # deadlines are looked at once a second


def test_case_46_a_full_queue(served: Served, wire: Wire) -> None:
    """Too much is told so at once, and when to come back; another model is as quick as ever."""
    begun = time.monotonic()
    other = Wire(served.broker.url)
    answers = ask_together(wire, "slow", [numbers(float(n)) for n in range(MAX_QUEUE + 14)], message_expiry_s=30)
    refused = [(answer, took) for answer, took in answers.values() if status_of(answer) == 429]
    all_s = time.monotonic() - begun
    ask_slow = Properties(response_topic=wire.replies, correlation_data=b"again")
    wire.transport.publish(Message(f"{MODELS}/slow/infer", numbers(1.0), properties=ask_slow))
    wire.transport.poll(0.0)
    begun = time.monotonic()
    ask(other, numbers(1.0))
    other_s = time.monotonic() - begun
    other.transport.close()

    assert 12 <= len(refused) <= 14
    assert all(0 < int(dict(answer.properties.user)["retry-after"]) <= 1.5e3 * all_s for answer, _ in refused)
    assert max(took for _, took in refused) < SLOW_S
    assert other_s < SLOW_S


def test_case_47_a_client_that_stops_reading(served: Served) -> None:
    """Its answers pile up in the broker; the daemon serves everybody else, and does not grow."""
    healthy = Wire(served.broker.url)
    with Proxy(served.broker.port) as line:
        stuck = Wire(f"mqtt://127.0.0.1:{line.port}")
        ask(healthy, numbers(1.0))
        before = served.resident()
        line.to_daemon.hold = True
        for number in range(100):
            told = Properties(response_topic=stuck.replies, correlation_data=b"%d" % number)
            stuck.transport.publish(
                Message(f"{MODELS}/wide/infer", numbers(float(number), width=4_000), properties=told)
            )
            stuck.transport.poll(0.0)
        took = []
        for number in range(50):
            begun = time.monotonic()
            assert 2.0 * number == doubled(ask(healthy, numbers(float(number))).payload)[0]
            took.append(time.monotonic() - begun)
        grown = served.resident() - before
    stuck.transport.close()
    healthy.transport.close()

    assert sorted(took)[25] < 0.1
    assert grown < 12_000_000


def test_case_48_one_poisonous_request_in_a_batch(wire: Wire) -> None:
    """A kernel fails on one request: only that one gets a 500, whoever shared its batch is answered."""
    payloads = [numbers(POISON if number == 3 else float(number)) for number in range(8)]
    answers = ask_together(wire, "odd", payloads)
    statuses = [status_of(answer) for answer, _ in answers.values()]

    assert [200, 200, 200, 500, 200, 200, 200, 200] == statuses
    assert all(doubled(a.payload)[0] == 2.0 * int(n) for n, (a, _) in answers.items() if n != b"3")


def test_case_49_a_client_that_is_gone(served: Served, wire: Wire) -> None:
    """Its answer is for nobody: counted, and the request acknowledged."""
    before = stats_from(served.broker)["mqtt"]["unheard"]
    told = Properties(response_topic="edge/v1/reply/nobody-at-all", correlation_data=b"1")
    wire.send(Message(f"{MODELS}/scale/infer", numbers(1.0), properties=told))

    eventually(lambda: stats_from(served.broker)["mqtt"]["unheard"] == before + 1, "counted")


def test_case_50_many_large_user_properties(served: Served, wire: Wire) -> None:
    """Twelve megabytes of properties are read past, and given back."""
    ask(wire, numbers(1.0))
    before = served.resident()
    user = tuple((f"key-{number}", "x" * 60_000) for number in range(200))
    told = Properties(response_topic=wire.replies, correlation_data=b"many", user=user)
    for _ in range(3):
        wire.send(Message(f"{MODELS}/scale/infer", numbers(2.0), properties=told))
        assert 4.0 == doubled(wire.next().payload)[0]

    assert served.resident() < before + 40_000_000


@pytest.mark.parametrize(
    "name", ["..", "../../etc", "%2e%2e", "sc\u0430le", "scale\u200b", "x" * 10_000, "scale ", "SCALE", "scale.", "-"]
)
def test_case_51_names_that_are_no_model(served: Served, wire: Wire, name: str) -> None:
    """404 for a name in one level; what is no request's topic at all is never delivered. No file is looked for."""
    told = Properties(response_topic=wire.replies, correlation_data=name[:20].encode())
    wire.send(Message(f"{MODELS}/{name}/infer", numbers(1.0), properties=told))
    if "/" in name:
        assert wire.silent_for(0.2)
    else:
        assert (404, "model_not_found") == error_of(wire.next().payload)

    assert alive(served.daemon)
    assert FACTOR == doubled(ask(wire, numbers(1.0)).payload)[0]
