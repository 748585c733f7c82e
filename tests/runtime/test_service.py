"""Models in service: one answer for each request, whatever happens to the packages meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.errors import QueueFull
from edge_sdk.package import GRAPH, MANIFEST
from edge_sdk.runtime.batching import QueueLimits
from edge_sdk.runtime.messages import Answer, Request
from edge_sdk.runtime.service import Service
from tests.packages import make_package, misbehaving, scaling
from tests.runtime.requests import request, response

PATIENCE_S = 20.0
"""How long a test waits for what must happen before it fails; nothing waits so long that works."""


class Site:
    """A service with a folder, as the daemon runs it: this thread computes for the quick models, and takes note."""

    def __init__(self, engines: Path, **options: Any) -> None:
        self.engines = engines
        self.answers: list[Answer] = []
        self._news = threading.Condition()
        self.service = Service(engines, on_answer=self._take, on_change=self._take, **options)

    def _take(self, answer: Answer | None = None) -> None:
        with self._news:
            if answer is not None:
                self.answers.append(answer)
            self._news.notify_all()

    def until(self, happened: Callable[[], bool]) -> None:
        """Work for quick models until something is so."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert time.monotonic() < deadline, self.service.snapshot()
            if not self.service.run_quick():
                with self._news:
                    self._news.wait_for(happened, timeout=0.02)

    def states(self) -> dict[str, str]:
        return {f"{model.model}/{model.version}": model.state for model in self.service.models()}

    def settle(self) -> None:
        """Until the folder was read and every package in it was loaded, or was not."""
        self.until(lambda: self.service.settled and "LOADING" not in self.states().values())

    def reload(self) -> None:
        """Look at the folder again, until that is done: a package behind all others is loaded after them."""
        last = f"zzz-{time.monotonic_ns()}"
        make_package(self.engines / last, scaling())
        self.service.reload()
        self.until(lambda: self.states().get(f"{last}/1") == "READY")

    def submit(self, *requests: Request) -> None:
        for each in requests:
            self.service.submit(each)

    def ask(self, *requests: Request) -> list[Answer]:
        """The answers to requests, in the order of the requests; each has exactly one."""
        self.submit(*requests)
        tickets = [each.ticket for each in requests]
        self.until(lambda: {answer.ticket for answer in self.answers} >= set(tickets))
        found = {ticket: [answer for answer in self.answers if answer.ticket == ticket] for ticket in tickets}

        assert [1] * len(tickets) == [len(found[ticket]) for ticket in tickets]
        return [found[ticket][0] for ticket in tickets]

    def factor(self, **wanted: Any) -> float:
        """What the served model multiplies with."""
        (answer,) = self.ask(request(1.0, **wanted))
        return float(response(answer).outputs["y"][0, 0])


@pytest.fixture(params=["quick", "threaded"])
def mode(request: pytest.FixtureRequest) -> dict[str, float]:
    """Every model computes on the caller's thread, or every model has its own."""
    return {"inline_ms": 1e6 if request.param == "quick" else -1.0}


@pytest.fixture
def open_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Sites that are stopped at the end of the test."""
    sites: list[Site] = []

    def opened(**options: Any) -> Site:
        sites.append(Site(tmp_path / "engines", **options))
        sites[-1].service.start()
        return sites[-1]

    yield opened
    for site in sites:
        site.service.stop(limit_s=0.0)


@pytest.fixture
def double(tmp_path: Path) -> Path:
    """The folder of a model that doubles."""
    return make_package(tmp_path / "engines" / "double", scaling(2.0)).path


def reference(folder: Path, *orders: dict[str, object], **package: Any) -> None:
    make_package(folder, misbehaving(orders), backend="reference", **package)


def test_a_request_gets_its_answer(open_site: Callable[..., Site], double: Path, mode: dict[str, float]) -> None:
    """On the caller's thread or on the model's own, and also if it came while the model was loading."""
    site = open_site(**mode)
    early = request(1.0)
    site.submit(early)
    answers = site.ask(*[request(float(n)) for n in range(40)])

    assert [2.0 * n for n in range(40)] == [float(response(answer).outputs["y"][0, 0]) for answer in answers]
    site.until(lambda: early.ticket in {answer.ticket for answer in site.answers})
    assert [200] == [answer.status for answer in site.answers if answer.ticket == early.ticket]


@pytest.mark.parametrize(
    ("model", "version", "status"),
    [
        ("double", None, 200), ("double", "1", 200), ("double", "2", 404), ("double", "../1", 404),
        ("none", None, 404), ("none", "1", 404), ("../../etc", None, 404), ("%2e", None, 404),
        ("d\N{CYRILLIC SMALL LETTER O}uble", None, 404),
        ("d" * 10_240, None, 404), ("", None, 404), ("DOUBLE", None, 404),
    ],
)  # fmt: skip
def test_names_are_keys_and_never_paths(
    open_site: Callable[..., Site], double: Path, model: str, version: str | None, status: int
) -> None:
    """What is not served is 404, and the answer repeats no more of a name than a log can bear."""
    site = open_site()
    site.settle()
    (answer,) = site.ask(request(1.0, model=model, version=version))

    assert status == answer.status
    assert len(str(answer.result)) < 10_000


def test_the_newest_version_answers(open_site: Callable[..., Site], tmp_path: Path, mode: dict[str, float]) -> None:
    """`10` is newer than `9`; a version can be pinned; one that is broken is not preferred."""
    for version, factor in (("9", 9.0), ("10", 10.0)):
        make_package(tmp_path / "engines" / f"m{version}", scaling(factor), name="m", version=version)
    broken = make_package(tmp_path / "engines" / "m11", scaling(), name="m", version="11")
    (broken.path / GRAPH).write_bytes(b"")
    site = open_site(**mode)
    site.settle()

    assert (10.0, 9.0) == (site.factor(model="m"), site.factor(model="m", version="9"))
    assert [503] == [answer.status for answer in site.ask(request(1.0, model="m", version="11"))]
    assert ["11", "10", "9"] == [model.version for model in site.service.by_name()["m"]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / GRAPH).write_bytes(b""),
        lambda path: (path / GRAPH).write_bytes((path / GRAPH).read_bytes()[:-9]),
        lambda path: (path / GRAPH).unlink(),
        lambda path: (path / MANIFEST).write_text("{", encoding="utf-8"),
        lambda path: make_package(path, b"garbage"),
        lambda path: make_package(path, scaling(), backend="abacus"),
        lambda path: make_package(path, scaling(), architecture="riscv64"),
        lambda path: make_package(path, scaling(), task="image-classification"),
        lambda path: reference(path, {"do": "raise"}),
    ],
    ids=["empty", "cut", "gone", "no manifest", "garbage", "no backend", "other machine", "wrong task", "bad warm-up"],
)  # fmt: skip
def test_a_broken_package_harms_nobody(
    open_site: Callable[..., Site], double: Path, damage: Callable[[Path], object]
) -> None:
    """It is UNAVAILABLE with a reason and answers 503; the others serve; repaired, it serves too."""
    broken = make_package(double.parent / "broken", scaling()).path
    damage(broken)
    site = open_site()
    site.settle()
    (model,) = (each for each in site.service.models() if each.model == "broken")

    assert ("UNAVAILABLE", True) == (model.state, bool(model.reason))
    assert [503] == [answer.status for answer in site.ask(request(1.0, model="broken"))]
    assert 2.0 == site.factor()

    make_package(broken, scaling(3.0))
    site.reload()
    assert 3.0 == site.factor(model="broken")


@pytest.mark.parametrize("file", [GRAPH, MANIFEST])
def test_an_older_package_stays_in_service(open_site: Callable[..., Site], double: Path, file: str) -> None:
    """A package that breaks under a model that serves is a reason to read, not an outage."""
    site = open_site()
    site.settle()
    if file == GRAPH:
        make_package(double, b"garbage")
    else:
        (double / MANIFEST).write_text("{", encoding="utf-8")
    site.reload()
    (model,) = (each for each in site.service.models() if each.model == "double")

    assert 2.0 == site.factor()
    assert ("READY", True) == (model.state, bool(model.reason))

    make_package(double, scaling(5.0))
    site.reload()
    assert (5.0, "") == (site.factor(), model.reason)


def test_a_removed_package_is_retired(open_site: Callable[..., Site], double: Path, mode: dict[str, float]) -> None:
    """Gone from the folder, gone from service: 404, and what waited for it is answered 503."""
    make_package(double.parent / "other", scaling(3.0))
    site = open_site(**mode)
    site.settle()

    assert 2.0 == site.factor()

    double.rename(double.parent.parent / "elsewhere")
    site.reload()
    assert [404] == [answer.status for answer in site.ask(request(1.0))]
    assert 3.0 == site.factor(model="other")


def test_swapping_a_model_under_traffic_loses_and_mixes_nothing(
    open_site: Callable[..., Site], double: Path, mode: dict[str, float]
) -> None:
    """While packages are exchanged, every request gets one answer, wholly from the old engine or wholly from a new
    one, and the last package serves in the end."""
    site = open_site(**mode)
    site.settle()
    sent: list[Request] = []
    done = threading.Event()

    def swap() -> None:
        for factor in range(3, 11):
            make_package(double, scaling(float(factor)))
            seen = len(site.answers)
            site.service.reload()
            deadline = time.monotonic() + PATIENCE_S
            while len(site.answers) < seen + 10 and time.monotonic() < deadline:  # let traffic meet this one
                done.wait(0.001)
        done.set()

    swapper = threading.Thread(target=swap)
    swapper.start()
    while not done.is_set():
        sent += (batch := [request(float(len(sent) + n), rows=n % 3 + 1) for n in range(5)])
        site.ask(*batch)
    swapper.join()
    site.reload()
    by_ticket = {answer.ticket: answer for answer in site.answers}

    assert len(sent) == sum(answer.ticket in {each.ticket for each in sent} for answer in site.answers)
    for index, each in enumerate(sent):
        rows = response(by_ticket[each.ticket]).outputs["y"]
        factors = set((rows / index).ravel().tolist()) if index else {2.0}
        assert len(factors) == 1
        assert factors <= {float(factor) for factor in range(2, 11)}
    assert 10.0 == site.factor()


def test_a_queue_that_is_full_says_so_at_once(open_site: Callable[..., Site], double: Path) -> None:
    """429 with a moment to come back; what was accepted is answered."""
    site = open_site(limits=QueueLimits(max_requests=3), inline_ms=1e6)
    site.settle()
    answers = site.ask(*[request(1.0) for _ in range(5)])
    refusals = [answer.result for answer in answers if isinstance(answer.result, QueueFull)]

    assert [200, 200, 200, 429, 429] == [answer.status for answer in answers]
    assert all(refusal.retry_after_ms for refusal in refusals)


def test_what_waited_too_long_is_not_computed(open_site: Callable[..., Site], double: Path) -> None:
    """408 on the clock that was given, without any of the engine's time; the others are computed."""
    now = [100.0]
    site = open_site(clock=lambda: now[0], inline_ms=1e6)
    site.settle()
    late, timely = request(1.0, received=100.0, deadline=101.0), request(1.0, received=100.0, deadline=300.0)
    site.submit(late, timely)
    now[0] = 200.0
    site.until(lambda: len(site.answers) == 2)
    (model,) = site.service.models()

    assert {late.ticket: 408, timely.ticket: 200} == {answer.ticket: answer.status for answer in site.answers}
    assert 1 == model.statistics.batched


def test_a_slow_model_holds_up_nobody(open_site: Callable[..., Site], double: Path) -> None:
    """Where a model computes is decided by its warm-up: one that takes 0.3 s does so on a thread of its own."""
    reference(double.parent / "slow", {"do": "sleep", "seconds": 0.3})
    site = open_site(inline_ms=100.0)
    site.settle()
    slow = request(1.0, model="slow")
    site.submit(slow)
    quick = site.ask(*[request(1.0) for _ in range(3)])

    assert [200] * 3 == [answer.status for answer in quick]
    assert slow.ticket not in {answer.ticket for answer in site.answers}
    assert {"double": True, "slow": False} == {model.model: model.quick for model in site.service.models()}
    site.until(lambda: slow.ticket in {answer.ticket for answer in site.answers})


def test_stopping_finishes_what_was_accepted(
    open_site: Callable[..., Site], double: Path, mode: dict[str, float]
) -> None:
    """Everything that waits is computed; afterwards nothing is taken, and everything is still answered."""
    site = open_site(**mode)
    site.settle()
    accepted = [request(float(n)) for n in range(50)]
    site.submit(*accepted)
    finished = site.service.stop(limit_s=PATIENCE_S)
    late = request(1.0)
    site.submit(late)
    statuses = {answer.ticket: answer.status for answer in site.answers}

    assert finished
    assert [200] * 50 == [statuses[each.ticket] for each in accepted]
    assert (503, 51) == (statuses[late.ticket], len(site.answers))


def test_a_stop_that_is_cut_short_still_answers(open_site: Callable[..., Site], double: Path) -> None:
    """What could not be computed in time is 503, not silence, and the caller is told."""
    reference(double, {"do": "sleep", "seconds": 0.2}, max_batch=1)
    site = open_site(inline_ms=25.0)
    site.settle()
    requests = [request(1.0) for _ in range(5)]
    site.submit(*requests)
    finished = site.service.stop(limit_s=0.05)
    site.until(lambda: len(site.answers) == 5)

    assert not finished
    assert {200, 503} >= {answer.status for answer in site.answers}
    assert 503 in {answer.status for answer in site.answers}


def test_stopping_before_anything_is_ready(open_site: Callable[..., Site], double: Path) -> None:
    """A service that stops while it loads answers what waited for the load, and accepts nothing afterwards."""
    site = open_site()
    first = request(1.0)
    site.submit(first)
    site.service.stop(limit_s=0.0)
    site.submit(second := request(1.0))
    site.until(lambda: {answer.ticket for answer in site.answers} == {first.ticket, second.ticket})

    assert [503] == [answer.status for answer in site.answers if answer.ticket == second.ticket]


def test_an_empty_folder_is_settled(open_site: Callable[..., Site]) -> None:
    """Nothing to serve is a state too: every request is 404."""
    site = open_site()
    site.settle()

    assert [404] == [answer.status for answer in site.ask(request(1.0))]
    assert {"404": 1} == site.service.snapshot()["answers"]


def test_many_threads_may_submit(open_site: Callable[..., Site], double: Path) -> None:
    """One answer for each request of eight threads, and the counts agree."""
    site = open_site(inline_ms=-1.0, limits=QueueLimits(max_requests=400))
    site.settle()
    requests = [[request(float(n)) for n in range(50)] for _ in range(8)]
    threads = [threading.Thread(target=site.submit, args=each) for each in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    site.until(lambda: len(site.answers) == 400)
    by_ticket = {answer.ticket: answer for answer in site.answers}
    snapshot = site.service.snapshot()

    for each in requests:
        assert [2.0 * n for n in range(50)] == [float(response(by_ticket[r.ticket]).outputs["y"][0, 0]) for r in each]
    assert {"200": 400} == snapshot["answers"] == snapshot["models"]["double/1"]["answers"]
