"""Pipelines without a daemon: asked and measured in this process. `daemon/test_pipelines.py` compares the answers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

Image = pytest.importorskip("PIL.Image", reason="pictures need the extra `vision`", exc_type=ImportError)

from edge_sdk.package import GRAPH  # noqa: E402
from edge_sdk.spec import Preprocess  # noqa: E402
from edge_sdk.stages import build_pipeline  # noqa: E402
from tests.packages import brightness, make_package, order, scaling  # noqa: E402
from tests.test_cli import edge_sdk  # noqa: E402

SEES = """
name = "sees"

[[stage]]
name = "eye"
model = "bright"
%s
picture = "request"

[outputs]
scores = "eye.%s"
"""


def grey(level: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (level, level, level)).save(stream, "PNG")
    return stream.getvalue()


def bright(folder: Path, *, scale: float = 1.0, orders: Sequence[dict[str, object]] = (), **package: Any) -> None:
    """A package that gives the mean of each colour, times `scale`."""
    preprocess = Preprocess(resize=(8, 8), scale=scale)
    make_package(folder, order(brightness(), orders), name="bright", preprocess=preprocess, **package)


def sees(engines: Path, *, more: str = "", tensor: str = "scores", folder: str = "sees/build/pipeline") -> Path:
    """The pipeline `sees` in an engines folder."""
    spec = engines.parent / "engine.toml"
    engines.mkdir(parents=True, exist_ok=True)
    spec.write_text(SEES % (more, tensor))
    return build_pipeline(spec, engines / folder).path


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """A folder with the model that sees."""
    bright(tmp_path / "engines" / "bright" / "build" / "cpu-x86")
    return tmp_path / "engines"


@pytest.mark.parametrize("folder", ["sees/build/pipeline", "sees", "sees/1"])
def test_a_pipeline_is_asked_without_a_broker(engines: Path, folder: str) -> None:
    """Wherever the daemon would find it, its models are found beside it; nothing else there is looked into."""
    make_package(engines / "broken", b"no graph at all")
    pipeline = sees(engines, folder=folder)
    asked = edge_sdk("infer", "--local", pipeline, "--input", "-", stdin=grey(200))
    found = edge_sdk("infer", "--local", pipeline, "--input", "-", "--json", stdin=grey(200)).json

    assert "scores: float32[1, 3] = 200, 200, 200\n" == asked.out
    assert "" == asked.err
    assert ("sees", "1") == (found["model_name"], found["model_version"])
    assert [200.0] * 3 == found["outputs"][0]["data"]


def test_the_newest_version_is_asked_unless_one_is_named(engines: Path) -> None:
    bright(engines / "bright" / "10", version="10", scale=0.5)
    newest, named = sees(engines), sees(engines, more='version = "1"', folder="named")
    found = [edge_sdk("infer", "--local", path, "--input", "-", stdin=grey(200)).out for path in (newest, named)]

    assert ["scores: float32[1, 3] = 100, 100, 100\n", "scores: float32[1, 3] = 200, 200, 200\n"] == found


def test_a_pipeline_is_measured(engines: Path, tmp_path: Path) -> None:
    """From the picture to the answer, with so many on their way; zeros are no picture."""
    pipeline = sees(engines)
    (tmp_path / "grey.png").write_bytes(grey(7))
    measured = ("bench", pipeline, "--input", tmp_path / "grey.png", "--seconds", "0.2")
    found = edge_sdk(*measured, "--concurrency", "4", "--json").json
    nothing = edge_sdk("bench", pipeline)

    assert (4, 0, None) == (found["concurrency"], found["errors"], found["device"])
    assert 4 < found["requests"]
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert "requests/s, p50" in edge_sdk(*measured).out
    assert 3 == nothing.code
    assert "takes a picture" in nothing.error


def test_what_is_no_picture_is_refused(engines: Path) -> None:
    """As the daemon refuses it; rows of a sequence are none either."""
    pipeline = sees(engines)
    asked = edge_sdk("infer", "--local", pipeline, "--input", "-", stdin=b"{}")
    sequence = edge_sdk("infer", "--local", pipeline, "--input", "-", "--sequence", stdin=grey(7))

    assert (6, True) == (asked.code, "JPEG or PNG" in asked.error)
    assert (3, True) == (sequence.code, "no sequences" in sequence.error)


def test_a_stage_that_is_not_there_is_named(engines: Path, tmp_path: Path) -> None:
    """With the folder in which it was looked for."""
    away = sees(tmp_path / "elsewhere" / "engines")
    version = sees(engines, more='version = "7"')
    asked = [edge_sdk("infer", "--local", path, "--input", "-", stdin=grey(7)) for path in (away, version)]

    assert [3, 3] == [each.code for each in asked]
    assert f"'bright', which is not in {tmp_path / 'elsewhere' / 'engines'}" in asked[0].error
    assert "'bright' in the version 7" in asked[1].error


def test_a_stage_of_another_device_needs_a_daemon(engines: Path) -> None:
    """Both commands say so, and what to use in their place."""
    pipeline = sees(engines, more='device = "door-cam"')
    asked = edge_sdk("infer", "--local", pipeline, "--input", "-", stdin=grey(7))
    measured = edge_sdk("bench", pipeline, "--input", __file__)

    assert (3, asked.error) == (measured.code, measured.error)
    assert "the device 'door-cam' for its stage 'eye'" in asked.error
    assert "edge-sdk serve" in asked.error
    assert "edge-sdk infer sees" in asked.error
    assert "edge-sdk bench --broker URL sees" in asked.error


def test_models_that_do_not_do_are_said(engines: Path) -> None:
    """One that does not give what is wired, one whose files were altered, and one that no runtime takes."""
    pipelines = sees(engines, tensor="colour"), sees(engines, folder="sound"), sees(engines, folder="unsound")
    model = engines / "bright" / "build" / "cpu-x86"
    asked = [edge_sdk("infer", "--local", pipelines[0], "--input", "-", stdin=grey(7))]
    (model / GRAPH).write_bytes(scaling().SerializeToString())
    asked.append(edge_sdk("infer", "--local", pipelines[1], "--input", "-", stdin=grey(7)))
    make_package(model, b"no graph at all", name="bright")
    asked.append(edge_sdk("infer", "--local", pipelines[2], "--input", "-", stdin=grey(7)))

    assert [3, 3, 3] == [each.code for each in asked]
    assert "has no output 'colour'; it has scores" in asked[0].error
    assert f"{model / GRAPH} was altered" in asked[1].error
    assert "The model 'bright' of the pipeline sees did not load: " in asked[2].error


@pytest.mark.parametrize("when", [0.0, 7.0], ids=["while it loads", "while it computes"])
def test_a_lost_device_is_an_end(engines: Path, when: float) -> None:
    """Nobody waits for answers that cannot come any more."""
    orders = [{"do": "lose-device", "when": when}]
    bright(engines / "bright" / "build" / "cpu-x86", orders=orders, backend="reference")
    asked = edge_sdk("infer", "--local", sees(engines), "--input", "-", stdin=grey(7))

    assert 4 == asked.code
    assert "device" in asked.error
