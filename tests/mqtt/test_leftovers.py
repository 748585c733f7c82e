"""Documents of models that are gone: which of what is retained is cleared, and for how long is looked."""

from __future__ import annotations

import pytest

from edge_sdk.mqtt.leftovers import LOOK_S, Leftovers
from edge_sdk.mqtt.topics import Topics
from edge_sdk.mqtt.transports.base import Message

MINE = "edge/v1/cam/models"
MODELS = {"here"}


def leftovers() -> Leftovers:
    return Leftovers(Topics("edge/v1", "cam"))


def test_it_looks_once_for_a_while() -> None:
    one = leftovers()
    one.connected()
    done = [one.due(now) for now in (0.0, 1.0, LOOK_S - 0.1, LOOK_S, LOOK_S + 1.0)]
    one.connected()

    assert ["look", None, None, "leave", None] == done
    assert None is one.due(100.0)
    assert f"{MINE}/+" == one.topics


def test_a_lost_connection_is_a_second_chance_and_no_third() -> None:
    """It may have been lost for that. What the broker keeps for us of the attempts is taken back."""
    one = leftovers()
    done = []
    for now in (0.0, 100.0, 200.0, 300.0):
        one.connected()
        done += [one.due(now), one.due(now + 1.0)]

    assert ["look", None, "look", None, "leave", None, None, None] == done


@pytest.mark.parametrize(
    ("message", "is_cleared"),
    [
        (Message(f"{MINE}/gone", b"{}", retain=True), True),
        (Message(f"{MINE}/here", b"{}", retain=True), False),
        (Message(f"{MINE}/gone", b"{}"), False),
        (Message(f"{MINE}/gone", b"", retain=True), False),
        (Message(f"{MINE}/no model", b"{}", retain=True), False),
    ],
    ids=["gone", "here", "published now", "empty", "never ours"],
)
def test_only_what_is_retained_of_other_models_is_cleared(message: Message, is_cleared: bool) -> None:
    one = leftovers()
    clearing = Message(message.topic, b"", retain=True)

    assert one.owns(message.topic)
    assert (clearing if is_cleared else None) == one.heard(message, MODELS)


@pytest.mark.parametrize(
    "topic", [f"{MINE}/gone/infer", f"{MINE}/gone/result", "edge/v1/cam-2/models/gone", "edge/v1/cam/info", MINE]
)
def test_nothing_else_is_its_own(topic: str) -> None:
    assert not leftovers().owns(topic)
