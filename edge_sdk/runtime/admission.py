"""Whose turn it is to compute, where several models share the cores of a device: pure decisions.

A batch asks for as many cores as its engine has threads, and computes once it is granted them. So ten models never run
on two cores at a time, where each would take five times as long and all of them would be late together.

    admission.ask(claim)                # a batch wants to compute
    admission.granted()                 # those whose turn has come, each once
    admission.give_back(claim, 0.02)    # it took so many seconds
    admission.write_off(claim)          # it holds them for so long that nobody should wait for it any more

Turns are fair by what models used, in core seconds: of those that wait when a core comes free, whoever had the least
comes first. One that was idle starts beside the others, or a little before them: a model that phrases its last answers
before it asks again was not idle. Among claims of one model, the first asked is the first granted. Nobody overtakes
whoever is first and does not fit: a model that needs all the cores gets them. No batch is interrupted, and no core is
kept free for somebody who may ask next: between two short batches of one model there may be a long one of another.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

_SAVED_S = 1.0
"""Core seconds by which a model that comes back may be ahead of the others, if it used so much less than they did."""


@dataclass(eq=False)
class Claim:
    """A batch that wants `cores` for itself. Each is asked for and given back once."""

    model: str
    cores: int
    granted: bool = False
    written_off: bool = False
    """Whether its cores were given to others while it held them."""


@dataclass
class Admission:
    """The cores of a device, and who waits for them."""

    cores: int
    free: int = field(init=False)
    _waiting: OrderedDict[str, deque[Claim]] = field(default_factory=OrderedDict)
    """By model, and only those that have any."""
    _computing: dict[str, int] = field(default_factory=dict)
    """How many claims of each model hold cores."""
    _used: dict[str, float] = field(default_factory=dict)
    """Core seconds by model, counted from where it joined the others."""
    _floor: float = 0.0
    """The most that anybody had used when it was granted a turn: where a model begins that was never there."""

    def __post_init__(self) -> None:
        self.free = self.cores

    def ask(self, claim: Claim) -> None:
        """Let `claim` wait for its turn. One that wants more cores than there are wants all of them."""
        model, lowest = claim.model, self._floor - _SAVED_S
        if model not in self._used:  # which is when it may be worth it to forget others, who would begin anew as well
            self._used = {one: used for one, used in self._used.items() if used > lowest or self._is_active(one)}
        if not self._is_active(model):
            self._used[model] = max(self._used.get(model, self._floor), lowest)
        self._waiting.setdefault(model, deque()).append(claim)

    def granted(self) -> list[Claim]:
        """Those that may compute from now on, in their order; they hold their cores until `give_back`."""
        turns: list[Claim] = []
        while self._waiting:
            model = min(self._waiting, key=self._used.__getitem__)
            claim = self._waiting[model][0]
            if self._wanted(claim) > self.free:
                break
            self._leave(claim)
            self.free -= self._wanted(claim)
            self._floor = max(self._floor, self._used[model])
            self._computing[model] = self._computing.get(model, 0) + 1
            claim.granted = True
            turns.append(claim)
        return turns

    def give_back(self, claim: Claim, seconds: float) -> None:
        """`claim` was granted, and took `seconds`."""
        model = claim.model
        if not claim.written_off:
            self.free += self._wanted(claim)
        self._used[model] += self._wanted(claim) * seconds
        self._computing[model] -= 1
        if not self._computing[model]:
            del self._computing[model]

    def write_off(self, claim: Claim) -> None:
        """Give the cores of `claim`, which was granted them, to others; it computes on beside them, if it does."""
        if not claim.written_off:
            claim.written_off = True
            self.free += self._wanted(claim)

    @property
    def waiting(self) -> int:
        return sum(len(claims) for claims in self._waiting.values())

    def _is_active(self, model: str) -> bool:
        return model in self._waiting or model in self._computing

    def _wanted(self, claim: Claim) -> int:
        return min(max(1, claim.cores), self.cores)

    def _leave(self, claim: Claim) -> None:
        waiting = self._waiting[claim.model]
        waiting.popleft()
        if not waiting:
            del self._waiting[claim.model]
