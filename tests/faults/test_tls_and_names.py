"""Certificates that are not good, names that move, and IPv6: cases 23 and 25."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.mqtt.client import Client
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


class Authority:
    """A certificate authority for a test, and servers' certificates good and bad."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = self._self_signed("authority", "Test Authority")

    def certificate(self, name: str, *, host: str = "localhost", begins: str = "", ends: str = "") -> tuple[Path, Path]:
        """Certificate and key; `begins` and `ends` as YYMMDDHHMMSSZ."""
        key, request, made = (self.folder / f"{name}.{kind}" for kind in ("key", "csr", "crt"))
        self._openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", f"/CN={host}")
        options = self.folder / f"{name}.cnf"
        index = self.folder / f"{name}.index"
        index.touch()
        options.write_text(
            "[ca]\ndefault_ca=x\n[x]\n"
            f"database={index}\nnew_certs_dir={self.folder}\ndefault_md=sha256\nrand_serial=yes\n"
            "unique_subject=no\npolicy=any\nx509_extensions=names\n[any]\ncommonName=supplied\n"
            f"[names]\nsubjectAltName=DNS:{host}\n"
        )
        self._openssl(
            "ca", "-batch", "-notext", "-config", options, "-cert", self.file,
            "-keyfile", self.folder / "authority.key", "-in", request, "-out", made,
            "-startdate", begins or "200101000000Z", "-enddate", ends or "400101000000Z",
        )  # fmt: skip
        key.chmod(0o644)
        return made, key

    def stranger(self) -> tuple[Path, Path]:
        """A certificate that signed itself."""
        return self._self_signed("stranger", "localhost"), self.folder / "stranger.key"

    def _self_signed(self, name: str, subject: str) -> Path:
        key, made = self.folder / f"{name}.key", self.folder / f"{name}.crt"
        self._openssl(
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", made, "-days", "2",
            "-subj", f"/CN={subject}",
        )  # fmt: skip
        key.chmod(0o644)
        return made

    def _openssl(self, *words: object) -> None:
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True, cwd=self.folder)


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
