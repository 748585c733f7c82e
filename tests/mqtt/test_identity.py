"""The key of a request: the same in every process, another for every other request."""

from __future__ import annotations

import subprocess
import sys

from edge_sdk.mqtt.identity import key_of
from edge_sdk.mqtt.session import ReplyRoute
from edge_sdk.mqtt.transports.base import Message


def key(
    payload: bytes = b"payload", *, topic: str = "t", reply: str = "r", data: bytes | None = b"1", named: bool = True
) -> int:
    return key_of(Message(topic, payload), ReplyRoute(reply, data, named))


def test_what_makes_a_request_another_one() -> None:
    """Topic, reply topic, correlation data, payload: each of them, and each id of a client that counts."""
    others = [key(topic="u"), key(reply="s"), key(data=b"2"), key(data=None), key(b"Payload"), key(b"payload\0")]
    counted = {key(data=number.to_bytes(4, "big")) for number in range(5_000)}

    assert key() == key()
    assert 1 + len(others) == len({key(), *others})
    assert 5_000 == len(counted)
    assert all(0 < found < 2**64 for found in counted)


def test_a_long_payload_is_looked_at_where_its_sender_gave_no_id() -> None:
    """With an id both ends are enough; without one, every byte counts."""
    one = bytes(100_000)
    other = one[:50_000] + b"\1" + one[50_001:]

    assert key(one) != key(other[:-1])
    assert key(one, named=False, data=None) != key(other, named=False, data=None)


def test_another_process_has_the_same_key() -> None:
    """Python's own hashes are different in each."""
    program = "from tests.mqtt.test_identity import key; print(key())"
    told = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout.strip()
        for _ in range(2)
    }

    assert {str(key())} == told
