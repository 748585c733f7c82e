"""Who may lie in a device's memory, and who has to go when somebody else comes. Pure bookkeeping: it frees nothing.

Each holder has memory of its *own*, which goes when it is evicted, and may have some that is *kept* until it leaves.
Scratch memory is *shared*: one piece, as large as the largest wish for it. So what is held is

    the sum of what is their own, the sum of what is kept, and the largest share

and it never is above the budget. Holders rank by when they were last used; time is the order of the calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from edge_sdk.errors import OutOfMemory

Key = TypeVar("Key")


@dataclass(frozen=True)
class Needs:
    """Bytes of the device."""

    own: int = 0
    kept: int = 0
    shared: int = 0


@dataclass
class _Holder:
    needs: Needs
    users: int = 0


class Residency(Generic[Key]):
    """The books of one device. Whoever shares them between threads brings the lock."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._holders: dict[Key, _Holder] = {}
        """The one used longest ago comes first."""

    def __repr__(self) -> str:
        busy = sum(holder.users > 0 for holder in self._holders.values())
        return f"<{self.held_bytes:,} of {self.budget_bytes:,} bytes, {busy} in use, {len(self._idle())} idle>"

    @property
    def held_bytes(self) -> int:
        return _sum(holder.needs for holder in self._holders.values())

    @property
    def shared_bytes(self) -> int:
        """How large the shared piece has to be."""
        return max((holder.needs.shared for holder in self._holders.values()), default=0)

    def needs(self, key: Key) -> Needs:
        """What is booked for `key`; nothing for who is not here."""
        return self._holders[key].needs if key in self._holders else Needs()

    def room_for(self, key: Key) -> int:
        """The most that `key` could hold, in all, if everybody who is idle went."""
        return self.budget_bytes - _sum(self._staying(key, self._idle()))

    def admit(self, key: Key, needs: Needs) -> tuple[Key, ...]:
        """Book `needs` for `key`, in place of what it had, and say whom to evict for it, the longest unused first.

        Their own and shared bytes are off the books already. Nobody in use is among them, and nobody beyond those it
        takes. OutOfMemory, with the arithmetic, if that is not enough; the books then stay as they were.
        """
        idle = [candidate for candidate in self._idle() if candidate != key]
        for count in range(len(idle) + 1):
            if _sum([*self._staying(key, idle[:count]), needs]) <= self.budget_bytes:
                break
        else:
            wanted = _sum([needs])
            raise OutOfMemory(
                f"The engine needs {wanted:,} bytes of the device ({needs.own:,} of its own, {needs.kept:,} for its "
                f"arrays, {needs.shared:,} of shared scratch memory). Engines may use {self.budget_bytes:,} bytes; "
                f"those in use now leave {max(0, self.room_for(key)):,}."
            )
        for victim in idle[:count]:
            self._strike_off(victim)
        users = self._holders[key].users if key in self._holders else 0
        self._holders.pop(key, None)
        self._holders[key] = _Holder(needs, users)
        return tuple(idle[:count])

    def may_fit(self, needs: Needs) -> bool:
        """Whether `needs` could be admitted if nobody else were here."""
        return _sum([needs]) <= self.budget_bytes

    def use(self, key: Key) -> None:
        """`key` is in use, and will not be evicted, until it `rest`s as often as it was used."""
        holder = self._holders.pop(key, None) or _Holder(Needs())
        holder.users += 1
        self._holders[key] = holder

    def rest(self, key: Key) -> None:
        holder = self._holders.pop(key)
        holder.users -= 1
        self._holders[key] = holder

    def evict(self, key: Key) -> None:
        """Its own and shared bytes were given back, for whatever reason."""
        if key in self._holders:
            self._strike_off(key)

    def leave(self, key: Key) -> None:
        """All of its memory was given back, for good."""
        self._holders.pop(key, None)

    def idle(self) -> tuple[Key, ...]:
        """Who could be evicted and would give something back, the longest unused first."""
        return tuple(self._idle())

    def _idle(self) -> list[Key]:
        return [
            key
            for key, holder in self._holders.items()
            if not holder.users and (holder.needs.own or holder.needs.shared)
        ]

    def _strike_off(self, key: Key) -> None:
        holder = self._holders[key]
        holder.needs = replace(holder.needs, own=0, shared=0)

    def _staying(self, key: Key, victims: Iterable[Key]) -> list[Needs]:
        """What others than `key` need once `victims` were evicted."""
        gone = set(victims)
        return [
            replace(holder.needs, own=0, shared=0) if other in gone else holder.needs
            for other, holder in self._holders.items()
            if other != key
        ]


def _sum(needs: Iterable[Needs]) -> int:
    everybody = list(needs)
    return sum(need.own + need.kept for need in everybody) + max((need.shared for need in everybody), default=0)
