"""Many models in little memory, in the real daemon: nothing fails, and the process stays as small as it was told to."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="graphs cannot be made without the extra `build`")
pytest.importorskip("onnxruntime", reason="what is measured is onnxruntime's memory")

from onnx import TensorProto, helper

from edge_sdk.mqtt.client import Answer, Client
from edge_sdk.tensors import Array
from tests.brokers import Broker
from tests.daemon.processes import DaemonProcess, running_daemon
from tests.packages import graph, make_package, scaling

WIDTH = 1581
"""Squared, in float32: 10 MB."""
MODELS = 50
BUDGET_BYTES = 300_000_000
IN_FLIGHT = 6


DRAWN = np.random.default_rng(7).standard_normal((WIDTH + 1) * MODELS + WIDTH * WIDTH, dtype=np.float32) / 40


def weights(number: int) -> Array:
    """Those of a model: another matrix for each, whose products have numbers of everyday size."""
    first = (WIDTH + 1) * number
    return DRAWN[first : first + WIDTH * WIDTH].reshape(WIDTH, WIDTH)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty packages of 10 MB: y = x @ w."""
    folder = tmp_path_factory.mktemp("library")
    row = (TensorProto.FLOAT, ("batch", WIDTH))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    for number in range(MODELS):
        make_package(folder / f"m{number}", graph(nodes, {"x": row}, {"y": row}, {"w": weights(number)}), max_batch=4)
    return folder


@pytest.fixture(scope="module")
def idle_bytes(broker: Broker, library: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """What the daemon and onnxruntime take when they serve next to nothing."""
    folder = tmp_path_factory.mktemp("idle")
    make_package(folder / "engines" / "double", scaling(2.0))
    with running_daemon(folder / "engines", broker.url, folder, ready=["double"], device="idle") as daemon:
        return daemon.resident_bytes()


@pytest.fixture(scope="module")
def crowded(broker: Broker, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that serves all of them and has room for half."""
    folder = tmp_path_factory.mktemp("crowded")
    settings = {"memory__budget_bytes": str(BUDGET_BYTES), "stats_interval_s": "0.2", "device": "crowded"}
    last = [f"m{number}" for number in range(MODELS)]
    with running_daemon(library, broker.url, folder, ready=last, **settings) as daemon:
        yield daemon


def ask_all(client: Client, order: list[int], daemon: DaemonProcess) -> tuple[int, int]:
    """Ask the models of `order`, several at a time, check every answer; the largest size of the process meanwhile.

    Also how many answers there were.
    """
    draw = np.random.default_rng(11)
    largest, answered = 0, 0
    pending: dict[Future[Answer], tuple[int, Array]] = {}

    def take(future: Future[Answer]) -> None:
        number, row = pending.pop(future)
        answer = future.result()

        assert np.allclose(row @ weights(number), answer.outputs["y"], rtol=1e-3, atol=1e-4)

    for number in order:
        row = draw.standard_normal((1, WIDTH), dtype=np.float32)
        pending[client.submit(f"m{number}", {"x": row})] = number, row
        while len(pending) >= IN_FLIGHT:
            done, _ = wait(pending, 30, FIRST_COMPLETED)
            assert done
            for future in done:
                take(future)
                answered += 1
            largest = max(largest, daemon.resident_bytes())
    for future in list(pending):
        take(future)
        answered += 1
    return answered, max(largest, daemon.resident_bytes())


def test_fifty_models_share_the_memory_of_half_of_them(broker: Broker, idle_bytes: int, crowded: DaemonProcess) -> None:
    """Requests over all of them, in turns and as in life: no failure, the budget is kept, and what moved is counted."""
    in_turns = [*range(MODELS)]
    ranks = np.random.default_rng(5).zipf(1.3, 1000)
    as_in_life = [int(rank) - 1 for rank in ranks if rank <= MODELS][:150]
    with Client(broker.url, device="crowded", timeout_s=60) as client:
        answered, largest = ask_all(client, [*in_turns, *as_in_life], crowded)
        stats = client.stats()
    memory = stats["memory"]
    held = {name: model["memory"]["held_bytes"] for name, model in stats["models"].items()}

    assert len(in_turns) + len(as_in_life) == answered
    assert largest <= BUDGET_BYTES + idle_bytes, f"{largest:,} bytes; idle it had {idle_bytes:,}"
    assert BUDGET_BYTES == memory["budget_bytes"]
    assert memory["models_bytes"] == sum(held.values()) <= BUDGET_BYTES
    assert memory["evictions"] >= MODELS
    assert memory["reloads"] >= MODELS // 2
    assert 0 == memory["refusals"]
    assert {"READY"} == {model["state"] for model in stats["models"].values()}
    assert set(stats["answers"]) == {"200"}
    resident = [name for name, model in stats["models"].items() if model["memory"]["resident"]]
    assert 20 <= len(resident) < MODELS
    assert all(9_000_000 <= model["memory"]["measured_bytes"] <= 16_000_000 for model in stats["models"].values())
