"""The open sequences of one stateful model: what each of them goes on from. Pure; the time is passed in.

    feeds = sequences.resume(request, decoded, now)      # what it brought, with the state of its sequence
    ...compute, phrase the answer...
    sequences.keep(request, decoded, feeds, outputs, now)    # it is answered: its sequence goes on from here
    sequences.let_go(request, decoded)                       # or it is not: its sequence is where it was

A sequence is its client's: two clients may use one id. Its state moves on only with an answer, so a request that fails,
expires or is refused leaves it as it was. Computing one twice would move it twice, and everything behind it would be
wrong without anybody noticing. The session answers repetitions from what it remembers; what comes again after that is
refused here: by its step, where the client counts, and by its id among the last ones of the sequence. And a request of
a sequence that is not known, after a restart or a time-out, is refused rather than computed from nothing.

`rounds` says what may be computed together: of each sequence one request, and those of one sequence in their order.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_sdk.errors import InvalidTensor, Malformed, QueueFull, SequenceOutOfStep, SequenceUnknown
from edge_sdk.runtime.messages import Request
from edge_sdk.sequence import SequenceRules
from edge_sdk.tasks.base import Decoded, SequencePart
from edge_sdk.tensors import Array, Feeds, Outputs, TensorSpec, numpy_dtype

Key = tuple[str, str]
"""Client and id."""

_SEEN = 128
"""Ids of requests that a sequence remembers: more than a client has unacknowledged."""
_COME_BACK_MS = 1000
"""When the table is full. A sequence may end at any moment; the next time-out alone would be too pessimistic."""


@dataclass
class _Open:
    """A sequence: the state behind its last answer."""

    state: Mapping[str, Array]
    used: float
    next_step: int | None
    seen: deque[bytes | str] = field(default_factory=lambda: deque(maxlen=_SEEN))


class Sequences:
    """Not thread-safe: it belongs to the thread that computes."""

    def __init__(self, rules: SequenceRules, inputs: Sequence[TensorSpec]) -> None:
        """`inputs` are the model's, aligned: states have the batch as their first axis."""
        self._rules = rules
        self._context = rules.context
        self._states = {state.output: state.input for state in rules.states}
        self._initial = _initial(rules, {spec.name: spec for spec in inputs})
        self._open: OrderedDict[Key, _Open] = OrderedDict()  # the one that was used longest ago first
        self._beginning: set[Key] = set()  # have a place, and no answer yet

    def __len__(self) -> int:
        return len(self._open)

    def key(self, request: Request, decoded: Decoded) -> Key:
        """Whose sequence, and which. Malformed where the request names none."""
        return request.client, self._part(request, decoded).id

    def resume(self, request: Request, decoded: Decoded, now: float) -> Feeds:
        """What the model is fed: the request's own, and the state of its sequence.

        Raises SequenceUnknown, SequenceOutOfStep, QueueFull (too many sequences) or InvalidTensor. What comes back
        holds the sequence's arrays: they are read only, until `keep`.
        """
        if decoded.rows > 1:
            raise InvalidTensor(
                f"The request has {decoded.rows} rows; a request of a sequence has one, as its state has."
            )
        key, part = self.key(request, decoded), self._part(request, decoded)
        self._forget_idle(now)
        found = self._open.get(key)
        if found is not None:
            self._check_new(request, part, found)
            found.used = now
            self._open.move_to_end(key)
        if part.start:
            if found is None:
                self._make_room(key, request)
            state: Mapping[str, Array] = self._initial
        elif found is None:
            raise self._unknown(part)
        else:
            state = found.state
        return self._joined(decoded.feeds, state)

    def keep(self, request: Request, decoded: Decoded, feeds: Feeds, outputs: Outputs, now: float) -> None:
        """The request is answered: its sequence goes on from `outputs`, or is over. Copies what it keeps."""
        key, part = self.key(request, decoded), self._part(request, decoded)
        self._beginning.discard(key)
        if part.end:
            self._open.pop(key, None)
            return
        state = {into: outputs[out].copy() for out, into in self._states.items()}
        if self._context is not None:
            state[self._context.input] = _end_of(feeds[self._context.input], self._context.axis, self._context.samples)
        found = self._open.get(key)
        if found is None:
            found = self._open[key] = _Open(state, now, None)
        found.state, found.used = state, now
        found.next_step = None if part.step is None else part.step + 1
        if request.id is not None:
            found.seen.append(request.id)
        self._open.move_to_end(key)

    def answered(self, outputs: Outputs) -> Outputs:
        """Those outputs that are the request's, and not its sequence's."""
        return {name: array for name, array in outputs.items() if name not in self._states}

    def let_go(self, request: Request, decoded: Decoded) -> None:
        """The request is not answered, or with an error: its sequence stays where it was."""
        self._beginning.discard(self.key(request, decoded))

    def close(self, request: Request, decoded: Decoded, now: float) -> None:
        """End a sequence without computing anything; raises as `resume` does."""
        key, part = self.key(request, decoded), self._part(request, decoded)
        self._forget_idle(now)
        if (found := self._open.get(key)) is None:
            raise self._unknown(part)
        self._check_new(request, part, found)
        del self._open[key]

    def _part(self, request: Request, decoded: Decoded) -> SequencePart:
        part = request.payload.sequence or decoded.sequence
        if part is None:
            raise Malformed(
                f"The model {request.model} keeps a state for each sequence, and the request names none.",
                fix="Give the user property `sequence-id`, and `sequence-start: 1` with the first request.",
            )
        return part

    def _check_new(self, request: Request, part: SequencePart, found: _Open) -> None:
        """SequenceOutOfStep for what was computed before, or leaves something out."""
        if request.id is not None and request.id in found.seen:
            raise SequenceOutOfStep(
                f"This request of the sequence {part.id!r} was computed before, and its answer is not kept any more."
            )
        if part.start or part.step is None or found.next_step is None or part.step == found.next_step:
            return
        raise SequenceOutOfStep(
            f"Step {part.step} of the sequence {part.id!r} came; its next one is {found.next_step}.",
            fix="Send that one first." if part.step > found.next_step else "It was computed before.",
        )

    def _make_room(self, key: Key, request: Request) -> None:
        if key not in self._beginning and len(self._open) + len(self._beginning) >= self._rules.max_sequences:
            raise QueueFull(
                f"The model {request.model} has {self._rules.max_sequences} sequences open, and takes no more.",
                fix="A sequence ends with `sequence-end: 1`; one that is not used is forgotten after "
                f"{self._rules.timeout_s:g} s.",
                retry_after_ms=_COME_BACK_MS,
            )
        self._beginning.add(key)

    def _unknown(self, part: SequencePart) -> SequenceUnknown:
        return SequenceUnknown(
            f"The sequence {part.id!r} is not known here: it was not started, has ended, was not used for "
            f"{self._rules.timeout_s:g} s, or this device was restarted.",
            fix="Begin it anew with `sequence-start: 1`.",
        )

    def _forget_idle(self, now: float) -> None:
        while self._open:
            key, oldest = next(iter(self._open.items()))
            if now - oldest.used < self._rules.timeout_s:
                return
            del self._open[key]

    def _joined(self, brought: Feeds, state: Mapping[str, Array]) -> Feeds:
        feeds = {**state, **brought}
        if self._context is not None:
            name, axis = self._context.input, self._context.axis
            context = state[name]
            if context.ndim != brought[name].ndim:  # zeros, before the first request: as long as the context
                context = _zeros_before(brought[name], axis, self._context.samples)
            if _without(context.shape, axis) != _without(brought[name].shape, axis):
                raise InvalidTensor(
                    f"The input {name!r} is of shape {list(brought[name].shape)}, and what the sequence keeps of it is "
                    f"{list(context.shape)}: they differ in more than axis {axis}.",
                    fix="Every request of a sequence has the size of its first one.",
                )
            feeds[name] = np.concatenate([context, brought[name]], axis=axis)
        return feeds


def rounds(keys: Sequence[Hashable], shapes: Sequence[Hashable], rows: Sequence[int], max_rows: int) -> list[list[int]]:
    """Group indices so that each group's rows fit a batch, its shapes are equal, and it holds no key twice; those of
    one key are in their order.

    Each goes into the first group where all of it holds, so what is behind a long row of one key does not wait for the
    end of it. A request of 0 rows cannot share a batch.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    after: dict[Hashable, int] = {}
    for index, (key, shape, wanted) in enumerate(zip(keys, shapes, rows)):
        place = after.get(key, 0)
        while place < len(groups) and not (0 < wanted <= room[place] and shape == shapes[groups[place][0]]):
            place += 1
        if place == len(groups):
            groups.append([])
            room.append(max_rows if wanted else 0)
        groups[place].append(index)
        room[place] -= wanted
        after[key] = place + 1
    return groups


_NOTHING = np.zeros(())
"""Stands for the context before the first request, whose other axes only the request knows."""


def _initial(rules: SequenceRules, inputs: Mapping[str, TensorSpec]) -> dict[str, Array]:
    initial: dict[str, Array] = {}
    for state in rules.states:
        spec = inputs[state.input]
        shape = [axis for axis in spec.at_batch(1) if isinstance(axis, int)]
        initial[state.input] = np.full(shape, state.initial, numpy_dtype(spec.dtype))
    if rules.context is not None:
        initial[rules.context.input] = _NOTHING
    return initial


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _zeros_before(array: Array, axis: int, samples: int) -> Array:
    shape = list(array.shape)
    shape[axis] = samples
    return np.zeros(shape, array.dtype)


def _end_of(array: Array, axis: int, samples: int) -> Array:
    start = array.shape[axis] - samples
    end: Array = array[(slice(None),) * axis + (slice(start, None),)].copy()
    return end
