"""docs/security.md does what it says: its commands, its mosquitto and its rights, run as they are printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.errors import BrokerError, SettingsError
from edge_sdk.mqtt.access import BrokerAccess
from edge_sdk.mqtt.client import Client
from edge_sdk.mqtt.negotiation import ProtocolSetting
from edge_sdk.mqtt.transports.base import (
    FAILURE,
    NOT_AUTHORIZED,
    Acknowledged,
    Connected,
    Message,
    Received,
    Subscribed,
)
from edge_sdk.mqtt.transports.paho import PahoTransport
from edge_sdk.package import EnginePackage
from edge_sdk.settings import CREDENTIALS
from edge_sdk.toml import read_toml
from tests.brokers import MOSQUITTO, Broker, eventually, running_mosquitto
from tests.daemon.processes import DaemonProcess
from tests.transports.conftest import Driver

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
DEVICE = "door-cam"

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


def blocks(language: str, heading: str) -> list[str]:
    """The blocks of a language under a heading, up to the next of its level."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", GUIDE, re.MULTILINE | re.DOTALL)
    assert section is not None, heading
    return re.findall(rf"^```{language}\n(.*?)^```", section.group(1), re.MULTILINE | re.DOTALL)


@dataclass
class Site:
    """A broker as the guide sets it up, and a daemon behind it."""

    broker: Broker
    folder: Path
    daemon: DaemonProcess

    @property
    def url(self) -> str:
        return f"mqtts://localhost:{self.broker.port}"

    def access(self, name: str) -> BrokerAccess:
        ca, certificate, key = (self.folder / file for file in ("ca.crt", f"{name}.crt", f"{name}.key"))
        return BrokerAccess(ca_file=ca, client_cert=certificate, client_key=key)

    def client(self, name: str, protocol: ProtocolSetting = "auto") -> Client:
        return Client(
            self.url, access=self.access(name), client_id=name, device=DEVICE, timeout_s=20, protocol=protocol
        )

    def bare(self, name: str, *filters: str) -> Driver:
        """A connection of bare messages, which has asked for `filters`."""
        driver = Driver(PahoTransport(), self.access(name).options(self.url, client_id=f"{name}-bare"))
        assert isinstance(driver.open(), Connected)
        if filters:
            driver.transport.subscribe(filters)
            driver.next(Subscribed)
        return driver


@pytest.fixture(scope="module")
def site(digits: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("guide")
    # Only openssl's commands: the last block is a question to a device. And further clients.
    commands = "\n".join(block for block in blocks("sh", "Certificates") if "openssl" in block)
    commands = commands.replace("broker.example", "localhost").replace(" phone;", " phone tablet operator;")
    subprocess.run(["sh", "-e", "-c", commands], cwd=folder, check=True, capture_output=True)
    (rights,) = blocks("acl", "Access control")
    phone = re.search(r"^user phone\n.*?\n\n", rights, re.MULTILINE | re.DOTALL)
    assert phone is not None
    (folder / "acl").write_text(f"{rights}\n{phone[0].replace('phone', 'tablet')}")
    (folder / "acl").chmod(0o644)
    (configuration,) = blocks("conf", "Certificates")
    lines = configuration.replace("/etc/mosquitto/certs", str(folder)).replace("/etc/mosquitto", str(folder))
    kept = [line for line in lines.splitlines() if not line.startswith(("listener", "allow_anonymous"))]
    with running_mosquitto(folder, lines=kept, allow_anonymous="false") as broker:
        config = folder / "edge-sdk.toml"
        settings = blocks("toml", "Certificates")[0].replace("/etc/edge-sdk", str(folder))
        config.write_text(settings.replace("broker.example:8883", f"localhost:{broker.port}"))
        url = read_toml(config, SettingsError)["broker"]["url"]
        daemon = DaemonProcess(digits.path.parent, url, folder / "daemon.log", device=DEVICE, stats_interval_s="0.2")
        daemon.start(arguments=["--config", str(config)])
        found = Site(broker, folder, daemon)
        try:
            with found.client("phone") as client:
                daemon.wait_for_state(client, "digits", "READY")
            yield found
        finally:
            daemon.kill()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_client_with_these_rights_is_answered(site: Site, pictures: list[Path], protocol: ProtocolSetting) -> None:
    """Requests of every form, and everything a device says of itself."""
    versions: list[str | None] = [None, "1"] if protocol == "5" else [None]
    with site.client("phone", protocol) as client:
        labels = {client.infer("digits", pictures[0], version=version).predictions[0].label for version in versions}
        told = client.info()
        devices = client.devices()

    assert {pictures[0].parent.name} == labels
    assert "digits" in told["models"]
    assert {DEVICE: True} == devices


def test_the_daemon_has_all_it_needs(site: Site) -> None:
    """The broker refused it nothing that it publishes or reads, and it sees the end of its certificate."""
    device = site.bare(DEVICE, f"edge/v1/{DEVICE}/models/+/result/-/+")
    asking_itself = [published(device, f"edge/v1/{DEVICE}/models/-/{kind}/-/7") for kind in ("infer", "result")]
    heard = eventually(lambda: _heard(device), "what it sends itself")
    device.transport.close()
    device = site.bare(DEVICE, f"edge/v1/{DEVICE}/models/+")
    retained = device.next(Received).message
    device.transport.close()
    operator = site.bare("operator", f"edge/v1/{DEVICE}/stats")
    stats = json.loads(operator.next(Received).message.payload)
    operator.transport.close()

    assert max(asking_itself) < FAILURE
    assert [f"edge/v1/{DEVICE}/models/-/result/-/7"] == [event.message.topic for event in heard]
    assert (f"edge/v1/{DEVICE}/models/digits", True) == (retained.topic, retained.retain)
    assert "ok" == stats["self_test"]["requests"]
    assert 0 == stats["mqtt"]["refused"]
    assert 360 < stats["client_certificate_days"] <= 365
    assert "refused" not in site.daemon.said()


def test_a_client_reads_no_answer_but_its_own(site: Site, pictures: list[Path]) -> None:
    """Whatever it asks the broker for; and it is nobody but itself."""
    answers = ("edge/v1/reply/phone", "edge/v1/+/models/+/result/phone/+")
    spy = site.bare("tablet", "#", *answers, "edge/v1/+/models/+/infer")
    with site.client("phone") as client:
        client.infer("digits", pictures[0])
    with site.client("phone", "3.1.1") as client:
        client.infer("digits", pictures[0])
    heard = {event.message.topic for event in _heard(spy)}
    forged = (f"edge/v1/{DEVICE}/availability", "edge/v1/reply/phone", f"edge/v1/{DEVICE}/models/x/infer/phone/1")
    codes = {topic: published(spy, topic) for topic in forged}
    spy.transport.close()

    assert {f"edge/v1/{DEVICE}/{news}" for news in ("availability", "info", "models/digits")} == heard
    assert {NOT_AUTHORIZED} == set(codes.values()), codes


def test_a_device_is_no_other_device(site: Site) -> None:
    """It publishes nothing in another's name, and asks nobody."""
    driver = site.bare(DEVICE)
    forged = ("edge/v1/other/availability", "edge/v1/other/models/digits/infer", f"edge/v1/{DEVICE}/models/x/infer")
    codes = {topic: published(driver, topic) for topic in forged}
    driver.transport.close()

    assert {NOT_AUTHORIZED} == set(codes.values()), codes


def test_the_command_line_takes_the_same_way_in(site: Site, pictures: list[Path]) -> None:
    """`infer` with a file of settings and a client id, and `doctor` with the device's own."""
    device = (site.folder / "edge-sdk.toml").read_text()
    phone = site.folder / "phone.toml"
    phone.write_text(device.replace(f"{DEVICE}.", "phone."))
    asked = edge_sdk(
        "infer", "digits", "--input", pictures[0], "--config", phone, "--client", "phone", "--device", DEVICE, "--json"
    )
    found = edge_sdk("doctor", "--config", site.folder / "edge-sdk.toml", "--json")
    findings = {finding["subject"]: finding for finding in found}

    assert pictures[0].parent.name == asked["predictions"][0]["label"]
    assert "ok" == findings["broker"]["level"], findings["broker"]
    assert "ok" == findings["client certificate"]["level"], findings["client certificate"]


def test_nobody_comes_without_a_certificate(site: Site) -> None:
    """The authority alone is not enough."""
    with pytest.raises(BrokerError, match="certificate"):
        Client(site.url, access=BrokerAccess(ca_file=site.folder / "ca.crt"))


def test_the_credentials_of_the_guide_are_those_that_are_looked_for() -> None:
    """Each name in the guide's drop-in, and in the unit's comments."""
    (drop_in,) = blocks("ini", "Systemd's credentials")
    unit = (Path(__file__).resolve().parents[2] / "systemd" / "edge-sdk.service").read_text(encoding="utf-8")

    assert set(CREDENTIALS.values()) == set(re.findall(r"^LoadCredential=([a-z-]+):", drop_in, re.MULTILINE))
    assert set(CREDENTIALS.values()) == set(re.findall(r"^#LoadCredential=([a-z-]+):", unit, re.MULTILINE))


def _heard(driver: Driver) -> list[Received]:
    """Every message that came; what was still on its way is given a moment."""
    give_up_at = time.monotonic() + 0.5
    while time.monotonic() < give_up_at:
        driver.events += driver.transport.poll(0.05)
    return [event for event in driver.events if isinstance(event, Received)]


def edge_sdk(*words: object) -> Any:
    """The JSON that a command prints; `doctor` may have found other faults of this machine."""
    command = [sys.executable, "-m", "edge_sdk", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def published(driver: Driver, topic: str) -> int:
    """What the broker says to a message on `topic`."""
    handle = driver.transport.publish(Message(topic, b"forged"))
    codes: list[int] = eventually(lambda: _codes(driver, handle), "acknowledged")
    return codes[0]


def _codes(driver: Driver, handle: int) -> list[int]:
    """The broker's answer to a publication, once it is there."""
    driver.events += driver.transport.poll(0.05)
    return [event.code for event in driver.events if isinstance(event, Acknowledged) and event.handle == handle]
