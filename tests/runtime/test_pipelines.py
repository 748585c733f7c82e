"""Pipelines in a service: what commands and deadlines do to them. `daemon/test_pipelines.py` has them at work."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Image = pytest.importorskip("PIL.Image", reason="pictures need the extra `vision`", exc_type=ImportError)

from edge_sdk.errors import Unavailable  # noqa: E402
from edge_sdk.mqtt.presence import metadata  # noqa: E402
from edge_sdk.runtime.served import UNLOADED  # noqa: E402
from edge_sdk.spec import Preprocess  # noqa: E402
from edge_sdk.stages import PIPELINE, build_pipeline  # noqa: E402
from edge_sdk.tasks.base import JPEG, Payload  # noqa: E402
from tests.packages import brightness, make_package, order  # noqa: E402
from tests.runtime.requests import request  # noqa: E402
from tests.runtime.test_service import Site  # noqa: E402

SEES = """
name = "sees"

[[stage]]
name = "eye"
model = "bright"
picture = "request"
"""
ANSWERS = """
[outputs]
scores = "eye.scores"
"""
CUTS = """
[[stage]]
name = "cut"
op = "crop"
picture = "request"
inputs = {boxes = "eye.scores"}

[[stage]]
name = "parts"
model = "bright"
picture = "cut.pictures"
"""


def photo() -> Payload:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20)).save(stream, "JPEG")
    return Payload(stream.getvalue(), JPEG)


@pytest.fixture
def open_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """A service with a model that sees, slowly if that is wanted, and the pipeline `sees` that asks it."""
    sites: list[Site] = []

    def opened(wiring: str, *, takes_s: float = 0.0, broken: str | None = None) -> Site:
        model = order(brightness(), [{"do": "sleep", "seconds": takes_s}])
        make_package(
            tmp_path / "engines" / "bright", model, backend="reference", preprocess=Preprocess(resize=(8, 8)),
            best_batch=1,
        )  # fmt: skip
        (tmp_path / "engine.toml").write_text(wiring)
        build_pipeline(tmp_path / "engine.toml", tmp_path / "engines" / "sees")
        if broken is not None:
            (tmp_path / "engines" / "sees" / PIPELINE).write_text(broken)
        sites.append(Site(tmp_path / "engines"))
        sites[-1].service.start()
        sites[-1].settle()
        return sites[-1]

    yield opened
    for site in sites:
        site.service.stop(limit_s=0.0)


def test_a_pipeline_is_unloaded_and_loaded(open_site: Callable[..., Site]) -> None:
    """As a model is: 503 until `load`, whatever is reloaded meanwhile; its models serve on."""
    site = open_site(SEES + ANSWERS)
    asked = [site.ask(request(photo(), model="sees"))[0].status]
    unloaded = site.service.unload("sees").result()
    asked.append(site.ask(request(photo(), model="sees"))[0].status)
    site.reload()
    states, reasons = site.states(), {model.model: model.reason for model in site.service.models()}
    loaded = site.service.load("sees").result()
    asked.append(site.ask(request(photo(), model="sees"))[0].status)

    figures = site.service.snapshot()["models"]
    assert ["sees/1"] == [name for name in figures if "memory" not in figures[name]], "it holds none that could be away"
    assert ({"sees/1": "UNAVAILABLE"}, {"sees/1": "READY"}) == (unloaded, loaded)
    assert ("UNAVAILABLE", "READY") == (states["sees/1"], states["bright/1"])
    assert "unloaded" in reasons["sees"]
    assert [200, 503, 200] == asked


def test_a_file_that_broke_harms_nobody(open_site: Callable[..., Site]) -> None:
    """What was served from it goes on, as a model's package does."""
    site = open_site(SEES + ANSWERS)
    (site.engines / "sees" / PIPELINE).write_text("{")
    site.reload()

    assert "READY" == site.states().get("sees/1")
    assert [200] == [answer.status for answer in site.ask(request(photo(), model="sees"))]


@pytest.mark.parametrize("content", ["{", '{"format": 1, "name": "sees"}'], ids=["no JSON", "no stages"])
def test_a_file_that_is_broken_from_the_start_is_said(open_site: Callable[..., Site], content: str) -> None:
    """As a model's package that cannot be opened: it is UNAVAILABLE with the reason, and serves once it is repaired."""
    site = open_site(SEES + ANSWERS, broken=content)
    (place,) = site.service.by_name()["sees"]
    told, figures = metadata([place]), site.service.snapshot()["models"]["sees/0"]
    refused = site.ask(request(photo(), model="sees"))[0]
    unloaded = site.service.unload("sees").result()
    why_not = site.service.by_name()["sees"][0].reason
    site.service.load("sees").result()
    reason = site.service.by_name()["sees"][0].reason
    build_pipeline(site.engines.parent / "engine.toml", site.engines / "sees")
    site.reload()

    assert ("sees", ["0"], "UNAVAILABLE") == (told["name"], told["versions"], told["state"])
    assert f"{PIPELINE}" in told["reason"]
    assert "UNAVAILABLE" == figures["state"]
    assert isinstance(refused.result, Unavailable)
    assert not refused.result.retryable
    assert ({"sees/0": "UNAVAILABLE"}, UNLOADED) == (unloaded, why_not)
    assert place.reason == reason
    assert {"bright/1": "READY", "sees/1": "READY"}.items() <= site.states().items()
    assert "sees/0" not in site.states()
    assert [200] == [answer.status for answer in site.ask(request(photo(), model="sees"))]


def test_what_is_under_way_at_a_stop_is_answered(open_site: Callable[..., Site]) -> None:
    """As what waits for a model: 503, and when to come back; and what comes after it, too."""
    site = open_site(SEES + ANSWERS, takes_s=0.7)
    sent = request(photo(), model="sees")
    site.submit(sent)
    finished = site.service.stop(limit_s=0.05)
    late = request(photo(), model="sees")
    site.submit(late)
    site.until(lambda: len(site.answers) == 2)
    told = [answer.result.retry_after_ms for answer in site.answers if isinstance(answer.result, Unavailable)]

    assert not finished
    assert {sent.ticket, late.ticket} == {answer.ticket for answer in site.answers}
    assert [1000, 1000] == told
    assert 0 == site.service.by_name()["sees"][0].waiting


def test_nothing_is_cut_out_for_who_waits_no_longer(open_site: Callable[..., Site]) -> None:
    """The deadline passes while the first stage computes: what follows is not begun."""
    site = open_site(SEES + CUTS + ANSWERS, takes_s=0.3)
    now = time.monotonic()
    (answer,) = site.ask(request(photo(), model="sees", received=now, deadline=now + 0.2))

    assert 408 == answer.status
    assert "'cut'" in str(answer.result)
