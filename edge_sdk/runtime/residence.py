"""Bringing models into memory and sending them away: what the books decide, done and measured.

It lives on the thread that loads packages, which never is the one that speaks with the network. What a model takes is
what the process grew by, without the libraries it maps and after what was freed went back to the system, from before
the load until after the warm-up. Others may take or give memory back meanwhile (a request that waits, an answer), so it
is a measurement and not a proof; each time a model comes back it is measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from edge_sdk import host
from edge_sdk.backends.registry import prefers_compiled, preload
from edge_sdk.errors import EdgeSdkError
from edge_sdk.package import EnginePackage
from edge_sdk.runtime.memory import Account, Books, Estimate, Tenant
from edge_sdk.runtime.served import ServedModel
from edge_sdk.runtime.worker import Worker


class NoRoomNow(EdgeSdkError):
    """Whoever is in the way is in use: try again in a moment."""


class Residence:
    """The models that are in memory. Used by the thread that loads packages, but for what is said to be for others."""

    def __init__(
        self,
        books: Books,
        models: Callable[[], Iterable[ServedModel]],
        hire: Callable[[EnginePackage], Worker],
        clock: Callable[[], float],
    ) -> None:
        """`models` gives those in service, `hire` loads a worker and warms it up."""
        self.books = books
        self._models = models
        self._hire = hire
        self._clock = clock
        self._leaving: list[ServedModel] = []

    def admit(self, model: ServedModel, package: EnginePackage) -> Worker:
        """A worker of the package, warmed up, and room made for it.

        Raises NoRoomNow; OutOfMemory, with the sum in words, where it cannot fit however many others went; and what
        hiring raises.
        """
        books, key = self.books, model.key
        books.declare(key, Estimate.of(package))
        books.check(key)
        if not books.fits_beside(key, self._tenants()):  # the former one goes first, and requests wait for the new one
            self._send_away(model, even_if_wanted=True, evicted=False)
        self._clear(lambda: books.make_room(key, self._tenants(), self._clock()), model)
        preload(package)
        host.trim()
        before, started = host.private_bytes(), self._clock()
        books.arrive(key)
        try:
            worker = self._hire(package)
            try:
                seconds = self._clock() - started
                host.trim()  # half of what onnxruntime took to load a graph is free by now, and would stay with us
                books.settle(key, host.private_bytes() - before + worker.elsewhere_bytes, seconds)
                books.check(key)
                self._clear(lambda: books.overflow(key, self._tenants(), self._clock()), model)
            except BaseException:
                worker.close()
                raise
        except BaseException:
            books.abandon(key)
            host.trim()
            raise
        if _is_on_device(worker):
            self.moved(model)
        return worker

    def moved(self, model: ServedModel) -> None:
        """A model computes on a GPU now, whose memory has books of its own."""
        self.books.leave(model.key)

    def dismiss(self, model: ServedModel) -> None:
        """A model is gone for good."""
        self.books.forget(model.key)

    def expected_s(self, model: ServedModel) -> float:
        """How long it takes to bring back a model that was there before. For any thread."""
        account = self.books.account(model.key)
        return account.load_s if account is not None else 0.0

    def snapshot(self) -> dict[str, Any]:
        """The figures of the box, JSON-ready. For any thread."""
        books = self.books
        return {
            "budget_bytes": books.budget_bytes,
            "models_bytes": books.held_bytes,
            "evictions": books.evictions,
            "reloads": books.reloads,
        }

    def figures(self, model: ServedModel) -> dict[str, Any]:
        """Those of one model, JSON-ready. For any thread."""
        account = self.books.account(model.key) or Account(Estimate(0))
        return {
            "resident": model.worker is not None,
            "held_bytes": account.held_bytes,
            "declared_bytes": account.estimate.total_bytes,
            "measured_bytes": account.measured_bytes,
            "evictions": account.evictions,
            "reloads": max(0, account.loads - 1),
            "queue_bytes": model.waiting_bytes,
        }

    def _clear(self, victims: Callable[[], Sequence[Tenant] | None], model: ServedModel) -> None:
        """Send away whoever `victims` names, until it names nobody. Raises NoRoomNow."""
        self._note_who_left()
        while found := victims():
            for tenant in found:
                for other in [one for one in self._models() if one.key == tenant.key]:
                    self._send_away(other, even_if_wanted=tenant.wanted, evicted=True)
            if self._leaving:
                break
        if found is None or self._leaving:
            raise NoRoomNow(f"There is no room for {model.model} {model.version} while others are in use.")

    def _send_away(self, model: ServedModel, *, even_if_wanted: bool, evicted: bool) -> None:
        """A model that has been asked meanwhile, and was idle, stays."""
        match model.sleep(even_if_wanted=even_if_wanted):
            case "gone":
                self.books.leave(model.key, evicted=evicted)
            case "leaving":
                self._leaving.append(model)

    def _note_who_left(self) -> None:
        """Those that were being computed when they were sent away, and are done by now."""
        for model in [model for model in self._leaving if not model.is_leaving]:
            self._leaving.remove(model)
            self.books.leave(model.key, evicted=True)

    def _tenants(self) -> list[Tenant]:
        return [
            Tenant(model.key, model.last_used, model.since, wanted=bool(model.waiting), pinned=_is_pinned(model))
            for model in self._models()
            if model.worker is not None
        ]


def _is_pinned(model: ServedModel) -> bool:
    """What lies in the memory of a GPU is that one's to manage, and a model for which an engine is being built stays
    until it is there."""
    package = model.package
    return model.state != "READY" or package is None or prefers_compiled(package)


def _is_on_device(worker: Worker) -> bool:
    return prefers_compiled(worker.package) and not worker.loaded.second_best
