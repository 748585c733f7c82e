"""Pipelines as they are written down: wiring that cannot work is refused where it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_sdk.errors import PackageError, SpecError
from edge_sdk.stages import PIPELINE, PipelinePackage, build_pipeline, load_pipeline_spec, pipeline_folders

DETECTOR = '[[stage]]\nname = "detector"\nmodel = "m"\npicture = "request"\n'
FOUND = '[[stage]]\nname = "found"\nop = "fastestdet-boxes"\ninputs = {head = "detector.head"}\n'
OUTPUTS = '[outputs]\nboxes = "found.boxes"\n'


def written(folder: Path, body: str) -> Path:
    file = folder / "engine.toml"
    file.write_text(f'name = "p"\n{body}')
    return file


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (FOUND + DETECTOR + OUTPUTS, r"'found' reads 'detector.head'; .* before it \(none yet\)"),
        (DETECTOR + FOUND + '[outputs]\nboxes = "found.places"\n', "fastestdet-boxes gives boxes, classes, labels"),
        (DETECTOR + FOUND + '[outputs]\nphoto = "request"\n', "an answer holds tensors"),
        (DETECTOR + DETECTOR + OUTPUTS, "two stages are called 'detector'"),
        (DETECTOR + FOUND.replace("head =", "heads =") + OUTPUTS, "fastestdet-boxes takes head"),
        (DETECTOR + FOUND + DETECTOR.replace("detector", "d2").replace("request", "found.boxes") + OUTPUTS, "is none"),
        (DETECTOR.replace('model = "m"\n', "") + OUTPUTS, "either a `model` or an `op`"),
        (DETECTOR.replace('picture = "request"\n', "") + OUTPUTS, "either a `picture` or `inputs`"),
        (DETECTOR.replace('"m"', '"m"\ndevice = "a"\ngroup = "b"') + OUTPUTS, "not of both"),
        (DETECTOR.replace('"detector"', '"request"') + OUTPUTS, "no stage is called 'request'"),
        (DETECTOR + FOUND.replace('"found"', '"found"\ndevice = "a"') + OUTPUTS, "is done here"),
        (DETECTOR + FOUND, "`outputs` is missing"),
    ],
)
def test_wiring_that_cannot_work_is_refused(body: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=said):
        load_pipeline_spec(written(tmp_path, body))


def test_a_pipeline_is_a_file(tmp_path: Path) -> None:
    """Labels and all; built again it is the same, and nothing else is overwritten."""
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    spec = written(tmp_path, DETECTOR + FOUND + 'labels = "labels.txt"\n' + OUTPUTS)
    built = build_pipeline(spec, tmp_path / "engines" / "p")

    assert ("cat", "dog") == built.spec.stage[1].labels
    assert [built.path] == pipeline_folders(tmp_path / "engines")
    assert built.digest == build_pipeline(spec, built.path).digest
    (built.path / "photo.jpg").touch()
    with pytest.raises(PackageError, match="no pipeline"):
        build_pipeline(spec, built.path)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 2}', b'{"format": 1, "name": "p"}', b"\xff", b"[" * 9999])
def test_a_file_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / PIPELINE).write_bytes(content)
    with pytest.raises(PackageError, match="pipeline"):
        PipelinePackage.open(tmp_path)
