"""What the runtime is asked and what it answers, whatever carried it here.

Times are seconds of a monotonic clock, so that a step of the wall clock ends no request early or late.
"""

from __future__ import annotations

from typing import NamedTuple, Union

from edge_sdk.errors import RequestError, Unavailable
from edge_sdk.tasks.base import Body, Payload

SELF_TEST = 0
"""The ticket of a self-test, of which there is one at a time: nobody else's, and not counted."""
DEFAULT_PRIORITY = 4
"""As in JMS, whose ten levels other brokers have taken over."""


class Request(NamedTuple):
    """One inference to do. `ticket` is the caller's: it comes back with the answer and means nothing here."""

    ticket: int
    model: str
    payload: Payload
    received: float
    deadline: float
    version: str | None = None
    """None: the newest that is ready."""
    client: str = ""
    """Who asked, as far as that can be told: clients take turns."""
    priority: int = DEFAULT_PRIORITY
    """0 to 9; the higher comes first."""
    id: bytes | str | None = None
    """What the client calls it, if anything."""
    key: int = 0
    """64 bits that are the same when the same request comes again, also to another process; 0: it never does."""

    def __repr__(self) -> str:
        return f"<Request {self.ticket} for {self.model}, {len(self.payload.data)} bytes>"


class Timing(NamedTuple):
    """Where the time of a request went, in milliseconds: it waited, was decoded, computed, and its answer phrased."""

    queue_ms: float
    """Until its batch began to compute, but for its own decoding."""
    infer_ms: float
    """Its batch."""
    batch: int = 1
    """How many requests were computed together."""
    stages: tuple[tuple[str, float], ...] = ()
    """Of a pipeline: how long each of its stages took, waiting included."""
    decode_ms: float = 0.0
    """0 where it was too short to tell."""
    encode_ms: float = 0.0
    together: tuple[int, ...] = ()
    """The tickets of the batch, where there are several."""


class Answer(NamedTuple):
    """The one terminal answer to a request: a body, or what was wrong."""

    ticket: int
    result: Union[Body, RequestError]
    model_version: str | None = None
    timing: Timing | None = None

    @property
    def status(self) -> int:
        return self.result.status if isinstance(self.result, RequestError) else 200


def stopping() -> Unavailable:
    """What a request is told that a stop leaves undone."""
    return Unavailable("The device is stopping.", retry_after_ms=1000)
