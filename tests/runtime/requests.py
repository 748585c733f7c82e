"""Requests as the runtime sees them, and their answers as a client would."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from edge_sdk.errors import RequestError
from edge_sdk.runtime.messages import Answer, Request
from edge_sdk.tasks.base import Payload
from edge_sdk.tasks.oip import OipResponse, decode_response, encode_request
from edge_sdk.tensors import Array

TICKETS = itertools.count(1)
FOREVER = float("inf")


def payload(**feeds: Array) -> Payload:
    body = encode_request(feeds)
    return Payload(body.data, body.content_type, body.header_length)


def request(
    value: float | Payload = 0.0,
    *,
    model: str = "double",
    version: str | None = None,
    rows: int = 1,
    received: float = 0.0,
    deadline: float = FOREVER,
) -> Request:
    """A request for `rows` rows of four times `value`, or with a payload of its own."""
    sent = value if isinstance(value, Payload) else payload(x=np.full((rows, 4), value, np.float32))
    return Request(next(TICKETS), model, sent, received, deadline, version)


def response(answer: Answer) -> OipResponse:
    """The body of an answer that is no error."""
    assert not isinstance(answer.result, RequestError), answer.result
    return decode_response(answer.result.data, answer.result.header_length)


def statuses(answers: Sequence[Answer]) -> list[int]:
    return [answer.status for answer in answers]
