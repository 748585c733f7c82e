"""The [sequence] table: what it says about a model, and what it says when the model is another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.errors import PackageError, SpecError
from edge_sdk.package import EnginePackage
from edge_sdk.sequence import SequenceRules
from edge_sdk.spec import load_spec
from edge_sdk.tensors import TensorSpec, is_batchable
from tests import packages

VAD = {
    "states": [{"input": "state", "output": "stateN", "batch_axis": 1}],
    "constants": {"sr": 16000},
    "context": {"input": "input", "samples": 64},
}
INPUTS = (
    TensorSpec("input", "float32", ("batch", "sequence")),
    TensorSpec("state", "float32", (2, "batch", 128)),
    TensorSpec("sr", "int64", ()),
)
OUTPUTS = (TensorSpec("output", "float32", ("batch", 1)), TensorSpec("stateN", "float32", ("a", "batch", "b")))
SIZES = {"sequence": 576}


def rules(**changes: Any) -> SequenceRules:
    return SequenceRules.model_validate({**VAD, **changes})


def test_aligned_it_is_a_model_that_stacks() -> None:
    """The batch is the first axis of everything, constants are gone, and sizes are known."""
    inputs, outputs = rules().aligned(INPUTS, OUTPUTS, SIZES)

    assert ["input: float32[batch, 576]", "state: float32[batch, 2, 128]"] == [str(spec) for spec in inputs]
    assert ["output: float32[batch, 1]", "stateN: float32[batch, 2, 128]"] == [str(spec) for spec in outputs]
    assert is_batchable(inputs, outputs)
    assert not is_batchable(INPUTS, OUTPUTS)


def test_a_request_brings_what_is_new() -> None:
    """Neither the state nor the constant nor the context."""
    rules().check(INPUTS, OUTPUTS, SIZES)

    assert ["input: float32[batch, 512]"] == [str(spec) for spec in rules().asked(INPUTS, SIZES)]
    assert ["output: float32[batch, 1]"] == [str(spec) for spec in rules().answered(OUTPUTS)]
    assert 16000 == rules().constant_feeds(INPUTS, SIZES)["sr"]
    assert np.dtype(np.int64) == rules().constant_feeds(INPUTS, SIZES)["sr"].dtype


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"states": [{"input": "stat", "output": "stateN"}]}, "the input 'stat', which the model does not have"),
        ({"states": [{"input": "state", "output": "stateM"}]}, "Its outputs are 'output', 'stateN'"),
        ({"states": [{"input": "state", "output": "output"}]}, "one dtype and one number of axes"),
        ({"states": [{"input": "state", "output": "stateN", "batch_axis": 3}]}, "axis 3 .* is the batch; it has 3"),
        ({"states": [{"input": "state", "output": "stateN", "batch_axis": 0}]}, "a size that is not known"),
        ({"constants": {"sr": 1.5}}, "1.5, which is no int64"),
        ({"constants": {"sr": 16000, "input": 0}, "context": None}, "its size is not fixed|every input"),
        ({"context": {"input": "input", "samples": 576}}, "leaves no room"),
        ({"context": {"input": "input", "samples": 64, "axis": 2}}, "leaves no room"),
    ],
)
def test_another_model_is_told_apart(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        rules(**changes).check(INPUTS, OUTPUTS, SIZES)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("", "nothing to keep"),
        ('states = [{input = "a", output = "b"}, {input = "a", output = "c"}]', "'a' is named twice"),
        ('states = [{input = "a", output = "b"}]\ncontext = {input = "a", samples = 1}', "a state or a constant too"),
        ('context = {input = "a", samples = 1}\n[batching]\nnewest_wins = true', "out of the middle"),
        ('context = {input = "a", samples = 1}\n[calibration]\ndata = "x.npz"', "neither calibrated nor judged"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(table: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "engine.toml").write_text(f'name = "x"\nmodel = "x.onnx"\n[sequence]\n{table}\n')
    with pytest.raises(SpecError, match=said):
        load_spec(tmp_path)


def test_a_package_that_promises_another_state_is_refused(tmp_path: Path) -> None:
    """Its manifest is at fault, and is named."""
    states = {"states": [{"input": "state", "output": "new_state", "batch_axis": 1}]}
    package = packages.make_package(
        tmp_path / "odd", packages.stateful(), sequence=SequenceRules.model_validate(states)
    )
    manifest = package.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"input": "state"', '"input": "memory"'))
    with pytest.raises(PackageError, match=r"manifest\.json: .*'memory', which the model does not have"):
        EnginePackage.open(package.path)
