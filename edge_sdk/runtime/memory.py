"""How the models of a box share its memory: pure decisions, the time passed in.

A model's bytes are *declared* before it is loaded, by what its package says, and *measured* as it is: what the process
grew by, from before the load to after the first inferences. The books count with the measured ones as soon as there are
any, also for a model that is loaded again.

    books.declare(key, estimate)            # by what its package says
    books.check(key)                        # OutOfMemory, with the sum in words, if it can never fit
    books.make_room(key, tenants, now)      # whom to send away for it, the longest unused first; None: not now
    books.arrive(key)                       # it is being loaded
    books.settle(key, measured, seconds)
    books.overflow(key, tenants, now)       # whom to send away if that is more than was thought
    books.leave(key, evicted=True)

Who has to go: whoever nobody waits for, the one used longest ago first. If those do not suffice, more models are wanted
at once than fit, and they take turns. A model stays for a *turn* then, of at least ten times what a load takes: so at
most a tenth of the time goes into loading, however hard the clients press. A model that is being computed is not sent
away, and neither is one that is *pinned*.

What is held never is above the budget. Only while one is being loaded, and its runtime holds the file beside what it
makes of it, a model may pass it that fits alone and leaves no room for that.

`backends.residency` keeps such books for a GPU's memory, and is told of every use as it happens. Here that would be
paid by every batch of every small model, so who was used when is asked only when somebody has to go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from edge_sdk.errors import OutOfMemory
from edge_sdk.package import GRAPH, EnginePackage
from edge_sdk.profiles import DeviceProfile
from edge_sdk.runtime.catalog import Key
from edge_sdk.tensors import TensorSpec, numpy_dtype

MIN_TURN_S = 0.5
"""A load takes a few milliseconds at least, and the requests of a turn have to come, too."""
_LOADS_A_TURN = 10
_ACTIVATIONS_PER_ARRAYS = 4
"""MobileNetV2 at batch 8: 21.5 MB beside 4.8 MB of input and output. It stands only until the model is measured."""
_GROWTH_WHILE_LOADING = 2.25
"""What onnxruntime holds of a 10 MB graph at its peak: the parsed file and the prepared weights, 20 MB (measured)."""
_LEAST_OF_GRAPH = 0.5
"""A measurement below this share of the graph was disturbed: somebody else gave memory back at the same time."""


@dataclass(frozen=True)
class Estimate:
    """What a model will hold, from what its package says."""

    graph_bytes: int
    arrays_bytes: int = 0
    """Of the inputs and outputs of a largest batch, where it lies while it is computed."""
    activations_bytes: int = 0

    @classmethod
    def of(cls, package: EnginePackage) -> Estimate:
        manifest = package.manifest
        best = {name: axis.best for name, axis in manifest.axes.items()}
        rows = manifest.batching.max_batch
        arrays = sum(_bytes(spec, rows, best) for spec in (*manifest.inputs, *manifest.outputs))
        graph = manifest.files[GRAPH].bytes if GRAPH in manifest.files else 0
        return cls(graph, arrays, _ACTIVATIONS_PER_ARRAYS * arrays)

    @property
    def total_bytes(self) -> int:
        return self.graph_bytes + self.arrays_bytes + self.activations_bytes

    @property
    def loading_bytes(self) -> int:
        """The most it takes while it is being loaded."""
        return max(self.total_bytes, int(self.graph_bytes * _GROWTH_WHILE_LOADING) + self.arrays_bytes)

    def __str__(self) -> str:
        return (
            f"{self.graph_bytes:,} for its graph, {self.arrays_bytes:,} for the arrays of a largest batch, about "
            f"{self.activations_bytes:,} to compute it"
        )


@dataclass(frozen=True)
class Tenant:
    """A model that is in memory, as it is at the moment."""

    key: Key
    last_used: float
    since: float
    """When it came."""
    wanted: bool = False
    """Whether requests wait for it, or are being computed."""
    pinned: bool = False


@dataclass
class Account:
    """What is known of one model's memory."""

    estimate: Estimate
    measured_bytes: int | None = None
    held_bytes: int = 0
    """0 while it is not in memory."""
    former_bytes: int = 0
    """What it held before the load that is under way."""
    load_s: float = 0.0
    loads: int = 0
    evictions: int = 0

    @property
    def booked_bytes(self) -> int:
        """What it holds, or would."""
        return self.estimate.total_bytes if self.measured_bytes is None else self.measured_bytes


@dataclass
class Books:
    """The memory of a box, and the models in it. `budget_bytes` None: whatever they like."""

    budget_bytes: int | None = None
    evictions: int = 0
    reloads: int = 0
    """Models that came back."""
    _accounts: dict[Key, Account] = field(default_factory=dict)

    @property
    def held_bytes(self) -> int:
        return sum(account.held_bytes for account in self._accounts.values())

    def account(self, key: Key) -> Account | None:
        return self._accounts.get(key)

    def declare(self, key: Key, estimate: Estimate) -> None:
        """A package is about to be loaded for `key`. Another one than before is measured anew."""
        account = self._accounts.get(key)
        if account is None:
            self._accounts[key] = Account(estimate)
        elif account.estimate != estimate:
            account.estimate, account.measured_bytes = estimate, None

    def check(self, key: Key) -> None:
        """Raise OutOfMemory, with the sum in words, if `key` does not fit even where nobody else is."""
        account = self._accounts[key]
        if self.budget_bytes is None or account.booked_bytes <= self.budget_bytes:
            return
        how = f"{account.estimate}" if account.measured_bytes is None else "measured when it was loaded"
        raise OutOfMemory(
            f"It can never fit: it needs {account.booked_bytes:,} bytes ({how}); all models together may use "
            f"{self.budget_bytes:,}.",
            fix="Raise [memory] budget_bytes if the device has more, or build it for a smaller max_batch.",
            retryable=False,
        )

    def make_room(self, key: Key, tenants: Iterable[Tenant], now: float) -> tuple[Tenant, ...] | None:
        """Whom to send away so that `key` can be loaded, in this order; None if that is not possible now.

        What `key` holds already stays beside what comes.
        """
        account = self._accounts[key]
        wanted = account.booked_bytes
        if self.budget_bytes is not None and not account.held_bytes:
            wanted = max(wanted, min(account.estimate.loading_bytes, self.budget_bytes))
        return self._victims(key, wanted, tenants, now)

    def fits_beside(self, key: Key, tenants: Iterable[Tenant]) -> bool:
        """Whether `key` can be loaded beside what it holds already, once everybody has gone who may."""
        account = self._accounts[key]
        if self.budget_bytes is None or not account.held_bytes:
            return True
        pinned = [self._accounts.get(tenant.key) for tenant in tenants if tenant.pinned and tenant.key != key]
        staying = sum(other.held_bytes for other in pinned if other is not None)
        return staying + account.held_bytes + account.booked_bytes <= self.budget_bytes

    def arrive(self, key: Key) -> None:
        """`key` is being loaded, beside what it may hold already; `settle` or `abandon` follows."""
        account = self._accounts[key]
        account.former_bytes = account.held_bytes
        account.held_bytes += account.booked_bytes

    def abandon(self, key: Key) -> None:
        """It came to nothing: `key` holds what it held before."""
        account = self._accounts[key]
        account.held_bytes = account.former_bytes

    def settle(self, key: Key, measured_bytes: int, seconds: float) -> None:
        """`key` was loaded, in `seconds`, and this is what it takes. See `overflow` for whether that fits."""
        account = self._accounts[key]
        least = int(account.estimate.graph_bytes * _LEAST_OF_GRAPH)
        account.measured_bytes = account.held_bytes = max(measured_bytes, least)
        account.load_s = seconds
        account.loads += 1
        self.reloads += account.loads > 1

    def overflow(self, key: Key, tenants: Iterable[Tenant], now: float) -> tuple[Tenant, ...] | None:
        """Whom to send away because `key` takes more than it said. None: `key` has to go again, the others are in
        use."""
        return self._victims(key, 0, tenants, now)

    def leave(self, key: Key, *, evicted: bool = False) -> None:
        """`key` gave its memory back."""
        if (account := self._accounts.get(key)) is not None:
            account.held_bytes = 0
            account.evictions += evicted
            self.evictions += evicted

    def forget(self, key: Key) -> None:
        """`key` is gone for good."""
        self._accounts.pop(key, None)

    def _victims(self, key: Key, wanted: int, tenants: Iterable[Tenant], now: float) -> tuple[Tenant, ...] | None:
        """Who has to go before `key` holds `wanted` bytes more."""
        if self.budget_bytes is None:
            return ()
        excess = self.held_bytes + wanted - self.budget_bytes
        turn_s = max(MIN_TURN_S, _LOADS_A_TURN * self._accounts[key].load_s)
        movable = [tenant for tenant in tenants if tenant.key != key and not tenant.pinned]
        idle = sorted((one for one in movable if not one.wanted), key=lambda one: one.last_used)
        done = sorted((one for one in movable if one.wanted and now - one.since >= turn_s), key=lambda one: one.since)
        victims: list[Tenant] = []
        for tenant in [*idle, *done]:
            if excess <= 0:
                break
            if (account := self._accounts.get(tenant.key)) is not None and account.held_bytes:
                victims.append(tenant)
                excess -= account.held_bytes
        return tuple(victims) if excess <= 0 else None


def budget_for(
    profile: DeviceProfile | None, *, machine_bytes: int, limit_bytes: int | None, own_bytes: int
) -> int | None:
    """What models may hold on a machine: the share that the profile gives engines, less what the process holds itself.

    `limit_bytes` is what control groups leave of `machine_bytes`. A profile's total is that of its GPU where this is a
    card of its own, and says nothing about the box then. None where nobody knows how much there is.
    """
    known = [machine_bytes, limit_bytes]
    fraction = 0.8
    if profile is not None:
        fraction = profile.memory.usable_fraction
        if profile.family in ("cpu", "jetson"):
            known.append(profile.memory.total_bytes)
    total = min((each for each in known if each), default=0)
    return max(0, int(total * fraction) - own_bytes) if total else None


def _bytes(spec: TensorSpec, rows: int, best: Mapping[str, int]) -> int:
    """Of a tensor with a batch of `rows`; another axis without a size has the one it is to be fastest at, or 1."""
    sizes = [axis if isinstance(axis, int) else best.get(axis, 1) for axis in spec.shape]
    if spec.shape and isinstance(spec.shape[0], str):
        sizes[0] = rows
    return math.prod(sizes) * numpy_dtype(spec.dtype).itemsize
