"""Which version of MQTT is tried, told how the attempts ended."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.mqtt.negotiation import Negotiation


def test_a_broker_that_hung_up_once_is_asked_in_5_again() -> None:
    """Silence says nothing about what a broker knows; a broker that then speaks MQTT 5 is never doubted again."""
    negotiation = Negotiation()

    tries_4 = negotiation.hung_up()
    negotiation.connected()
    negotiation.lost()
    again = negotiation.version
    negotiation.connected()
    negotiation.lost()

    assert (True, 5, 5) == (tries_4, again, negotiation.version)
    assert not negotiation.hung_up()


def test_a_refusal_holds_until_5_is_accepted_after_all() -> None:
    """A broker that refused MQTT 5 and hangs up on 3.1.1 may have been replaced: 5 is tried, and believed."""
    negotiation = Negotiation()

    assert negotiation.refused(0x84)
    negotiation.connected()
    negotiation.lost()
    kept = negotiation.version
    negotiation.hung_up()
    replaced = negotiation.version
    negotiation.connected()
    negotiation.lost()

    assert [4, 5, 5] == [kept, replaced, negotiation.version]


@given(st.sampled_from(["5", "3.1.1"]), st.lists(st.sampled_from(["connected", "lost", "hung_up", "refused"])))
def test_a_set_version_is_never_left(protocol: str, story: list[str]) -> None:
    negotiation = Negotiation("5" if protocol == "5" else "3.1.1")
    for happening in story:
        getattr(negotiation, happening)(*([0x84] if happening == "refused" else []))

    assert (5 if protocol == "5" else 4) == negotiation.version
