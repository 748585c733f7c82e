"""How a graph is run: measured in time and in processor time where it is built, and used on such a processor alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.backends.registry import load_engine
from edge_sdk.compile.pipeline import build_engine
from edge_sdk.compile.running import best_way, ways_to_run
from edge_sdk.package import RunningRecord, WayRecord
from edge_sdk.profiles import DeviceProfile, OnnxRuntimeOptions, physical_cores, processor
from tests import packages
from tests.compile.graphs import conv_net


def way(threads: int, latency_ms: float, cpu_ms: float, *, spinning: bool = False) -> WayRecord:
    return WayRecord(intra_op_threads=threads, spinning=spinning, latency_ms=latency_ms, cpu_ms=cpu_ms)


@pytest.mark.parametrize(
    ("limit", "cores", "counts"),
    [(0, 1, [1]), (0, 2, [1, 2]), (0, 6, [1, 2, 4, 6]), (0, 8, [1, 2, 4, 8]), (3, 8, [1, 2, 3]), (16, 4, [1, 2, 4])],
)
def test_numbers_of_threads_that_are_tried(limit: int, cores: int, counts: list[int]) -> None:
    """Powers of two and all of them, the most frugal first; a profile may say that there are to be fewer."""
    options = OnnxRuntimeOptions(intra_op_threads=limit, graph_optimization="basic")
    ways = ways_to_run(options, cores)

    assert counts == [each.intra_op_threads for each in ways]
    assert all(each.spinning == (each.intra_op_threads > 1) for each in ways)
    assert {"basic"} == {each.graph_optimization for each in ways}


@pytest.mark.parametrize(
    ("ways", "threads", "spinning"),
    [
        ([way(1, 4.0, 4.0), way(2, 2.2, 4.3)], 2, False),
        ([way(1, 4.0, 4.0), way(2, 3.7, 4.1)], 1, False),
        ([way(1, 4.0, 4.0), way(2, 3.0, 7.0)], 1, False),
        ([way(1, 4.0, 4.0), way(2, 3.0, 6.0)], 2, False),
        ([way(1, 4.0, 4.0), way(2, 2.2, 4.3), way(4, 2.1, 5.0)], 2, False),
        ([way(1, 4.0, 4.0), way(2, 3.9, 4.3), way(4, 1.5, 5.0)], 4, False),
        ([way(2, 1.2, 2.1), way(2, 1.0, 3.3, spinning=True)], 2, False),
        ([way(2, 1.5, 2.1), way(2, 1.0, 2.2, spinning=True)], 2, True),
        ([way(2, 0.04, 0.14), way(2, 0.02, 5.2, spinning=True)], 2, False),
    ],
    ids=[
        "twice as fast",
        "noise",
        "a core for a third",
        "half a core for a third",
        "enough",
        "four alone",
        "a core for 20 %",
        "free",
        "tiny",
    ],
)
def test_time_is_weighed_against_processor_time(ways: list[WayRecord], threads: int, spinning: bool) -> None:
    """What a way gains in time must be no less than what it costs the others on the device."""
    best = best_way(ways)

    assert (threads, spinning) == (best.intra_op_threads, best.spinning)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1, max_size=6))
def test_nothing_slower_or_dearer_in_all_is_chosen(measures: list[tuple[float, float]]) -> None:
    """The chosen way is no slower than the most frugal one, and time by processor time is hardly more."""
    ways = [way(threads, *measure) for threads, measure in enumerate(measures, start=1)]
    best = best_way(ways)

    assert best.latency_ms <= ways[0].latency_ms
    assert best.latency_ms * best.cpu_ms <= 1.25 * ways[0].latency_ms * ways[0].cpu_ms * (1 + 1e-9)


def test_a_build_says_how_the_graph_is_run(tmp_path: Path, cpu: DeviceProfile) -> None:
    """Measured, packed, reported, and used by whoever loads the package on such a processor."""
    (tmp_path / "net.onnx").write_bytes(conv_net().SerializeToString())
    package = build_engine(tmp_path / "net.onnx", profile=cpu, output=tmp_path / "package")
    running = package.manifest.running

    assert running is not None
    assert processor() == running.processor
    assert {each.intra_op_threads for each in running.tried} >= {1, physical_cores()}
    assert (running.intra_op_threads, running.spinning) in {
        (each.intra_op_threads, each.spinning) for each in running.tried
    }
    assert cpu == package.profile()
    assert f"- Threads: {running.intra_op_threads}" in (package.path / "report.md").read_text()


@pytest.mark.parametrize(("version", "spins"), [("1.25.1", "0"), ("1.26.0", "1"), ("2.0.0rc1", "1")])
def test_a_release_that_knows_no_limit_does_not_spin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, spins: str
) -> None:
    """Without a limit two threads may wait for each other on one core for milliseconds."""
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "__version__", version)
    package = packages.make_package(tmp_path / "p", packages.scaling(), backend="onnxruntime")
    loaded = load_engine(package)
    options = loaded.engine._session.get_session_options()  # type: ignore[attr-defined]

    assert spins == options.get_session_config_entry("session.intra_op.allow_spinning")
    loaded.engine.close()


def test_another_device_is_not_measured(tmp_path: Path, jetson: DeviceProfile) -> None:
    (tmp_path / "net.onnx").write_bytes(conv_net().SerializeToString())
    package = build_engine(tmp_path / "net.onnx", profile=jetson, output=tmp_path / "package")

    assert package.manifest.running is None


@pytest.mark.parametrize(("where", "threads", "spins"), [("here", 3, "0"), ("elsewhere", physical_cores(), "1")])
def test_measures_hold_where_they_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, threads: int, spins: str
) -> None:
    """On a processor of another kind, or with another number of cores, the profile's options count."""
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")  # the first whose threads may spin
    running = RunningRecord(
        intra_op_threads=3, spinning=False, processor=processor() if where == "here" else "an i860, 1 cores"
    )
    package = packages.make_package(tmp_path / "p", packages.scaling(), backend="onnxruntime", running=running)
    loaded = load_engine(package)
    options = loaded.engine._session.get_session_options()  # type: ignore[attr-defined]

    assert threads == options.intra_op_num_threads
    assert spins == options.get_session_config_entry("session.intra_op.allow_spinning")
    assert int(options.get_session_config_entry("session.intra_op.spin_duration_us")) <= 20
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    loaded.engine.close()
