"""Served while an engine is built: answers from the start, a new engine once it is right, and a reason otherwise."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the second-best engine of these packages is onnxruntime's")

from edge_sdk.errors import DeviceLost, EngineFailed, EngineUnfit, ModelError, OutOfMemory
from edge_sdk.mqtt.presence import metadata
from edge_sdk.runtime import trial
from edge_sdk.runtime.building import Builder, Wish
from edge_sdk.runtime.served import ServedModel
from edge_sdk.runtime.succession import Yardstick
from edge_sdk.runtime.trial import Trial
from edge_sdk.runtime.worker import Worker
from tests.brokers import eventually
from tests.runtime.compiler import BROKEN, StandInCompiler, package_to_compile, shifting
from tests.runtime.requests import request
from tests.runtime.test_service import Site


class NotingSite(Site):
    """A site that notes every change as it would be published."""

    def __init__(self, engines: Path, **options: Any) -> None:
        self.published: list[dict[str, Any]] = []
        super().__init__(engines, **options)

    def _take(self, answer: Any = None) -> None:
        if answer is None:
            self.published += [metadata(versions) for versions in self.service.by_name().values()]
        super()._take(answer)


class Works:
    """Services whose engines are compiled by a stand-in, into one store."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.engines = folder / "engines"
        self.store = folder / "store"
        self.now = 0.0
        self.compiler = StandInCompiler(self.store, before_step=self._pass_time)
        self.losses: list[DeviceLost] = []
        self.sites: list[NotingSite] = []

    def _pass_time(self) -> None:
        self.now += 1.0

    def open(self, **options: Any) -> NotingSite:
        settings: dict[str, Any] = {"store": self.store, "on_lost": self.losses.append, "inline_ms": 1e6}
        site = NotingSite(self.engines, **{**settings, **options}, clock=lambda: self.now)
        self.sites.append(site)
        site.service.start()
        return site

    def restart(self) -> NotingSite:
        """A service as another process would open it; of the one before it, nothing is heard any more."""
        self._patch.setattr(trial, "_THIS_PROCESS", f"process {len(self.sites)}")
        return self.open()

    def close(self) -> None:
        self.compiler.go_on()
        for site in self.sites:
            site.service.stop(limit_s=0.0)


@pytest.fixture
def works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Works]:
    made = Works(tmp_path, monkeypatch)
    made.compiler.install(monkeypatch)
    yield made
    made.close()


def the_model(site: Site) -> ServedModel:
    (model,) = site.service.models()
    return model


def test_it_answers_at_once_and_changes_over_when_the_engine_is_there(works: Works) -> None:
    """On the second-best backend while the engine is built; each percentage once, rising; then the new backend. Every
    request meanwhile is answered, and `backend` always says by what."""
    package_to_compile(works.engines / "double")
    works.compiler.hold()
    site = works.open()
    site.until(lambda: bool(works.compiler.builds))
    model = the_model(site)

    assert 2.0 == site.factor()
    assert ("BUILDING", "onnxruntime", 0) == (model.state, model.backend, model.progress_percent)
    assert model.reason.startswith("BUILDING 0 %")
    assert site.service.settled

    works.compiler.go_on()
    site.until(lambda: model.state == "READY")
    percents = [said["progress_percent"] for said in site.published if said["state"] == "BUILDING"]
    assert ("tensorrt", "", None) == (model.backend, model.reason, model.progress_percent)
    assert 2.0 == site.factor()
    assert percents == sorted(percents)
    assert {0, 10, 50, 99} <= set(percents)
    assert {"onnxruntime"} == {said["backend"] for said in site.published if said["state"] == "BUILDING"}
    assert "edge-sdk_tensorrt" == metadata([model])["platform"]


def test_a_restart_does_not_build_again(works: Works) -> None:
    """What the store has is loaded, with nothing said of building."""
    package_to_compile(works.engines / "double")
    first = works.open()
    first.until(lambda: bool(first.states()) and the_model(first).backend == "tensorrt")
    first.service.stop(limit_s=0.0)
    second = works.open()
    second.settle()

    assert ("READY", "tensorrt", 1) == (the_model(second).state, the_model(second).backend, len(works.compiler.builds))
    assert 2.0 == second.factor()
    assert "BUILDING" not in {said["state"] for said in second.published}


@pytest.mark.parametrize("error", [BROKEN, ValueError("a defect")])
def test_a_build_that_fails_is_a_reason_and_no_outage(works: Works, error: Exception) -> None:
    """The second-best engine goes on, the model says why; it is not tried again until somebody reloads."""
    package_to_compile(works.engines / "double")
    works.compiler.fails = error
    site = works.open()
    site.until(lambda: bool(works.compiler.builds) and the_model(site).state == "READY")
    model = the_model(site)

    assert 2.0 == site.factor()
    assert "onnxruntime" == model.backend
    assert ("layer" if error is BROKEN else "defect of edge-sdk") in model.reason
    assert 1 == len(works.compiler.builds)

    works.compiler.fails = None
    site.service.reload()
    site.until(lambda: model.backend == "tensorrt")
    assert (2, "", 2.0) == (len(works.compiler.builds), model.reason, site.factor())


def test_an_engine_that_answers_otherwise_is_not_used(works: Works) -> None:
    """It is compared with the graph before it answers anybody, and taken out of the store, so that the next start does
    not believe it either."""
    package = package_to_compile(works.engines / "double")
    wrong = shifting().SerializeToString()
    works.compiler.turns_into = lambda graph: wrong
    site = works.open()
    site.until(lambda: "signal to noise" in the_model(site).reason if site.states() else False)
    model = the_model(site)

    assert ("READY", "onnxruntime", 2.0) == (model.state, model.backend, site.factor())
    assert not works.compiler.entry(package.manifest.files["graph.onnx"].sha256).exists()


def test_an_engine_that_does_not_load_is_not_used(works: Works) -> None:
    """Built and then refused: the reason is the refusal's."""
    package_to_compile(works.engines / "double")
    works.compiler.runs_into = EngineFailed("It was made on a Tuesday.")
    site = works.open()
    site.until(lambda: "Tuesday" in the_model(site).reason if site.states() else False)

    assert ("READY", "onnxruntime", 2.0) == (the_model(site).state, the_model(site).backend, site.factor())


def test_an_engine_that_cannot_compute_is_not_used(works: Works) -> None:
    """Neither when it was just built, nor where a start finds it in the store: the graph answers, and it is dropped."""
    package = package_to_compile(works.engines / "double")
    entry = works.compiler.entry(package.manifest.files["graph.onnx"].sha256)
    first = works.open()
    first.until(lambda: bool(first.states()) and the_model(first).backend == "tensorrt")
    works.compiler.computes = False
    second = works.open()
    second.settle()
    model = the_model(second)

    assert ("READY", "onnxruntime", 2.0) == (model.state, model.backend, second.factor())
    assert "cannot compute" in model.reason
    assert not entry.exists()

    third = works.open()
    third.until(lambda: "not used" in the_model(third).reason if third.states() else False)
    assert ("READY", "onnxruntime", 2.0) == (the_model(third).state, the_model(third).backend, third.factor())
    assert not entry.exists()


def test_a_device_lost_on_the_way_is_told(works: Works) -> None:
    """Loading the new engine finds the device in a state that only a new process ends."""
    package_to_compile(works.engines / "double")
    works.compiler.runs_into = DeviceLost("The stand-in has lost its device.")
    site = works.open()
    site.until(lambda: bool(works.losses))

    assert 1 == len(works.losses)


def test_an_engine_whose_trial_ended_the_process_is_not_tried_for_ever(works: Works) -> None:
    """The next start takes it away and does not build another one, which would end it again; a reload does."""
    package = package_to_compile(works.engines / "double")
    works.compiler.runs_into = DeviceLost("The stand-in has lost its device.")
    first = works.open()
    first.until(lambda: bool(works.losses))
    first.service.stop(limit_s=0.0)
    works.compiler.runs_into = None
    second = works.restart()
    second.settle()
    model = the_model(second)

    assert ("READY", "onnxruntime", 2.0) == (model.state, model.backend, second.factor())
    assert "ended the process" in model.reason
    assert 1 == len(works.compiler.builds)
    assert not works.compiler.entry(package.manifest.files["graph.onnx"].sha256).exists()

    second.service.reload()
    second.until(lambda: the_model(second).backend == "tensorrt")
    assert (2, 2.0) == (len(works.compiler.builds), second.factor())
    eventually(lambda: not list(works.store.glob("trial-*")), "the trial is over")


@pytest.mark.parametrize(
    "how", ["the graph is refused", "the engine answers otherwise", "the engine does not fit", "there is no room"]
)
def test_what_would_fail_again_is_not_built_at_every_start(how: str, works: Works) -> None:
    """The next process knows, and says why; somebody who reloads, or another version of the runtime, tries again.

    What was built lies about no longer: nobody has proven it.
    """
    package = package_to_compile(works.engines / "double")
    match how:
        case "the graph is refused":
            works.compiler.fails = ModelError("There is no such layer.")
        case "the engine answers otherwise":
            works.compiler.turns_into = lambda _: shifting().SerializeToString()
        case "the engine does not fit":
            works.compiler.runs_into = EngineUnfit("Its output has no size.", reasons=("its output has no size",))
        case "there is no room":
            works.compiler.runs_into = OutOfMemory("The engine needs more than the device has.")
    first = works.open()
    first.until(lambda: bool(works.compiler.builds) and the_model(first).state == "READY")
    said = the_model(first).reason
    first.service.stop(limit_s=0.0)
    second = works.restart()
    second.settle()

    assert ("READY", "onnxruntime", 1) == (
        the_model(second).state,
        the_model(second).backend,
        len(works.compiler.builds),
    )
    assert said.split(": ", 1)[1] in the_model(second).reason
    assert 2.0 == second.factor()
    assert not works.compiler.entry(package.manifest.files["graph.onnx"].sha256).exists()

    works.compiler.fails = works.compiler.runs_into = None
    works.compiler.turns_into = lambda graph: graph
    second.service.reload()
    second.until(lambda: the_model(second).backend == "tensorrt")


def test_another_version_of_the_runtime_is_another_chance(works: Works) -> None:
    package_to_compile(works.engines / "double")
    works.compiler.fails = ModelError("There is no such layer.")
    first = works.open()
    first.until(lambda: bool(works.compiler.builds) and the_model(first).state == "READY")
    first.service.stop(limit_s=0.0)
    works.compiler.version = "a later stand-in"
    works.compiler.fails = None
    second = works.restart()

    second.until(lambda: bool(second.states()) and the_model(second).backend == "tensorrt")


def test_an_engine_that_nobody_has_proven_is_not_believed(works: Works) -> None:
    """The process ended between the build and the trial: the next start builds it anew, and proves that one."""
    package = package_to_compile(works.engines / "double")
    entry = works.compiler.entry(package.manifest.files["graph.onnx"].sha256)
    entry.mkdir(parents=True)
    (entry / "engine.plan").write_bytes(shifting().SerializeToString())
    Trial(package, works.store).note("building")
    site = works.restart()
    site.until(lambda: bool(site.states()) and the_model(site).backend == "tensorrt")

    assert (1, 2.0) == (len(works.compiler.builds), site.factor())
    eventually(lambda: not list(works.store.glob("trial-*")), "the trial is over")


@pytest.mark.parametrize("how", ["replaced", "removed", "stopped"])
def test_a_build_that_nobody_wants_any_more_is_ended(works: Works, how: str) -> None:
    """Another package of the model, none, or the end of the service: its progress is where a build learns it."""
    package = package_to_compile(works.engines / "double")
    works.compiler.hold()
    site = works.open()
    site.until(lambda: bool(works.compiler.builds))
    if how == "replaced":
        package_to_compile(works.engines / "double", 3.0)
        site.service.reload()
        site.until(lambda: site.factor() == 3.0)
    elif how == "removed":
        package.path.rename(works.store.parent / "elsewhere")
        site.service.reload()
        site.until(lambda: not site.service.models())
    else:
        site.service.stop(limit_s=0.0)
    works.compiler.go_on()
    eventually(lambda: works.compiler.cancelled == 1, "the build was cancelled")

    if how == "replaced":
        site.until(lambda: the_model(site).backend == "tensorrt")
        assert 3.0 == site.factor()


def test_an_engine_that_was_built_for_nobody_is_not_kept(works: Works) -> None:
    """Another package came while it was put into the store: nobody will prove it, so nobody may find it there."""
    package = package_to_compile(works.engines / "double")
    entry = works.compiler.entry(package.manifest.files["graph.onnx"].sha256)
    kept, goes_on = threading.Event(), threading.Event()

    def once_kept() -> None:
        kept.set()
        goes_on.wait(20.0)

    works.compiler.once_kept = once_kept
    site = works.open()
    site.until(kept.is_set)
    works.compiler.once_kept = lambda: None
    package_to_compile(works.engines / "double", 3.0)
    site.service.reload()
    site.until(lambda: site.factor() == 3.0)
    goes_on.set()
    site.until(lambda: the_model(site).backend == "tensorrt")

    assert 3.0 == site.factor()
    assert not entry.exists()
    eventually(lambda: not list(works.store.glob("trial-*")), "both trials are over")


def test_where_building_is_off_the_graph_answers_for_good(works: Works) -> None:
    """READY, with the reason why it is not as fast as it might be."""
    package_to_compile(works.engines / "double")
    site = works.open(building=False)
    site.settle()
    model = the_model(site)

    assert ("READY", "onnxruntime", 2.0) == (model.state, model.backend, site.factor())
    assert "There is no engine" in model.reason
    assert [] == works.compiler.builds


def test_a_store_that_cannot_be_written_is_said_once_and_costs_no_build(
    works: Works, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log at the start, in the model's reason; the graph answers."""
    package_to_compile(works.engines / "double")
    works.store.write_bytes(b"a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        site = works.open()
        site.until(lambda: "No engine could be built" in the_model(site).reason if site.states() else False)
    said = [record for record in caplog.records if "engines are not built here" in record.message]

    assert ("READY", "onnxruntime", 2.0) == (the_model(site).state, the_model(site).backend, site.factor())
    assert str(works.store) in the_model(site).reason
    assert 1 == len(said)
    assert [] == works.compiler.builds


def test_one_engine_is_built_at_a_time(works: Works) -> None:
    """Two models wish for one, and both answer meanwhile."""
    for name, factor in (("one", 2.0), ("other", 3.0)):
        package_to_compile(works.engines / name, factor)
    site = works.open()
    site.until(lambda: [model.backend for model in site.service.models()] == ["tensorrt"] * 2)

    assert (2, 1) == (len(works.compiler.builds), works.compiler.most_at_once)
    assert (2.0, 3.0) == (site.factor(model="one"), site.factor(model="other"))


def test_no_request_is_lost_or_wrong_while_the_engine_changes(works: Works) -> None:
    """Requests pour in from before the build until after the swap."""
    package_to_compile(works.engines / "double")
    site = works.open(inline_ms=-1.0)
    site.settle()
    seen: set[int] = set()
    while the_model(site).backend != "tensorrt" or len(seen) < 20:
        batch = [request(float(n)) for n in range(5)]
        seen.update(answer.ticket for answer in site.ask(*batch))

    assert {"200"} == set(site.service.snapshot()["answers"])


def test_a_reload_takes_up_an_engine_that_came_from_elsewhere(works: Works) -> None:
    """Somebody has put one into the store: a model on its second-best backend looks again, any other is left alone."""
    package = package_to_compile(works.engines / "double")
    site = works.open(building=False)
    site.settle()
    entry = works.compiler.entry(package.manifest.files["graph.onnx"].sha256)
    entry.mkdir(parents=True)
    (entry / "engine.plan").write_bytes(package.read("graph.onnx"))
    site.service.reload()
    site.until(lambda: the_model(site).backend == "tensorrt")
    worker = the_model(site).worker
    package_to_compile(works.engines / "other")
    site.service.reload()
    site.until(lambda: "READY" == site.states().get("other/1"))

    assert (2.0, True) == (site.factor(), site.service.by_name()["double"][0].worker is worker)


# The builder alone


def test_a_percentage_is_said_when_it_is_news_and_not_too_often() -> None:
    """Whole percents, at most about twice a second, and never backwards."""
    now = 0.0
    said: list[int] = []
    ended = threading.Event()

    def build(package: Any, progress: Callable[[float], None]) -> None:
        nonlocal now
        for done in (0.101, 0.109, 0.2, 0.15, 0.3, 1.0):
            now += 0.3
            progress(done)

    builder = Builder(build, clock=lambda: now)
    builder.wish(("m", "1"), Wish("m", progress=said.append, built=ended.set, failed=pytest.fail))  # type: ignore[arg-type]

    assert ended.wait(10.0)
    assert [0, 10, 20, 30] == said  # 0.3 s apart, so every second one is due; 15 would be backwards, 99 came too soon
    builder.stop()
    builder.join(10.0)


# The yardstick


def test_a_yardstick_knows_its_engine_from_another(tmp_path: Path, works: Works) -> None:
    """Golden requests where the package has them; zeros, which every scaling answers alike, where it has none."""
    worker = Worker.load(package_to_compile(tmp_path / "double"))
    other = Worker.load(package_to_compile(tmp_path / "triple", 3.0))
    ones = [{"x": np.ones((1, 4), np.float32)}]
    yardstick = Yardstick(ones, [worker.ask(each) for each in ones])
    yardstick.check(worker)
    with pytest.raises(EngineUnfit, match=r"6\.02 dB"):
        yardstick.check(other)
    zeros = Yardstick.of(worker)

    assert 0.0 == float(np.abs(zeros.feeds[0]["x"]).sum())
    zeros.check(other)
