"""The GPU benchmark, as far as a machine without a GPU can run it: over a simulated one, and to its refusal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import edge_sdk.bench
from benchmarks import gpu as benchmark
from edge_sdk.backends import cuda
from edge_sdk.backends.registry import Loaded
from edge_sdk.backends.tensorrt.executor import Options, TensorRTEngine
from edge_sdk.package import EnginePackage
from tests.backends.simulated_gpu import SimulatedCuda
from tests.backends.tensorrt.test_executor import Bench
from tests.compile.graphs import conv_net, pictures
from tests.packages import make_package

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(SimulatedCuda())
    made.gpu.join()
    yield made
    made.gpu.leave(_Nobody())

    assert {} == made.cuda.leaks()


class _Nobody:
    def evict(self) -> None: ...


def test_a_run_of_the_benchmark(bench: Bench) -> None:
    """Samples in every way, the error against the CPU, memory before and after: all of it in the tables."""

    def opened(options: Options) -> TensorRTEngine:
        return bench.load(conv_net(), {"N": (1, 4)}, options=options, weight_bytes=1 << 20)

    given = pictures(4)
    with closing(bench.load(conv_net(), {"N": (1, 4)})) as engine:
        wanted = engine.infer({"image": given})
    memory = benchmark.memory_of(opened, bench.gpu.device, "fp32", 4)
    samples = benchmark.samples_of(opened, "fp32", [1, 4], seconds=0.02, rounds=1)
    error = benchmark.relative_error(opened, wanted, given)
    wrong = benchmark.relative_error(opened, {"scores": wanted["scores"] + 1}, given)
    report = benchmark.Report({"GPU": "simulated"}, {"fp32": error}, samples, [memory], ["a note"])
    told = benchmark.markdown(report)

    assert 0.0 == error < 0.1 < wrong
    assert [(way, batch) for batch in (1, 4) for way in benchmark.WAYS] == [(one.way, one.batch) for one in samples]
    assert all(one.per_second > 0 and one.compute_ms is not None for one in samples)
    assert (1 << 20) < memory.before - memory.loaded
    assert 100.0 == memory.given_back_percent
    assert "| fp32 | 2 lanes, graphs | 4 |" in told
    assert told.endswith("Note: a note")


def test_bench_has_the_devices_own_time_beside_the_walls(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a package whose engine is timed by its device; no figure of a peer that is not there."""
    package = make_package(tmp_path / "net", conv_net(), max_batch=4)

    def loaded(_: EnginePackage) -> Loaded:
        return Loaded(bench.load(conv_net(), {"N": (1, 4)}), "tensorrt")

    monkeypatch.setattr(edge_sdk.bench, "load_engine", loaded)
    figures = edge_sdk.bench.device_figures(package, seconds=0.1)

    assert figures is not None
    assert (4, None) == (figures.batch, figures.cuda_provider_ms)
    assert 0 < figures.compute_ms <= figures.device_ms
    assert 0 < figures.wall_ms


def test_a_cpu_has_no_clock_of_its_own(tmp_path: Path) -> None:
    package = make_package(tmp_path / "net", conv_net(), max_batch=4)

    assert edge_sdk.bench.device_figures(package, seconds=0.1) is None


def test_memory_that_stays_is_seen() -> None:
    """What was taken and did not come back counts against the executor."""

    assert 75.0 == benchmark.Memory("fp32", before=1000, loaded=600, after=900).given_back_percent


def test_without_a_gpu_it_says_so() -> None:
    """One sentence on stderr, nothing on stdout, exit status 2."""
    if cuda.lacking() is None:
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )

    assert (2, "") == (done.returncode, done.stdout)
    assert done.stderr.startswith("There is nothing to measure: ")
    assert 1 == done.stderr.count("\n")
