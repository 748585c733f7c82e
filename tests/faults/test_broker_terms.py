"""What the broker allows, demands, refuses and breaks: cases 9 to 22."""

from __future__ import annotations

import functools
import itertools
import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk import doctor
from edge_sdk.mqtt.client import Client
from edge_sdk.mqtt.transports.base import Message, Properties
from edge_sdk.settings import Settings
from tests.brokers import MOSQUITTO, Broker, eventually, free_port, running_mosquitto
from tests.daemon.processes import error_of
from tests.daemon.test_requests import Wire
from tests.faults import fake_broker
from tests.faults.conftest import (
    MODELS,
    OpenDaemon,
    OpenScene,
    alive,
    doubled,
    numbers,
    pid_of,
    stats_from,
    status_of,
)
from tests.faults.fake_broker import CONNECT, PINGREQ, PUBLISH, SUBSCRIBE, FakeBroker, Rules, connack, disconnect
from tests.faults.proxy import Proxy
from tests.faults.scene import DEVICE, busy
from tests.faults.systemd import Ear
from tests.faults.vitals import vitals

needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


# Who may do what


def passwords(place: Path, **users: str) -> Path:
    """A password file of mosquitto, written anew."""
    place.unlink(missing_ok=True)
    for number, (user, password) in enumerate(users.items()):
        create = [] if number else ["-c"]
        subprocess.run(["mosquitto_passwd", "-b", *create, str(place), user, password], check=True)
    place.chmod(0o644)
    return place


def test_case_09_bad_credentials(tmp_path: Path, open_scene: OpenScene, open_daemon: OpenDaemon) -> None:
    """Refused, it tries again rarely and says why; the password is read anew for each attempt."""
    known = passwords(tmp_path / "known", robot="right")
    secret = tmp_path / "secret"
    secret.write_text("wrong\n")
    with running_mosquitto(tmp_path, lines=[f"password_file {known}"]) as broker, Proxy(broker.port) as proxy:
        with Ear(tmp_path) as ear:
            daemon = open_daemon(
                f"mqtt://127.0.0.1:{proxy.port}",
                extra=ear.environment,
                broker__username="robot",
                broker__password_file=str(secret),
            )
            eventually(lambda: "refused the connection" in daemon.said(), "refused")
            status = ear.status
            busy(2.0)
            attempts = proxy.accepted
        secret.write_text("right\n")
        eventually(lambda: "Connected" in daemon.said(), "connected with the right password")

    assert status.startswith("Not connected: the broker refused the connection")
    assert attempts <= 2
    assert "right" not in daemon.said()


def test_case_10_credentials_are_revoked(tmp_path: Path, open_scene: OpenScene) -> None:
    """A broker that no longer knows us ends the connection; once it knows us again, everything goes on."""
    known, secret = passwords(tmp_path / "known", robot="first"), tmp_path / "secret"
    secret.write_text("first\n")
    scene = open_scene(
        broker_settings={"lines": [f"password_file {known}"]},
        broker__username="robot",
        broker__password_file=str(secret),
        promises={"recovery_s": 7.0},
    )
    scene.wait_for_answers()
    with scene.fault("revoked"):
        passwords(known, robot="second")
        scene.broker.signal(signal.SIGHUP)
        scene.proxy.reset()  # mosquitto asks for a password only when somebody connects
        eventually(lambda: "refused the connection" in scene.daemon.said(), "refused")
        passwords(known, robot="first")
        scene.broker.signal(signal.SIGHUP)
    scene.wait_for_answers()
    report = scene.finish()

    assert report.kept, report


@needs_mosquitto
def test_case_11_the_answers_topic_is_denied(tmp_path: Path, open_daemon: OpenDaemon) -> None:
    """A refused answer (0x87) is counted, and its request acknowledged: nothing goes in circles, others are served."""
    known = passwords(tmp_path / "known", robot="secret")
    rights = tmp_path / "rights"
    rights.write_text(f"topic readwrite #\n\nuser robot\ntopic readwrite edge/v1/{DEVICE}/#\n")
    rights.chmod(0o600)
    secret = tmp_path / "secret"
    secret.write_text("secret\n")
    lines = [f"password_file {known}", f"acl_file {rights}"]
    with running_mosquitto(tmp_path, lines=lines) as broker, Proxy(broker.port) as proxy:
        daemon = open_daemon(
            f"mqtt://127.0.0.1:{proxy.port}",
            broker__username="robot",
            broker__password_file=str(secret),
            stats_interval_s="0.2",
        )
        with Client(broker.url, device=DEVICE) as client:
            daemon.wait_for_state(client, "scale", "READY")  # it says so after it has subscribed
        wire = Wire(broker.url)
        wire.subscribe(f"{MODELS}/scale/result")
        denied = Properties(response_topic=wire.replies, correlation_data=b"1")
        wire.send(Message(f"{MODELS}/scale/infer", numbers(1.0), properties=denied))
        wire.send(Message(f"{MODELS}/scale/infer", numbers(2.0)))
        answer = wire.next()
        counts = eventually(lambda: _counts_if(broker, lambda c: c["refused"] == 1), "the refusal is counted")
        wire.transport.close()

    assert 4.0 == doubled(answer.payload)[0]
    assert 2 == counts["received"] == counts["acknowledged"]
    assert 1 == proxy.accepted


@needs_mosquitto
@pytest.mark.parametrize(
    ("denied", "protocol", "what"),
    [
        ("infer/#", "5", "requests do not arrive"),
        ("result/#", "3.1.1", "answers do not leave"),
    ],
)
def test_case_11_12_the_broker_denies_without_a_word(
    tmp_path: Path, open_daemon: OpenDaemon, denied: str, protocol: str, what: str
) -> None:
    """It grants the subscription and delivers nothing, or takes answers and drops them. The self-test notices: log,
    status, figures, /readyz and doctor say so; and when the rights are given, it is over. That commands arrive says
    nothing of requests."""
    known = passwords(tmp_path / "known", robot="secret")
    rights = tmp_path / "rights"
    # mosquitto asks at each message: `infer` is denied to the reader, `result` to the writer
    right = "write" if denied.startswith("infer") else "read"
    of_robot = ["availability", "info", "stats", "cmd/#", "models/+", "models/+/result/#", "models/+/infer/#"]
    rules = [f"topic {'readwrite' if not t.endswith(denied) else right} edge/v1/{DEVICE}/{t}" for t in of_robot]
    everybody = "topic readwrite #\n\nuser robot\n"
    rights.write_text(everybody + "\n".join(rules) + "\n")
    rights.chmod(0o600)
    secret = tmp_path / "secret"
    secret.write_text("secret\n")
    lines = [f"password_file {known}", f"acl_file {rights}"]
    port = free_port()
    with running_mosquitto(tmp_path, lines=lines) as broker, Ear(tmp_path) as ear:
        told = {"username": "robot", "password_file": secret, "protocol": protocol}
        daemon = open_daemon(
            broker.url,
            extra=ear.environment,
            health=f"127.0.0.1:{port}",
            stats_interval_s="0.2",
            serving__self_test_s="2",
            commands__enabled="true",
            **{f"broker__{key}": str(value) for key, value in told.items()},
        )
        wire = Wire(broker.url)

        def is_told() -> bool:
            wire.send(Message(f"edge/v1/{DEVICE}/cmd/ping", b""))
            return what in daemon.said()

        eventually(is_told, "the log says so")
        wire.transport.close()
        eventually(lambda: what in ear.status, "the status says so")
        eventually(lambda: "failed" in stats_from(broker)["self_test"].values(), "the figures say so")
        eventually(lambda: status_of(port, "readyz") == 503, "not ready")
        alive_all_the_same = status_of(port, "healthz")
        settings = Settings.model_validate({"device": DEVICE, "broker": {"url": broker.url, **told}})
        found = {finding.subject: finding for finding in doctor.examine(settings)}["rights at the broker"]
        rights.write_text(f"{everybody}topic readwrite edge/v1/{DEVICE}/#\n")
        broker.signal(signal.SIGHUP)
        eventually(lambda: status_of(port, "readyz") == 200, "ready")
        eventually(lambda: what not in ear.status, "the status is right again")
        restored = {finding.subject: finding for finding in doctor.examine(settings)}["rights at the broker"]

    assert 200 == alive_all_the_same
    assert "fault" == found.level
    assert what in found.detail
    assert found.fix.startswith("Allow this device to ")
    assert "ok" == restored.level


def _counts_if(broker: Broker, wanted: Any) -> dict[str, Any] | None:
    counts: dict[str, Any] = stats_from(broker)["mqtt"]
    return counts if wanted(counts) else None


@pytest.mark.parametrize("code", [0x80, 0x87, 0x9E])
def test_case_13_a_subscription_is_refused(open_daemon: OpenDaemon, code: int) -> None:
    """One filter of three is refused: the log says so, and what comes under the others is answered."""
    with FakeBroker(Rules(subacks=(code, 1))) as broker:
        daemon = open_daemon(broker.url)
        broker.wait(lambda: broker.published(f"{MODELS}/scale"), "the model is announced")
        broker.send(fake_broker.publish(f"{MODELS}/scale/infer/c/1", numbers(3.0), packet_id=1))
        (answer,) = broker.wait(lambda: broker.published(f"{MODELS}/scale/result/c/1"), "an answer")
        eventually(lambda: f"{code:#04x}" in daemon.said(), "the log names the refusal")

    assert 6.0 == doubled(answer.payload)[0]
    assert 1 == len(broker.connected_at)


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ((Rules(), Rules(subacks=(0x9E,))), "reason 0x9e"),
        ((Rules(connack=connack(shared_subscriptions=False)),), "no shared subscriptions"),
    ],
    ids=["refused", "unavailable"],
)
def test_case_13_the_group_is_refused(open_daemon: OpenDaemon, rules: tuple[Rules, ...], why: str) -> None:
    """The device's own requests are answered, `info` says why the group's do not come, and the next connection is the
    next attempt."""
    with FakeBroker(*rules, Rules()) as broker:
        open_daemon(broker.url, groups="g")

        def state(connection: int) -> dict[str, str]:
            told = broker.published(f"edge/v1/{DEVICE}/info", connection=connection)
            return dict(json.loads(told[-1].payload)["group"]) if told else {}

        broker.wait(lambda: why in state(1).get("reason", ""), "the reason is told")
        broker.wait(lambda: broker.published(f"{MODELS}/scale", connection=1), "the model is announced")
        broker.send(fake_broker.publish(f"{MODELS}/scale/infer/c/1", numbers(3.0), packet_id=1), connection=1)
        (answer,) = broker.wait(lambda: broker.published(f"{MODELS}/scale/result/c/1"), "an answer")
        refused, before = state(1), len(broker.connected_at)
        broker.drop(connection=1)
        broker.wait(lambda: state(before + 1).get("state") == "joined", "in the group after all")
        shared = broker.of(SUBSCRIBE, connection=before + 2)

    assert 6.0 == doubled(answer.payload)[0]
    assert "away" == refused["state"]
    assert len(rules) == before
    assert b"$share/g/edge/v1/group/g/models/+/infer" in shared[0].body


@pytest.mark.usefixtures("each_transport")
def test_case_14_the_session_is_taken_over(open_daemon: OpenDaemon, tmp_path: Path) -> None:
    """Thrown out for somebody with our id, the daemon stays away for a minute or more, and says why."""
    with Ear(tmp_path) as ear, FakeBroker(Rules(then=disconnect(0x8E))) as broker:
        daemon = open_daemon(broker.url, extra=ear.environment)
        ear.hears("give each daemon its own `device`")
        busy(1.0)
    pause_s = float(re.findall(r"nother client uses .* trying again in ([\d.]+) s", daemon.said())[0])

    assert pause_s >= 60
    assert 1 == len(broker.connected_at)


def test_case_14_two_daemons_of_one_name(mosquitto: Broker, open_daemon: OpenDaemon) -> None:
    """mosquitto 2.0 does not say who took the session: both go on, ever more rarely, and everything is answered."""
    with Proxy(mosquitto.port) as proxy, Client(mosquitto.url, device=DEVICE) as client:
        url = f"mqtt://127.0.0.1:{proxy.port}"
        first, second = open_daemon(url), open_daemon(url)
        first.wait_for_state(client, "scale", "READY")
        eventually(lambda: "lost" in first.said() + second.said(), "one is thrown out")
        begun, before = time.monotonic(), proxy.accepted
        while time.monotonic() < begun + 4:
            assert 4.0 == doubled(client.infer("scale", numbers(2.0)).raw)[0]
        connections = proxy.accepted - before

    assert connections <= 12
    assert alive(first)
    assert alive(second)


# What the broker allows


def in_flight(broker: FakeBroker, connection: int) -> list[fake_broker.Heard]:
    """The messages of QoS 1 that came on a connection; nothing is acknowledged by itself."""
    return [heard for heard in broker.of(PUBLISH, connection=connection) if heard.packet_id is not None]


def _count_is(broker: FakeBroker, count: int) -> bool:
    return len(in_flight(broker, 1)) == count


@pytest.mark.usefixtures("each_transport")
@pytest.mark.parametrize("window", [1, 3])
def test_case_15_a_narrow_receive_maximum(open_daemon: OpenDaemon, window: int) -> None:
    """Never more messages on the way than the broker takes, also right after a reconnect."""
    with FakeBroker(Rules(connack=connack(receive_maximum=window), pubacks=False)) as broker:
        open_daemon(broker.url)
        broker.wait(lambda: len(in_flight(broker, 1)) == window, "a full window")
        taken = 0
        while not broker.published(f"{MODELS}/scale"):  # the announcements, one acknowledged after the other
            taken += 1
            broker.acknowledge(in_flight(broker, 1)[taken - 1])
            broker.wait(functools.partial(_count_is, broker, taken + window), "the next")
        for number in range(3 * window):
            broker.request(f"{MODELS}/scale/infer", numbers(number), correlation_data=b"%d" % number)
        busy(0.3)
        first = len(in_flight(broker, 1)) - taken
        broker.drop()
        broker.wait(lambda: len(in_flight(broker, 2)) >= window, "a full window again")
        busy(0.3)
        second = len(in_flight(broker, 2))

    assert (window, window) == (first, second)


@needs_mosquitto
def test_case_16_an_answer_over_the_brokers_packet_limit(tmp_path: Path, open_daemon: OpenDaemon) -> None:
    """It becomes a 413 before it is sent, and the connection stands."""
    with running_mosquitto(tmp_path, max_packet_size=20_000) as broker, Proxy(broker.port) as proxy:
        daemon = open_daemon(f"mqtt://127.0.0.1:{proxy.port}")
        with Client(broker.url, device=DEVICE) as client:
            daemon.wait_for_state(client, "wide", "READY")
            wire = Wire(broker.url)
            request = np.full(4_000, np.pi, np.float32).tobytes()  # 16,000 bytes in; as JSON, 70,000 out
            answer = wire.ask(request, topic=f"{MODELS}/wide/infer", content_type="application/octet-stream")
            small = wire.ask(numbers(2.0), topic=f"{MODELS}/scale/infer")
            wire.transport.close()

    assert (413, "too_large") == error_of(answer.payload)
    assert 4.0 == doubled(small.payload)[0]
    assert 1 == proxy.accepted


@pytest.mark.usefixtures("each_transport")
def test_case_16_a_packet_limit_that_nothing_fits_in(open_daemon: OpenDaemon) -> None:
    """A broker that takes packets of 20 bytes is of no use, and no reason to fall over."""
    with FakeBroker(Rules(connack=connack(maximum_packet_size=20))) as broker:
        daemon = open_daemon(broker.url, stats_interval_s="0.1")
        broker.wait(lambda: broker.connected_at, "it connects")
        broker.request(f"{MODELS}/scale/infer", numbers(1.0), correlation_data=b"1")
        busy(1.0)

    assert alive(daemon), daemon.said()


@pytest.mark.usefixtures("each_transport")
def test_case_17_18_acknowledgements_of_another_connection(open_daemon: OpenDaemon, misbehaving_engines: Any) -> None:
    """CONNECT is the first packet of a connection, and what came on an earlier one is not acknowledged on it."""
    slow = misbehaving_engines({"do": "sleep", "seconds": 0.4})
    with FakeBroker() as broker:
        open_daemon(broker.url, engines=slow, serving__inline_ms="0")
        broker.wait(lambda: any(b"READY" in m.payload for m in broker.published(f"{MODELS}/odd")), "odd is ready")
        sent = broker.request(f"{MODELS}/odd/infer", numbers(1.0), correlation_data=b"one")
        broker.drop()
        broker.wait(lambda: broker.published("edge/v1/reply/", connection=2), "the answer, on the next connection")
        busy(0.2)
        too_early = broker.acknowledged(connection=2)
        broker.request(f"{MODELS}/odd/infer", numbers(1.0), correlation_data=b"one", packet_id=sent, duplicate=True)
        broker.wait(lambda: broker.acknowledged(connection=2) == [sent], "acknowledged once it came again")
        answers = broker.published("edge/v1/reply/")
        first_packets = [next(h for h in broker.heard if h.connection == n).kind for n in (1, 2)]

    assert [] == too_early
    assert [CONNECT, CONNECT] == first_packets
    assert [2.0, 2.0] == [doubled(answer.payload)[0] for answer in answers]


@pytest.mark.parametrize("code", [0x8B, 0x89, 0x97, 0x9D])
def test_case_19_the_broker_says_why_it_leaves(open_daemon: OpenDaemon, code: int) -> None:
    """Shutting down, busy, quota exceeded, moved: the pauses double, and never end the service."""
    with FakeBroker(*[Rules(then=disconnect(code))] * 4, Rules()) as broker:
        daemon = open_daemon(broker.url)
        broker.wait(lambda: len(broker.connected_at) == 5, "five connections")
        broker.wait(lambda: broker.published(f"{MODELS}/scale", connection=5), "the last one serves")
    pauses = [later - earlier for earlier, later in itertools.pairwise(broker.connected_at)]

    assert all(pause >= 0.1 * 2**number for number, pause in enumerate(pauses)), pauses
    assert max(pauses) < 5.5
    assert 4 == daemon.said().count("the broker ended the connection")


@pytest.mark.parametrize("server_keepalive_s", [None, 1])
def test_case_21_keepalive(open_daemon: OpenDaemon, server_keepalive_s: int | None) -> None:
    """The keepalive that is set is announced and kept; one that the broker demands instead, is kept too."""
    wanted = 5 if server_keepalive_s else 1
    with FakeBroker(Rules(connack=connack(server_keepalive_s=server_keepalive_s))) as broker:
        open_daemon(broker.url, broker__keepalive_s=str(wanted))
        pings = broker.wait(lambda: len(broker.of(PINGREQ)) >= 2 and broker.of(PINGREQ), "two pings", 5)
        (connect,) = broker.of(CONNECT)

    assert wanted == int.from_bytes(connect.body[8:10], "big")
    assert pings[1].at - pings[0].at <= 1.1


# A broker that breaks the rules

BROKEN = {
    "a CONNACK cut short": Rules(connack=b"\x20\x01\x00", hang_up=True),
    "a CONNACK of an unknown code": Rules(connack=b"\x20\x03\x00\x55\x00"),
    "a topic that is not UTF-8": Rules(then=b"\x32\x09\x00\x02\xff\xfe\x00\x01\x00ab"),
    "a packet of 256 MB": Rules(then=b"\x32\xff\xff\xff\x7f" + bytes(100_000)),
    "an answer to nothing": Rules(then=b"\x20\x03\x00\x00\x00"),
}


@pytest.mark.usefixtures("each_transport")
@pytest.mark.parametrize("rules", BROKEN.values(), ids=BROKEN.keys())
def test_case_22_malformed_packets(open_daemon: OpenDaemon, rules: Rules) -> None:
    """The connection is closed and made anew; memory stays what it was."""
    with FakeBroker(rules, rules, Rules()) as broker:
        # The codec mqtt5 panics at the third of these: a backtrace, where the environment asks for one, takes 50 MB.
        daemon = open_daemon(broker.url, broker__protocol="5", extra={"RUST_BACKTRACE": "0"})
        broker.wait(lambda: broker.published(f"{MODELS}/scale", connection=3), "the third connection serves")
        held = vitals(pid_of(daemon))

    assert held is not None
    assert held.rss_bytes < 120_000_000
    assert "Traceback" not in daemon.said() or "PyObject pointer is null" in daemon.said()


def test_a_broker_of_3_1_1_is_served_too(open_daemon: OpenDaemon) -> None:
    """Where MQTT 5 is refused the next connection, at once, is in 3.1.1 and so by paho."""
    refusal = Rules(connack=b"\x20\x02\x00\x01", hang_up=True)
    with FakeBroker(refusal, Rules()) as broker:
        open_daemon(broker.url)
        broker.wait(lambda: broker.published(f"{MODELS}/scale", connection=2), "the second connection serves")
        versions = [heard.version for heard in broker.heard if heard.kind == CONNECT]
        between_s = broker.connected_at[1] - broker.connected_at[0]

    assert [5, 4] == versions
    assert between_s < 1


@pytest.mark.parametrize(
    ("hang_ups", "expected"),
    [([1], [5, 4, 5]), ([1, 3], [5, 4, 5, 4])],
    ids=["it was only starting", "it does so each time"],
)
def test_a_hang_up_is_no_word_about_versions(open_daemon: OpenDaemon, hang_ups: list[int], expected: list[int]) -> None:
    """A broker that ends as it is greeted may have been going away. Where it then takes 3.1.1 it is asked in MQTT 5
    once more, for over 3.1.1 no request has a way back; if it hangs up on that again, it is believed."""
    ending = Rules(connack=b"", hang_up=True)
    with FakeBroker(*(ending if number in hang_ups else Rules() for number in range(1, 5))) as broker:
        open_daemon(broker.url)
        last = len(expected)
        broker.wait(lambda: broker.published(f"{MODELS}/scale", connection=last), "the last connection serves")
        versions = [heard.version for heard in broker.heard if heard.kind == CONNECT]

    assert expected == versions
