"""The client library against real brokers: one answer or one error for each request, whatever happens between."""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from edge_sdk.errors import (
    BrokerError,
    DataError,
    EdgeSdkError,
    IdReused,
    ModelNotFound,
    NoAnswer,
    QueueFull,
    RequestError,
    SettingsError,
    TooLarge,
)
from edge_sdk.mqtt import topics
from edge_sdk.mqtt.client import Client
from edge_sdk.mqtt.topics import InferTopic, Topics
from edge_sdk.mqtt.transports.base import Acknowledged, ConnectOptions, Message, MqttVersion
from edge_sdk.mqtt.transports.memory import MemoryBroker, MemoryTransport
from edge_sdk.mqtt.transports.paho import PahoTransport
from tests.brokers import MOSQUITTO, Broker, eventually, running_amqtt, running_mosquitto
from tests.mqtt.responder import Reply, Responder, echo, error
from tests.transports.conftest import Driver

needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
pytestmark = needs_mosquitto


@pytest.fixture(params=[5, 4], ids=["5", "3.1.1"])
def version(request: pytest.FixtureRequest) -> MqttVersion:
    return 4 if request.param == 4 else 5


@pytest.fixture(scope="module")
def shared_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One mosquitto for the tests that do it no harm."""
    with running_mosquitto(tmp_path_factory.mktemp("mosquitto"), max_packet_size=3_000_000) as broker:
        yield broker


Device = Callable[..., Responder]


@pytest.fixture
def device(shared_broker: Broker, version: MqttVersion, request: pytest.FixtureRequest) -> Iterator[Device]:
    """Responders of the test's MQTT version; each test has device names of its own."""
    started: list[Responder] = []

    def start(reply: Reply = echo, **more: Any) -> Responder:
        name = f"d{abs(hash(request.node.nodeid)) % 10**9}-{len(started)}"
        options = ConnectOptions("127.0.0.1", shared_broker.port, name, version=version, clean_start=True)
        responder = Responder(PahoTransport(), options, reply, device=name, **more)
        responder.__enter__()
        started.append(responder)
        return responder

    yield start
    for responder in started:
        responder.__exit__()


def protocol(version: MqttVersion) -> Any:
    return "5" if version == 5 else "3.1.1"


@pytest.fixture
def client(shared_broker: Broker, version: MqttVersion) -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def make(responder: Responder | None = None, **more: Any) -> Client:
        more.setdefault("device", responder.topics.device if responder else None)
        clients.append(Client(shared_broker.url, protocol=protocol(version), timeout_s=10, **more))
        return clients[-1]

    yield make
    for each in clients:
        each.close()


Connect = Callable[..., Client]


def test_a_request_is_answered(device: Device, client: Connect) -> None:
    """An answer has the outputs as arrays, the model's version, the device and what the device says of the time."""
    dev = device()

    answer = client(dev).infer("m", b"some raw bytes")

    assert [14] == answer.outputs["size"].tolist()
    assert ("m", "1", dev.topics.device, 200) == (answer.model, answer.model_version, answer.device, answer.status)
    assert ({"queue": 1.2, "infer": 5.8} if dev.options.version == 5 else {}) == answer.timing
    assert answer.raw.startswith(b"{")


def test_predictions_are_values(device: Device, client: Connect) -> None:
    """A classification comes as label, index and score, the best first."""
    body = b'{"outputs": [], "predictions": [{"label": "cat", "index": 3, "score": 0.9}, {"index": 1, "score": 0.1}]}'
    dev = device(lambda _m, _n: [body])

    best, second = client(dev).infer("m", b"\xff\xd8\xff jpeg").predictions

    assert ("cat", 3, 0.9) == (best.label, best.index, best.score)
    assert ("", 1) == (second.label, second.index)


def test_data_goes_out_in_its_form(device: Device, client: Connect, tmp_path: Path, version: MqttVersion) -> None:
    """Each kind of data has its content type on MQTT 5, and a form that can be sniffed on 3.1.1."""
    dev = device()
    ask = client(dev)
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"\x89PNG....")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)

    ask.infer("m", photo)
    ask.infer("m", str(photo))
    ask.infer("m", b"\xff\xd8\xff...")
    ask.infer("m", b' {"inputs": []}')
    ask.infer("m", array)
    ask.infer("m", {"x": array})
    ask.infer("m", {"x": array, "y": array})
    ask.infer("m", memoryview(b"raw"))

    png, again, jpeg, text, npy, single, several, raw = dev.requests
    assert [b"\x89PNG....", b"\x89PNG....", b"raw"] == [png.payload, again.payload, raw.payload]
    assert npy.payload.startswith(b"\x93NUMPY")
    assert npy.payload.endswith(array.tobytes())
    types = [each.properties.content_type for each in (png, jpeg, text, npy, single, several, raw)]
    if version == 5:
        binary = "application/octet-stream"
        assert ["image/png", "image/jpeg", "application/json", "application/x-npy", binary, binary, binary] == types
        header_length = int(single.properties.user_value("inference-header-content-length") or 0)
        assert array.tobytes() == single.payload[header_length:]
        assert binary == several.properties.user_value("accept")
        assert 1 <= (png.properties.message_expiry_s or 0) <= 10
    else:
        assert [None] * 7 == types
        assert npy.payload == single.payload
        assert several.payload.startswith(b'{"inputs"')


@pytest.mark.parametrize("data", [object(), {}, "/no/such/file", np.array(["text"]), 7])
def test_data_that_is_no_data_is_refused(device: Device, client: Connect, data: Any) -> None:
    """What cannot be sent fails at once, with an error that says what can."""
    with pytest.raises(DataError):
        client(device()).submit("m", data)


def test_a_version_can_be_asked_for(device: Device, client: Connect, version: MqttVersion) -> None:
    """MQTT 5 has a topic for it; 3.1.1 has none with a way back, and says so."""
    dev = device()

    if version == 5:
        client(dev).infer("m", b"x", version="2")
        assert dev.topics.infer("m", version="2") == dev.requests[0].topic
    else:
        with pytest.raises(SettingsError, match="needs MQTT 5"):
            client(dev).infer("m", b"x", version="2")


def test_error_answers_are_raised(device: Device, client: Connect) -> None:
    """Each code is its class; an unknown one, of a newer device, is a RequestError with the device's words."""
    bodies = iter([error(404, "model_not_found"), error(409, "id_reused"), error(418, "teapot")])
    ask = client(device(lambda _m, _n: [next(bodies)]))

    with pytest.raises(ModelNotFound, match="it is model_not_found"):
        ask.infer("m", b"x")
    with pytest.raises(IdReused):
        ask.infer("m", b"x")
    with pytest.raises(RequestError, match="it is teapot"):
        ask.infer("m", b"x")
    assert (3, 0, 3) == (ask.statistics.requests, ask.statistics.answers, ask.statistics.errors)


def test_a_full_queue_is_tried_again(device: Device, client: Connect) -> None:
    """After 429 and 503 the request is sent again when the device said so, until it is answered."""
    bodies = iter(
        [error(429, "queue_full", retry_after_ms=30), error(503, "unavailable"), echo(Message("", b"x"), 1)[0]]
    )
    ask = client(device(lambda _m, _n: [next(bodies)]))

    assert 200 == ask.infer("m", b"x").status
    assert (1, 1, 0, 2) == (
        ask.statistics.requests, ask.statistics.answers, ask.statistics.errors, ask.statistics.resent
    )  # fmt: skip


def test_a_queue_that_stays_full_is_reported(device: Device, client: Connect) -> None:
    """At the deadline the error is what the device said last, not that it said nothing."""
    ask = client(device(lambda _m, _n: [error(429, "queue_full", retry_after_ms=40)]))

    begun = time.monotonic()
    with pytest.raises(QueueFull):
        ask.infer("m", b"x", timeout_s=0.3)

    assert 0.25 < time.monotonic() - begun < 2


def test_the_deadline_is_kept(device: Device, client: Connect) -> None:
    """Without an answer NoAnswer comes at the deadline, and names model and device; a late answer is dropped."""
    dev = device(lambda _m, _n: [])
    ask = client(dev)

    begun = time.monotonic()
    with pytest.raises(NoAnswer, match=rf"No answer .* model 'm' on device '{dev.topics.device}'"):
        ask.infer("m", b"x", timeout_s=0.3)
    took_s = time.monotonic() - begun
    dev.reply = lambda m, n: echo(m, n)
    ask.infer("m", b"y")

    assert 0.28 < took_s < 2


def test_an_answer_that_comes_late_is_counted(device: Device, client: Connect) -> None:
    """The answer to a request that was given up reaches nobody."""
    go_on = threading.Event()

    def slow(message: Message, times: int) -> list[bytes]:
        go_on.wait(10)
        return echo(message, times)

    ask = client(device(slow))

    with pytest.raises(NoAnswer):
        ask.infer("m", b"x", timeout_s=0.2)
    go_on.set()

    assert [1] == ask.infer("m", b"y").outputs["size"].tolist()
    assert 1 == ask.statistics.late


def test_duplicates_are_seen_once(device: Device, client: Connect) -> None:
    """Three answers to each request are one answer to the caller."""
    ask = client(device(lambda m, n: echo(m, n) * 3))

    answers = [future.result() for future in [ask.submit("m", bytes(n)) for n in range(1, 21)]]
    eventually(lambda: ask.statistics.duplicates == 40, f"all duplicates counted: {ask.statistics}")

    assert list(range(1, 21)) == [int(answer.outputs["size"][0]) for answer in answers]


def test_a_lost_answer_is_asked_for_again(device: Device, client: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request without an answer is sent again under the same id."""
    monkeypatch.setattr("edge_sdk.mqtt.pending.FIRST_RESEND_S", 0.2)
    monkeypatch.setattr("edge_sdk.mqtt.pending.FIRST_LOOK_S", 0.1)
    dev = device(lambda m, times: [] if times == 1 else echo(m, times))
    ask = client(dev)

    answer = ask.infer("m", b"x")

    assert 200 == answer.status
    assert [2] == list(dev.seen.values())
    assert 1 == ask.statistics.resent


def test_two_clients_in_turn_under_one_id_get_their_own_answers(device: Device, client: Connect) -> None:
    """A client that is restarted asks under keys of its own: a device that remembers the former one's answers by their
    key, as ours does, computes anew."""
    remembered: dict[tuple[str, bytes], list[bytes]] = {}

    def remembering(message: Message, times: int) -> list[bytes]:
        properties = message.properties
        key = (properties.response_topic or message.topic, properties.correlation_data or b"")
        return remembered.setdefault(key, echo(message, times))

    dev = device(remembering)
    sizes = []
    for size in (1, 2):
        with client(dev, client_id=f"{dev.topics.device}-fixed") as ask:
            sizes.append(int(ask.infer("m", bytes(size)).outputs["size"][0]))

    assert [1, 2] == sizes


def test_many_threads_share_a_client(device: Device, client: Connect) -> None:
    """Eight threads, one client: everybody gets the answer to the own request."""
    ask = client(device())
    wrong: list[tuple[int, int]] = []

    def work(thread: int) -> None:
        for turn in range(25):
            size = 1 + thread * 25 + turn
            got = int(ask.infer("m", bytes(size)).outputs["size"][0])
            if got != size:
                wrong.append((size, got))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [] == wrong
    assert 200 == ask.statistics.answers


def test_futures_can_be_awaited(device: Device, client: Connect) -> None:
    """`asyncio.wrap_future` makes a submission awaitable."""
    ask = client(device())

    async def main() -> int:
        answers = await asyncio.gather(*(asyncio.wrap_future(ask.submit("m", b"x")) for _ in range(5)))
        return len(answers)

    assert 5 == asyncio.run(main())


def test_nobody_listening_is_said_fast(client: Connect) -> None:
    """A device that was never there costs no deadline: NoAnswer within a second, naming model and device."""
    ask = client(device="nobody")

    begun = time.monotonic()
    with pytest.raises(NoAnswer, match=r"'nobody' is not listening.*'some-model'"):
        ask.infer("some-model", b"x")

    assert time.monotonic() - begun < 1


def test_a_device_that_said_goodbye_is_offline(device: Device, client: Connect) -> None:
    """For a client that comes after, it is offline at once."""
    dev = device()
    dev.__exit__()
    ask = client(dev)

    begun = time.monotonic()
    with pytest.raises(NoAnswer, match=rf"'{dev.topics.device}' is (offline|not listening)"):
        ask.infer("m", b"x")

    assert time.monotonic() - begun < 1


def test_a_device_that_restarts_is_waited_for(device: Device, client: Connect) -> None:
    """A client that saw it online waits for its return, and the request is answered."""
    dev = device()
    ask = client(dev)
    ask.infer("m", b"x")
    dev.__exit__()
    future = ask.submit("m", b"xyz")
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(0.8)

    with Responder(PahoTransport(), dev.options, device=dev.topics.device):
        answer = future.result(5)

    assert [3] == answer.outputs["size"].tolist()


def test_a_device_without_availability_is_served_on_mqtt_5(
    device: Device, client: Connect, version: MqttVersion
) -> None:
    """MQTT 5 needs no retained topic to know that somebody listens; 3.1.1 does."""
    dev = device(quiet=True)

    if version == 5:
        assert 200 == client(dev).infer("m", b"x").status
    else:
        with pytest.raises(NoAnswer):
            client(dev).infer("m", b"x")


def test_the_broker_s_packet_limit_is_known(device: Device, client: Connect, version: MqttVersion) -> None:
    """On MQTT 5 a request over it fails at once with TooLarge, and the connection lives on."""
    if version != 5:
        pytest.skip("MQTT 3.1.1 tells no limit")
    ask = client(device())

    with pytest.raises(TooLarge, match="at most 3,000,000"):
        ask.infer("m", bytes(3_100_000))

    assert [2_000_000] == ask.infer("m", bytes(2_000_000)).outputs["size"].tolist()
    assert 0 == ask.statistics.reconnects


def test_closing_ends_what_is_pending(device: Device, client: Connect) -> None:
    """`close` leaves no future without an end, and nothing can be asked after."""
    ask = client(device(lambda _m, _n: []))
    futures = [ask.submit("m", b"x") for _ in range(5)]

    ask.close()
    ask.close()

    for future in futures:
        with pytest.raises(NoAnswer, match="closed"):
            future.result(0)
    with pytest.raises(NoAnswer, match="closed"):
        ask.infer("m", b"x")


def test_a_cancelled_request_is_forgotten(device: Device, client: Connect) -> None:
    """Cancelling a future disturbs nobody else."""
    ask = client(device(lambda m, n: [] if m.payload == b"never" else echo(m, n)))
    future = ask.submit("m", b"never")

    assert future.cancel()
    assert [1] == ask.infer("m", b"x").outputs["size"].tolist()


def test_retained_descriptions_can_be_read(device: Device, client: Connect) -> None:
    """`devices`, `info` and `metadata` tell what devices retain; what is not there is NoAnswer."""
    dev = device()
    dev.transport.publish(Message(dev.topics.model("m"), b'{"name": "m", "state": "READY"}', retain=True))
    dev.transport.publish(Message(dev.topics.info, b'{"name": "edge-sdk"}', retain=True))
    dev.transport.wake()
    ask = client(dev)
    ask.infer("m", b"x")

    assert {"name": "m", "state": "READY"} == ask.metadata("m")
    assert {"name": "edge-sdk"} == ask.info()
    assert True is ask.devices()[dev.topics.device]
    with pytest.raises(NoAnswer, match="no model 'other'"):
        ask.metadata("other")


def test_an_unreachable_broker_is_an_error_at_once() -> None:
    """The constructor says what is wrong; no thread is left."""
    before = threading.active_count()

    with pytest.raises(BrokerError, match=r"127\.0\.0\.1:1 cannot be reached"):
        Client("mqtt://127.0.0.1:1")

    assert before == threading.active_count()


@pytest.mark.parametrize("url", ["http://host", "mqtt://", "mqtt://host/path", "mqtt://host:99999"])
def test_a_bad_url_is_an_error(url: str) -> None:
    """What is no broker's URL is refused before anything is tried."""
    with pytest.raises(SettingsError):
        Client(url)


def test_the_only_device_online_is_the_default(tmp_path: Path, version: MqttVersion) -> None:
    """Without `device` the one that is online is asked; with two of them the error lists both."""
    with running_mosquitto(tmp_path) as broker:
        options = ConnectOptions("127.0.0.1", broker.port, "one", version=version, clean_start=True)
        with (
            Client(broker.url, protocol=protocol(version)) as ask,
            pytest.raises(NoAnswer, match="No device is online"),
        ):
            ask.infer("m", b"x")
        with Responder(PahoTransport(), options, device="one"), Client(broker.url, protocol=protocol(version)) as ask:
            assert "one" == ask.infer("m", b"x").device
            other = ConnectOptions("127.0.0.1", broker.port, "two", version=version, clean_start=True)
            with Responder(PahoTransport(), other, device="two"):
                eventually(lambda: all(ask.devices().get(name) for name in ("one", "two")), "both are online")
                with pytest.raises(NoAnswer, match="2 devices are online: one, two"):
                    ask.infer("m", b"x")


@pytest.mark.parametrize("keeps_sessions", [True, False], ids=["persistent", "forgetful"])
def test_a_broker_that_dies_costs_no_request(tmp_path: Path, version: MqttVersion, keeps_sessions: bool) -> None:
    """200 requests in flight, the broker killed and restarted twice: every one is answered, once, correctly."""
    settings = {} if keeps_sessions else {"persistence": "false"}
    with running_mosquitto(tmp_path, **settings) as broker:
        options = ConnectOptions(
            "127.0.0.1", broker.port, "dev", version=version, clean_start=False, session_expiry_s=600
        )

        def slowly(message: Message, times: int) -> list[bytes]:
            time.sleep(0.002)
            return echo(message, times)

        calls: list[int] = []
        with (
            Responder(PahoTransport(), options, slowly),
            Client(broker.url, device="dev", protocol=protocol(version), timeout_s=40) as ask,
        ):
            ask.infer("m", b"warm")
            futures = [ask.submit("m", bytes(n)) for n in range(1, 201)]
            for number, future in enumerate(futures, 1):
                future.add_done_callback(lambda _f, number=number: calls.append(number))  # type: ignore[misc]
            for kills in (1, 2):
                eventually(lambda kills=kills: ask.statistics.answers > 30 * kills, "some answers came")  # type: ignore[misc]
                broker.kill()
                broker.start()
                eventually(lambda kills=kills: ask.statistics.reconnects >= kills, "the client is back")  # type: ignore[misc]
            answers = [future.result() for future in futures]

            assert list(range(1, 201)) == [int(answer.outputs["size"][0]) for answer in answers]
            assert list(range(1, 201)) == sorted(calls)
            assert 0 == ask.statistics.errors


def test_amqtt_is_spoken_to_in_3_1_1(tmp_path: Path) -> None:
    """`protocol="auto"` finds out that the embedded broker knows no MQTT 5, and requests are answered all the same."""
    pytest.importorskip("amqtt", reason="amqtt, the embedded broker, is not installed")
    with running_amqtt(tmp_path) as broker:
        options = ConnectOptions("127.0.0.1", broker.port, "dev", version=4, clean_start=True)
        with Responder(PahoTransport(), options), Client(broker.url, device="dev") as ask:
            answers = [future.result() for future in [ask.submit("m", bytes(n)) for n in range(1, 21)]]

            assert "3.1.1" == ask.protocol
            assert list(range(1, 21)) == [int(answer.outputs["size"][0]) for answer in answers]


def test_without_sockets(version: MqttVersion) -> None:
    """The same client runs on the transport in memory."""
    broker = MemoryBroker()
    options = ConnectOptions("memory", 1883, "dev", version=version, clean_start=True)
    with (
        Responder(broker.transport(), options),
        Client("mqtt://memory", protocol=protocol(version), transport=broker.transport()) as ask,
    ):
        assert [4] == ask.infer("m", b"four").outputs["size"].tolist()
        assert {"dev": True} == ask.devices()


def test_errors_are_ours(device: Device, client: Connect) -> None:
    """Nonsense in place of an answer is an error of the SDK, never a foreign exception."""
    bodies = iter(
        [b"", b"{", b"[]", b"\xff\xfe", b'{"error": 1}', b'{"predictions": 7}', b'{"outputs": [{"name": "x"}]}']
    )
    ask = client(device(lambda _m, _n: [next(bodies)]))

    for _ in range(7):
        try:
            ask.infer("m", b"x", timeout_s=2)
        except EdgeSdkError:
            pass

    assert 7 == ask.statistics.answers + ask.statistics.errors


def test_topics_are_checked_before_anything_is_sent(device: Device, client: Connect) -> None:
    """A model or device name that the contract does not allow is the caller's mistake, and said at once."""
    ask = client(device())

    with pytest.raises(SettingsError):
        ask.submit("no/such/name", b"x")
    with pytest.raises(SettingsError):
        ask.submit("m", b"x", device="a b")
    assert Topics("edge/v1", "a").infer("m")


def test_a_foreign_message_harms_nobody(device: Device, client: Connect, version: MqttVersion) -> None:
    """Whoever may publish may write on our topics: what is pending is answered all the same."""
    go_on = threading.Event()
    dev = device(lambda m, n: echo(m, n) if go_on.wait(10) else [])
    ask = client(dev)
    future = ask.submit("m", b"four")
    mine = dev.topics.result(InferTopic("m", None, ask.client_id, "9" * 5_000))
    if version == 5:
        mine = topics.reply(topics.DEFAULT_ROOT, ask.client_id)
    eventually(lambda: dev.requests != [], "the request is at the device")
    stranger = Driver(PahoTransport(), replace(dev.options, client_id=f"{dev.topics.device}-stranger"))
    stranger.open()
    stranger.transport.publish(Message(mine, b"[" * 200_000))
    stranger.next(Acknowledged)
    stranger.transport.close()
    eventually(lambda: ask.statistics.late == 1, "the client read the stranger's message")
    go_on.set()

    assert [4] == future.result(5).outputs["size"].tolist()


def test_an_unreadable_answer_ends_its_own_request_only(client: Connect, device: Device) -> None:
    """One that is pure nonsense where numbers belong, here: an index that is infinite."""
    body = b'{"outputs": [], "predictions": [{"index": 1e999, "score": 1}]}'
    dev = device(lambda m, n: [body] if m.payload == b"bad" else echo(m, n))
    ask = client(dev)
    bad, good = ask.submit("m", b"bad"), ask.submit("m", b"good")

    with pytest.raises(NoAnswer, match="'m' cannot be read"):
        bad.result(5)
    assert [4] == good.result(5).outputs["size"].tolist()
    assert [4] == ask.infer("m", b"more").outputs["size"].tolist()


def test_a_request_that_mqtt_cannot_carry_ends_alone(device: Device, client: Connect, version: MqttVersion) -> None:
    """What no property can hold is the caller's mistake; the others' requests go on."""
    if version != 5:
        pytest.skip("MQTT 3.1.1 has no properties")
    ask = client(device())
    bad, good = ask.submit("m", b"x", accept="x" * 70_000), ask.submit("m", b"four")

    with pytest.raises(DataError, match="'m' cannot be sent"):
        bad.result(5)
    assert [4] == good.result(5).outputs["size"].tolist()


def test_a_description_that_is_no_json_is_no_answer(device: Device, client: Connect) -> None:
    dev = device()
    dev.transport.publish(Message(dev.topics.info, b"not json", retain=True))
    dev.transport.wake()
    ask = client(dev)
    ask.infer("m", b"x")

    with pytest.raises(NoAnswer, match="b'not json'"):
        ask.info()


def answers_of(client_id: str, version: MqttVersion) -> str:
    return f"edge/v1/reply/{client_id}" if version == 5 else f"edge/v1/+/models/+/result/{client_id}/+"


def test_a_client_that_may_not_read_its_answers_is_told_at_once(version: MqttVersion) -> None:
    """The constructor names the filter that the broker refused."""
    mine = answers_of("me", version)
    broker = MemoryBroker(forbidden=[mine])

    with pytest.raises(BrokerError, match=re.escape(mine)):
        Client("mqtt://memory", client_id="me", protocol=protocol(version), transport=broker.transport())


def test_answers_that_are_forbidden_later_end_what_is_pending(version: MqttVersion) -> None:
    """The broker's rules changed while the client was away: what waits, and what is asked then, fails at once, named;
    and the broker is not asked again and again."""
    mine = answers_of("me", version)
    broker = MemoryBroker()
    options = ConnectOptions("memory", 1883, "dev", version=version, clean_start=True)
    transport = Counting(broker)
    with (
        Responder(broker.transport(), options, lambda _m, _n: []),
        Client("mqtt://memory", client_id="me", device="dev", protocol=protocol(version), transport=transport) as ask,
    ):
        pending = ask.submit("m", b"x")
        broker.forbidden = [mine]
        broker.cut("me")

        with pytest.raises(BrokerError, match=re.escape(mine)):
            pending.result(5)
        with pytest.raises(BrokerError, match=re.escape(mine)):
            ask.infer("m", b"x", timeout_s=5)
        assert 2 == transport.subscriptions

        broker.forbidden = []
        broker.cut("me")
        eventually(lambda: ask.statistics.reconnects == 2, "the client is back")
        with pytest.raises(NoAnswer):
            ask.infer("m", b"x", timeout_s=0.3)


class Counting(MemoryTransport):
    """Counts the SUBSCRIBEs that leave."""

    subscriptions = 0

    def subscribe(self, filters: Sequence[str], *, qos: Literal[0, 1] = 1, retained: bool = True) -> int:
        self.subscriptions += 1
        return super().subscribe(filters, qos=qos, retained=retained)


def test_devices_that_may_not_be_seen_are_the_reason(version: MqttVersion) -> None:
    """Where availability is forbidden no device is seen, and the error says whose doing that is."""
    everyone = topics.everyones_availability(topics.DEFAULT_ROOT)
    broker = MemoryBroker(forbidden=[everyone])
    options = ConnectOptions("memory", 1883, "dev", version=version, clean_start=True)
    with (
        Responder(broker.transport(), options),
        Client("mqtt://memory", protocol=protocol(version), transport=broker.transport()) as ask,
    ):
        with pytest.raises(NoAnswer, match=rf"refused.*{re.escape(everyone)}"):
            ask.infer("m", b"x")
        with pytest.raises(NoAnswer, match=rf"refused.*{re.escape(everyone)}"):
            ask.devices()
        if version == 5:
            assert 200 == ask.infer("m", b"x", device="dev").status
