"""Which library speaks: the fast one where it can, without being loaded before, and the other one after a downgrade."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from edge_sdk.doctor import _transport
from edge_sdk.errors import BrokerError, SettingsError
from edge_sdk.mqtt.transports import choice
from edge_sdk.mqtt.transports.base import Connected, ConnectOptions, MqttVersion
from edge_sdk.mqtt.transports.choice import Library, TransportSetting, chosen, new_transport
from edge_sdk.profiles import Machine
from edge_sdk.settings import Broker, Settings
from tests.transports.conftest import Driver
from tests.transports.test_hostile import CONNACK_4, CONNACK_5, after_connect, fake_broker

PROGRAM = """
import sys
from edge_sdk.mqtt.transports.base import ConnectOptions
from edge_sdk.mqtt.transports.choice import new_transport
transport = new_transport({wanted!r})
before = {{"paho", "mqtt5"}} & set(sys.modules)
transport.open(ConnectOptions("127.0.0.1", {port}, "c", version={version}), timeout_s=5)
print(sorted(before), sorted({{"paho", "mqtt5"}} & set(sys.modules)))
"""

needs_mqtt5 = pytest.mark.skipif(not choice.has_mqtt5(), reason="the codec mqtt5 is not installed")


@pytest.fixture
def without_mqtt5(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Python in which mqtt5 is not installed."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mqtt5", None)
        patch.setattr(choice, "find_spec", lambda name: None)
        yield


@needs_mqtt5
@pytest.mark.parametrize(
    ("wanted", "version", "library"),
    [("auto", 5, "mqtt5"), ("auto", 4, "paho"), ("paho", 5, "paho"), ("mqtt5", 5, "mqtt5")],
)
def test_one_library_is_loaded_and_only_to_connect(
    wanted: TransportSetting, version: MqttVersion, library: Library
) -> None:
    """A daemon that speaks by mqtt5 never holds paho in memory, and the other way round."""
    with fake_broker(after_connect(CONNACK_5 if version == 5 else CONNACK_4)) as port:
        program = PROGRAM.format(wanted=wanted, port=port, version=version)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert f"[] ['{library}']\n" == done.stdout


@needs_mqtt5
def test_a_downgrade_takes_the_other_library() -> None:
    """One transport, a connection in MQTT 5 and the next in 3.1.1: each with the library that speaks it."""
    transport, used = new_transport(), []
    for version, connack in ((5, CONNACK_5), (4, CONNACK_4), (5, CONNACK_5)):
        with fake_broker(after_connect(connack)) as port:
            driver = Driver(transport, ConnectOptions("127.0.0.1", port, "c", version=5 if version == 5 else 4))

            assert isinstance(driver.open(), Connected)
            used.append(type(transport._codec).__name__)
    transport.close(send_will=True)

    assert ["Mqtt5Codec", "PahoCodec", "Mqtt5Codec"] == used


def test_what_is_not_installed_is_named(without_mqtt5: None) -> None:
    """`auto` does without; who asks for mqtt5 learns how to come by it."""
    assert "paho" == chosen("auto", 5)
    with pytest.raises(SettingsError, match=r"edge-sdk\[fast\]|3\.11"):
        new_transport("mqtt5")


def test_mqtt5_alone_does_not_speak_3_1_1() -> None:
    """The setting leaves no other library for it, and no version to fall back to."""
    with pytest.raises(BrokerError, match="MQTT 5 alone"):
        chosen("mqtt5", 4)
    assert ("5", "auto") == (Broker(transport="mqtt5").spoken, Broker(transport="paho").spoken)


@needs_mqtt5
@pytest.mark.parametrize(
    ("broker", "detail"),
    [
        (Broker(), "which is compiled, and paho where the broker knows no MQTT 5"),
        (Broker(protocol="5"), "which is compiled"),
        (Broker(protocol="3.1.1"), "for mqtt5 does not speak MQTT 3.1.1"),
        (Broker(transport="mqtt5"), "as the settings say"),
        (Broker(transport="paho"), "as the settings say"),
    ],
)
def test_doctor_says_which_is_in_use(broker: Broker, detail: str) -> None:
    """The library with its version, and why that one."""
    (finding,) = _transport(Machine.read(), Settings(broker=broker))

    assert "ok" == finding.level
    assert finding.detail.endswith(detail)


def test_doctor_says_what_is_missing(without_mqtt5: None) -> None:
    """Missing and not asked for: a note. Missing and asked for: a fault. Both with what to do."""
    (missed,) = _transport(Machine.read(), Settings())
    (wanted,) = _transport(Machine.read(), Settings(broker=Broker(transport="mqtt5")))

    assert ("note", "fault") == (missed.level, wanted.level)
    assert missed.fix
    assert wanted.fix
