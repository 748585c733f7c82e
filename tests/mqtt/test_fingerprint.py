"""Payloads that differ are told apart, also where they hold the same numbers in other places."""

from __future__ import annotations

import numpy as np
import pytest

from edge_sdk.mqtt.fingerprint import LARGE, fingerprint

SIZES = (0, 1, LARGE - 1, LARGE, LARGE + 1, LARGE + 7, 602_112, 602_117)


@pytest.mark.parametrize("size", SIZES)
def test_equal_payloads_are_equal(size: int) -> None:
    """Whatever object holds them; another content type, or one byte more, is another request."""
    payload = np.random.default_rng(0).bytes(size)

    assert fingerprint(payload, "a") == fingerprint(bytes(bytearray(payload)), "a")
    assert fingerprint(payload, "a") != fingerprint(payload, "b")
    assert fingerprint(payload, "a") != fingerprint(payload + b"\0", "a")


@pytest.mark.parametrize("size", SIZES[3:])
def test_any_changed_byte_is_noticed(size: int) -> None:
    """At the ends, at every border of a part, and at some places between."""
    payload = bytearray(np.random.default_rng(1).bytes(size))
    original = fingerprint(bytes(payload), "a")
    part = size // 8 // 64 * 8
    for place in {0, 1, size - 1, size - 8, size - 9, *range(part - 1, size, part), *range(0, size, 9973)}:
        payload[place] ^= 0x80

        assert original != fingerprint(bytes(payload), "a"), place
        payload[place] ^= 0x80


def test_one_number_in_any_place_is_another_payload() -> None:
    """A one in a field of zeros, wherever it is: what sums alone would not tell."""
    count = 602_112 // 4
    places = [0, 1, 2, 1176 * 2, 1233 * 2, 1234 * 2, *range(7, count, 311)]
    found = set()
    for place in places:
        numbers = np.zeros(count, np.float32)
        numbers[place] = 1.0
        found.add(fingerprint(numbers.tobytes(), ""))

    assert len(places) == len(found)


def test_a_picture_that_moved_is_another() -> None:
    """By a pixel, a row, or a channel."""
    picture = np.random.default_rng(2).random((3, 224, 224), np.float32)
    moved = [np.roll(picture, by, axis) for axis in range(3) for by in (1, 2)]

    assert 7 == len({fingerprint(each.tobytes(), "") for each in [picture, *moved]})
