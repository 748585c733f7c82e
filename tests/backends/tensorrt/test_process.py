"""The process in which TensorRT compiles: watched, limited, and gone whenever it should be. All with real builds."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.backends.tensorrt import api
from edge_sdk.backends.tensorrt.builder import PlanOrder
from edge_sdk.backends.tensorrt.child import ERRORS, Job
from edge_sdk.backends.tensorrt.shapes import ShapeRange
from edge_sdk.errors import BackendUnavailable, EdgeSdkError, EngineFailed
from edge_sdk.profiles import TensorRTOptions
from tests.backends.tensorrt.plans import build

pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")

PATIENCE_S = 30


@pytest.fixture(scope="module")
def graph(shared: Path) -> bytes:
    """A model that compiles for long enough to be interrupted."""
    return (shared / "models" / "squeezenet.onnx").read_bytes()


def builder_process(parent: psutil.Process | None = None) -> psutil.Process:
    """The process of the build that `parent` (this process) has under way."""
    (child,) = (parent or psutil.Process()).children()
    return child


class AtWork:
    """A progress that calls `act` with the building process, once, as soon as TensorRT reports its first step."""

    def __init__(self, act: Callable[[psutil.Process], None]) -> None:
        self._act: Callable[[psutil.Process], None] | None = act

    def __call__(self, done: float) -> None:
        if 0 < done < 1 and self._act is not None:
            act, self._act = self._act, None
            act(builder_process())


def test_progress_grows_to_one(graph: bytes, tmp_path: Path) -> None:
    """It is told often enough to be watched, never goes back, and is 1 once: when the plan is there."""
    told: list[float] = []

    def progress(done: float) -> None:
        told.append(done)
        assert (done == 1.0) == (tmp_path / "engine.plan").exists()

    build(graph, tmp_path, "8.6", progress=progress)

    assert sorted(told) == told
    assert 1 == told.count(1.0)
    assert 1.0 == told[-1]
    assert any(0 < done < 1 for done in told)
    assert 3 < len(told)


def test_a_considerate_build_stands_back(graph: bytes, tmp_path: Path) -> None:
    """It is nice and idle on the disk; and when memory runs out, the kernel takes it before the daemon."""
    seen: list[tuple[int, object, str]] = []

    def look(child: psutil.Process) -> None:
        oom_score = Path(f"/proc/{child.pid}/oom_score_adj").read_text(encoding="ascii").strip()
        seen.append((child.nice(), child.ionice().ioclass, oom_score))

    build(graph, tmp_path, "8.6", considerate=True, progress=AtWork(look))
    build(graph, tmp_path, "8.6", progress=AtWork(look))

    assert (19, psutil.IOPRIO_CLASS_IDLE, "800") == seen[0]
    assert (psutil.Process().nice(), psutil.Process().ionice().ioclass, "800") == seen[1]


def test_a_crash_is_an_error(graph: bytes, tmp_path: Path) -> None:
    """A segmentation fault inside the process: its signal, how far it was, its last words; and nothing is left."""
    with pytest.raises(EngineFailed, match=r"with SIGSEGV at \d+%\. Its last lines: \S+") as raised:
        build(graph, tmp_path, "8.6", progress=AtWork(lambda child: child.send_signal(signal.SIGSEGV)))

    assert "The package's graph still runs, on onnxruntime." == raised.value.fix
    assert [] == psutil.Process().children()
    assert [] == list(tmp_path.iterdir())


def test_the_kernel_takes_it(graph: bytes, tmp_path: Path) -> None:
    """SIGKILL from outside is what the kernel does when memory runs out; the error says so, and how much it had."""
    with pytest.raises(EngineFailed, match=r"SIGKILL at .* Most likely the kernel needed its memory: it had \d+ MiB"):
        build(graph, tmp_path, "8.6", progress=AtWork(lambda child: child.kill()))


def test_too_much_memory(graph: bytes, tmp_path: Path) -> None:
    """A build beyond its limit is ended; the error has the limit, what it took, and the option to raise."""
    with pytest.raises(EngineFailed, match=r"took \d+ MiB of memory at \d+%, more than its limit of 95 MiB") as raised:
        build(graph, tmp_path, "8.6", build_memory_bytes=100_000_000)

    assert raised.value.fix.startswith("Raise build_memory_bytes in the profile's [tensorrt] table")
    assert [] == psutil.Process().children()
    assert [] == list(tmp_path.iterdir())


def test_too_much_time(graph: bytes, tmp_path: Path) -> None:
    """A build that hangs is ended when its time is up."""
    started = time.monotonic()
    with pytest.raises(EngineFailed, match=r"\d+% done after 1\.5 s, the most it may take") as raised:
        build(graph, tmp_path, "8.6", build_time_s=1.5, progress=AtWork(lambda child: child.suspend()))

    assert raised.value.fix.startswith("Raise build_time_s in the profile's [tensorrt] table")
    assert 1.5 <= time.monotonic() - started < 1.5 + PATIENCE_S
    assert [] == psutil.Process().children()


@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineFailed("The daemon stops.")])
def test_progress_cancels(graph: bytes, error: BaseException | type[BaseException], tmp_path: Path) -> None:
    """Whatever progress raises, Ctrl-C too, ends the build before it is raised to the caller."""

    def cancel(child: psutil.Process) -> None:
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        build(graph, tmp_path, "8.6", progress=AtWork(cancel))

    assert [] == psutil.Process().children()
    assert [] == list(tmp_path.iterdir())


def test_it_does_not_outlive_its_parent(shared: Path, tmp_path: Path) -> None:
    """A parent that is killed, which cleans up nothing, leaves no build behind: not even one that is stopped."""
    program = f"""
import sys
from pathlib import Path
from tests.backends.tensorrt.plans import build
from tests.backends.tensorrt.test_process import AtWork

def stop(child):
    child.suspend()
    print(child.pid, flush=True)

graph = Path({str(shared / "models" / "squeezenet.onnx")!r}).read_bytes()
build(graph, Path({str(tmp_path)!r}), "8.6", progress=AtWork(stop))
"""
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    until = time.monotonic() + PATIENCE_S
    while not has_ended(child) and time.monotonic() < until:
        time.sleep(0.01)

    assert has_ended(child)


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, or would be if somebody asked for its exit code: it is not ours."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_folder_that_cannot_be_written(graph: bytes, tmp_path: Path) -> None:
    """An error of ours, about the folder."""
    with pytest.raises(EngineFailed, match=r"nowhere cannot be written: No such file or directory"):
        build(graph, tmp_path / "nowhere", "8.6")


def test_an_absent_flavour(graph: bytes, tmp_path: Path) -> None:
    """What the child lacks reaches the caller as what it is."""
    if api.find("tensorrt") is not None:
        pytest.skip("tensorrt is installed")
    with pytest.raises(BackendUnavailable, match="tensorrt is not installed") as raised:
        build(graph, tmp_path, flavour="tensorrt")

    assert "JetPack" in raised.value.fix


def test_importing_from_another_folder(graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child finds edge_sdk wherever the parent found it, whatever folder either is in; the plan lands where asked,
    also where that was said relative to the parent's folder."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    plan = build(graph, Path("out"), "8.6")

    assert tmp_path / "out" / "engine.plan" == plan.file
    assert [plan.file] == list((tmp_path / "out").iterdir())


sizes = st.lists(st.integers(0, 1 << 40), max_size=5).map(tuple)
orders = st.builds(
    PlanOrder,
    flavour=st.sampled_from(["tensorrt", "tensorrt_rtx"]),
    targets=st.lists(st.sampled_from(["8.6", "12.1"])).map(tuple),
    options=st.builds(
        TensorRTOptions,
        flavour=st.sampled_from(["tensorrt", "tensorrt_rtx"]),
        compute_capabilities=st.just(("8.6",)),
        workspace_bytes=st.none() | st.integers(1, 1 << 40),
        max_aux_streams=st.none() | st.integers(0, 16),
        build_time_s=st.floats(0.1, 1e9),
        strip_weights=st.booleans(),
    ),
    shapes=st.dictionaries(st.text(), st.builds(ShapeRange, sizes, sizes, sizes)),
    timing_cache=st.none() | st.just(Path("/var/lib/ümlaut")),
)


@given(st.builds(Job, orders, st.just(Path("/tmp/plan")), st.integers(1, 1 << 22), st.booleans()))
def test_an_order_reaches_the_child_as_it_is(job: Job) -> None:
    """In one line, whatever a graph calls its inputs."""
    line = job.encode()

    assert 1 == line.count(b"\n")
    assert job == Job.decode(line)


def test_errors_keep_their_kind() -> None:
    """An error that the child may raise is one that the parent knows, by name."""
    assert all(issubclass(kind, EdgeSdkError) and name == kind.__name__ for name, kind in ERRORS.items())
