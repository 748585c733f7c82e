"""What people send, and what they get: every content type, by every kind of client, and everything that is wrong."""

from __future__ import annotations

import io
import itertools
import json
import re
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_sdk.mqtt.client import Client
from edge_sdk.mqtt.transports.base import (
    Acknowledged,
    Connected,
    ConnectOptions,
    Message,
    MqttVersion,
    Properties,
    Received,
    Subscribed,
)
from edge_sdk.mqtt.transports.paho import PahoTransport
from edge_sdk.tasks.base import BINARY, JPEG, JSON, NPY, PNG, TEXT
from edge_sdk.tasks.npy import encode_npy
from edge_sdk.tasks.oip import decode_response, encode_request
from edge_sdk.tensors import Array
from tests.brokers import Broker, eventually, running_amqtt
from tests.daemon.processes import DEVICE, DaemonProcess, error_of, running_daemon

MODEL = f"edge/v1/{DEVICE}/models/digits"


_NUMBERS = itertools.count(1)


class Wire:
    """A client of bare messages: what goes out is what the test says, to the byte."""

    def __init__(self, broker_url: str, *, version: MqttVersion = 5, name: str = "bare") -> None:
        name = f"{name}-{next(_NUMBERS)}" if version == 5 else name
        self.replies = f"edge/v1/reply/{name}"
        self.transport = PahoTransport()
        port = int(broker_url.rsplit(":", 1)[1])
        options = ConnectOptions("127.0.0.1", port, f"test-{name}", version=version, clean_start=True)
        self.transport.open(options, timeout_s=5)
        self.inbox: list[Message] = []
        self.asked = 0
        self._wait(lambda event: isinstance(event, Connected))
        self.subscribe(self.replies if version == 5 else f"{MODEL}/result/{name}/+")

    def subscribe(self, topic: str) -> None:
        self.transport.subscribe([topic])
        self._wait(lambda event: isinstance(event, Subscribed))

    def ask(
        self, payload: bytes, *, topic: str = f"{MODEL}/infer", deadline_s: float = 10, **properties: Any
    ) -> Message:
        """The answer to one request; user properties are given as `user={...}`."""
        user = tuple(properties.pop("user", {}).items())
        self.asked += 1
        told = {"response_topic": self.replies, "correlation_data": b"%d" % self.asked, **properties}
        self.send(Message(topic, payload, properties=Properties(user=user, **told)))
        return self.next(deadline_s)

    def send(self, message: Message) -> None:
        self.inbox.clear()
        handle = self.transport.publish(message)
        if message.qos:
            self._wait(lambda event: isinstance(event, Acknowledged) and event.handle == handle)

    def next(self, deadline_s: float = 10) -> Message:
        if not self.inbox:
            self._wait(lambda event: isinstance(event, Received), deadline_s)
        return self.inbox[0]

    def silent_for(self, seconds: float) -> bool:
        give_up_at = time.monotonic() + seconds
        while time.monotonic() < give_up_at:
            self._take(self.transport.poll(0.05))
        return not self.inbox

    def _wait(self, wanted: Callable[[Any], bool], deadline_s: float = 10) -> None:
        give_up_at = time.monotonic() + deadline_s
        while True:
            events = self.transport.poll(0.05)
            self._take(events)
            if any(wanted(event) for event in events):
                return
            assert time.monotonic() < give_up_at, "nothing came in time"

    def _take(self, events: Any) -> None:
        for event in events:
            if isinstance(event, Received):
                self.inbox.append(event.message)
                self.transport.acknowledge(event)


@pytest.fixture
def wire(broker: Broker, daemon: DaemonProcess) -> Iterator[Wire]:
    bare = Wire(broker.url)
    yield bare
    bare.transport.close()


def as_array(picture: Path) -> Array:
    """What the daemon's preprocessing makes of a digit."""
    return (np.asarray(Image.open(picture), dtype=np.float32) / 255)[np.newaxis, np.newaxis]


def as_json(array: Array) -> bytes:
    tensor = {"name": "image", "shape": list(array.shape), "datatype": "FP32", "data": array.ravel().tolist()}
    return json.dumps({"id": "42", "inputs": [tensor]}).encode()


def test_a_picture_is_answered_with_labels(wire: Wire, pictures: list[Path]) -> None:
    """PNG in, the best labels out, with everything the wire contract promises about an answer."""
    picture = next(p for p in pictures if p.parent.name == "7")

    answer = wire.ask(picture.read_bytes(), content_type=PNG, correlation_data=b"\x00\xff binary \x01")

    body = json.loads(answer.payload)
    user = dict(answer.properties.user)
    assert body["predictions"][0]["label"] == "7"
    assert body["outputs"][0]["data"][0].endswith(":7:7")
    assert answer.properties.correlation_data == b"\x00\xff binary \x01"
    assert answer.properties.content_type == JSON
    assert user["status"] == "200"
    assert user["device"] == DEVICE
    assert user["model-version"] == "1"
    assert ["queue", "infer", "decode"] == re.findall(r"(\w+);dur=", user["server-timing"])[:3]
    assert 0 < (answer.properties.message_expiry_s or 0) <= 30


def test_every_way_of_sending_a_tensor_gives_the_same_answer(wire: Wire, pictures: list[Path]) -> None:
    """JSON, binary, .npy and raw bytes are four spellings of one request; a picture is a fifth."""
    array = as_array(pictures[0])
    binary = encode_request({"image": array})
    header = {"inference-header-content-length": str(binary.header_length)}

    spellings = {
        "json": wire.ask(as_json(array), content_type=JSON),
        "sniffed json": wire.ask(as_json(array)),
        "binary": wire.ask(binary.data, content_type=BINARY, user=header),
        "npy": wire.ask(encode_npy(array), content_type=NPY),
        "npy without the batch axis": wire.ask(encode_npy(array[0]), content_type=NPY),
        "raw": wire.ask(array.tobytes(), content_type=BINARY),
    }

    for name, answer in spellings.items():
        length = dict(answer.properties.user).get("inference-header-content-length")
        response = decode_response(answer.payload, int(length) if length else None)
        found = response.outputs["probabilities"].ravel()
        reference = decode_response(spellings["json"].payload).outputs["probabilities"].ravel()
        assert np.allclose(reference, found, atol=1e-6), name
    label = json.loads(wire.ask(pictures[0].read_bytes(), content_type=PNG).payload)["predictions"][0]["index"]
    assert int(reference.argmax()) == label


def test_text_for_small_clients(wire: Wire, pictures: list[Path]) -> None:
    """`accept: text/plain` gives `score:index:label` lines, which a microcontroller can split."""
    answer = wire.ask(pictures[0].read_bytes(), user={"accept": TEXT})

    lines = answer.payload.decode().splitlines()
    assert len(lines) == 3
    assert lines[0].split(":")[1:] == ["0", "0"]
    assert answer.properties.content_type == TEXT


def test_a_batch_from_one_client(wire: Wire, pictures: list[Path]) -> None:
    """Several rows in one request come back as as many rows; more than the model takes is a 413."""
    arrays = np.concatenate([as_array(picture) for picture in pictures[:5]])

    outputs = decode_response(wire.ask(as_json(arrays)).payload).outputs["probabilities"]
    refused = wire.ask(encode_npy(np.zeros((17, 1, 8, 8), np.float32)))

    assert outputs.shape == (5, 10)
    assert error_of(refused.payload) == (413, "too_large")


def test_model_version_is_chosen_by_topic_and_by_property(wire: Wire, pictures: list[Path]) -> None:
    data = pictures[0].read_bytes()

    pinned = wire.ask(data, topic=f"{MODEL}/versions/1/infer")
    by_property = wire.ask(data, user={"model-version": "1"})
    unknown = wire.ask(data, topic=f"{MODEL}/versions/2/infer")

    assert dict(pinned.properties.user)["status"] == "200"
    assert dict(by_property.properties.user)["status"] == "200"
    assert error_of(unknown.payload) == (404, "version_not_found")


def test_without_response_topic_the_answer_goes_to_result(wire: Wire, pictures: list[Path]) -> None:
    wire.subscribe(f"{MODEL}/result")
    wire.send(Message(f"{MODEL}/infer", pictures[0].read_bytes()))

    answer = wire.next()

    assert answer.topic == f"{MODEL}/result"
    assert json.loads(answer.payload)["predictions"]


def test_qos_0_requests_are_answered(wire: Wire, pictures: list[Path]) -> None:
    properties = Properties(response_topic=wire.replies, correlation_data=b"zero")
    wire.send(Message(f"{MODEL}/infer", pictures[0].read_bytes(), qos=0, properties=properties))

    assert wire.next().properties.correlation_data == b"zero"


def test_mqtt_311_asks_by_topic(broker: Broker, daemon: DaemonProcess, pictures: list[Path]) -> None:
    """Without properties, the id is in the topic, and the answer comes to the topic that mirrors it."""
    old = Wire(broker.url, version=4, name="old")
    old.send(Message(f"{MODEL}/infer/old/7", pictures[0].read_bytes()))

    answer = old.next()
    old.send(Message(f"{MODEL}/infer/old/8", b"{"))
    error = old.next()
    old.transport.close()

    assert answer.topic == f"{MODEL}/result/old/7"
    assert json.loads(answer.payload)["predictions"][0]["label"] == "0"
    assert error_of(error.payload) == (400, "malformed")
    assert json.loads(error.payload)["id"] == "old/8"


def test_mqtt_311_broker(digits: Any, tmp_path: Path, pictures: list[Path]) -> None:
    """A broker that knows only 3.1.1 is served too, the version found out by asking."""
    pytest.importorskip("amqtt")
    with (
        running_amqtt(tmp_path) as embedded,
        running_daemon(digits.path.parent, embedded.url, tmp_path, ready=["digits"]),
        Client(embedded.url, device=DEVICE) as client,
    ):
        answer = client.infer("digits", pictures[0])

    assert answer.predictions[0].label == "0"


def test_retained_documents_describe_device_and_model(client: Client) -> None:
    """Whoever subscribes learns what there is, in the Open Inference Protocol's terms."""
    info, metadata = client.info(), client.metadata("digits")

    assert client.devices()[DEVICE]
    assert info["models"] == {"digits": ["1"]}
    assert info["limits"]["max_payload"] == 1_900_000
    assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
    assert (metadata["state"], metadata["precision"], metadata["backend"]) == ("READY", "int8", "onnxruntime")
    assert PNG in metadata["content_types"]


def test_stats_are_published(broker: Broker, digits: Any, tmp_path: Path) -> None:
    """Counts and percentiles come at the interval that is set."""
    with running_daemon(digits.path.parent, broker.url, tmp_path, device="counting", stats_interval_s="0.2"):
        bare = Wire(broker.url, name="stats")
        bare.subscribe("edge/v1/counting/stats")
        stats = json.loads(bare.next().payload)
        bare.transport.close()

    assert {"answers", "queue_ms", "infer_ms", "mqtt", "memory_bytes", "models"} <= set(stats)


def run(*command: str, data: bytes | None = None) -> str:
    """A command's standard output; it may take five seconds."""
    return subprocess.run(command, input=data, capture_output=True, timeout=15, check=True).stdout.decode()


@pytest.mark.parametrize("version", ["5", "311"])
def test_mosquitto_pub_and_sub(version: str, broker: Broker, daemon: DaemonProcess, pictures: list[Path]) -> None:
    """A shell is client enough: publish a file, listen on `result`, read the label."""
    port = str(broker.port)
    seven = next(p for p in pictures if p.parent.name == "7")
    listening = subprocess.Popen(
        [
            "stdbuf",
            "-oL",
            "mosquitto_sub",
            "-V",
            version,
            "-p",
            port,
            "-t",
            f"{MODEL}/result",
            "-C",
            "1",
            "-W",
            "10",
            "-d",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert listening.stdout is not None
    assert any("SUBACK" in line for line in iter(listening.stdout.readline, ""))
    run("mosquitto_pub", "-V", version, "-p", port, "-t", f"{MODEL}/infer", "-q", "1", "-f", str(seven))

    body = json.loads(next(line for line in listening.stdout if line.startswith("{")))
    listening.communicate(timeout=15)

    assert body["predictions"][0]["label"] == "7"


def test_mosquitto_rr(broker: Broker, daemon: DaemonProcess, pictures: list[Path]) -> None:
    """Request and response in one command, in both versions; JSON, with the classification asked for."""
    port = str(broker.port)
    array = as_array(next(p for p in pictures if p.parent.name == "4"))
    request = json.loads(as_json(array))
    request["outputs"] = [{"name": "probabilities", "parameters": {"classification": 1}}]
    body = json.dumps(request)

    five = run("mosquitto_rr", "-V", "5", "-p", port, "-t", f"{MODEL}/infer", "-e", "edge/v1/reply/rr", "-m", body)
    old = run("mosquitto_rr", "-V", "311", "-p", port, "-t", f"{MODEL}/infer/rr/1", "-e", f"{MODEL}/result/rr/1", "-m", body)  # fmt: skip  # noqa: E501

    for output in (five, old):
        label = json.loads(output)["outputs"][0]["data"][0]
        assert label.split(":")[1:] == ["4", "4"]


def test_tritonclient_bodies(wire: Wire, pictures: list[Path]) -> None:
    """A request body made by Triton's client is answered with a body that it reads."""
    http = pytest.importorskip("tritonclient.http")
    array = as_array(pictures[0])
    tensor = http.InferInput("image", list(array.shape), "FP32")
    tensor.set_data_from_numpy(array)
    body, header_length = http.InferenceServerClient.generate_request_body([tensor], request_id="t1")

    answer = wire.ask(body, content_type=BINARY, user={"inference-header-content-length": str(header_length)})

    length = int(dict(answer.properties.user)["inference-header-content-length"])
    result = http.InferenceServerClient.parse_response_body(answer.payload, header_length=length)
    assert result.get_response()["id"] == "t1"
    assert int(result.as_numpy("probabilities").argmax()) == 0


# What is wrong


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims that size; its pixels are a short zlib stream."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tensor_body(**changes: Any) -> bytes:
    tensor = {"name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.0] * 64, **changes}
    return json.dumps({"inputs": [tensor]}).encode()


def object_npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return stream.getvalue()


@dataclass(frozen=True)
class Bad:
    """A request that is wrong, and the error it deserves."""

    name: str
    payload: bytes
    status: int
    code: str
    properties: dict[str, Any] = field(default_factory=dict)
    topic: str = f"{MODEL}/infer"


BINARY_BODY = encode_request({"image": np.zeros((1, 1, 8, 8), np.float32)})
LYING_HEADER = {"inference-header-content-length": str(len(BINARY_BODY.data) + 1)}

BAD = [
    Bad("empty", b"", 400, "malformed"),
    Bad("truncated JSON", tensor_body()[:-5], 400, "malformed"),
    Bad("deep JSON", b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "malformed"),
    Bad("duplicate keys", b'{"inputs": [], "inputs": []}', 400, "malformed"),
    Bad("NaN in JSON", tensor_body(data=[float("nan")] * 64), 400, "malformed"),
    Bad("UTF-16", tensor_body().decode().encode("utf-16"), 400, "malformed", {"content_type": JSON}),
    Bad("no inputs", b'{"outputs": []}', 400, "malformed"),
    Bad("wrong input name", tensor_body(name="picture"), 422, "invalid_tensor"),
    Bad("wrong dtype", tensor_body(datatype="INT8", data=[0] * 64), 422, "invalid_tensor"),
    Bad("float in an integer", tensor_body(datatype="INT8", data=[1e9] * 64), 422, "invalid_tensor"),
    Bad("text in numbers", tensor_body(data=["x"] * 64), 422, "invalid_tensor"),
    Bad("negative shape", tensor_body(shape=[1, 1, -8, 8]), 422, "invalid_tensor"),
    Bad("enormous shape", tensor_body(shape=[2**62, 2**62, 8, 8]), 422, "invalid_tensor"),
    Bad("shape and data differ", tensor_body(shape=[2, 1, 8, 8]), 422, "invalid_tensor"),
    Bad("shape the model has not", tensor_body(shape=[1, 1, 4, 16]), 422, "invalid_tensor"),
    Bad(
        "unknown output",
        json.dumps({**json.loads(tensor_body()), "outputs": [{"name": "y"}]}).encode(),
        422,
        "invalid_tensor",
    ),
    Bad(
        "header longer than the payload",
        BINARY_BODY.data,
        400,
        "malformed",
        {"content_type": BINARY, "user": LYING_HEADER},
    ),
    Bad(
        "header length no number",
        BINARY_BODY.data,
        400,
        "malformed",
        {"content_type": BINARY, "user": {"inference-header-content-length": "-1"}},
    ),
    Bad("raw tensor of the wrong size", bytes(255), 422, "invalid_tensor", {"content_type": BINARY}),
    Bad("unknown content type", b"abc", 415, "unsupported_type", {"content_type": "text/csv"}),
    Bad(
        "unknown charset", tensor_body(), 415, "unsupported_type", {"content_type": "application/json; charset=latin-1"}
    ),
    Bad("nothing to sniff", b"hello", 415, "unsupported_type"),
    Bad("objects in npy", object_npy(), 415, "unsupported_type", {"content_type": NPY}),
    Bad("npy cut off", encode_npy(np.zeros((1, 1, 8, 8), np.float32))[:-1], 400, "malformed"),
    Bad("SVG as JPEG", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_type", {"content_type": JPEG}),
    Bad("PNG bomb", png_of(50_000, 50_000), 413, "too_large"),
    Bad("PNG with too few pixels", png_of(5_000, 5_000), 400, "malformed"),
    Bad("cut-off PNG", png_of(100, 100)[:60], 400, "malformed"),
    Bad("10 MB payload", bytes(10_000_000), 413, "too_large"),
    Bad("unknown model", b"{}", 404, "model_not_found", topic=f"edge/v1/{DEVICE}/models/nobody/infer"),
    Bad("model name like a path", b"{}", 404, "model_not_found", topic=f"edge/v1/{DEVICE}/models/..%2f..%2fetc/infer"),
    Bad("long correlation data", b"{}", 400, "malformed", {"correlation_data": bytes(129)}),
]


def test_bad_requests_get_their_error_while_good_ones_go_on(
    wire: Wire, client: Client, daemon: DaemonProcess, pictures: list[Path]
) -> None:
    """Each kind of bad request gets its own typed error; requests beside them are answered, all of them rightly."""
    good = [picture for picture in pictures if picture.parent.name == "0"][:8]
    stop = threading.Event()
    answered: list[str] = []

    def keep_asking() -> None:
        while not stop.is_set():
            answered.extend(client.infer("digits", picture).predictions[0].label for picture in good)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    found = {}
    for bad in BAD:
        properties = {"correlation_data": bad.name.encode(), **bad.properties}
        found[bad.name] = error_of(wire.ask(bad.payload, topic=bad.topic, **properties).payload)
    stop.set()
    asking.join()

    assert {bad.name: (bad.status, bad.code) for bad in BAD} == found
    assert {"0"} == set(answered)
    assert daemon.process is not None
    assert daemon.process.poll() is None


def test_an_id_used_again_with_another_payload_is_refused(wire: Wire, pictures: list[Path]) -> None:
    first = wire.ask(pictures[0].read_bytes(), correlation_data=b"same")
    again = wire.ask(pictures[0].read_bytes(), correlation_data=b"same")
    other = wire.ask(pictures[1].read_bytes(), correlation_data=b"same")

    assert first.payload == again.payload
    assert dict(again.properties.user)["duplicate"] == "1"
    assert error_of(other.payload) == (409, "id_reused")


@pytest.mark.parametrize(
    "topic",
    [
        "$SYS/broker/uptime",
        f"{MODEL}/infer",
        f"edge/v1/{DEVICE}/availability",
        "elsewhere/x",
        "edge/v1/reply/" + "x" * 60_000,
    ],
)
def test_a_response_topic_outside_the_allowed_is_not_written_to(
    topic: str, wire: Wire, broker: Broker, pictures: list[Path]
) -> None:
    """A client cannot make the device write where the client may not; the request is acknowledged and forgotten."""
    wire.subscribe("elsewhere/#")
    wire.send(Message(f"{MODEL}/infer", pictures[0].read_bytes(), properties=Properties(response_topic=topic)))

    assert wire.silent_for(0.3)
    assert wire.ask(pictures[0].read_bytes()).payload


def test_retained_requests_are_old_ones(broker: Broker, wire: Wire, digits: Any, tmp_path: Path) -> None:
    """A request that was published retained is not answered again by every daemon that starts."""
    retained = Message("edge/v1/late/models/digits/infer", b"{}", retain=True)
    bare = Wire(broker.url, name="late")
    bare.subscribe("edge/v1/late/models/digits/result")
    bare.send(retained)
    with running_daemon(digits.path.parent, broker.url, tmp_path, device="late") as late:
        with Client(broker.url, device="late") as asking:
            late.wait_for_state(asking, "digits", "READY")
        assert bare.silent_for(0.3)
    bare.transport.publish(Message(retained.topic, b"", retain=True))
    bare.transport.close()


def test_expired_requests_are_not_computed(broker: Broker, tmp_path: Path, digits: Any) -> None:
    """A request whose deadline passed while the daemon was away is not answered late."""
    bare = Wire(broker.url, name="hurry")
    with running_daemon(digits.path.parent, broker.url, tmp_path, ready=[], device="slow") as slow:
        with Client(broker.url, device="slow") as asking:
            slow.wait_for_state(asking, "digits", "READY")
        slow.kill()
        properties = Properties(response_topic=bare.replies, correlation_data=b"h", message_expiry_s=1)
        bare.send(Message("edge/v1/slow/models/digits/infer", b"{}", properties=properties))
        started = time.monotonic()
        eventually(lambda: time.monotonic() - started > 2.1, "the deadline has passed")  # brokers count whole seconds
        slow.start()
        with Client(broker.url, device="slow") as asking:
            slow.wait_for_state(asking, "digits", "READY")
        silent = bare.silent_for(0.5)
    bare.transport.close()

    assert silent


def test_a_big_picture_is_answered_as_soon_as_it_is_computed(client: Client) -> None:
    """Decoded on another thread, which wakes the network's: else each would wait for the second to be over."""
    stream = io.BytesIO()
    Image.new("L", (2000, 2000), 200).save(stream, "JPEG")
    client.infer("digits", stream.getvalue())
    began = time.monotonic()
    for _ in range(12):
        client.infer("digits", stream.getvalue())

    assert time.monotonic() - began < 6.0
