"""Pipelines in a service: what commands and deadlines do to them. `daemon/test_pipelines.py` has them at work."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Image = pytest.importorskip("PIL.Image", reason="pictures need the extra `vision`", exc_type=ImportError)

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

    def opened(wiring: str, *, takes_s: float = 0.0) -> Site:
        model = order(brightness(), [{"do": "sleep", "seconds": takes_s}])
        make_package(
            tmp_path / "engines" / "bright", model, backend="reference", preprocess=Preprocess(resize=(8, 8)),
            best_batch=1,
        )  # fmt: skip
        (tmp_path / "engine.toml").write_text(wiring)
        build_pipeline(tmp_path / "engine.toml", tmp_path / "engines" / "sees")
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


def test_nothing_is_cut_out_for_who_waits_no_longer(open_site: Callable[..., Site]) -> None:
    """The deadline passes while the first stage computes: what follows is not begun."""
    site = open_site(SEES + CUTS + ANSWERS, takes_s=0.3)
    now = time.monotonic()
    (answer,) = site.ask(request(photo(), model="sees", received=now, deadline=now + 0.2))

    assert 408 == answer.status
    assert "'cut'" in str(answer.result)
