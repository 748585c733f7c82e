"""Tells one payload from another, in this process: pure, and cheap beside the inference that the payload is for.

Python's own hash takes a quarter of a millisecond for an image of 600 KB, which is a tenth of what a small model needs
for it; this takes a fifth of that. It is for clients that use an id twice by mistake, not for those that mean harm: who
wants to get the answer to an earlier request of his own may.
"""

from __future__ import annotations

import numpy as np

LARGE = 64 * 1024
"""Bytes from which on sums cost less than a hash."""

_WORDS_BYTES = 8
_CUTS = (64, 61)
"""Into so many equal parts, laid over each other and added up word by word. What one cut cannot tell (equal words that
moved by a whole part) the other does, and no change of a single word escapes either."""


def fingerprint(payload: bytes, content_type: str) -> int:
    """Equal for equal payloads of one content type, and hardly ever for others."""
    if len(payload) < LARGE:
        return hash((payload, content_type))
    words = np.frombuffer(payload, np.uint64, len(payload) // _WORDS_BYTES)
    told: list[object] = [content_type, len(payload), payload[len(words) * _WORDS_BYTES :]]
    for parts in _CUTS:
        whole = len(words) // parts * parts
        told += (words[:whole].reshape(parts, -1).sum(axis=0).tobytes(), words[whole:].tobytes())
    return hash(tuple(told))
