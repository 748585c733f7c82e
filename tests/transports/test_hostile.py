"""Brokers that break every rule: the transport closes, and never raises, hangs or grows."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.errors import BrokerError, TooLarge
from edge_sdk.mqtt.negotiation import Negotiation
from edge_sdk.mqtt.transports.base import (
    Acknowledged,
    Closed,
    Connected,
    ConnectOptions,
    Event,
    Message,
    MqttVersion,
    Properties,
    Received,
    Refused,
    Subscribed,
    Will,
)
from edge_sdk.mqtt.transports.memory import MemoryBroker
from edge_sdk.mqtt.transports.paho import PahoTransport
from tests.brokers import MOSQUITTO, running_mosquitto
from tests.transports.conftest import Driver, transport_of

CONNACK_5 = b"\x20\x03\x00\x00\x00"
CONNACK_4 = b"\x20\x02\x00\x00"

Talk = Callable[[socket.socket], None]

needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")

DriverAt = Callable[..., Driver]


@pytest.fixture(params=["mqtt5", "paho"])
def driver_at(request: pytest.FixtureRequest) -> Iterator[DriverAt]:
    """Drivers of one library for brokers on a port, closed when the test ends."""
    drivers: list[Driver] = []
    new_transport = transport_of(request.param)

    def make(port: int, version: MqttVersion = 5, **more: Any) -> Driver:
        if version == 4 and request.param == "mqtt5":
            pytest.skip("mqtt5 speaks MQTT 5 alone")
        drivers.append(Driver(new_transport(), ConnectOptions("127.0.0.1", port, "victim", version=version, **more)))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.transport.close(send_will=True)


@contextlib.contextmanager
def fake_broker(talk: Talk) -> Iterator[int]:
    """A listener whose connections each get `talk`; yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            with contextlib.suppress(OSError):
                talk(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in connections:
            connection.close()
        thread.join()


def after_connect(*packets: bytes, hang_up: bool = False) -> Talk:
    """Answer CONNECT with `packets`."""

    def talk(connection: socket.socket) -> None:
        connection.recv(4096)
        for packet in packets:
            connection.sendall(packet)
        if hang_up:
            connection.close()

    return talk


def publish(topic: bytes, rest: bytes, first: int = 0x32) -> bytes:
    body = len(topic).to_bytes(2, "big") + topic + rest
    return bytes([first, len(body)]) + body


HOSTILE = {
    "a first byte of no packet": b"\x00\x00",
    "AUTH": b"\xf0\x00",
    "a CONNECT of its own": b"\x10\x00",
    "another CONNACK": CONNACK_5,
    "a length without end": b"\x30\xff\xff\xff\xff\x01",
    "an invalid UTF-8 topic": publish(b"\xff\xfe", b"\x00\x01\x00"),
    "a topic with NUL": publish(b"a\0b", b"\x00\x01\x00"),
    "a topic that is a wildcard": publish(b"a/#", b"\x00\x01\x00"),
    "an empty topic": publish(b"", b"\x00\x01\x00"),
    "QoS 2": publish(b"t", b"\x00\x01\x00", 0x34),
    "QoS 3": publish(b"t", b"\x00\x01\x00", 0x36),
    "a packet id cut short": publish(b"t", b"\x00"),
    "properties that reach too far": publish(b"t", b"\x00\x01\x50\x26"),
    "an unknown property": publish(b"t", b"\x00\x01\x02\x7e\x01"),
    "a topic alias nobody allowed": publish(b"t", b"\x00\x01\x03\x23\x00\x01"),
    "a content type twice": publish(b"t", b"\x00\x01\x08\x03\x00\x01a\x03\x00\x01b"),
    "a PUBACK of one byte": b"\x40\x01\x00",
    "a SUBACK of one byte": b"\x90\x01\x00",
    "a SUBACK with an unknown code": b"\x90\x04\x00\x01\x00\x55",
    "an UNSUBACK of nothing": b"\xb0\x00",
    "an unknown DISCONNECT": b"\xe0\x01\x55",
    "a packet beyond what we take": b"\x30\xff\xff\xff\x7f",
    "a user property with NUL": publish(b"t", b"\x00\x01\x08\x26\x00\x01a\x00\x02b\0"),
    "a user property that is not UTF-8": publish(b"t", b"\x00\x01\x08\x26\x00\x01a\x00\x02b\xff"),
}


# mqtt5 panics at text that is not UTF-8, and leaves Python's error behind as one that nobody could take.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("packet", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_breaks_the_protocol_closes_the_connection(packet: bytes, driver_at: DriverAt) -> None:
    """Closed comes, as the last event; nothing is raised."""
    with fake_broker(after_connect(CONNACK_5, packet)) as port:
        driver = driver_at(port)

        connected = driver.open()
        driver.next(Closed)

        assert isinstance(connected, Connected)
        assert driver.silent(object, 0.05)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x20",
        b"\x20\x00",
        b"\x20\x01\x00",
        b"\x20\x03\x00\x55\x00",
        b"\x20\x05\x00\x00\x02\x21\x00",
        b"HTTP/1.1 400 ",
    ],
    ids=["nothing", "a byte", "empty", "short", "unknown code", "broken property", "HTTP"],
)
def test_a_broken_connack_closes_the_connection(packet: bytes, driver_at: DriverAt) -> None:
    """What is not a CONNACK, or is cut off, ends the attempt."""
    with fake_broker(after_connect(packet, hang_up=True)) as port:
        assert isinstance(driver_at(port).open(), Closed)


def test_a_message_before_connack_closes_the_connection(driver_at: DriverAt) -> None:
    """Nothing may come before CONNACK; what does is not delivered."""
    with fake_broker(after_connect(publish(b"t", b"\x00\x01\x00"), CONNACK_5)) as port:
        driver = driver_at(port)

        assert isinstance(driver.open(), Closed)
        assert driver.silent(Received, 0.05)


def test_a_broker_that_never_answers_is_given_up(driver_at: DriverAt) -> None:
    """Without CONNACK the attempt ends with the time-out that `open` was given."""
    with fake_broker(lambda connection: None) as port:
        driver = driver_at(port)

        begun = time.monotonic()
        driver.transport.open(driver.options, timeout_s=0.3)
        (event,) = driver.transport.poll(10)

        assert isinstance(event, Closed)
        assert 0.2 < time.monotonic() - begun < 3


def test_a_broker_that_falls_silent_is_closed_in_time(driver_at: DriverAt) -> None:
    """A half-open connection is noticed within twice the keepalive, also while we publish into it."""
    with fake_broker(after_connect(CONNACK_5)) as port:
        driver = driver_at(port, keepalive_s=1)
        driver.open()

        begun = time.monotonic()
        while not any(isinstance(event, Closed) for event in driver.events):
            driver.transport.publish(Message("t", b"x"))
            driver.events += driver.transport.poll(0.2)
            assert time.monotonic() - begun < 5

        assert time.monotonic() - begun < 2.3


def test_an_announced_limit_is_held(driver_at: DriverAt) -> None:
    """A packet over our maximum packet size closes the connection before its bytes are awaited (MQTT 5)."""
    with fake_broker(after_connect(CONNACK_5, b"\x32\xff\xff\xff\x7f")) as port:
        driver = driver_at(port, maximum_packet_size=100_000)
        driver.open()

        assert "at most 100,000" in driver.next(Closed).reason


def test_a_reason_code_nobody_knows_is_told(driver_at: DriverAt) -> None:
    """A PUBACK is one whatever its code: if it ended the connection, its message would be sent again, for ever."""

    def talk(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(CONNACK_5)
        packet = connection.recv(4096)  # of a topic of one letter
        connection.sendall(b"\x40\x03" + packet[5:7] + b"\xc5")

    with fake_broker(talk) as port:
        driver = driver_at(port)
        driver.open()
        handle = driver.transport.publish(Message("t", b""))

        assert Acknowledged(handle, 0xC5) == driver.next(object)


def test_server_limits_are_told(driver_at: DriverAt) -> None:
    """Everything in CONNACK that limits us comes with Connected."""
    properties = b"\x21\x00\x05\x27\x00\x00\x10\x00\x25\x00\x2a\x00\x13\x00\x07"
    connack = bytes([0x20, 3 + len(properties), 1, 0, len(properties)]) + properties
    with fake_broker(after_connect(connack)) as port:
        event = driver_at(port).open()

        assert isinstance(event, Connected)
        assert True is event.session_present
        limits = event.limits
        assert (5, 4096, False, False, 7) == (
            limits.receive_maximum, limits.maximum_packet_size, limits.retain_available,
            limits.shared_subscriptions, limits.keepalive_s,
        )  # fmt: skip


def test_the_broker_s_reason_for_leaving_is_told(driver_at: DriverAt) -> None:
    """A DISCONNECT from the broker is Closed with its code: the back-off depends on it."""
    with fake_broker(after_connect(CONNACK_5, b"\xe0\x02\x8b\x00")) as port:
        driver = driver_at(port)
        driver.open()

        assert 0x8B == driver.next(Closed).code


@needs_mosquitto
def test_an_oversized_message_of_3_1_1_is_passed_over(tmp_path: Path, driver_at: DriverAt) -> None:
    """MQTT 3.1.1 cannot refuse a size: the message comes without its payload, and what follows it is unharmed."""
    with running_mosquitto(tmp_path) as broker:
        victim, sender = driver_at(broker.port, 4, maximum_packet_size=100_000), driver_at(broker.port, 4)
        victim.open(clean_start=True)
        victim.transport.subscribe(["t"])
        victim.next(Subscribed)
        sender.open(client_id="sender")

        sender.transport.publish(Message("t", bytes(5_000_000)))
        sender.transport.publish(Message("t", b"small"))
        sender.next(Acknowledged)
        large, small = victim.next(Received), victim.next(Received)
        victim.transport.acknowledge(large)

        assert (b"", "t", 1) == (large.message.payload, large.message.topic, large.message.qos)
        assert large.skipped_bytes > 5_000_000
        assert (b"small", 0) == (small.message.payload, small.skipped_bytes)


@pytest.mark.parametrize(
    ("version", "connack", "code"),
    [
        (5, b"\x20\x03\x00\x86\x00", 0x86),
        (5, b"\x20\x03\x00\x84\x00", 0x84),
        (5, b"\x20\x02\x00\x01", 0x84),
        (4, b"\x20\x02\x00\x05", 0x87),
        (4, b"\x20\x02\x00\x04", 0x86),
    ],
)
def test_a_refusal_comes_with_its_reason_code(
    version: MqttVersion, connack: bytes, code: int, driver_at: DriverAt
) -> None:
    """Refused carries MQTT 5's reason code whatever the version, is not followed by Closed, and `open` works again."""
    with fake_broker(after_connect(connack, hang_up=True)) as port:
        driver = driver_at(port, version)

        first, silent, second = driver.open(), driver.silent(object, 0.05), driver.open()

        assert isinstance(first, Refused)
        assert (code, True) == (first.code, silent)
        assert isinstance(second, Refused)


@needs_mosquitto
@pytest.mark.parametrize("version", [5, 4])
def test_wrong_credentials_are_refused(tmp_path: Path, version: MqttVersion, driver_at: DriverAt) -> None:
    """A real broker's refusal of a name it does not know; the right name is let in."""
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(passwords), "known", "secret"], check=True)
    with running_mosquitto(tmp_path, allow_anonymous="false", lines=[f"password_file {passwords}"]) as broker:
        driver = driver_at(broker.port, version)

        stranger = driver.open(username="stranger", password="guess")
        known = driver.open(username="known", password="secret")

        assert isinstance(stranger, Refused)
        assert isinstance(known, Connected)


def test_credentials_are_not_shown() -> None:
    """The password is in no repr, and so in no log."""

    assert "secret" not in repr(ConnectOptions("h", 1, "c", username="u", password="secret"))


@needs_mosquitto
def test_an_oversized_publish_is_refused_before_it_is_sent(tmp_path: Path, driver_at: DriverAt) -> None:
    """Over the broker's limit `publish` raises TooLarge and nothing else is disturbed."""
    with running_mosquitto(tmp_path, max_packet_size=10_000) as broker:
        driver = driver_at(broker.port)
        driver.open()

        with pytest.raises(TooLarge, match="at most 10,000"):
            driver.transport.publish(Message("t", bytes(10_000)))
        handle = driver.transport.publish(Message("t", bytes(9_000)))

        assert handle == driver.next(Acknowledged).handle


def test_a_stalled_tls_handshake_ends_in_time() -> None:
    """A listener that takes the connection and says nothing is a BrokerError by the time-out."""
    with fake_broker(lambda connection: None) as port:
        begun = time.monotonic()
        with pytest.raises(BrokerError, match="No TLS connection"):
            PahoTransport().open(ConnectOptions("127.0.0.1", port, "c", tls=True), timeout_s=0.3)

        assert time.monotonic() - begun < 3


def test_versions_are_negotiated() -> None:
    """auto begins with 5, goes to 3.1.1 on a refusal or a hang-up, and back; a setting is never left."""
    auto, pinned = Negotiation("auto"), Negotiation("5")

    assert (5, True, 4) == (auto.version, auto.refused(0x84), auto.version)
    assert (False, 5) == (auto.hung_up(), auto.version)
    assert (True, 4) == (auto.hung_up(), auto.version)
    assert (False, 4) == (auto.refused(0x86), auto.version)
    assert (False, False, 5) == (pinned.refused(0x84), pinned.hung_up(), pinned.version)
    assert 4 == Negotiation("3.1.1").version


def test_a_broker_that_knew_mqtt_5_may_hang_up() -> None:
    """Once MQTT 5 worked, only a refusal in so many words leads away from it."""
    negotiation = Negotiation("auto")
    assert negotiation.patience_s(10) < 10
    negotiation.connected()

    assert (False, 5, 10) == (negotiation.hung_up(), negotiation.version, negotiation.patience_s(10))
    assert (True, 4) == (negotiation.refused(0x84), negotiation.version)


def test_the_memory_broker_refuses_too() -> None:
    """Version and credentials are checked, so that a daemon's answer to a refusal can be tested without sockets."""
    broker = MemoryBroker(versions=[4], users={"known": "secret"})
    options = ConnectOptions("memory", 1883, "c", version=5)

    events: list[Event] = []
    for version, password in ((5, "secret"), (4, "guess"), (4, "secret")):
        transport = broker.transport()
        changed: MqttVersion = 5 if version == 5 else 4
        transport.open(
            ConnectOptions("memory", 1883, options.client_id, version=changed, username="known", password=password),
            timeout_s=1,
        )
        events += transport.poll(0)

    assert [Refused, Refused, Connected] == [type(event) for event in events]
    assert [0x84, 0x86] == [event.code for event in events if isinstance(event, Refused)]


def test_time_in_memory_is_the_test_s() -> None:
    """With a clock of its own the broker in memory expires messages, sends wills and ends sessions when told."""
    now = [0.0]
    broker = MemoryBroker(clock=lambda: now[0])
    watcher, leaver = broker.transport(), broker.transport()
    watcher.open(ConnectOptions("memory", 1883, "watcher", session_expiry_s=100), timeout_s=1)
    watcher.poll(0)
    watcher.subscribe(["w", "t"])
    watcher.poll(0)
    will = Will(Message("w", b"gone"), delay_s=10)
    leaver.open(ConnectOptions("memory", 1883, "leaver", session_expiry_s=60, will=will), timeout_s=1)
    leaver.poll(0)
    broker.cut("leaver")

    now[0] = 9.9
    before = list(watcher.poll(0))
    now[0] = 10.0
    (after,) = watcher.poll(0)
    broker.cut("watcher")
    assert isinstance(after, Received)
    leaver.open(ConnectOptions("memory", 1883, "leaver"), timeout_s=1)
    leaver.poll(0)
    leaver.publish(Message("t", b"old", properties=Properties(message_expiry_s=5)))
    leaver.publish(Message("t", b"new", properties=Properties(message_expiry_s=50)))
    leaver.poll(0)
    now[0] = 16.0
    watcher.open(ConnectOptions("memory", 1883, "watcher", session_expiry_s=100), timeout_s=1)
    waiting = [event for event in watcher.poll(0) if isinstance(event, Received)]

    assert [] == before
    assert b"gone" == after.message.payload
    assert [b"gone", b"new"] == [event.message.payload for event in waiting]
    assert 44 == waiting[1].message.properties.message_expiry_s
