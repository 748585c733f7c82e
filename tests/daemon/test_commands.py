"""Commands to a real daemon over a real broker: each does what it says, has one answer, and harms no request."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edge_sdk.cli import main
from edge_sdk.errors import CommandFailed, NoAnswer, Unavailable
from edge_sdk.mqtt import commands
from edge_sdk.mqtt.client import Client
from edge_sdk.mqtt.transports.base import Message, Properties
from edge_sdk.stages import build_pipeline
from tests.brokers import Broker, eventually
from tests.daemon.processes import DaemonProcess, running_daemon
from tests.daemon.test_requests import Wire
from tests.faults.proxy import Proxy
from tests.packages import make_package, misbehaving, scaling, stateful
from tests.runtime.test_sequences import RULES

COMMANDED = "commanded"
ROW = np.ones((1, 4), np.float32)
FAR = """
name = "far"
stage = [{name = "eye", model = "eye", device = "nobody", picture = "request"}]
outputs = {seen = "eye.scores"}
"""


@pytest.fixture(scope="module")
def commanded(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A device that obeys: `double` in two versions, of which the newer triples, `other`, `slow`, `sums`, which has a
    state, and `far`, a pipeline whose only model lives elsewhere."""
    home = tmp_path_factory.mktemp("commanded")
    make_package(home / "engines" / "old", scaling(2.0), name="double", version="1")
    make_package(home / "engines" / "new", scaling(3.0), name="double", version="2")
    make_package(home / "engines" / "other", scaling(5.0), name="other")
    make_package(home / "engines" / "sums", stateful(), name="sums", sequence=RULES)
    (home / "far.toml").write_text(FAR)
    build_pipeline(home / "far.toml", home / "engines" / "far")
    slow = misbehaving([{"do": "sleep", "seconds": 0.5}])
    make_package(home / "engines" / "slow", slow, name="slow", backend="reference", max_batch=1)
    with running_daemon(
        home / "engines", broker.url, home, ready=["double", "other", "slow", "sums"], device=COMMANDED,
        commands__enabled="true", groups="hall",
    ) as daemon:  # fmt: skip
        yield daemon


@pytest.fixture
def client(broker: Broker, commanded: DaemonProcess) -> Iterator[Client]:
    with Client(broker.url, device=COMMANDED, timeout_s=30, wait_for_device_s=1) as connected:
        yield connected


@pytest.fixture
def wire(broker: Broker, commanded: DaemonProcess) -> Iterator[Wire]:
    bare = Wire(broker.url)
    bare.subscribe(f"edge/v1/{COMMANDED}/cmd/+/response")
    yield bare
    bare.transport.close()


def command(name: str, payload: bytes, *, retain: bool = False, **properties: Any) -> Message:
    return Message(f"edge/v1/{COMMANDED}/cmd/{name}", payload, retain=retain, properties=Properties(**properties))


def factor(client: Client, **asked: Any) -> float:
    return float(client.infer("double", {"x": ROW}, **asked).outputs["y"][0, 0])


def test_a_device_is_alive_and_tells_of_itself(client: Client) -> None:
    info = client.command("info")

    assert "version" in client.command("ping")
    assert ["2", "1"] == info["models"]["double"]
    assert client.info(COMMANDED)["boot_id"] == info["boot_id"]


def test_a_self_test_asks_every_model(client: Client) -> None:
    """One real inference each, of every version, with the time that it took; of a pipeline, whether it is whole."""
    found = client.command("selftest")["models"]

    assert {"double/1", "double/2", "other/1", "slow/1", "sums/1", "far/1"} == set(found)
    assert all(result["ok"] for result in found.values())
    assert found["slow/1"]["infer_ms"] >= 500


def test_a_version_is_unloaded_and_loaded(client: Client, commanded: DaemonProcess) -> None:
    """Its requests get 503 while another version answers the rest; SIGHUP does not bring it back, `load` does; without
    a version all of them go."""
    newest = factor(client)
    client.command("unload", {"model": "double", "version": "2"})
    without = factor(client)
    with pytest.raises(Unavailable):
        factor(client, version="2", timeout_s=1.5)
    commanded.hang_up()
    client.command("ping")
    still_without = factor(client)
    states = client.command("unload", {"model": "double"})["models"]
    with pytest.raises(Unavailable):
        factor(client, timeout_s=1.5)
    reason = client.metadata("double")["reason"]
    back = client.command("load", {"model": "double"})["models"]

    assert (3.0, 2.0, 2.0) == (newest, without, still_without)
    assert {"double/1": "UNAVAILABLE", "double/2": "UNAVAILABLE"} == states
    assert "unloaded" in reason
    assert {"double/1": "READY", "double/2": "READY"} == back
    assert 3.0 == factor(client)


def test_unloading_under_load_fails_only_what_was_unloaded(client: Client) -> None:
    """While one model comes and goes, every request to another is answered, and those to the one that goes get an
    answer or a 503, and nothing else."""
    done = threading.Event()

    def come_and_go() -> None:
        for _ in range(10):
            client.command("unload", {"model": "double"})
            client.command("load", {"model": "double"})
        done.set()

    moving = threading.Thread(target=come_and_go)
    moving.start()
    others, ours = [], []
    while not done.is_set():
        others.append(client.submit("other", {"x": ROW}))
        ours.append(client.submit("double", {"x": ROW}, timeout_s=5))
        done.wait(0.002)
    moving.join()
    failed = [type(error) for future in ours if (error := future.exception()) is not None]

    assert all(5.0 == future.result().outputs["y"][0, 0] for future in others)
    assert set(failed) <= {Unavailable}
    assert 3.0 == factor(client)


def test_a_drained_device_finishes_and_takes_no_more(client: Client, broker: Broker) -> None:
    """What was accepted is answered, nobody listens any more, neither for itself nor for its group; commands are
    heard, and `resume` brings all of it back."""
    eventually(lambda: client.info(COMMANDED)["group"]["state"] == "joined", "in the group")
    accepted = client.submit("slow", {"x": ROW})
    eventually(lambda: client.command("info") and client.statistics.requests, "it is on its way")
    told = client.command("drain")
    answer = accepted.result()
    eventually(lambda: client.info(COMMANDED)["group"]["state"] == "left", "out of the group")
    drained, online = client.command("info"), client.devices()[COMMANDED]
    with Client(broker.url, timeout_s=5, wait_for_device_s=0.1) as late:
        with pytest.raises(NoAnswer, match="is not listening"):
            late.infer("other", {"x": ROW}, device=COMMANDED)
        with pytest.raises(NoAnswer, match="Nobody in group"):
            late.infer("other", {"x": ROW}, group="hall")
    client.command("resume")
    eventually(lambda: client.info(COMMANDED)["group"]["state"] == "joined", "in the group again")

    assert told["draining"]
    assert 2.0 == answer.outputs["y"][0, 0]
    assert (True, True) == (drained["draining"], online)
    assert "draining" not in client.command("info")
    assert 3.0 == factor(client)
    assert 3.0 == factor(client, group="hall")


def test_a_resumed_device_gives_its_self_test_time(commanded: DaemonProcess, broker: Broker, tmp_path: Path) -> None:
    """It was connected anew while it was drained, and sent itself nothing: that is no reason to miss anything."""
    with (
        Proxy(broker.port) as proxy,
        running_daemon(
            commanded.engines, f"mqtt://127.0.0.1:{proxy.port}", tmp_path, ready=["other"], device="resumed",
            commands__enabled="true", serving__self_test_s="0.2", stats_interval_s="0.1",
        ) as daemon,
        Client(broker.url, device="resumed", timeout_s=30) as client,
    ):  # fmt: skip
        client.command("drain")
        proxy.reset()
        eventually(lambda: daemon.said().count("Connected to") == 2, "connected again")
        connected = client.stats()["uptime_s"]
        eventually(lambda: client.stats()["uptime_s"] > connected + 0.2, "longer than a self-test waits")
        client.command("resume")
        eventually(lambda: client.stats()["self_test"]["requests"] == "ok", "it heard itself")
        said = daemon.said()

    assert "requests do not arrive" not in said
    assert "comes back again" not in said


def test_what_comes_to_a_drained_device_is_told_so(wire: Wire, client: Client) -> None:
    """A request that the broker handed over before it heard that the device unsubscribed gets 503, and when to come
    back."""
    asked = Properties(response_topic=wire.replies)
    row = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1.0] * 4}]}).encode()

    def refusal() -> Message | None:
        wire.inbox.clear()
        wire.transport.publish(command("drain", b""))
        wire.transport.publish(Message(f"edge/v1/{COMMANDED}/models/other/infer", row, properties=asked))
        wire.silent_for(0.2)
        client.command("resume")
        return next((message for message in wire.inbox if message.topic == wire.replies), None)

    refused = eventually(refusal, "a request that overtook the UNSUBSCRIBE")

    assert ("503", "5000") == tuple(refused.properties.user_value(key) for key in ("status", "retry-after"))


@pytest.mark.parametrize(
    ("name", "payload", "transaction", "says"),
    [
        ("unload", b"{", None, "not JSON"),
        ("unload", b"[]", None, "it is an object"),
        ("unload", b'{"transaction": "a"}', "a", "names no `model`"),
        ("unload", b'{"transaction": "b", "model": 3}', "b", "`model` is 3"),
        ("unload", b'{"transaction": "c", "model": "absent"}', "c", "no model 'absent'"),
        ("load", b'{"transaction": "d", "model": "double", "version": "9"}', "d", "no version '9'"),
        ("reboot", b'{"transaction": "e"}', "e", "no command 'reboot'"),
        ("deploy", b'{"transaction": "f"}', "f", "cannot be deployed"),
        ("ping", b'{"transaction": ["g"]}', None, "`transaction` is a number"),
        ("ping", b" " * 70_000, None, "70,000 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)
def test_what_cannot_be_done_is_answered(
    wire: Wire, name: str, payload: bytes, transaction: str | None, says: str
) -> None:
    """Whatever comes: an error for a person, on the topic of that command, with the transaction if it had one."""
    wire.send(command(name, payload))
    answer = wire.next()
    body = json.loads(answer.payload)

    assert f"edge/v1/{COMMANDED}/cmd/{name}/response" == answer.topic
    assert ("error", transaction) == (body["status"], body["transaction"])
    assert says in body["error"]


def test_a_command_that_comes_twice_is_done_once(wire: Wire) -> None:
    """The same transaction again gets the same bytes again, marked; with another payload it is refused. Correlation
    data comes back, and a Response Topic changes nothing."""
    asked = command("ping", b'{"transaction": 17}', response_topic=wire.replies, correlation_data=b"\0id")
    wire.send(asked)
    first = wire.next()
    wire.send(asked)
    again = wire.next()
    wire.send(command("ping", b'{"transaction": 17, "more": 1}', correlation_data=b"\0id"))
    other = wire.next()

    assert f"edge/v1/{COMMANDED}/cmd/ping/response" == first.topic
    assert (b"\0id", None) == (first.properties.correlation_data, first.properties.user_value("duplicate"))
    assert 17 == json.loads(first.payload)["transaction"]
    assert (first.payload, "1") == (again.payload, again.properties.user_value("duplicate"))
    assert "used before" in json.loads(other.payload)["error"]


def test_a_retained_command_is_ignored(broker: Broker, wire: Wire, tmp_path: Path) -> None:
    """An old command is not for today: a daemon that is given one when it starts does nothing. MQTT 5 can ask not to be
    given any, 3.1.1 cannot."""
    topic = "edge/v1/forgetful/cmd/drain"
    wire.subscribe("edge/v1/forgetful/cmd/+/response")
    wire.send(Message(topic, b'{"transaction": "old"}', retain=True))
    make_package(tmp_path / "engines" / "double", scaling(2.0), name="double")
    with running_daemon(
        tmp_path / "engines", broker.url, tmp_path, ready=["double"], device="forgetful",
        commands__enabled="true", broker__protocol="3.1.1",
    ):  # fmt: skip
        wire.send(Message("edge/v1/forgetful/cmd/info", b'{"transaction": "new"}'))
        answer = json.loads(wire.next().payload)
        wire.send(Message(topic, b"", retain=True))

    assert "new" == answer["transaction"]
    assert "draining" not in answer["data"]


def test_nobody_is_obeyed_by_default(broker: Broker, tmp_path: Path) -> None:
    """Without the setting a device does not even listen, and the client says so at once."""
    make_package(tmp_path / "engines" / "double", scaling(2.0), name="double")
    with (
        running_daemon(tmp_path / "engines", broker.url, tmp_path, ready=["double"], device="free"),
        Client(broker.url, device="free", timeout_s=30) as client,
        pytest.raises(NoAnswer, match="enabled = true"),
    ):
        client.command("unload", {"model": "double"})


def test_from_the_command_line(broker: Broker, commanded: DaemonProcess) -> None:
    """What the device says, for a person or a script; 6 if it did not do it, 2 for what is no argument."""

    def run(*words: str) -> Any:
        return CliRunner(env={"EDGE_SDK_BROKER__URL": broker.url}).invoke(main, ["command", COMMANDED, *words])

    tested, failed, wrong = run("selftest", "--json"), run("unload", "model=absent"), run("load", "double")

    assert (0, 6, 2) == (tested.exit_code, failed.exit_code, wrong.exit_code)
    assert json.loads(tested.stdout)["models"]["double/2"]["ok"]
    assert "no model 'absent'" in failed.stderr


def test_a_failed_command_raises(client: Client) -> None:
    with pytest.raises(CommandFailed, match="no model 'absent'"):
        client.command("load", {"model": "absent"})


def test_the_command_line_knows_every_command() -> None:
    (argument,) = [parameter for parameter in main.commands["command"].params if parameter.name == "name"]

    assert set(commands.NAMES) == set(argument.type.choices)  # type: ignore[attr-defined]  # a Choice
