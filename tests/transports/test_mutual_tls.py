"""A broker that asks who we are: what is shown to it, and what is said where that is not good."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_sdk.errors import BrokerError, SettingsError
from edge_sdk.mqtt.transports.base import Closed, Connected, ConnectOptions, Event
from edge_sdk.mqtt.transports.paho import PahoTransport
from edge_sdk.mqtt.transports.tls import client_context
from tests.authority import Authority
from tests.brokers import MOSQUITTO, Broker, running_mosquitto
from tests.transports.conftest import Driver

Files = dict[str, str]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def asking(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """mosquitto that takes nobody without a certificate of our authority."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    certificate, key = authority.certificate("server")
    lines = [f"cafile {authority.file}", f"certfile {certificate}", f"keyfile {key}", "require_certificate true"]
    with running_mosquitto(tmp_path_factory.mktemp("asking"), lines=lines) as broker:
        yield broker


@pytest.fixture
def shown(authority: Authority, tmp_path: Path) -> Callable[[str], Files]:
    """What is shown to the broker, by its kind."""

    def make(kind: str) -> Files:
        ends = "210101000000Z" if kind == "expired" else ""
        certificate, key = authority.certificate("us", host="camera", ends=ends)
        if kind == "of a stranger":
            certificate, key = authority.stranger()
        files = {"tls_client_cert": str(certificate), "tls_client_key": str(key)}
        if kind == "in one file":
            both = tmp_path / "both.pem"
            both.write_bytes(certificate.read_bytes() + key.read_bytes())
            files = {"tls_client_cert": str(both)}
        if kind in ("encrypted", "encrypted, of another password", "encrypted, without its password"):
            files["tls_client_key"] = str(encrypted(key, tmp_path / "encrypted.key"))
            password = {"encrypted": "hunter2", "encrypted, of another password": "hunter3"}.get(kind)
            files |= {"tls_client_key_password": password} if password else {}
        if kind == "of another key":
            files["tls_client_key"] = str(authority.certificate("other")[1])
        if kind == "missing":
            key.unlink()
        if kind == "no certificate":
            certificate.write_text("nonsense")
        if kind == "no key":
            key.write_text("nonsense")
        return {} if kind == "nothing" else files

    return make


def encrypted(key: Path, place: Path) -> Path:
    words = ["openssl", "pkcs8", "-topk8", "-in", str(key), "-out", str(place), "-passout", "pass:hunter2"]
    subprocess.run(words, check=True, capture_output=True)
    return place


def options(port: int, authority: Authority, files: Files) -> ConnectOptions:
    return ConnectOptions("localhost", port, "us", tls=True, tls_ca_file=str(authority.file), **files)  # type: ignore[arg-type]  # they are all texts


@pytest.mark.parametrize("kind", ["whole", "in one file", "encrypted"])
def test_a_good_certificate_lets_us_in(
    asking: Broker, authority: Authority, shown: Callable[[str], Files], kind: str
) -> None:
    """Certificate and key in two files or one, the key encrypted or not."""
    driver = Driver(PahoTransport(), options(asking.port, authority, shown(kind)))
    event = driver.open()
    driver.transport.close()

    assert isinstance(event, Connected)


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("nothing", "wants a certificate of us"),
        ("expired", "says that our certificate has expired"),
        ("of a stranger", "does not know the authority that signed our certificate"),
    ],
)
def test_the_brokers_refusal_is_told_in_words(
    asking: Broker, authority: Authority, shown: Callable[[str], Files], kind: str, complaint: str
) -> None:
    """In TLS 1.3 it comes after the handshake seemed to be done."""
    driver = Driver(PahoTransport(), options(asking.port, authority, shown(kind)))
    try:
        event: Event = driver.open()
        told = event.reason if isinstance(event, Closed) else repr(event)
    except BrokerError as err:  # in TLS 1.2
        told = str(err)

    assert complaint in told


@pytest.mark.parametrize(
    ("kind", "complaint", "fix"),
    [
        ("missing", "client key .* cannot be read: .*us.key: No such file", "must exist"),
        ("no certificate", "us.crt holds no certificate", "PEM"),
        ("no key", "us.key holds no private key", "client_key"),
        ("of another key", "other.key does not belong to the certificate .*us.crt", "Replace both"),
        ("encrypted, without its password", "encrypted.key is encrypted", "client_key_password_file"),
        ("encrypted, of another password", "does not open the client key", "Correct"),
    ],
)
def test_our_own_mistakes_are_found_before_the_broker_is_asked(
    authority: Authority, shown: Callable[[str], Files], kind: str, complaint: str, fix: str
) -> None:
    """SettingsError names the file and what to do; no secret is in it, and nobody is asked on the terminal."""
    with pytest.raises(SettingsError, match=complaint) as caught:
        PahoTransport().open(options(1, authority, shown(kind)), timeout_s=5)

    assert fix in caught.value.fix
    assert "hunter" not in repr(caught.value)


@pytest.mark.parametrize(("content", "complaint"), [(None, "No such file"), ("nonsense", "holds none")])
def test_an_authority_that_is_none(tmp_path: Path, content: str | None, complaint: str) -> None:
    """The same for whom we trust."""
    file = tmp_path / "authorities"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=complaint) as caught:
        client_context(ConnectOptions("localhost", 1, "us", tls=True, tls_ca_file=str(file)))

    assert str(file) in str(caught.value)
