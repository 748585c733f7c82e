"""A loaded model at work: a batch is what each request would have got alone, and trouble stays with its cause."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

from edge_sdk.errors import EngineFailed, PackageError
from edge_sdk.runtime.worker import Worker
from edge_sdk.tasks.base import BINARY, JSON, Payload
from edge_sdk.tensors import Array
from tests import packages
from tests.compile.graphs import conv_net, pictures
from tests.runtime.requests import payload, request, response, statuses

Hire = Callable[..., Worker]


@pytest.fixture
def hire(tmp_path: Path) -> Hire:
    """A worker for a graph; keyword arguments are the package's."""

    def hired(model: ModelProto, *, clock: Callable[[], float] = lambda: 0.0, **package: Any) -> Worker:
        made = packages.make_package(tmp_path / "package", model, **package)
        return Worker.load(made, clock=clock)

    return hired


def rows_of(worker: Worker, *payloads: Payload, output: str = "y") -> list[Array]:
    """One output of each answer to requests that are computed as one batch, in the order of the requests."""
    requests = [request(sent) for sent in payloads]
    answers = {answer.ticket: answer for answer in worker.run_batch(requests)}

    assert {each.ticket for each in requests} == set(answers)
    return [response(answers[each.ticket]).outputs[output] for each in requests]


@pytest.mark.parametrize("backend", sorted({packages.BACKEND, "reference"}))
def test_a_batch_is_its_requests(hire: Hire, backend: str) -> None:
    """Each answer holds its own rows, in order, whatever the sizes and the forms of the others."""
    worker = hire(packages.scaling(2.0), backend=backend, max_batch=8)
    answers = worker.run_batch([request(float(n), rows=n % 3 + 1) for n in range(10)])

    for n, answer in enumerate(answers):
        assert [[2.0 * n] * 4] * (n % 3 + 1) == response(answer).outputs["y"].tolist()


def test_a_batch_computes_what_each_would_get_alone(hire: Hire) -> None:
    """On a real network, within the tolerance of another order of summation."""
    worker = hire(conv_net(), max_batch=4)
    sent = [payload(image=pictures(1, seed=n)) for n in range(6)]
    together = rows_of(worker, *sent, output="scores")
    alone = [rows_of(worker, one, output="scores")[0] for one in sent]

    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "max_batch", "batches"),
    [
        (packages.scaling(batch=1), 8, [1, 1]),
        (packages.scaling(batch=3), 1, [3, 3]),
        (packages.scaling(), 1, [1, 1]),
    ],
    ids=["fixed at 1", "fixed at 3", "max_batch 1"],
)
def test_a_model_that_shares_no_batch_computes_one_by_one(
    hire: Hire, model: ModelProto, max_batch: int, batches: list[int]
) -> None:
    """A fixed first axis, or a package whose rows must not be mixed: right answers, one at a time."""
    worker = hire(model, max_batch=max_batch)
    sent = [payload(x=np.full((size, 4), n, np.float32)) for n, size in enumerate(batches)]

    assert [0.0, 2.0] == [float(rows.mean()) for rows in rows_of(worker, *sent)]


def test_sizes_that_only_the_request_knows(hire: Hire) -> None:
    """Free lengths, outputs of other axes, state along a second axis: any size, also after a smaller one."""
    lengths = [3, 5, 1]
    totals = rows_of(hire(packages.total()), *[payload(x=np.ones(length, np.float32)) for length in lengths])
    sums = rows_of(hire(packages.counting()), *[payload(x=np.ones((length, 4), np.float32)) for length in lengths])
    state = [payload(sample=np.ones((n, 2), np.float32), state=np.full((1, n, 2), 2, np.float32)) for n in lengths]
    steps = rows_of(hire(packages.stateful(), max_batch=1), *state, output="total")

    assert [3.0, 5.0, 1.0] == [float(total) for total in totals]
    assert [[4.0] * length for length in lengths] == [each.tolist() for each in sums]
    assert [[[3.0, 3.0]] * length for length in lengths] == [step.tolist() for step in steps]


@pytest.mark.parametrize("backend", sorted({packages.BACKEND, "reference"}))
def test_requests_of_one_size_are_computed_together(hire: Hire, backend: str) -> None:
    """Each gets what it would get alone, in the order in which they came, also where sizes come by turns."""
    worker = hire(packages.texts(), backend=backend, max_batch=4)
    lengths = [3, 7, 3, 3, 1, 7, 3, 3]
    draw = np.random.default_rng(1)
    sent = [request(payload(tokens=draw.integers(0, 50, (1, length)))) for length in lengths]
    answers = worker.run_batch(sent)
    alone = [worker.run_batch([each])[0] for each in sent]

    assert [each.ticket for each in sent] == [answer.ticket for answer in answers]
    assert [4, 2, 4, 4, 1, 2, 4, 1] == [answer.timing.batch for answer in answers if answer.timing is not None]
    for answer, other in zip(answers, alone):
        for name, wanted in response(other).outputs.items():
            np.testing.assert_allclose(wanted, response(answer).outputs[name], rtol=1e-5, atol=1e-6)


def test_the_odd_one_among_equal_sizes_fails_alone(hire: Hire) -> None:
    """A token that the model has no row for is its sender's to hear of; texts of its length are computed, and others
    that cannot be read are answered in their turn."""
    worker = hire(packages.texts(), max_batch=4)
    tokens = [[1, 2], [1, 99], [3, 4], [1], [5, 6]]
    sent = [request(payload(tokens=np.array([each], np.int64))) for each in tokens]
    sent.insert(1, request(Payload(b"{", JSON)))
    answers = worker.run_batch(sent)

    assert [each.ticket for each in sent] == [answer.ticket for answer in answers]
    assert [200, 400, 500, 200, 200, 200] == statuses(answers)


def test_rows_and_sizes_are_counted_together(hire: Hire) -> None:
    """Requests of several rows share a batch of their size as far as it goes; more than a batch is 413."""
    worker = hire(packages.texts(), max_batch=4)
    sent = [request(payload(tokens=np.ones((rows, length), np.int64))) for rows, length in [(2, 3), (2, 3), (5, 3)]]
    answers = worker.run_batch(sent)

    assert [200, 200, 413] == statuses(answers)
    assert [(2, 3, 3), (2, 3, 3)] == [response(answer).outputs["each"].shape for answer in answers[:2]]


def test_a_package_that_shares_nothing_takes_any_first_axis(hire: Hire) -> None:
    """With `max_batch` 1 nobody knows that the first axis is a batch: five rows are one request, computed alone."""
    worker = hire(packages.centring(), max_batch=1)
    sent = [payload(x=np.arange(5 * width, dtype=np.float32).reshape(5, width)) for width in (2, 3)]
    centred = rows_of(worker, *sent)

    assert [[0.0, 0.0], [0.0, 0.0, 0.0]] == [each.mean(axis=0).tolist() for each in centred]


def test_strings_share_a_batch_too(hire: Hire) -> None:
    """Arrays that cannot be kept between batches are joined, and each request gets its own words."""
    worker = hire(packages.identity(TensorProto.STRING, ("batch", 1)), max_batch=4)
    words = [np.array([[word]], dtype=object) for word in (b"one", "zwölf".encode(), b"")]

    assert [word.tolist() for word in words] == [
        each.tolist() for each in rows_of(worker, *[payload(x=w) for w in words])
    ]


def test_a_request_larger_than_a_batch_is_too_large(hire: Hire) -> None:
    """413 for it, and its neighbours are computed."""
    worker = hire(packages.scaling(), max_batch=2)
    big, small = request(1.0, rows=3), request(1.0)
    answers = {answer.ticket: answer.status for answer in worker.run_batch([big, small])}

    assert {big.ticket: 413, small.ticket: 200} == answers


def test_what_cannot_be_decoded_harms_nobody(hire: Hire) -> None:
    """Each bad request gets its own status; good ones in the same batch are answered."""
    worker = hire(packages.scaling())
    bad = [Payload(b"{", JSON), Payload(b"abc", BINARY), Payload(b"abc", "audio/midi"), payload(z=np.zeros((1, 4)))]
    requests = [request(1.0), *map(request, bad), request(2.0)]
    answers = {answer.ticket: answer.status for answer in worker.run_batch(requests)}

    assert [200, 400, 422, 415, 422, 200] == [answers[each.ticket] for each in requests]


def test_one_poisonous_request_gets_the_500_alone(hire: Hire, caplog: pytest.LogCaptureFixture) -> None:
    """A batch that fails is computed again one by one; what the runtime said stays in the log."""
    model = packages.misbehaving([{"do": "raise", "when": 666.0}])
    worker = hire(model, backend="reference")
    requests = [request(1.0), request(666.0), request(2.0)]
    with caplog.at_level(logging.WARNING):
        answers = {answer.ticket: answer for answer in worker.run_batch(requests)}

    assert [200, 500, 200] == [answers[each.ticket].status for each in requests]
    assert "told to fail" not in str(answers[requests[1].ticket].result)
    assert "told to fail" in caplog.text


def test_nan_stays_with_the_request_that_asked_in_json(hire: Hire) -> None:
    """The runtime gives NaN: 500 where the answer is JSON, the NaN itself where it is binary."""
    worker = hire(packages.misbehaving([{"do": "nan"}]), backend="reference")
    in_json = Payload(np.zeros(4, np.float32).tobytes(), BINARY)
    answers = worker.run_batch([request(in_json), request(1.0)])

    assert [500, 200] == statuses(answers)
    assert np.isnan(response(answers[1]).outputs["y"]).all()


def test_memory_that_is_not_there_is_507(hire: Hire) -> None:
    """The greedy request is told so, the next one is computed."""
    worker = hire(packages.filling(), max_batch=1)
    sizes = [payload(x=np.array([size], np.int64)) for size in (2**44, 2)]
    answers = worker.run_batch([request(sent) for sent in sizes])

    assert [507, 200] == statuses(answers)


def test_an_answer_outlives_the_next_batch(hire: Hire) -> None:
    """Answers are bytes of their own, although the arrays behind them are used again."""
    worker = hire(packages.scaling())
    first = worker.run_batch([request(1.0)])
    worker.run_batch([request(5.0)])

    assert [[2.0] * 4] == response(first[0]).outputs["y"].tolist()


def test_timing_is_measured_on_the_clock_that_was_given(hire: Hire) -> None:
    """Each look at it takes a second: waiting, until all of the batch was decoded, computing, decoding, phrasing; and
    who shared it."""
    ticks = iter(range(100, 200))
    worker = hire(packages.scaling(), clock=lambda: float(next(ticks)))
    requests = [request(1.0, received=98.0), request(1.0, received=99.0)]
    answers = worker.run_batch(requests)
    timings = [answer.timing for answer in answers if answer.timing is not None]

    assert [6000.0, 5000.0] == [timing.queue_ms for timing in timings]
    assert {(1000.0, 1000.0, 1000.0, 2)} == {(t.decode_ms, t.infer_ms, t.encode_ms, t.batch) for t in timings}
    assert {tuple(each.ticket for each in requests)} == {timing.together for timing in timings}
    assert ["1", "1"] == [answer.model_version for answer in answers]


@pytest.mark.parametrize("best_batch", [1, 8])
def test_warming_up_gives_the_seconds_of_a_batch(hire: Hire, best_batch: int) -> None:
    """On the clock that was given; a model whose sizes are unknown counts as slow, whatever it takes."""
    ticks = iter([0.0, 9.0, 10.0, 12.0, 20.0, 25.0])
    worker = hire(packages.scaling(), best_batch=best_batch, clock=lambda: next(ticks))

    assert 2.0 == worker.warm_up()
    assert float("inf") == hire(packages.total()).warm_up()


def test_warming_up_finds_an_engine_that_cannot_compute(hire: Hire) -> None:
    """EngineFailed before the first request, not with it."""
    with pytest.raises(EngineFailed):
        hire(packages.misbehaving([{"do": "raise"}]), backend="reference").warm_up()


def test_a_defect_is_an_answer_too(hire: Hire, caplog: pytest.LogCaptureFixture) -> None:
    """A package whose manifest does not tell the truth about its graph: 500 for the request, details in the log."""
    specs = packages.specs(packages.scaling(width=5).graph.input)
    worker = hire(packages.scaling(), inputs=specs)
    answers = worker.run_batch([request(payload(x=np.zeros((1, 5), np.float32))) for _ in range(2)])

    assert [500, 500] == statuses(answers)
    assert "defect of edge-sdk" in caplog.text


def test_closing_closes_the_engine(hire: Hire) -> None:
    """Whoever asks afterwards is answered, not left alone."""
    worker = hire(packages.scaling())
    worker.close()

    assert [500] == statuses(worker.run_batch([request(1.0)]))


def test_a_package_replaced_while_it_was_read_is_looked_at_again(tmp_path: Path) -> None:
    """A worker made of a manifest that is no longer there is one of the package that took its place."""
    stale = packages.make_package(tmp_path / "scale", packages.scaling(2.0))
    packages.make_package(tmp_path / "scale", packages.scaling(3.0))
    worker = Worker.load(stale)

    assert stale.digest != worker.package.digest


def test_an_altered_package_stays_refused(tmp_path: Path) -> None:
    package = packages.make_package(tmp_path / "scale", packages.scaling(2.0))
    (package.path / "graph.onnx").write_bytes(b"altered")

    with pytest.raises(PackageError, match="altered"):
        Worker.load(package)
