"""Certificates that are not good, names that move, and IPv6: cases 23 and 25."""

from __future__ import annotations

import signal
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.mqtt.access import BrokerAccess
from edge_sdk.mqtt.client import Client
from tests.authority import Authority
from tests.brokers import MOSQUITTO, eventually, free_port, listens, running_mosquitto
from tests.daemon.processes import DaemonProcess
from tests.faults.conftest import (
    OpenDaemon,
    doubled,
    numbers,
)
from tests.faults.scene import DEVICE
from tests.faults.systemd import Ear

needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@needs_mosquitto
@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("expired", "expired"),
        ("not valid yet", "not yet valid"),
        ("of another host", "mismatch"),
        ("of a stranger", "self"),
    ],
)
def test_case_23_a_certificate_that_is_not_good(
    tmp_path: Path, authority: Authority, open_daemon: OpenDaemon, kind: str, complaint: str
) -> None:
    """The connection is refused in words, and tried again; the certificate that replaces it is taken at once."""
    bad = {
        "expired": lambda: authority.certificate("expired", ends="210101000000Z"),
        "not valid yet": lambda: authority.certificate("early", begins="390101000000Z"),
        "of another host": lambda: authority.certificate("elsewhere", host="elsewhere.example"),
        "of a stranger": authority.stranger,
    }[kind]()
    good = authority.certificate(f"good-{kind[:4]}")
    certificate, key = tmp_path / "server.crt", tmp_path / "server.key"

    def install(pair: tuple[Path, Path]) -> None:
        certificate.write_bytes(pair[0].read_bytes())
        key.write_bytes(pair[1].read_bytes())

    install(bad)
    lines = [f"certfile {certificate}", f"keyfile {key}"]
    with running_mosquitto(tmp_path, lines=lines) as broker, Ear(tmp_path) as ear:
        daemon = open_daemon(
            f"mqtts://localhost:{broker.port}", extra=ear.environment, broker__ca_file=str(authority.file)
        )
        ear.hears("No TLS connection")
        status = next(line for line in ear.lines if "No TLS connection" in line)
        install(good)
        broker.signal(signal.SIGHUP)
        eventually(lambda: "Connected" in daemon.said(), f"connected: {daemon.said()}")

    assert status.startswith("STATUS=Not connected: ")
    assert complaint in status


@needs_mosquitto
def test_case_23_certificates_are_rotated_on_both_sides(
    tmp_path: Path, authority: Authority, engines: Path, open_daemon: OpenDaemon
) -> None:
    """Authority, certificates and keys of everybody are replaced under way: the next connection uses them.

    That ours ends soon is told before, and that everybody here can read its key. A certificate that is replaced before
    its key fits nothing for a moment; that is told, too, and passes by itself.
    """
    place = tmp_path / "certificates"
    place.mkdir()
    names = ("ca.crt", "server.crt", "server.key", "daemon.crt", "daemon.key", "client.crt", "client.key")
    ca, server, server_key, ours, our_key, theirs, their_key = (place / name for name in names)
    second = Authority(tmp_path / "second")

    def install(made_by: Authority, *wanted: Path) -> None:
        for path in wanted or (ca, server, server_key, ours, our_key, theirs, their_key):
            made = made_by.file if path is ca else made_by.folder / path.name
            path.write_bytes(made.read_bytes())

    soon = (datetime.now(timezone.utc) + timedelta(days=5)).strftime("%y%m%d%H%M%SZ")
    for one in (authority, second):
        for name, host in (("server", "localhost"), ("daemon", "daemon"), ("client", "client")):
            one.certificate(name, host=host, ends=soon if name == "daemon" and one is authority else "")
    install(authority)
    lines = [f"cafile {ca}", f"certfile {server}", f"keyfile {server_key}", "require_certificate true"]
    with running_mosquitto(tmp_path, lines=lines) as broker:
        url = f"mqtts://localhost:{broker.port}"
        tls = {"broker__ca_file": ca, "broker__client_cert": ours, "broker__client_key": our_key}
        daemon = open_daemon(url, **{key: str(file) for key, file in tls.items()})
        access = BrokerAccess(ca_file=ca, client_cert=theirs, client_key=their_key)
        with Client(url, access=access, device=DEVICE, timeout_s=60) as client:
            daemon.wait_for_state(client, "scale", "READY")
            before = client.infer("scale", numbers(2.0))
            eventually(lambda: f"{ours} expires in 5 days" in daemon.said(), "told ahead")
            broker.stop()
            install(second, ca, server, server_key, ours, theirs, their_key)
            broker.start()
            eventually(lambda: "does not belong to the certificate" in daemon.said(), "the key does not fit")
            install(second, our_key)
            after = client.infer("scale", numbers(3.0))
            reconnects = client.statistics.reconnects

    assert f"may read {our_key}" in daemon.said()
    assert (4.0, 6.0) == (doubled(before.raw)[0], doubled(after.raw)[0])
    assert reconnects >= 1


# Names and addresses


@pytest.fixture
def own_hosts(tmp_path: Path) -> Path:
    """A file that is /etc/hosts for what is started in a mount namespace of its own."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    try:
        subprocess.run(["unshare", "--mount", "mount", "--bind", hosts, "/etc/hosts"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mount namespaces here (they need root): a name's address cannot be changed")
    return hosts


@needs_mosquitto
def test_case_25_a_name_that_moves(
    tmp_path: Path, own_hosts: Path, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that does not resolve is tried again; when its address changes, the next connection goes there."""
    name = "broker.test"
    homes = [tmp_path / "one", tmp_path / "two"]
    port = free_port()
    started: list[subprocess.Popen[bytes]] = []
    for number, home in enumerate(homes, 1):
        home.mkdir()
        configuration = home / "mosquitto.conf"
        configuration.write_text(f"listener {port} 127.0.0.{number}\nallow_anonymous true\n")
        started.append(subprocess.Popen([str(MOSQUITTO), "-c", str(configuration)], stderr=subprocess.DEVNULL))
    daemon = DaemonProcess(engines, f"mqtt://{name}:{port}", tmp_path / "daemon.log", device=DEVICE)
    try:
        eventually(lambda: listens(port), "the first broker listens")
        command = f'mount --bind {own_hosts} /etc/hosts && exec "$0" "$@"'
        real = subprocess.Popen

        def in_namespace(words: Any, **options: Any) -> Any:
            return real(["unshare", "--mount", "sh", "-c", command, *words], **options)

        monkeypatch.setattr("tests.daemon.processes.subprocess.Popen", in_namespace)
        daemon.start()
        monkeypatch.undo()
        eventually(lambda: "trying again" in daemon.said(), "the name is unknown")
        own_hosts.write_text(f"127.0.0.1 localhost\n127.0.0.1 {name}\n")
        eventually(lambda: "Connected" in daemon.said(), "connected to the first")
        own_hosts.write_text(f"127.0.0.1 localhost\n127.0.0.2 {name}\n")
        started[0].kill()
        eventually(lambda: daemon.said().count("Connected") == 2, "connected to the second")
    finally:
        for process in started:
            process.kill()
            process.wait()
        if daemon.process is not None:
            daemon.kill()


@needs_mosquitto
def test_case_25_ipv6_only(tmp_path: Path, open_daemon: OpenDaemon) -> None:
    """A broker that has nothing but IPv6 is served."""
    port = free_port()
    with running_mosquitto(tmp_path, lines=[f"listener {port} ::1"]) as broker:
        daemon = open_daemon(f"mqtt://[::1]:{port}")
        with Client(broker.url, device=DEVICE) as client:
            daemon.wait_for_state(client, "scale", "READY")
            answer = client.infer("scale", numbers(2.0))

    assert 4.0 == doubled(answer.raw)[0]
