"""What is retained of models that a device does not have any more: found and cleared. Pure, the time passed in.

A model that is taken away leaves an empty retained message, which the daemon sends. Of one that was taken away while no
daemon ran, the document would stay with the broker for ever. So a daemon asks its broker, once in its life, for what it
retains of this device's models.

    leftovers.connected()
    match leftovers.due(now):                       # every second or so
        case "look": ...                            # read `leftovers.topics`, and what is retained there
        case "leave": ...                           # and no more
    if leftovers.owns(topic):
        clearing = leftovers.heard(message, models)     # publish that, unless it is None

Where the device may not read there, nothing comes and nothing is cleared.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Literal

from edge_sdk.mqtt.topics import Topics, is_model_name
from edge_sdk.mqtt.transports.base import Message

LOOK_S = 10.0
"""Brokers send what they retain at once, or beside everything else; none is known that takes so long."""
_ATTEMPTS = 2
"""A connection that is lost meanwhile may have been lost for that: there are brokers (AWS IoT) that hang up on whoever
asks for what he may not read."""


class Leftovers:
    """The search of one process, on one connection or two."""

    def __init__(self, topics: Topics) -> None:
        self.topics = topics.models
        """The filter under which the documents of this device's models are."""
        self._head = self.topics.removesuffix("+")
        self._attempts = 0
        self._until = math.inf
        self._is_over = False

    def connected(self) -> None:
        """There is another connection, on which nothing was asked for."""
        self._until = math.inf

    def due(self, now: float) -> Literal["look", "leave"] | None:
        """What to do now, on a connection."""
        if self._is_over:
            return None
        if self._until == math.inf and self._attempts < _ATTEMPTS:
            self._attempts += 1
            self._until = now + LOOK_S
            return "look"
        if self._until <= now or self._until == math.inf:  # a broker that keeps our session keeps that, too
            self._is_over = True
            return "leave"
        return None

    def owns(self, topic: str) -> bool:
        """Whether what comes there is what was looked for, and no request."""
        return topic.startswith(self._head) and "/" not in topic[len(self._head) :]

    def heard(self, message: Message, models: Container[str]) -> Message | None:
        """What clears a document that was found; None if it is of one of the `models`, has just been published, or is
        none of ours."""
        model = message.topic[len(self._head) :]
        if not message.retain or not message.payload or model in models or not is_model_name(model):
            return None
        return Message(message.topic, b"", retain=True)
