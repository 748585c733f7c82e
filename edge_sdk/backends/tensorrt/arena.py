"""What all engines on one GPU share: its context, one piece of scratch memory, and one budget.

TensorRT's engines need scratch memory only while they compute, and on one GPU they compute one after the other. So
there is one *arena*, as large as the most demanding engine's, handed from stream to stream by an event: the next
compute waits, on the device, for the last one to be done with it. The processor waits for neither.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple, Protocol

from edge_sdk.backends.cuda import Device, DeviceMemory, Event, Stream
from edge_sdk.backends.residency import Needs, Residency
from edge_sdk.errors import DeviceLost, EdgeSdkError, OutOfMemory
from edge_sdk.profiles import Memory

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""How long an engine waits for others, which are in use now, to become idle and make room."""


class Scratch(NamedTuple):
    """The arena as it is lent: where, how large, and the how manieth of its places this is."""

    address: int
    size: int
    generation: int


class Arena:
    """Scratch memory of a device, for one compute at a time. Threads may share it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._wanted = 0
        self._memory: DeviceMemory | None = None
        self._handover: Event | None = None
        self._last: Stream | None = None
        self._generation = 0

    def fit(self, size: int) -> None:
        """Make it exactly so large, once nobody computes any more; 0 gives everything back.

        OutOfMemory if it cannot be had: then there is none until the next turn, which tries again.
        """
        with self._lock:
            if size == self._wanted and size:
                return
            self._drain()
            self._wanted = size
            if self._memory is not None:
                self._memory.free()
                self._memory = None
            if size:
                self._allocate()
            elif self._handover is not None:
                self._handover.free()
                self._handover = self._last = None

    @contextmanager
    def turn(self, stream: Stream) -> Iterator[Scratch]:
        """The arena, for what is put into `stream` meanwhile."""
        with self._lock:
            if self._handover is None:
                self._handover = self._device.event()
            if self._wanted and self._memory is None:
                self._allocate()
            if self._last is not None and self._last is not stream:
                stream.wait(self._handover)
            address = self._memory.address if self._memory is not None else 0
            self._last = stream
            try:
                yield Scratch(address, self._wanted, self._generation)
            finally:  # also after a failure: something of it may be on its way
                self._handover.record(stream)

    def _allocate(self) -> None:
        self._memory = self._device.allocate(self._wanted)
        self._generation += 1

    def _drain(self) -> None:
        if self._last is not None and self._handover is not None:
            with contextlib.suppress(DeviceLost):  # which nobody computes on
                self._handover.synchronize()


class Resident(Protocol):
    """What lies in the memory of a GPU and can be sent away while it is idle."""

    def evict(self) -> None: ...


class SharedGpu:
    """A GPU and the engines on it. The last one to leave gives everything back."""

    _open: ClassVar[dict[int, SharedGpu]] = {}
    _opening = threading.Lock()

    def __init__(
        self,
        device: Device,
        memory: Memory,
        *,
        patience_s: float = PATIENCE_S,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.device = device
        self.arena = Arena(device)
        self._residency = Residency[Resident](_budget(device, memory))
        self._changed = threading.Condition(threading.RLock())
        self._members = 0
        self._patience_s = patience_s
        self._on_close = on_close

    @classmethod
    def of(cls, ordinal: int, memory: Memory) -> SharedGpu:
        """Join the one for the GPU that CUDA calls `ordinal`, opened if nobody uses it yet; BackendUnavailable.

        Profiles may differ in what they let engines use; the smallest of them counts while it is open.
        """
        with cls._opening:
            if (gpu := cls._open.get(ordinal)) is None:
                gpu = cls._open[ordinal] = cls(Device.open(ordinal), memory, on_close=lambda: cls._forget(ordinal))
            else:
                gpu._residency.budget_bytes = min(gpu._residency.budget_bytes, _budget(gpu.device, memory))
            gpu.join()
            return gpu

    @classmethod
    def _forget(cls, ordinal: int) -> None:
        cls._open.pop(ordinal, None)

    def __repr__(self) -> str:
        return f"<{self.device.facts.name}: {self._residency!r}>"

    @property
    def budget_bytes(self) -> int:
        return self._residency.budget_bytes

    @property
    def held_bytes(self) -> int:
        """What the books say that its engines hold."""
        with self._changed:
            return self._residency.held_bytes

    def join(self) -> None:
        """One engine more, which will `leave`."""
        with self._changed:
            self._members += 1

    def leave(self, member: Resident) -> None:
        """`member` has given its memory back, for good."""
        with self._opening, self._changed:
            with self.device.for_the_last_time():
                self._residency.leave(member)
                self._fit_quietly()
            self._changed.notify_all()
            self._members -= 1
            if last := self._members == 0:
                self._on_close()
        if last:
            self.device.close()

    def use(self, member: Resident) -> None:
        """`member` stays where it is until it `rest`s as often as it was used."""
        with self._changed:
            self._residency.use(member)

    def rest(self, member: Resident) -> None:
        with self._changed:
            self._residency.rest(member)
            self._changed.notify_all()

    def admit(self, member: Resident, needs: Needs) -> None:
        """Make room for `needs` of `member`, in place of what it had, by sending away who was idle longest.

        Where those in use are in the way, wait for them a while. OutOfMemory if there is no room even so.
        """
        give_up_at = time.monotonic() + self._patience_s
        with self._changed, self.device:
            while True:
                try:
                    evicted = self._residency.admit(member, needs)
                    break
                except OutOfMemory:
                    left_s = give_up_at - time.monotonic()
                    if not self._residency.may_fit(needs) or left_s <= 0 or not self._changed.wait(left_s):
                        raise
            for victim in evicted:
                log.info("%r makes room on %s.", victim, self.device.facts.name)
                victim.evict()
            self.arena.fit(self._residency.shared_bytes)

    def room_for(self, member: Resident) -> int:
        with self._changed:
            return self._residency.room_for(member)

    def kept_bytes(self, member: Resident) -> int:
        """What stays booked for `member` when it is evicted."""
        with self._changed:
            return self._residency.needs(member).kept

    def evicted(self, member: Resident) -> None:
        """`member` gave back what it can."""
        with self._changed, self.device.for_the_last_time():
            self._residency.evict(member)
            self._fit_quietly()
            self._changed.notify_all()

    def evict_idle(self, but: Resident) -> bool:
        """Send away everybody who is idle, for a device that has less than it said; whether there was anybody."""
        with self._changed, self.device:
            idle = [member for member in self._residency.idle() if member is not but]
            for member in idle:
                member.evict()
                self._residency.evict(member)
            self._fit_quietly()
            return bool(idle)

    def _fit_quietly(self) -> None:
        """A smaller arena may be refused by a device that somebody else filled: the next turn asks again."""
        try:
            self.arena.fit(self._residency.shared_bytes)
        except EdgeSdkError as exc:
            log.debug("The arena is to be had later: %s", exc)


def _budget(device: Device, memory: Memory) -> int:
    return int((memory.total_bytes or device.facts.total_bytes) * memory.usable_fraction)
