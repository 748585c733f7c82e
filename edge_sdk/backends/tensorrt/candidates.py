"""The engines that were found for a package, and what is against each: every one is read and none is run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.backends.tensorrt.sidecar import FOREIGN, PLAN, SIDECAR, Here, Sidecar, Unreadable, decode, misfits
from edge_sdk.backends.tensorrt.store import EngineStore, PlanFile, open_engine
from edge_sdk.errors import EngineFailed
from edge_sdk.package import GRAPH, EnginePackage

OF_PACKAGE, OF_STORE = "the package's engine", "the store's engine"


class CheckedPlan:
    """A plan that fits, as often as it is asked for: an engine that made room for another is loaded again.

    The first time these are the very bytes that were compared with the sidecar. Later they are read anew, from the file
    that was open then - what has taken its place, or that its store has dropped it, changes nothing - and compared.
    """

    def __init__(self, plan: bytes, sha256: str, file: PlanFile) -> None:
        self._plan: bytes | None = plan
        self._sha256 = sha256
        self._file = file

    def __call__(self) -> bytes:
        """EngineFailed if the file was altered since."""
        plan, self._plan = self._plan, None
        if plan is None:
            try:
                plan = self._file.read()
            except OSError as exc:
                raise EngineFailed(f"The engine's plan cannot be read any more: {exc.strerror or exc}.") from exc
            if hashlib.sha256(plan).hexdigest() != self._sha256:
                raise EngineFailed(
                    "The engine's plan was altered while it was in use.",
                    fix="Load the package again: it is refused then.",
                )
        return plan


@dataclass(frozen=True)
class Candidate:
    """An engine that was found for a package, and every reason against loading it here."""

    place: str
    folder: Path
    reasons: tuple[str, ...]
    sidecar: Sidecar | None = None
    plan: CheckedPlan | None = None
    """None unless it may be loaded."""

    @property
    def lacks_only_trust(self) -> bool:
        return len(self.reasons) == 1 and self.reasons[0].startswith(FOREIGN)

    @property
    def is_stored(self) -> bool:
        return self.place == OF_STORE

    def __str__(self) -> str:
        return f"{self.place}: {'; '.join(self.reasons) or 'it fits'}"


def candidates(package: EnginePackage, store: EngineStore, here: Here) -> Iterator[Candidate]:
    """The package's engine, then the store's for its graph, the one used last first. Each is read when it is asked for,
    so one plan at a time is in memory. BackendUnavailable if the store's key cannot be trusted."""
    key = store.existing_key()
    graph = package.manifest.files.get(GRAPH)
    graph_sha256 = graph.sha256 if graph is not None else ""
    if (record := package.manifest.backend.engine) is not None:
        if {record.file, record.sidecar} <= set(package.manifest.files):
            yield _examined(OF_PACKAGE, package.path, (record.file, record.sidecar), graph_sha256, here, key)
        else:
            yield Candidate(OF_PACKAGE, package.path, ("it is not among the package's files",))
    for entry in store.engines(graph_sha256):
        yield _examined(OF_STORE, entry, (PLAN, SIDECAR), graph_sha256, here, key)


def reasons_against(sidecar: Sidecar, plan: bytes, graph_sha256: str, here: Here, key: bytes | None) -> tuple[str, ...]:
    """`misfits` of a plan's own bytes."""
    digest = hashlib.sha256(plan).hexdigest()
    return misfits(sidecar, plan_sha256=digest, plan_bytes=len(plan), graph_sha256=graph_sha256, here=here, key=key)


def _examined(
    place: str, folder: Path, names: tuple[str, str], graph_sha256: str, here: Here, key: bytes | None
) -> Candidate:
    try:
        file, described = open_engine(folder, *names)
        sidecar = decode(described)
        plan = file.read()
    except OSError as exc:
        return Candidate(place, folder, (f"it cannot be read: {exc.strerror or exc}",))
    except Unreadable as exc:
        return Candidate(place, folder, (str(exc),))
    if reasons := reasons_against(sidecar, plan, graph_sha256, here, key):
        return Candidate(place, folder, reasons, sidecar)
    return Candidate(place, folder, (), sidecar, CheckedPlan(plan, sidecar.plan_sha256, file))
