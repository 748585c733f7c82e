"""Several batches of one model at a time, on threads or in processes; and models that share a device's cores."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from edge_sdk.backends.isolated import IsolatedEngine
from edge_sdk.backends.registry import Loaded
from edge_sdk.errors import DeviceLost, EngineFailed
from edge_sdk.runtime.batching import QueueLimits
from edge_sdk.runtime.messages import Answer, Request
from edge_sdk.runtime.service import Service
from edge_sdk.runtime.worker import Worker
from edge_sdk.spec import Serving
from edge_sdk.tasks.registry import task_of
from edge_sdk.tensors import Array, Outputs, TensorSpec
from tests import packages
from tests.brokers import eventually
from tests.packages import make_package, misbehaving, scaling
from tests.runtime.requests import request, response, statuses

PATIENCE_S = 20.0
POISON = 666.0


class Together:
    """y = 2 * x, but only once `count` batches are computed at a time: in vain, it fails."""

    inputs = (TensorSpec("x", "float32", ("batch", 4)),)
    outputs = (TensorSpec("y", "float32", ("batch", 4)),)

    def __init__(self, meeting: threading.Barrier, family: list[Together]) -> None:
        self.closed = False
        self._meeting = meeting
        self._family = family
        family.append(self)

    def twin(self) -> Together:
        return Together(self._meeting, self._family)

    def infer(self, feeds: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> Outputs:
        if self.closed:
            raise EngineFailed("This engine was closed.")
        if np.any(feeds["x"] == POISON):
            raise DeviceLost("It is gone.")
        if np.any(feeds["x"]):
            try:
                self._meeting.wait(PATIENCE_S)
            except threading.BrokenBarrierError as exc:
                raise EngineFailed("Nobody else computes.") from exc
        assert out is not None
        np.multiply(feeds["x"], 2, out=out["y"])
        return dict(out)

    def close(self) -> None:
        self.closed = True


def test_instances_compute_at_a_time(tmp_path: Path) -> None:
    """As many batches as there are instances are on their way, each in arrays of its own; answers come in order."""
    package = make_package(tmp_path / "p", scaling(), serving=Serving(instances=3), best_batch=1)
    family: list[Together] = []
    engine = Together(threading.Barrier(3), family)
    worker = Worker(package, Loaded(engine, "stand-in"), task_of(package))
    worker.warm_up()
    sent = [request(float(n + 1)) for n in range(6)]
    answers: list[Answer] = []
    waiting = list(sent)
    while waiting or worker.in_flight:
        while waiting and worker.has_room:
            worker.start([waiting.pop(0)])
        answers += worker.finish()
        while waiting and worker.in_flight:  # the next three, once these are all done
            answers += worker.finish()

    assert [2.0 * (n + 1) for n in range(6)] == [float(response(answer).outputs["y"][0, 0]) for answer in answers]
    assert 3 == len(family)
    worker.close()
    assert all(each.closed for each in family)


def test_a_lost_device_is_no_instances_own(tmp_path: Path) -> None:
    """It ends the process, on whichever thread it was found out."""
    package = make_package(tmp_path / "p", scaling(), serving=Serving(instances=2), best_batch=1)
    worker = Worker(package, Loaded(Together(threading.Barrier(1), []), "stand-in"), task_of(package))
    worker.start([request(POISON)])

    with pytest.raises(DeviceLost):
        worker.finish()


class Site:
    """A service, and its answers."""

    def __init__(self, engines: Path, **options: Any) -> None:
        self.answers: list[Answer] = []
        self.service = Service(engines, on_answer=self.answers.append, on_change=lambda: None, **options)
        self.service.start()
        eventually(lambda: all(model.state == "READY" for model in self.service.models()), "ready models")

    def factors(self, requests: list[Request]) -> list[float]:
        """What each was multiplied by, the first number of each; 0 for one that was not answered 200."""
        eventually(lambda: len(self.answers) >= len(requests), f"answers to {len(requests)}", deadline_s=60.0)
        by_ticket = {answer.ticket: answer for answer in self.answers}
        assert len(self.answers) == len(requests) == len(by_ticket)
        return [
            float(response(by_ticket[each.ticket]).outputs["y"][0, 0])
            if by_ticket[each.ticket].status == 200
            else -float(by_ticket[each.ticket].status)
            for each in requests
        ]


@pytest.fixture
def open_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def opened(**options: Any) -> Site:
        sites.append(Site(tmp_path / "engines", limits=QueueLimits(max_requests=1000), **options))
        return sites[-1]

    yield opened
    for site in sites:
        site.service.stop(limit_s=0.0)


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_real_instances_answer_right(
    tmp_path: Path, open_site: Callable[..., Site], isolation: Literal["none", "process"]
) -> None:
    """Three of them over one session, or in three processes: each request its own answer; never on the network
    thread, however quick the model is."""
    make_package(
        tmp_path / "engines" / "double", scaling(), max_batch=4, serving=Serving(instances=3, isolation=isolation)
    )
    site = open_site(inline_ms=1e6)
    (model,) = site.service.models()
    sent = [request(float(n)) for n in range(300)]
    for each in sent:
        site.service.submit(each)

    assert not model.quick
    assert [2.0 * n for n in range(300)] == site.factors(sent)


def children() -> list[int]:
    """Processes of isolated engines that this one has started."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and b"isolated_child" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def test_a_child_killed_under_load_loses_nothing(tmp_path: Path, open_site: Callable[..., Site]) -> None:
    """SIGKILL four times while hundreds of requests wait: every one is answered, and right."""
    make_package(
        tmp_path / "engines" / "double", scaling(), max_batch=4, backend=packages.BACKEND,
        serving=Serving(isolation="process"),
    )  # fmt: skip
    site = open_site()
    sent = [request(float(n)) for n in range(400)]
    killed = set()
    for each in sent:
        site.service.submit(each)
        if each.ticket % 100 == 50:
            (child,) = eventually(lambda: [pid for pid in children() if pid not in killed], "another child")
            os.kill(child, signal.SIGKILL)
            killed.add(child)
        time.sleep(0)

    assert [2.0 * n for n in range(400)] == site.factors(sent)
    assert 4 == len(killed)
    site.service.stop(limit_s=PATIENCE_S)
    assert [] == children()


def test_a_poison_that_crashes_the_runtime_fails_alone(tmp_path: Path, open_site: Callable[..., Site]) -> None:
    """500 for the request that ends its process whenever it is computed, 200 for those beside it; the daemon lives."""
    make_package(
        tmp_path / "engines" / "double", misbehaving([{"do": "abort", "when": POISON}]), max_batch=4,
        backend="reference", serving=Serving(isolation="process"),
    )  # fmt: skip
    site = open_site()
    values = [1.0, 2.0, POISON, 3.0, 4.0]
    sent = [request(value) for value in values]
    for each in sent:
        site.service.submit(each)

    assert [2.0, 4.0, -500.0, 6.0, 8.0] == site.factors(sent)


def test_only_models_with_threads_wait_for_cores(tmp_path: Path, open_site: Callable[..., Site]) -> None:
    """A slow model takes turns with others; a quick one, on the network thread, never does."""
    make_package(tmp_path / "engines" / "slow", misbehaving([{"do": "sleep", "seconds": 0.05}]), backend="reference")
    make_package(tmp_path / "engines" / "quick", scaling())
    site = open_site(inline_ms=25.0)
    free = {model.model: model.worker.turnstile.is_open for model in site.service.models() if model.worker is not None}
    sent = [request(float(n), model="slow") for n in range(3)]
    for each in sent:
        site.service.submit(each)

    assert {"slow": False, "quick": True} == free
    assert [0.0, 2.0, 4.0] == site.factors(sent)
    assert [200] * 3 == statuses(site.answers)


def test_memory_in_other_processes_is_counted(tmp_path: Path) -> None:
    """Each process has a runtime of its own, which is more than ten megabytes; threads have none."""
    shares = []
    for serving in (Serving(instances=2), *(Serving(instances=n, isolation="process") for n in (1, 2))):
        worker = Worker.load(make_package(tmp_path / "p", scaling(), serving=serving))
        shares.append(worker.elsewhere_bytes)
        worker.close()

    assert 0 == shares[0]
    assert 10 << 20 < shares[1] < 0.7 * shares[2]


def test_what_cannot_be_shared_is_not(tmp_path: Path) -> None:
    """An engine that is one thread's alone has one instance, whatever the package wishes."""
    package = make_package(
        tmp_path / "p", scaling(), backend="reference", serving=Serving(instances=3), best_batch=1
    )  # fmt: skip
    worker = Worker.load(package)
    worker.start([request(1.0)])

    assert not worker.has_room
    assert [200] == statuses(worker.finish())
    assert not isinstance(worker.loaded.engine, IsolatedEngine)
    worker.close()
