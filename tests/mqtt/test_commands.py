"""Commands on the wire: whatever bytes come are a command or say what is wrong, and answers are understood."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.mqtt.commands import MAX_TRANSACTION, NAMES, Command, Outcome, answered, ask, phrase, read, route
from edge_sdk.mqtt.topics import Topics
from edge_sdk.mqtt.transports.base import Message, Properties, Received
from edge_sdk.mqtt.transports.memory import topic_matches

DEVICE = Topics("edge/v1", "dev")
TRANSACTIONS = (
    st.none() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8"), max_size=MAX_TRANSACTION)
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def received(payload: bytes, name: str = "ping", *, skipped_bytes: int = 0, **properties: Any) -> Received:
    message = Message(DEVICE.command(name), payload, properties=Properties(**properties))
    return Received(message, 1, False, 1, skipped_bytes)


@given(st.sampled_from(NAMES), st.text("abc", min_size=1), st.dictionaries(st.text("xyz", min_size=1), VALUES))
def test_what_a_client_asks_is_understood(name: str, transaction: str, arguments: dict[str, Any]) -> None:
    message = ask(name, transaction, arguments, DEVICE)
    command = read(Received(message, 1, False, 1), name)

    assert name == DEVICE.parse_command(message.topic)
    assert topic_matches(DEVICE.command_subscription(), message.topic)
    assert ("", transaction) == (command.problem, command.transaction)
    assert {**arguments, "transaction": transaction} == command.arguments


@given(TRANSACTIONS, st.dictionaries(st.text("xyz"), VALUES), st.none() | st.text("abc"))
def test_what_a_device_answers_is_understood(transaction: Any, data: dict[str, Any], error: str | None) -> None:
    """And is read by nobody as another command."""
    message = phrase(Command("ping", transaction), Outcome(data, error), DEVICE)

    assert (transaction, Outcome(data, error)) == answered(message.payload)
    assert not topic_matches(DEVICE.command_subscription(), message.topic)
    assert None is DEVICE.parse_command(message.topic)
    assert None is DEVICE.parse_infer(message.topic)


@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()), st.binary(max_size=MAX_TRANSACTION + 2))
def test_whatever_comes_is_a_command_or_says_why_not(payload: bytes, correlation_data: bytes) -> None:
    """Nothing is raised, and what is wrong has an answer on the only topic that it may go to."""
    command = read(received(payload, correlation_data=correlation_data), "ping")
    answer = phrase(command, Outcome(error=command.problem or None), DEVICE)
    answered(payload)

    assert "edge/v1/dev/cmd/ping/response" == route(command, DEVICE).topic == answer.topic
    assert command.correlation_data in (correlation_data, None)
    assert json.loads(answer.payload)["status"] == ("error" if command.problem else "ok")


@pytest.mark.parametrize("name", ["", "a/b", "#", "+", "ü", "x" * 65])
def test_a_name_that_is_none_is_no_command(name: str) -> None:
    assert None is DEVICE.parse_command(f"edge/v1/dev/cmd/{name}")


@pytest.mark.parametrize("body", [b'{"transaction":"\\ud83d"}', b'{"model":"\\udc00","transaction":"t"}'])
def test_half_a_character_is_refused(body: bytes) -> None:
    """JSON can escape it, and no answer could carry it: it would end the daemon that repeats it."""
    command = read(received(body), "unload")
    answer = phrase(command, Outcome(error=command.problem), DEVICE)

    assert "UTF-8" in command.problem
    assert (None, Outcome({}, command.problem)) == answered(answer.payload)
    assert route(command, DEVICE).topic == answer.topic


def test_commands_are_told_apart_by_what_they_bring() -> None:
    """Correlation data before the transaction; without either, each is another."""
    both = read(received(b'{"transaction": 1}', correlation_data=b"id"), "ping")
    one = read(received(b'{"transaction": 1}'), "ping")
    none = read(received(b""), "ping")

    assert (b"id", b"1") == (route(both, DEVICE).correlation_data, route(one, DEVICE).correlation_data)
    assert not route(none, DEVICE).identifies


def test_a_packet_that_was_skipped_is_too_large() -> None:
    """MQTT 3.1.1 delivers what is over the packet limit, and its payload is not read."""
    assert "17,000,000 bytes" in read(received(b"", skipped_bytes=17_000_000), "ping").problem
