"""The seam between edge-sdk and the runtimes that execute graphs: two small protocols.

A *backend* builds an engine from a graph for a profile, and loads an engine from a package. An *engine* has inputs,
outputs, `infer` and `close`. That is all. INT8 is not in the seam: it reaches a backend as Q/DQ nodes in the graph.
Batching is not in it either: a batch is a larger first axis.

An engine on an accelerator may be more: `Pipelined` ones lend the *slots* in which batches lie, in memory that the
device reads by itself, and compute one while the next is being filled and the last one phrased.

Who owns a buffer, said once, here:

* Arrays given to `infer` stay the caller's. The engine only reads them, and only until `infer` returns.
* Arrays that `infer` gives back belong to the caller, for good - unless the caller passed `out`. Then the engine
  writes its results into those very arrays and gives them back, so a loop that passes the same `feeds` arrays and the
  same `out` arrays each time allocates nothing, and an engine may keep them bound between calls.

An engine is used by one thread at a time; whoever shares one brings the lock, or asks a `Shareable` one for a twin.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from edge_sdk.package import GRAPH, BatchingRecord, EnginePackage, EngineRecord
from edge_sdk.profiles import DeviceProfile
from edge_sdk.spec import Axis
from edge_sdk.tensors import Array, Feeds, Outputs, TensorSpec

UNKNOWN_VERSION = "of unknown version"


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on this machine: its version if it can; if it cannot, why and what to do."""

    version: str | None
    why_not: str = ""
    fix: str = ""

    def __bool__(self) -> bool:
        return self.version is not None


def installed_version(module: str, *distributions: str) -> str:
    """The version of an installed module, from the metadata of the first of `distributions` that is installed.

    The same module is often published under several names; without any, the module's own name is looked up. A module
    that came without metadata, or under a name nobody told us, is `of unknown version`.

    >>> installed_version("PIL", "pillow", "pillow-simd")
    """
    for name in distributions or (module,):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return UNKNOWN_VERSION


def version_numbers(version: str) -> tuple[int, ...]:
    """(10, 3, 0) for 10.3.0; what follows the first part that is no number is left out."""
    numbers: list[int] = []
    for part in version.split("."):
        if not (part.isascii() and part.isdigit()):
            break
        numbers.append(int(part))
    return tuple(numbers)


Progress = Callable[[float], None]
"""Told how much of a build is done, from 0 to 1."""


def no_progress(done: float) -> None:
    """A progress that nobody watches."""


@dataclass(frozen=True)
class EngineOrder:
    """What a compiled engine is made from, and for."""

    graph: bytes
    inputs: tuple[TensorSpec, ...]
    profile: DeviceProfile
    batching: BatchingRecord
    axes: Mapping[str, Axis]
    here: bool = False
    """For the accelerator of this machine, whatever the profile says about its kind."""

    @classmethod
    def of(cls, package: EnginePackage, *, here: bool) -> EngineOrder:
        """The order for a package's engine; PackageError if its files were altered."""
        manifest = package.manifest
        return cls(
            package.read(GRAPH), manifest.inputs, package.profile(), manifest.batching, manifest.axes, here
        )  # fmt: skip

    @cached_property
    def graph_sha256(self) -> str:
        return hashlib.sha256(self.graph).hexdigest()


class Engine(Protocol):
    """A loaded model, ready to compute."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def infer(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> Outputs:
        """Compute every output from one C-contiguous array per input.

        `out`, if given, holds a C-contiguous, writable array of the right dtype and shape for *every* output.
        Raises EngineFailed when the runtime does, OutOfMemory when it ran out of memory.
        """
        ...

    def close(self) -> None:
        """Give the memory back. Closing twice is harmless; `infer` after `close` raises EngineFailed."""
        ...


class Slot(Protocol):
    """Where one batch lies while it is computed. Its arrays are the engine's, and live until the engine is closed."""

    def at(self, rows: int) -> tuple[Feeds, Outputs]:
        """The arrays for a batch of `rows`, to be filled and to be read: always the same ones for the same `rows`."""
        ...

    def start(self, rows: int) -> None:
        """Begin to compute what lies in `at(rows)`, and return as soon as the device has its orders.

        Until `finish` has returned, the feeds must not be written and the outputs not be read. Raises as `infer` does.
        """
        ...

    def finish(self) -> None:
        """Wait until the batch started last is computed; its outputs may be read until the next `start`. Raises as
        `infer` does, for whatever went wrong since `start`."""
        ...


@runtime_checkable
class Pipelined(Protocol):
    """What an engine is besides, if it can work on several batches at once."""

    def slots(self, rows: int) -> Sequence[Slot]:
        """The slots, for batches of up to `rows`; made at the first call. Batches finish in the order they started."""
        ...


@runtime_checkable
class Threaded(Protocol):
    """What an engine is besides, if it computes with several threads on the processor."""

    @property
    def threads(self) -> int: ...


@runtime_checkable
class Shareable(Protocol):
    """What an engine is besides, if several threads may compute with its weights at the same time."""

    def twin(self) -> Engine:
        """Another engine for the same, which another thread may use meanwhile. Each of them is closed by itself."""
        ...


@runtime_checkable
class Distant(Protocol):
    """What an engine is besides, if it holds memory that is not this process's."""

    def elsewhere_bytes(self) -> int:
        """How much that is now."""
        ...


@runtime_checkable
class Hosting(Protocol):
    """What an engine is besides, if arrays of its own spare it a copy."""

    def arrays(self, feeds: Feeds, outputs: Outputs) -> tuple[Feeds, Outputs]:
        """Arrays like these, to be filled and read in their place; views of their first rows are as good."""
        ...


class DeviceTime(NamedTuple):
    """Of one batch, by the device's own clock, in milliseconds."""

    total_ms: float
    """From the first copy to the last; waiting for other batches' computes is in it."""
    compute_ms: float


@runtime_checkable
class Timed(Protocol):
    """What an engine is besides, if its device has a clock of its own."""

    def device_time(self) -> DeviceTime | None:
        """Of the batch that was finished last; None where there is none."""
        ...


class Backend(Protocol):
    """A runtime. `name` is what profiles and manifests call it."""

    name: str
    compiles: bool
    """Whether it loads engines compiled for one kind of device, rather than the graph itself."""

    def availability(self) -> Availability:
        """Whether it can run here, found out without loading the vendor's library where that is possible."""
        ...

    def can_build(self, profile: DeviceProfile, *, here: bool = False) -> Availability:
        """Whether it can make what `profile`'s device loads, on this machine: for some devices, any machine can.

        `here` as in EngineOrder: what this machine loads, with the profile's options.
        """
        ...

    def build(
        self, order: EngineOrder, folder: Path | None, *, progress: Progress = no_progress, considerate: bool = False
    ) -> EngineRecord | None:
        """Compile an engine into `folder`, or (None) into the backend's own store; None where the graph is loaded.

        A `considerate` build leaves the processor to whoever else wants it. Raises BackendUnavailable where this
        machine lacks the means, ModelError where the runtime does not take the graph, EngineFailed where it fails.
        """
        ...

    def load(self, package: EnginePackage, profile: DeviceProfile) -> Engine:
        """The engine in `package`, its files checked against their digests first.

        Raises EngineUnfit where there is none that may be loaded here, BackendUnavailable where this machine lacks the
        means, EngineFailed where the runtime refuses, OutOfMemory where the device has too little memory for it.
        """
        ...

    def load_graph(self, graph: bytes, profile: DeviceProfile) -> Engine:
        """An engine straight from a graph, for a build that measures what it is about to pack."""
        ...
