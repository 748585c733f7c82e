"""Figures are what they say they are: accuracy over the samples, batches that answer as single requests do."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, helper

from edge_sdk.backends.base import Engine
from edge_sdk.backends.onnxruntime import OnnxRuntimeBackend
from edge_sdk.compile.datasets import Sample
from edge_sdk.compile.verify import best_batch, can_stack, judge, throughput, time_engines
from edge_sdk.errors import DataError
from edge_sdk.profiles import DeviceProfile
from edge_sdk.tensors import EXACT_DB
from tests.compile.graphs import conv_net, model, pictures


def _engine(graph: ModelProto, profile: DeviceProfile) -> Engine:
    return OnnxRuntimeBackend().load_graph(graph.SerializeToString(), profile)


def _identity(bias: list[float], profile: DeviceProfile) -> Engine:
    """Scores that are the input plus `bias`."""
    weights = {"bias": np.array([bias], np.float32)}
    nodes = [helper.make_node("Add", ["x", "bias"], ["y"])]
    return _engine(model(nodes, {"x": ["N", 3]}, {"y": ["N", 3]}, weights), profile)


def _samples(labels: list[int | None]) -> list[Sample]:
    return [
        Sample(str(i), {"x": np.eye(3, dtype=np.float32)[i % 3][np.newaxis]}, label) for i, label in enumerate(labels)
    ]


def test_an_engine_agrees_with_itself(cpu: DeviceProfile) -> None:
    """The same answers: agreement in everything, no difference, and the same top-1."""
    engine = _identity([0, 0, 0], cpu)
    judgement = judge(engine, [engine], _samples([0, 1, 0, 0]), classes=True)

    assert 75.0 == judgement.reference_top1_percent == judgement.candidates[0].top1_percent
    assert 100.0 == judgement.candidates[0].agreement_percent
    assert EXACT_DB == judgement.candidates[0].snr_db


def test_differences_are_counted(cpu: DeviceProfile) -> None:
    """A bias that lifts class 2 over the others: one of three labels stays, and the ratio is as computed."""
    judgement = judge(_identity([0, 0, 0], cpu), [_identity([0, 0, 2], cpu)], _samples([0, 1, 2]), classes=True)
    found = judgement.candidates[0]

    assert 100.0 == judgement.reference_top1_percent
    assert pytest.approx(33.33) == found.top1_percent
    assert pytest.approx(33.33) == found.agreement_percent
    assert pytest.approx(10 * np.log10(3 / 12), abs=0.01) == found.snr_db


def test_without_labels_there_is_no_top1(cpu: DeviceProfile) -> None:
    """And without classes no agreement."""
    engine = _identity([0, 0, 0], cpu)
    found = judge(engine, [engine], _samples([None, None]), classes=False)

    assert found.reference_top1_percent is None
    assert found.candidates[0].agreement_percent is None


def test_nan_is_noticed(cpu: DeviceProfile) -> None:
    """One NaN anywhere makes an engine not finite; in the reference it is the data's or the model's fault."""
    good, bad = _identity([0, 0, 0], cpu), _identity([0, float("nan"), 0], cpu)

    assert not judge(good, [bad], _samples([None]), classes=True).candidates[0].finite
    with pytest.raises(DataError):
        judge(bad, [good], _samples([None]), classes=True)


def test_another_shape_is_another_answer(cpu: DeviceProfile) -> None:
    """As many rows as were found, for instance: outputs that cannot be subtracted have nothing in common."""
    nodes = [helper.make_node("Concat", ["x", "x"], ["y"], axis=0)]
    twice = _engine(model(nodes, {"x": ["N", 3]}, {"y": ["M", 3]}), cpu)
    found = judge(_identity([0, 0, 0], cpu), [twice], _samples([None]), classes=False)

    assert -EXACT_DB == found.candidates[0].snr_db


def test_labels_beyond_the_classes_are_refused(cpu: DeviceProfile) -> None:
    """A date at the beginning of a file name is not a class."""
    engine = _identity([0, 0, 0], cpu)

    with pytest.raises(DataError) as caught:
        judge(engine, [engine], _samples([20240101]), classes=True)

    assert "3 classes" in caught.value.problem


def test_stacking_is_believed_only_when_seen(cpu: DeviceProfile) -> None:
    """A model whose axes allow batches but whose rows influence one another is asked one at a time."""
    mixing = [helper.make_node("ReduceMean", ["x"], ["m"], axes=[0]), helper.make_node("Sub", ["x", "m"], ["y"])]
    mixer = _engine(model(mixing, {"x": ["N", 3]}, {"y": ["N", 3]}), cpu)
    feeds = {"x": np.ones((1, 3), np.float32)}

    assert can_stack(_identity([0, 0, 0], cpu), feeds)
    assert not can_stack(mixer, feeds)
    assert [1] == list(throughput(mixer, feeds, 8, seconds=0.01))


def test_throughput_covers_batches_up_to_the_largest(cpu: DeviceProfile) -> None:
    """1, 2, 4 and the largest that is allowed, even if that is no power of two."""
    rates = throughput(_engine(conv_net(), cpu), {"image": pictures(1)}, 6, seconds=0.01)

    assert [1, 2, 4, 6] == list(rates)
    assert all(rate > 0 for rate in rates.values())


def test_best_batch_is_the_smallest_of_the_fastest() -> None:
    """Within the noise, the batch that answers sooner wins."""
    assert 4 == best_batch({1: 100.0, 2: 180.0, 4: 299.0, 8: 300.0})


def test_timing_gives_one_median_an_engine(cpu: DeviceProfile) -> None:
    """Every engine had its turns, however short the time."""
    engine = _engine(conv_net(), cpu)

    assert 2 == len(time_engines([engine, engine], {"image": pictures(1)}, seconds=0.1))
