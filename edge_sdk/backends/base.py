"""The seam between edge-sdk and the runtimes that execute graphs: two small protocols.

A *backend* builds an engine from a graph for a profile, and loads an engine from a package. An *engine* has inputs,
outputs, `infer` and `close`. That is all. INT8 is not in the seam: it reaches a backend as Q/DQ nodes in the graph.
Batching is not in it either: a batch is a larger first axis.

Who owns a buffer, said once, here:

* Arrays given to `infer` stay the caller's. The engine only reads them, and only until `infer` returns.
* Arrays that `infer` gives back belong to the caller, for good - unless the caller passed `out`. Then the engine
  writes its results into those very arrays and gives them back, so a loop that passes the same `feeds` arrays and the
  same `out` arrays each time allocates nothing, and an engine may keep them bound between calls.

An engine is used by one thread at a time; whoever shares one brings the lock.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_sdk.package import EnginePackage
from edge_sdk.profiles import DeviceProfile
from edge_sdk.tensors import Array, Outputs, TensorSpec

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


class Backend(Protocol):
    """A runtime. `name` is what profiles and manifests call it."""

    name: str

    def availability(self) -> Availability:
        """Whether it can run here, found out without loading the vendor's library where that is possible."""
        ...

    def build(self, graph: Path, profile: DeviceProfile, folder: Path) -> str | None:
        """Compile `graph` into an engine file in `folder`; its name, or None where the graph itself is loaded.

        Raises BackendUnavailable where this machine lacks the means, EngineFailed where the runtime refuses.
        """
        ...

    def load(self, package: EnginePackage, profile: DeviceProfile) -> Engine:
        """The engine in `package`, its files checked against their digests first. Raises as `build` does."""
        ...

    def load_graph(self, graph: bytes, profile: DeviceProfile) -> Engine:
        """An engine straight from a graph, for a build that measures what it is about to pack."""
        ...
