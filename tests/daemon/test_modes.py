"""Ways to deliver and to be watched that a daemon has beside its usual ones: durable, fast, priorities, /metrics."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.daemon import Daemon
from edge_sdk.health import Health
from edge_sdk.mqtt.client import Client
from edge_sdk.mqtt.transports.base import Message, Properties
from edge_sdk.mqtt.transports.memory import MemoryBroker
from edge_sdk.runtime import statistics
from edge_sdk.settings import load_settings
from edge_sdk.tasks.oip import decode_response, encode_request
from tests.brokers import Broker, eventually, free_port
from tests.daemon.processes import running_daemon
from tests.daemon.test_requests import Wire
from tests.packages import make_package, misbehaving, scaling


@pytest.fixture
def wire(broker: Broker) -> Iterator[Wire]:
    opened = Wire(broker.url)
    yield opened
    opened.transport.close()


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """A model that doubles, and takes a moment for it."""
    make_package(tmp_path / "engines" / "double", scaling(2.0))
    make_package(
        tmp_path / "engines" / "slow",
        misbehaving([{"do": "sleep", "seconds": 0.3}]),
        backend="reference",
        max_batch=1,
    )
    return tmp_path / "engines"


def question(value: float) -> tuple[bytes, dict[str, str]]:
    """A request's payload, and the user property that goes with it."""
    body = encode_request({"x": np.full((1, 4), value, np.float32)})
    return body.data, {"inference-header-content-length": str(body.header_length)}


def number(answer: Message) -> float:
    header = answer.properties.user_value("inference-header-content-length")
    return float(decode_response(answer.payload, int(header) if header else None).outputs["y"].ravel()[0])


def test_durable_answers_outlive_the_daemon(wire: Wire, broker: Broker, engines: Path, tmp_path: Path) -> None:
    """After kill -9 the next daemon gives the very bytes of the former one, and still knows which id had which payload;
    without the journal it would compute them anew."""
    data, user = question(3.0)
    asked: dict[str, Any] = {"correlation_data": b"outliving", "user": user, "content_type": "application/octet-stream"}
    topic = "edge/v1/durable/models/double/infer"
    settings = {"delivery": "durable", "state": str(tmp_path / "state"), "device": "durable"}
    settings |= {"stats_interval_s": "0.1", "serving__self_test_s": "0"}
    with running_daemon(engines, broker.url, tmp_path, ready=["double"], **settings) as daemon:
        first = wire.ask(data, topic=topic, **asked)
        with Client(broker.url, device="durable") as client:  # otherwise the next daemon would send it by itself, too
            eventually(lambda: client.stats()["mqtt"]["acknowledged"] == 1, "it is acknowledged")
        daemon.kill()
        daemon.start(ready=["double"])
        again = wire.ask(data, topic=topic, **asked)
        other = wire.ask(question(4.0)[0], topic=topic, **asked)

    assert 6.0 == number(first)
    assert first.payload == again.payload
    assert first.properties.user_value("boot-id") == again.properties.user_value("boot-id")
    assert ("1", None) == (again.properties.user_value("duplicate"), first.properties.user_value("duplicate"))
    assert "409" == other.properties.user_value("status")


def test_one_daemon_has_a_state_folder(broker: Broker, engines: Path, tmp_path: Path) -> None:
    """The second one says so and exits with 3, instead of sharing a journal."""
    settings = {"delivery": "durable", "state": str(tmp_path / "state")}
    with running_daemon(engines, broker.url, tmp_path, ready=["double"], **settings, device="one"):
        (tmp_path / "other").mkdir()
        with running_daemon(engines, broker.url, tmp_path / "other", **settings, device="other") as second:
            assert second.process is not None
            code = second.process.wait(20)

            assert (3, True) == (code, "Another daemon writes the journal" in second.said())


def test_fast_delivery_is_qos_0_and_the_newest_wins(wire: Wire, broker: Broker, engines: Path, tmp_path: Path) -> None:
    """Of what one client sends while the model is busy only the last is computed; the others are told, unless nobody
    hears it: QoS 0 all the way."""
    topic = "edge/v1/fast/models/slow/infer"
    with running_daemon(engines, broker.url, tmp_path, ready=["slow"], delivery="fast", device="fast"):
        data, user = question(1.0)
        for asked in range(8):
            properties = Properties(
                response_topic=wire.replies,
                correlation_data=b"%d" % asked,
                content_type="application/octet-stream",
                user=tuple(user.items()),
            )
            wire.transport.publish(Message(topic, data, qos=0, properties=properties))
        answers: dict[bytes, Message] = {}

        def all_came() -> bool:
            wire.silent_for(0.1)
            answers.update({m.properties.correlation_data or b"": m for m in wire.inbox})
            return len(answers) == 8

        eventually(all_came, "every request answered")
    statuses = {int(key): answer.properties.user_value("status") for key, answer in answers.items()}

    assert {0} == {answer.qos for answer in answers.values()}
    assert "200" == statuses[7]
    assert {"200", "429"} == set(statuses.values())
    assert 4 <= list(statuses.values()).count("429")


def test_an_urgent_request_overtakes(wire: Wire, broker: Broker, engines: Path, tmp_path: Path) -> None:
    """The user property `priority`, 0 to 9; anything else is a 400."""
    topic = "edge/v1/urgent/models/slow/infer"
    with running_daemon(engines, broker.url, tmp_path, ready=["slow"], device="urgent"):
        data, user = question(1.0)
        for asked, priority in enumerate("44449"):
            properties = Properties(
                response_topic=wire.replies,
                correlation_data=b"%d" % asked,
                content_type="application/octet-stream",
                user=(*user.items(), ("priority", priority)),
            )
            wire.transport.publish(Message(topic, data, properties=properties))
        order: list[bytes] = []

        def all_came() -> bool:
            wire.silent_for(0.1)
            order[:] = [m.properties.correlation_data or b"" for m in wire.inbox]
            return len(order) == 5

        eventually(all_came, "every request answered")
        refused = wire.ask(data, topic=topic, correlation_data=b"odd", user={**user, "priority": "urgent"})

    assert order.index(b"4") <= 1  # the first may have begun before it came
    assert [b"0", b"1", b"2", b"3"] == [key for key in order if key != b"4"]
    assert "400" == refused.properties.user_value("status")


def test_health_and_metrics(broker: Broker, engines: Path, tmp_path: Path) -> None:
    """Alive and ready while it serves; what was answered is counted; not ready, but alive, without a broker."""
    pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, exc.read().decode()

    with running_daemon(
        engines, broker.url, tmp_path, ready=["double"], device="watched", health=f"127.0.0.1:{port}"
    ) as daemon:
        with Client(broker.url, device="watched") as client:
            client.infer("double", {"x": np.ones((1, 4), np.float32)})
        counted = 'edge_sdk_answers_total{model="double",status="200",version="1"} 1.0'
        eventually(lambda: counted in get("/metrics")[1], "the answer is counted")

        assert (200, 200) == (get("/healthz")[0], get("/readyz")[0])

        daemon.stop()
    with running_daemon(engines, "mqtt://127.0.0.1:1", tmp_path, device="alone", health=f"127.0.0.1:{port}"):
        eventually(lambda: _listens(port), "it listens")

        assert 200 == get("/healthz")[0]
        assert 503 == get("/readyz")[0]


def test_figures_are_computed_when_somebody_asks(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `health` is on and nobody looks, no latencies are sorted, second after second. Who scrapes gets the figures
    of that moment, at once; who scrapes again within a second, the same figures."""
    pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")
    looks, sorts = Counted(Health.update), Counted(statistics.percentiles)
    monkeypatch.setattr(Health, "update", lambda *args, **kwargs: looks(*args, **kwargs))
    monkeypatch.setattr(statistics, "percentiles", sorts)
    port, broker = free_port(), MemoryBroker()
    given = {"engines": str(engines), "device": "watched", "health": f"127.0.0.1:{port}", "stats_interval_s": 3600}
    daemon = Daemon(load_settings(None, given), broker.transport())
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        with Client("mqtt://memory", device="watched", transport=broker.transport()) as client:
            client.infer("double", {"x": np.ones((1, 4), np.float32)})
        before, seen = sorts.calls, looks.calls
        eventually(lambda: looks.calls >= seen + 2, "the daemon has looked after its house twice")
        unasked = sorts.calls - before
        began = time.monotonic()
        first = scraped(port)
        took_s, asked = time.monotonic() - began, sorts.calls - before
        again = scraped(port)
    finally:
        daemon.stop()
        thread.join(30)

    assert 0 == unasked
    assert 'edge_sdk_answers_total{model="double",status="200",version="1"} 1.0' in first
    assert asked > 0
    assert took_s < 1.5
    assert (first, asked) == (again, sorts.calls - before)


class Counted:
    """A function, and how often it was called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=15) as response:
        text: str = response.read().decode()
    return text


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
