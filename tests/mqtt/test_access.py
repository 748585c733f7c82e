"""A password goes where nobody else can read it, for everybody who takes a broker's address."""

from __future__ import annotations

from typing import Any

import pytest

from edge_sdk.errors import SettingsError
from edge_sdk.mqtt.access import BrokerAccess
from edge_sdk.mqtt.address import connect_options, is_loopback
from edge_sdk.mqtt.broker import find_broker
from edge_sdk.mqtt.client import Client
from edge_sdk.mqtt.transports.memory import MemoryBroker

ELSEWHERE = "mqtt://broker.example"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.255.0.9", "::1"])
def test_loopback(host: str) -> None:
    """The name and the addresses that never leave this machine."""

    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "localhost.example", "128.0.0.1", "0.0.0.0", "::", "::2", "127.1", "10.0.0.1"])
def test_elsewhere(host: str) -> None:
    """Whatever is not certainly this machine is elsewhere; names are not resolved."""

    assert not is_loopback(host)


@pytest.mark.parametrize("url", ["mqtts://me:p@broker.example", "mqtt://me:p@localhost", "mqtt://me:p@[::1]:1884"])
def test_a_password_may_go(url: str) -> None:
    """Enciphered, or to this machine."""

    assert "p" == connect_options(url, client_id="c").password


@pytest.mark.parametrize(
    ("url", "more"),
    [
        ("mqtt://me:hunter2@broker.example", {}),
        ("me:hunter2@192.0.2.1:1883", {}),
        (ELSEWHERE, {"username": "me", "password": "hunter2"}),
    ],
)
def test_a_password_may_not_go(url: str, more: dict[str, Any]) -> None:
    """It is refused wherever the password came from, in words that do not hold it; saying so lets it go."""
    with pytest.raises(SettingsError, match="in the clear") as caught:
        connect_options(url, client_id="c", **more)

    assert "hunter2" not in str(caught.value)
    assert "hunter2" == connect_options(url, client_id="c", allow_plaintext_password=True, **more).password


def test_without_a_password_nothing_is_in_the_way() -> None:
    """A user name alone is no secret."""

    assert "me" == connect_options(ELSEWHERE, client_id="c", username="me").username


def test_a_password_needs_a_name() -> None:
    """Else it would not be sent, and the broker's refusal would be a riddle."""
    with pytest.raises(SettingsError, match="no user name"):
        connect_options("mqtts://broker.example", client_id="c", password="hunter2")


def test_the_client_library_refuses_before_it_connects() -> None:
    """The constructor raises; `access` lets it go, and then the broker sees it."""
    broker = MemoryBroker(users={"me": "hunter2"})
    with pytest.raises(SettingsError, match="in the clear"):
        Client(ELSEWHERE, username="me", password="hunter2", transport=broker.transport())
    allowed = BrokerAccess(allow_plaintext_password=True)
    with Client(ELSEWHERE, access=allowed, username="me", password="hunter2", transport=broker.transport()) as client:
        shown = repr(client)

    assert "hunter2" not in shown


def test_the_probe_refuses_too() -> None:
    """What doctor and quickstart look with."""
    with pytest.raises(SettingsError, match="in the clear"):
        find_broker(ELSEWHERE, access=BrokerAccess("me", password="hunter2"))
