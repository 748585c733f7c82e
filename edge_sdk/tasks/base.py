"""The seam between bytes and tensors: a task turns a payload into feeds, and outputs into an answer body.

Tasks know content types and no transport. They run on worker threads, so everything here is immutable. A task raises
RequestErrors only: what is wrong with a payload is the sender's to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from edge_sdk.tensors import Feeds, Outputs

JSON = "application/json"
BINARY = "application/octet-stream"
TEXT = "text/plain"
JPEG = "image/jpeg"
PNG = "image/png"
NPY = "application/x-npy"


@dataclass(frozen=True)
class SequencePart:
    """Which part of which sequence a request is. The id is its client's: those of two clients do not mix."""

    id: str
    start: bool = False
    end: bool = False
    step: int | None = None
    """Its number in the sequence; None where the client does not count."""


class Payload(NamedTuple):
    """The body of a request as it came."""

    data: bytes
    content_type: str | None = None
    """Lower case, without parameters; None: to be sniffed."""
    header_length: int | None = None
    """With BINARY: length in bytes of the JSON header before the tensors."""
    accept: str | None = None
    """The content type wanted for the answer; None: JSON."""
    sequence: SequencePart | None = None
    """None: of no sequence, unless the body itself says so."""


class Decoded(NamedTuple):
    """A payload understood: the feeds for one inference, and what the answer has to look like.

    Arrays may be views of the payload's bytes (read-only). `rows` is how many places of a batch the request takes;
    0 means that it cannot share one.
    """

    feeds: Feeds
    rows: int
    reply: object = None
    """Whatever the task needs to remember to phrase the answer."""
    sequence: SequencePart | None = None
    """What the body says about it."""
    took_s: float = 0.0
    """How long it took to understand; 0 where that was next to nothing, or nobody looked."""


class Body(NamedTuple):
    """The body of an answer."""

    data: bytes
    content_type: str = JSON
    header_length: int | None = None
    """With BINARY: length in bytes of the JSON header before the tensors."""


class Task(Protocol):
    """One model's way of reading payloads and phrasing answers."""

    content_types: tuple[str, ...]
    """What it accepts."""
    takes_pictures: bool
    """Whether there are payloads that take long to decode, and leave the interpreter to others meanwhile."""

    def decode_s(self, payload: Payload) -> float:
        """About how many seconds `decode` takes on a desktop processor, told from the header; 0.0 for next to none."""
        ...

    def decode(self, payload: Payload) -> Decoded:
        """Feeds for the model; raises Malformed, UnsupportedType, TooLarge or InvalidTensor."""
        ...

    def encode(self, outputs: Outputs, decoded: Decoded) -> Body:
        """The answer to the request that `decode` read; `outputs` hold its rows alone and are not kept."""
        ...
