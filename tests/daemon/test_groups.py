"""Devices that share the requests to a group: real daemons, a real broker, and members that come, go and are killed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.errors import NoAnswer, SettingsError
from edge_sdk.mqtt.client import Client
from tests.authority import Authority
from tests.brokers import MOSQUITTO, Broker, eventually, free_port, running_mosquitto
from tests.daemon.processes import DaemonProcess
from tests.faults.proxy import Proxy
from tests.packages import make_package, misbehaving, scaling

GROUP = "line-3"
REQUESTS = 2_000
ROW = np.ones((1, 4), np.float32)

StartMember = Callable[..., DaemonProcess]


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    make_package(tmp_path / "engines" / "double", scaling(2.0), name="double")
    make_package(
        tmp_path / "engines" / "slow",
        misbehaving([{"do": "sleep", "seconds": 0.02}]),
        name="slow",
        backend="reference",
        max_batch=1,
    )
    return tmp_path / "engines"


@pytest.fixture
def start_member(broker: Broker, engines: Path, tmp_path: Path) -> Iterator[StartMember]:
    """Daemons of the group, started and in it; killed with the test."""
    with ExitStack() as stack:

        def start(device: str, **settings: str) -> DaemonProcess:
            daemon = DaemonProcess(
                engines, broker.url, tmp_path / f"{device}.log", device=device, groups=GROUP, **settings
            )
            daemon.start()
            stack.callback(daemon.kill)
            return daemon

        yield start


def group_of(client: Client, device: str) -> dict[str, Any]:
    """What a device says of its group; empty while it says nothing."""
    try:
        found: dict[str, Any] = client.info(device)["group"]
    except NoAnswer:
        return {}
    return found


def wait_until_joined(client: Client, *devices: str) -> None:
    eventually(
        lambda: all(group_of(client, device).get("state") == "joined" for device in devices), f"{devices} are in it"
    )


@pytest.mark.timeout(120)
def test_a_group_shares_its_load_and_loses_none_of_it(broker: Broker, start_member: StartMember) -> None:
    """2,000 requests to a group of two, one of which is killed and started again meanwhile: each gets its answer, the
    right one, and both members have computed some of them, the killed one also after its return."""
    first, _ = start_member("first"), start_member("second")
    with Client(broker.url, timeout_s=60) as client:
        wait_until_joined(client, "first", "second")
        former, futures = client.info("first")["boot_id"], []
        for number in range(REQUESTS):
            futures.append(client.submit("double", {"x": ROW * number}, group=GROUP))
            if number == REQUESTS // 3:
                first.kill()
                killed_at = number
                restart = threading.Thread(target=lambda: first.start())
                restart.start()
            if number == REQUESTS * 2 // 3:
                restart.join()
                eventually(lambda: client.info("first")["boot_id"] != former, "the next daemon has said who it is")
                wait_until_joined(client, "first")
                back_at = number
            time.sleep(0.0005)  # spread over the fault
        answers = [future.result() for future in futures]

    for number, answer in enumerate(answers):
        assert 2.0 * number == answer.outputs["y"][0, 0]
    for part in (answers[:killed_at], answers[back_at + 1 :]):
        assert {"first", "second"} == {answer.device for answer in part}


@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
@pytest.mark.parametrize("way", ["mqtts", "ws"])
def test_a_group_is_joined_on_the_way_of_the_first_connection(way: str, engines: Path, tmp_path: Path) -> None:
    """The second connection goes by TLS, or in a WebSocket, where the first one does."""
    certificate, key = (authority := Authority(tmp_path)).certificate("server")
    tls_port = free_port()
    lines = [f"listener {tls_port} 127.0.0.1", f"certfile {certificate}", f"keyfile {key}"]
    with running_mosquitto(tmp_path, websockets=True, lines=lines) as broker:
        port = tls_port if way == "mqtts" else broker.websockets_port
        url, ca_file = f"{way}://localhost:{port}", str(authority.file)
        daemon = DaemonProcess(
            engines, url, tmp_path / "member.log", device="member", groups=GROUP, broker__ca_file=ca_file
        )
        daemon.start()
        try:
            with Client(broker.url, timeout_s=30) as client:
                wait_until_joined(client, "member")
                answers = [client.infer("double", {"x": ROW * number}, group=GROUP) for number in range(20)]
        finally:
            daemon.kill()

    assert [2.0 * number for number in range(20)] == [answer.outputs["y"][0, 0] for answer in answers]


@pytest.mark.timeout(60)
def test_who_leaves_a_group_answers_what_it_was_given(broker: Broker, start_member: StartMember) -> None:
    """A member that is stopped answers also what the broker holds for it beyond its Receive Maximum, since mosquitto
    gives that to nobody else: not one request has to be sent again."""
    leaving, _ = start_member("leaving", broker__receive_maximum="1"), start_member("staying")
    with Client(broker.url, timeout_s=30) as client:
        wait_until_joined(client, "leaving", "staying")
        futures = [client.submit("slow", {"x": ROW}, group=GROUP) for _ in range(60)]
        futures[0].result()
        code = leaving.stop()
        answers = [future.result() for future in futures]
        after = [client.infer("double", {"x": ROW}, group=GROUP) for _ in range(4)]

        assert 0 == client.statistics.resent
    assert 0 == code
    assert Counter(leaving=30, staying=30) == Counter(answer.device for answer in answers)
    assert {"staying"} == {answer.device for answer in after}


def test_the_second_connection_waits_for_nothing(broker: Broker, start_member: StartMember) -> None:
    """A request to the group wakes the daemon as one of its own does: thirty of them, each after the daemon has gone to
    sleep, take a fraction of the thirty seconds that its idle turns would."""
    start_member("prompt", serving__busy_poll_us="0")
    with Client(broker.url, timeout_s=30) as client:
        wait_until_joined(client, "prompt")
        began = time.monotonic()
        for _ in range(30):
            client.infer("double", {"x": ROW}, group=GROUP)

        assert time.monotonic() - began < 10


@pytest.mark.timeout(60)
def test_a_second_connection_that_cannot_be_made_holds_up_nobody(broker: Broker, start_member: StartMember) -> None:
    """A way to the broker with room for one connection, which drops the second one's SYNs: what the device is asked on
    the first is answered all the while, and once there is room the device is in its group."""
    with Proxy(broker.port, room=1) as proxy, Client(broker.url, device="crowded", timeout_s=30) as client:
        daemon = start_member("crowded", broker__url=f"mqtt://127.0.0.1:{proxy.port}")
        eventually(lambda: group_of(client, "crowded").get("state") == "joining", "the device wants a second one")
        daemon.wait_for_state(client, "double", "READY")
        longest_s, until = 0.0, time.monotonic() + 2
        while (began := time.monotonic()) < until:
            client.infer("double", {"x": ROW})
            longest_s = max(longest_s, time.monotonic() - began)
        state = group_of(client, "crowded")["state"]
        proxy.room = None
        wait_until_joined(client, "crowded")
        shared = client.infer("double", {"x": ROW}, group=GROUP)

    assert longest_s < 2.5  # an attempt takes up to five, and the next one follows within a fraction of one
    assert "joining" == state
    assert "crowded" == shared.device


def test_mqtt_311_serves_without_the_group(broker: Broker, start_member: StartMember) -> None:
    """There are no shared subscriptions before MQTT 5: the device's own topics are served, `info` says why the group's
    are not, and a client of 3.1.1 is told at once."""
    start_member("old", broker__protocol="3.1.1")
    with Client(broker.url, device="old", protocol="3.1.1") as client:
        eventually(lambda: "reason" in group_of(client, "old"), "the device says why it is in no group")
        group = group_of(client, "old")
        eventually(lambda: client.devices().get("old"), "online")
        answer = client.infer("double", {"x": ROW})
        with pytest.raises(SettingsError, match="needs MQTT 5"):
            client.infer("double", {"x": ROW}, group=GROUP)

    assert 2.0 == answer.outputs["y"][0, 0]
    assert "away" == group["state"]
    assert "MQTT 3.1.1" in group["reason"]


def test_a_group_without_members_is_no_puzzle(broker: Broker) -> None:
    """Nobody listens: the client says so at once, and not after the request's deadline."""
    with Client(broker.url, timeout_s=30) as client:
        began = time.monotonic()
        with pytest.raises(NoAnswer, match="Nobody in group 'deserted' is listening"):
            client.infer("double", {"x": ROW}, group="deserted")

        assert time.monotonic() - began < 10
