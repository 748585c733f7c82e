"""The wire contract is what docs/wire-contract.md says: its vectors and schemas, against the code and a live daemon."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk import errors
from edge_sdk.errors import RequestError, request_error
from edge_sdk.mqtt.codec import Codec
from edge_sdk.mqtt.session import ReplyRoute
from edge_sdk.mqtt.topics import Topics
from edge_sdk.mqtt.transports.base import (
    Acknowledged,
    Connected,
    ConnectOptions,
    Message,
    Properties,
    Received,
    Subscribed,
)
from edge_sdk.mqtt.transports.paho import PahoTransport
from edge_sdk.package import EnginePackage
from edge_sdk.runtime.messages import Answer
from edge_sdk.sensors import Sensors
from edge_sdk.tasks.npy import decode_npy
from edge_sdk.tasks.oip import decode_request, decode_response
from edge_sdk.tensors import OIP_FROM_DTYPE, Array, dtype_name
from tests.brokers import MOSQUITTO, Broker, eventually, running_mosquitto
from tests.daemon.processes import DEVICE, DaemonProcess, running_daemon
from tests.machines import MACHINES, put
from tests.packages import make_package, scaling

DOCS = Path(__file__).resolve().parent.parent / "docs"
CONTRACT = (DOCS / "wire-contract.md").read_text(encoding="utf-8")
ROOT = f"edge/v1/{DEVICE}"

Vector = dict[str, Any]

_IDS = itertools.count(1)


def vectors(name: str) -> Any:
    return json.loads((DOCS / "vectors" / f"{name}.json").read_text(encoding="utf-8"))


def schema(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DOCS / "schemas" / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def named(cases: list[Vector]) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in cases]


def described(tensors: dict[str, Array]) -> list[dict[str, Any]]:
    """Arrays as the vectors write them."""
    return [
        {
            "name": name,
            "datatype": OIP_FROM_DTYPE[dtype_name(array)],
            "shape": list(array.shape),
            "data": [item.decode() if isinstance(item, bytes) else item for item in array.ravel().tolist()],
        }
        for name, array in tensors.items()
    ]


def check(document: Any, name: str) -> None:
    """`document` is what the schema says, and the schema knows each of its keys."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    wanted = schema(name)
    jsonschema.validators.validator_for(wanted).check_schema(wanted)
    jsonschema.validate(document, wanted)

    assert set() == set(document) - set(wanted["properties"])


# The vectors, against the code


def test_vectors_are_what_their_script_makes() -> None:
    """The files beside docs/vectors/make.py are its output, so the script may be read in their place."""
    spec = importlib.util.spec_from_file_location("make_vectors", DOCS / "vectors" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)

    for name, value in make.VECTORS.items():
        assert make.text(value) == (DOCS / "vectors" / f"{name}.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("vector", named(vectors("requests")))
def test_request_vectors_are_read(vector: Vector) -> None:
    """Each request's bytes mean what the vector says."""
    request = decode_request(bytes.fromhex(vector["payload_hex"]), vector["header_length"])
    means = vector["means"]

    assert means["inputs"] == described(request.feeds)
    assert means["id"] == request.id
    assert means["binary_output"] == request.binary_output
    assert means["outputs"] == [choice.name for choice in request.outputs]


@pytest.mark.parametrize("vector", named(vectors("responses")))
def test_response_vectors_are_read(vector: Vector) -> None:
    """Each response's bytes mean what the vector says."""
    response = decode_response(bytes.fromhex(vector["payload_hex"]), vector["header_length"])
    means = vector["means"]

    assert means["outputs"] == described(response.outputs)
    assert (means["id"], means["model_name"], means["model_version"]) == (
        response.id,
        response.model_name,
        response.model_version,
    )


@pytest.mark.parametrize("vector", named(vectors("npy")))
def test_npy_vectors_are_read(vector: Vector) -> None:
    """Each .npy payload is the array the vector says, or is refused with the error it says."""
    payload = bytes.fromhex(vector["payload_hex"])
    if "error" in vector:
        with pytest.raises(RequestError) as refused:
            decode_npy(payload)

        assert vector["error"] == {"status": refused.value.status, "code": refused.value.code}
        return
    array = decode_npy(payload)

    assert vector["means"] == {"dtype": array.dtype.name, "shape": list(array.shape), "data": array.tolist()}


def test_topic_vectors_are_parsed_and_built() -> None:
    """Which topics are requests, what they say, and where their answers go."""
    told = vectors("topics")
    topics = Topics(told["root"], told["device"])

    assert told["subscriptions"] == topics.subscriptions()
    for request in told["requests"]:
        address = topics.parse_infer(request["topic"])
        assert address is not None
        assert [request["model"], request.get("version"), request.get("client"), request.get("number")] == [
            address.model,
            address.version,
            address.client,
            address.number,
        ]
        assert request["result"] == topics.result(address)
    assert [] == [topic for topic in told["not_requests"] if topics.parse_infer(topic) is not None]
    assert [] == [topic for topic in told["response_topics"]["taken"] if not topics.may_reply_to(topic)]
    assert [] == [topic for topic in told["response_topics"]["refused"] if topics.may_reply_to(topic)]


# The errors


def leaves() -> list[type[RequestError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and RequestError in kind.__bases__]


@pytest.mark.parametrize("kind", leaves())
def test_every_error_is_a_row_of_the_contract(kind: type[RequestError]) -> None:
    """Status, code and whether to try again stand in the contract's table, and the body is what the schema says."""
    codec = Codec(Topics("edge/v1", "lab"), boot_id="0" * 16, max_payload_bytes=1, timeout_s=1)
    error = kind("What is wrong.", retry_after_ms=7)
    message = codec.message(Answer(1, error), ReplyRoute("edge/v1/reply/me", b"\xff1"), 5)
    body = json.loads(message.payload)

    assert f"| {kind.status} | `{kind.code}` | {'yes' if kind.retryable else 'no'} |" in CONTRACT
    check(body, "error")
    assert (kind.status, kind.code, kind.retryable, "ff31") == (
        body["status"],
        body["code"],
        body["retryable"],
        body["id"],
    )
    assert kind is type(request_error(body["code"], body["error"]))


def test_the_contract_names_no_error_that_does_not_exist() -> None:
    """Each row of the table of errors is one that the code can answer with."""
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", CONTRACT, re.MULTILINE)

    assert sorted((str(kind.status), kind.code) for kind in leaves()) == sorted(rows)


# A live daemon


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    with running_mosquitto(tmp_path_factory.mktemp("broker")) as started:
        yield started


@pytest.fixture(scope="module")
def daemon(broker: Broker, digits: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """It serves the digits, a model that doubles its input, and one that cannot be loaded."""
    engines = tmp_path_factory.mktemp("engines")
    (engines / "digits").symlink_to(digits.path)
    make_package(engines / "double", scaling(2.0))
    make_package(engines / "broken", b"not a graph")
    folder = tmp_path_factory.mktemp("daemon")
    with running_daemon(
        engines, broker.url, folder, ready=["digits", "double"], stats_interval_s="0.1"
    ) as started:  # fmt: skip
        yield started


class Listener:
    """A bare MQTT 5 client: what was published, with every property."""

    def __init__(self, broker: Broker) -> None:
        self.transport = PahoTransport()
        self.transport.open(ConnectOptions("127.0.0.1", broker.port, "listener", clean_start=True), timeout_s=5)
        self.heard: dict[str, Message] = {}
        self.id = b""
        self._until(lambda event: isinstance(event, Connected))

    def on(self, topic: str) -> Message:
        """The next message on `topic`, or the one retained there."""
        self.heard.pop(topic, None)
        self.transport.subscribe([topic])
        self._until(lambda event: isinstance(event, Subscribed))
        eventually(lambda: self._poll() or topic in self.heard, f"a message on {topic}")
        return self.heard[topic]

    def ask(self, model: str, vector: Vector) -> Message:
        """The answer to a vector's bytes."""
        length = vector["header_length"]
        user = () if length is None else (("inference-header-content-length", str(length)),)
        self.id = b"%d" % next(_IDS)  # an id of an earlier test would bring that test's answer
        asked = Properties("edge/v1/reply/listener", self.id, vector["content_type"], 20, user)
        self.transport.subscribe(["edge/v1/reply/listener"])
        self._until(lambda event: isinstance(event, Subscribed))
        self.heard.clear()
        handle = self.transport.publish(Message(f"{ROOT}/models/{model}/infer", _payload(vector), properties=asked))
        self._until(lambda event: isinstance(event, Acknowledged) and event.handle == handle)
        eventually(lambda: self._poll() or self.heard, "an answer")
        return self.heard["edge/v1/reply/listener"]

    def _until(self, wanted: Any) -> None:
        eventually(lambda: any(map(wanted, self._poll())), "the broker's acknowledgement")

    def _poll(self) -> list[Any]:
        events = list(self.transport.poll(0.05))
        for event in events:
            if isinstance(event, Received):
                self.heard[event.message.topic] = event.message
                self.transport.acknowledge(event)
        return events


def _payload(vector: Vector) -> bytes:
    return bytes.fromhex(vector["payload_hex"])


@pytest.fixture
def listener(broker: Broker, daemon: DaemonProcess) -> Iterator[Listener]:
    bare = Listener(broker)
    yield bare
    bare.transport.close()


def test_retained_documents_are_what_the_schemas_say(listener: Listener) -> None:
    """Availability, device information, and the metadata of models that serve and of one that does not."""
    info = listener.on(f"{ROOT}/info")
    loaded = {name: listener.on(f"{ROOT}/models/{name}") for name in ("digits", "double", "broken")}

    assert b"online" == listener.on(f"{ROOT}/availability").payload
    assert all(message.retain for message in (info, *loaded.values()))
    check(json.loads(info.payload), "info")
    for message in loaded.values():
        check(json.loads(message.payload), "model")
    assert {"digits": "READY", "double": "READY", "broken": "UNAVAILABLE"} == {
        name: json.loads(message.payload)["state"] for name, message in loaded.items()
    }


def test_statistics_are_what_the_schema_says(listener: Listener) -> None:
    """The stats topic, after something was answered."""
    listener.ask("double", vectors("requests")[0])

    def counted() -> dict[str, Any] | None:
        stats: dict[str, Any] = json.loads(listener.on(f"{ROOT}/stats").payload)
        return stats if stats["answers"] else None

    stats = eventually(counted, "stats with an answer in them")

    check(stats, "stats")
    assert stats["machine"]["memory_available_bytes"] > 0
    assert stats["models"]["double/1"]["answers"]["200"] >= 1


@pytest.mark.parametrize("form", ["binary", "json"])
def test_a_daemon_answers_a_request_vector_with_the_response_vector(listener: Listener, form: str) -> None:
    """The bytes of the request vector, sent to a model that doubles, come back as the response vector's meaning."""
    request = next(vector for vector in vectors("requests") if vector["name"] == form)
    expected = next(vector for vector in vectors("responses") if vector["name"] == form)
    answer = listener.ask("double", request)
    length = answer.properties.user_value("inference-header-content-length")
    found = decode_response(answer.payload, int(length) if length else None)

    assert expected["content_type"] == answer.properties.content_type
    assert expected["means"]["outputs"] == described(found.outputs)
    assert expected["means"]["id"] == found.id
    assert listener.id == answer.properties.correlation_data
    assert {"status", "model-version", "device", "boot-id", "server-timing"} <= {k for k, _ in answer.properties.user}
    header = json.loads(answer.payload[: int(length)] if length else answer.payload)
    check(header, "inference-response")
    check(json.loads(_payload(request)[: request["header_length"]]), "inference-request")


@pytest.mark.parametrize("machine", MACHINES)
def test_how_any_machine_is_fits_the_schema(tmp_path: Path, machine: str) -> None:
    """A Jetson tells more than a virtual machine; each key that any of them tells is documented."""
    condition = Sensors(put(tmp_path, MACHINES[machine])).read()
    documented = schema("stats")["properties"]["machine"]

    pytest.importorskip("jsonschema", reason="jsonschema is not installed").validate(condition, documented)
    assert set() == set(condition) - set(documented["properties"])


def test_a_picture_and_an_error_are_what_the_schemas_say(listener: Listener, digits: EnginePackage) -> None:
    """Labels for a picture; a typed error for what is no picture."""
    blank = np.zeros((1, 8, 8), np.float32)
    answered = listener.ask("digits", {"payload_hex": _png().hex(), "content_type": "image/png", "header_length": None})
    refused = listener.ask(
        "digits", {"payload_hex": blank.tobytes().hex(), "content_type": "image/gif", "header_length": None}
    )

    check(json.loads(answered.payload), "inference-response")
    assert json.loads(answered.payload)["predictions"]
    check(json.loads(refused.payload), "error")
    assert "415" == refused.properties.user_value("status")


def _png() -> bytes:
    return (Path(__file__).parents[1] / "engines/digits/heldout/7/0017.png").read_bytes()
