"""The broker we start ourselves: up when the block begins, gone when it ends, however it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.errors import BrokerError
from edge_sdk.mqtt import broker as broker_module
from edge_sdk.mqtt.access import BrokerAccess
from edge_sdk.mqtt.address import connect_options
from edge_sdk.mqtt.broker import BrokerKind, find_broker, find_mosquitto, mosquitto_configuration, start_broker
from edge_sdk.mqtt.transports.base import Connected, ConnectOptions, Message, Received
from edge_sdk.mqtt.transports.paho import PahoTransport
from tests.brokers import eventually, free_port, listens
from tests.transports.conftest import Driver
from tests.transports.test_hostile import CONNACK_5, after_connect, fake_broker


@pytest.fixture(params=["mosquitto", "amqtt"])
def kind(request: pytest.FixtureRequest) -> BrokerKind:
    if request.param == "mosquitto":
        if find_mosquitto() is None:
            pytest.skip("mosquitto is not installed")
        return "mosquitto"
    pytest.importorskip("amqtt", reason="amqtt, the embedded broker, is not installed")
    return "amqtt"


def test_a_started_broker_works_and_goes(kind: BrokerKind) -> None:
    """It answers in the protocol it names, on loopback, and nothing listens there afterwards."""
    with start_broker(kind=kind) as broker:
        found = find_broker(broker.url)
        version = 5 if broker.protocol == "5" else 4
        driver = Driver(
            PahoTransport(), ConnectOptions("127.0.0.1", broker.port, "c", version=5 if version == 5 else 4)
        )
        driver.open()
        driver.transport.subscribe(["t"])
        driver.transport.publish(Message("t", b"hello"))

        assert b"hello" == driver.next(Received).message.payload
        assert (kind, True, broker.protocol) == (broker.kind, found.reachable, found.protocol)
        driver.transport.close()

    assert not listens(broker.port)
    assert False is find_broker(broker.url).reachable


def test_an_exception_ends_the_broker_too(kind: BrokerKind) -> None:
    """Ctrl-C in the block is still Ctrl-C, and the broker is gone."""
    with pytest.raises(KeyboardInterrupt), start_broker(kind=kind) as broker:
        raise KeyboardInterrupt

    assert not listens(broker.port)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_broker_dies_with_its_parent(kind: BrokerKind) -> None:
    """Not even kill -9 leaves one behind."""
    code = f"""
from edge_sdk.mqtt.broker import start_broker
with start_broker(kind={kind!r}) as broker:
    print(broker.port, flush=True)
    input()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent.stdin, parent.stdout:
        port = int(parent.stdout.readline())
        listened = listens(port)
        parent.send_signal(signal.SIGKILL)
        parent.wait()

    assert listened
    eventually(lambda: not listens(port), "the broker is gone")


def test_sessions_outlive_a_restart(tmp_path: Path) -> None:
    """With a directory, mosquitto keeps what it accepted from one start to the next."""
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    options = ConnectOptions("127.0.0.1", 0, "c", session_expiry_s=60)
    payloads: list[bytes] = []
    for _ in range(2):
        with start_broker(kind="mosquitto", directory=tmp_path) as broker:
            driver = Driver(PahoTransport(), options)
            driver.open(port=broker.port)
            driver.transport.subscribe(["t"])
            if not payloads:
                driver.transport.publish(Message("t", b"kept"))
            payloads.append(driver.next(Received).message.payload)
            driver.transport.close()

    assert [b"kept", b"kept"] == payloads


def test_a_port_taken_meanwhile_costs_another_try(kind: BrokerKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may bind the free port before the broker does: it takes the next one."""
    with fake_broker(after_connect()) as taken:
        ports = iter([taken, free_port()])
        monkeypatch.setattr(broker_module, "_free_port", lambda: next(ports))

        with start_broker(kind=kind) as broker:
            assert taken != broker.port
            assert find_broker(broker.url).reachable


def test_no_broker_at_all_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without mosquitto and without amqtt the error names both ways out."""
    monkeypatch.setattr(broker_module, "find_mosquitto", lambda: None)
    monkeypatch.setattr(broker_module, "find_spec", lambda _name: None)

    with pytest.raises(BrokerError, match=r"apt install mosquitto.*edge-sdk\[broker\]"), start_broker():
        pass


def test_mosquitto_takes_every_line_without_a_word(tmp_path: Path) -> None:
    """The generated configuration draws no warning or error from the installed version."""
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")

    with start_broker(kind="mosquitto", directory=tmp_path):
        log = (tmp_path / "mosquitto.log").read_text()

    assert "running" in log
    assert not [line for line in log.splitlines() if "Error" in line or "Unknown" in line or "deprecated" in line]
    configuration = mosquitto_configuration(1883, tmp_path)
    assert "listener 1883 127.0.0.1\n" in configuration
    assert (tmp_path / "mosquitto.conf").exists()


def test_what_is_no_broker_is_told_apart() -> None:
    """Something that listens but speaks no MQTT, or refuses, is not called a broker that works."""
    with fake_broker(after_connect(b"HTTP/1.1 400 Bad Request\r\n\r\n", hang_up=True)) as port:
        http = find_broker(f"mqtt://127.0.0.1:{port}")
    with fake_broker(after_connect(b"\x20\x03\x00\x87\x00", hang_up=True)) as port:
        refusing = find_broker(f"mqtt://127.0.0.1:{port}")

    assert (False, False) == (http.reachable, refusing.reachable)
    assert "Not authorized" in refusing.detail


def test_the_probe_says_who_it_is() -> None:
    """With the daemon's credentials the probe finds what the daemon will find."""
    connects: list[bytes] = []

    def talk(connection: socket.socket) -> None:
        connects.append(connection.recv(4096))
        connection.sendall(CONNACK_5)

    with fake_broker(talk) as port:
        found = find_broker(f"mqtt://127.0.0.1:{port}", access=BrokerAccess("somebody", password="secret"))

    assert found.reachable
    assert b"\0\x08somebody\0\x06secret" in connects[0]
    assert "secret" not in repr(found)


@pytest.mark.parametrize("answer", [b"\x20\x03\x00\x87\x00", CONNACK_5, b"HTTP", None])
def test_the_probe_closes_what_it_opened(monkeypatch: pytest.MonkeyPatch, answer: bytes | None) -> None:
    """Whatever answered, or if nobody did."""
    closed: list[bool] = []

    class Closing(PahoTransport):
        def close(self, *, send_will: bool = False) -> None:
            super().close(send_will=send_will)
            closed.append(self._pipe is None)

    monkeypatch.setattr(broker_module, "PahoTransport", Closing)
    if answer is None:
        assert not find_broker(f"mqtt://127.0.0.1:{free_port()}").reachable
    else:
        with fake_broker(after_connect(answer, hang_up=True)) as port:
            find_broker(f"mqtt://127.0.0.1:{port}")

    assert [True] == closed


def test_a_url_says_all_there_is_to_say() -> None:
    """User, password, host, port and TLS come from the URL; arguments win."""
    full = connect_options("mqtts://me:p%40ss@broker.example:1234", client_id="c", keepalive_s=7)
    short = connect_options("broker", client_id="c")
    given = connect_options("mqtt://me:pass@localhost", client_id="c", username="you", password="word")

    assert ("broker.example", 1234, True, "me", "p@ss", 7) == (
        full.host, full.port, full.tls, full.username, full.password, full.keepalive_s,
    )  # fmt: skip
    assert ("broker", 1883, False, None) == (short.host, short.port, short.tls, short.username)
    assert ("you", "word", 8883) == (
        given.username, given.password, connect_options("mqtts://[::1]", client_id="c").port,
    )  # fmt: skip


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_tls_is_spoken_and_checked(tmp_path: Path) -> None:
    """With the right authority a large message makes the round trip through TLS; with the system's it is refused."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-keyout", str(key), "-out", str(certificate), "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl cannot make a certificate here")
    from tests.brokers import running_mosquitto

    lines = [f"certfile {certificate}", f"keyfile {key}"]
    with running_mosquitto(tmp_path, lines=lines) as broker:
        options = ConnectOptions("127.0.0.1", broker.port, "c", tls=True, tls_ca_file=os.fspath(certificate))
        driver = Driver(PahoTransport(), options)
        connected = driver.open()
        driver.transport.subscribe(["t"])
        payload = os.urandom(3_000_000)
        driver.transport.publish(Message("t", b"before"))
        driver.transport.publish(Message("t", payload))
        small, large = driver.next(Received), driver.next(Received)
        driver.transport.close()

        assert isinstance(connected, Connected)
        assert (b"before", payload) == (small.message.payload, large.message.payload)
        assert find_broker(f"mqtts://127.0.0.1:{broker.port}", access=BrokerAccess(ca_file=certificate)).reachable
        with pytest.raises(BrokerError, match=r"certificate"):
            PahoTransport().open(ConnectOptions("127.0.0.1", broker.port, "c", tls=True), timeout_s=5)
