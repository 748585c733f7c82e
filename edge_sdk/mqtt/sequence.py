"""A sequence of a stateful model, from the client's side: its state is on the device, its place is counted here.

    with client.sequence("vad") as sequence:
        for chunk in chunks:
            print(sequence.infer(chunk).outputs["output"])

Each request has its step, so that a device which computed one already, or missed one, says so rather than go on from a
wrong state. Where a request ends with an error the sequence stands where it stood, and its step may be asked again.
After NoAnswer nobody knows: asked again, a step that was computed is answered SequenceOutOfStep.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from types import TracebackType
from typing import Any

from edge_sdk.errors import EdgeSdkError
from edge_sdk.mqtt.answers import Answer, Data
from edge_sdk.tasks.base import SequencePart

_GOODBYE_S = 2.0
"""So long at most it takes to say that nothing more comes."""


class ClientSequence:
    """One sequence, one request at a time: not to be shared between threads. `Client.sequence` makes them."""

    def __init__(
        self, infer: Callable[..., Answer], model: str, *, version: str | None = None, device: str | None = None
    ) -> None:
        self.id = secrets.token_hex(8)
        self._infer = infer
        self._to: dict[str, Any] = {"version": version, "device": device}
        self._model = model
        self._steps = 0
        self._open = False

    def infer(
        self, data: Data, *, end: bool = False, timeout_s: float | None = None, accept: str | None = None
    ) -> Answer:
        """The answer to what comes next; `end` says that nothing comes after it.

        `data` and errors as in `Client.infer`. SequenceUnknown: the device does not have the sequence any more, it was
        restarted or waited too long; `restart` begins anew.
        """
        part = SequencePart(self.id, start=not self._steps, end=end, step=self._steps)
        answer = self._infer(self._model, data, timeout_s=timeout_s, accept=accept, sequence=part, **self._to)
        self._steps += 1
        self._open = not end
        return answer

    def restart(self) -> None:
        """Begin anew with the next request, from the initial state and under another id."""
        self.close()
        self.id, self._steps = secrets.token_hex(8), 0

    def close(self) -> None:
        """Tell the device that nothing more comes, if `end` did not. Best effort: one that is not told forgets the
        sequence by itself after a while. On MQTT 3.1.1 it is not told."""
        if not self._open:
            return
        self._open = False
        try:
            part = SequencePart(self.id, end=True, step=self._steps)
            self._infer(self._model, b"", timeout_s=_GOODBYE_S, sequence=part, **self._to)
        except EdgeSdkError:
            pass

    def __enter__(self) -> ClientSequence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
