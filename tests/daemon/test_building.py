"""Served while its engine is built: the real daemon, a real broker and the real builder of TensorRT for RTX.

Only a GPU is stood in for, by `standin_gpu`. Builds of small models are over in a moment, so a test that wants to look
at one makes the building process slow: it is stopped and let go for moments, as on a machine with much else to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("onnx", reason="building needs the extra [build]")
pytest.importorskip("onnxruntime", reason="what answers while an engine is built is onnxruntime")

from edge_sdk import resources
from edge_sdk.backends.tensorrt import api, facts
from edge_sdk.compile.pipeline import build
from edge_sdk.local import in_process
from edge_sdk.mqtt.client import Client
from edge_sdk.package import PROFILE, BackendRecord, EnginePackage, seal, writing
from edge_sdk.profiles import load_profile
from edge_sdk.tasks.base import Payload
from edge_sdk.tasks.oip import decode_response
from tests.brokers import Broker, eventually
from tests.daemon.processes import DaemonProcess, running_daemon
from tests.test_wire_contract import check

pytestmark = pytest.mark.skipif(
    api.find("tensorrt_rtx") is None or not facts.cuda_bindings(),
    reason="engines are built with tensorrt-rtx, and whoever loads one looks for cuda-python or pycuda",
)

RTX_30 = "desktop-rtx-30"
PROGRAM = "tests.daemon.standin_gpu"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> EnginePackage:
    """The digits for an RTX 30, with an engine that another machine's key signed: none that may be loaded here."""
    folder = tmp_path_factory.mktemp("rtx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "another machine"))
        return build(
            resources.EXAMPLES / "digits", profile=RTX_30, precision="int8", output=folder / "engines" / "digits"
        ).package


@pytest.fixture(scope="module")
def questions(package: EnginePackage) -> list[tuple[bytes, int]]:
    """Pictures, and what the package's graph takes each for."""
    folder = resources.EXAMPLES / "digits" / "heldout"
    contents = [picture.read_bytes() for picture in sorted(folder.rglob("*.png"))[::5]]
    with in_process(package) as submit:
        bodies = [submit(Payload(data)).result() for data in contents]
    return [(data, decode_response(body.data).extra["predictions"][0]["index"]) for data, body in zip(contents, bodies)]


@pytest.fixture
def start(
    package: EnginePackage, broker: Broker, tmp_path: Path
) -> Callable[..., contextlib.AbstractContextManager[DaemonProcess]]:
    """A daemon on a computer that seems to have an RTX 3060, with a store of its own."""

    def started(device: str, engines: Path | None = None, store: Path | None = None) -> Any:
        return running_daemon(
            engines or package.path.parent,
            broker.url,
            tmp_path,
            program=PROGRAM,
            device=device,
            engine_cache=str(store or tmp_path / "store"),
        )

    return started


Start = Callable[..., contextlib.AbstractContextManager[DaemonProcess]]


class Asker:
    """A client that asks all the time, from a thread of its own, and compares each answer."""

    def __init__(self, broker: Broker, device: str, questions: list[tuple[bytes, int]]) -> None:
        self.answered = 0
        self.wrong = 0
        self.error: Exception | None = None
        self._client = Client(broker.url, device=device, timeout_s=30)
        self._questions = questions
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Asker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._client.close()

    def _ask(self) -> None:
        try:
            while not self._done.is_set():
                picture, expected = self._questions[self.answered % len(self._questions)]
                answer = self._client.infer("digits", picture)
                self.wrong += answer.predictions[0].index != expected
                self.answered += 1
        except Exception as exc:
            self.error = exc


@contextlib.contextmanager
def watching(broker: Broker, device: str, folder: Path) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Everything that is published about the digits, from a client that misses nothing."""
    said = folder / f"{device}.jsonl"
    with said.open("wb") as file:
        topic = f"edge/v1/{device}/models/digits"
        listening = subprocess.Popen(
            ["stdbuf", "-oL", "mosquitto_sub", "-p", str(broker.port), "-t", topic, "-q", "1"], stdout=file
        )
        try:
            yield lambda: [json.loads(line) for line in said.read_text().splitlines()]
        finally:
            listening.terminate()
            listening.wait()


def builders(daemon: DaemonProcess) -> list[psutil.Process]:
    """The daemon's building processes."""
    assert daemon.process is not None
    try:
        children = psutil.Process(daemon.process.pid).children()
        return [child for child in children if "edge_sdk.backends.tensorrt.child" in child.cmdline()]
    except psutil.NoSuchProcess:
        return []


def held_builder(daemon: DaemonProcess) -> psutil.Process:
    """The building process, stopped before it has built anything."""
    builder: psutil.Process = eventually(lambda: next(iter(builders(daemon)), None), "a building process")
    eventually(lambda: builder.nice() == 19, "it has found its place")
    builder.suspend()
    return builder


def let_go_for_moments(builder: psutil.Process, until: Callable[[], bool]) -> None:
    """A build on a busy machine: hundredths of a second of its time for half a second of everybody else's."""
    give_up_at = time.monotonic() + 90
    with contextlib.suppress(psutil.NoSuchProcess):
        while not until():
            assert time.monotonic() < give_up_at
            builder.resume()
            time.sleep(0.02)
            builder.suspend()
            time.sleep(0.15)
        builder.resume()


def altered(package: EnginePackage, folder: Path, **manifest: Any) -> EnginePackage:
    """A copy of a package whose manifest says something else, for an RTX 30, without an engine."""
    with writing(folder) as staged:
        for file in package.path.iterdir():
            if not file.name.startswith("engine."):
                shutil.copy2(file, staged)
        (staged / PROFILE).write_text(load_profile(RTX_30).model_dump_json(), encoding="utf-8")
        backend = BackendRecord(name="tensorrt")
        seal(staged, package.manifest.model_copy(update={"profile": RTX_30, "backend": backend, **manifest}))
    return EnginePackage.open(folder)


def test_a_model_answers_while_its_engine_is_built_and_never_stops(
    start: Start, broker: Broker, questions: list[tuple[bytes, int]], tmp_path: Path
) -> None:
    """At once from the CPU; `BUILDING n %` with rising n; then READY on the engine that was built. A client that asks
    all the while loses nothing and gets no wrong answer. A restart finds the engine and builds nothing."""
    with (
        watching(broker, "building", tmp_path) as said,
        start("building") as daemon,
        Client(broker.url, device="building") as client,
        contextlib.ExitStack() as asking,
    ):
        builder = held_builder(daemon)
        building = daemon.wait_for_state(client, "digits", "BUILDING")
        asker = asking.enter_context(Asker(broker, "building", questions))
        eventually(lambda: asker.answered > 20 or asker.error, "answers while the builder is held")

        let_go_for_moments(builder, lambda: not builder.is_running() or builder.status() == psutil.STATUS_ZOMBIE)
        ready = daemon.wait_for_state(client, "digits", "READY")
        swapped_at = asker.answered
        eventually(lambda: asker.answered > swapped_at + 20 or asker.error, "answers from the engine")
        daemon.stop()
        before = len(said())
        daemon.start()
        again = daemon.wait_for_state(client, "digits", "READY")
        eventually(lambda: asker.answered > swapped_at + 100 or asker.error, "answers after the restart")
        published = said()

    for each in published:
        check(each, "model")
    percents = [each["progress_percent"] for each in published if each["state"] == "BUILDING"]
    assert ("onnxruntime", "edge-sdk_onnxruntime") == (building["backend"], building["platform"])
    assert ("tensorrt", "edge-sdk_tensorrt", None) == (ready["backend"], ready["platform"], ready.get("reason"))
    assert sorted(set(percents)) == percents
    assert len(percents) >= 2  # on a machine with nothing else to do, five
    assert [f"BUILDING {each} %" for each in percents] == [
        each["reason"].partition(":")[0] for each in published if each["state"] == "BUILDING"
    ]
    assert {"onnxruntime"} == {each["backend"] for each in published if each["state"] == "BUILDING"}
    assert (None, 0) == (asker.error, asker.wrong)
    assert "tensorrt" == again["backend"]
    assert "BUILDING" not in {each["state"] for each in published[before:]}
    assert (1, 2) == (daemon.said().count("Building an engine"), daemon.said().count("The stand-in took a plan"))


def test_a_graph_that_tensorrt_refuses_is_answered_by_the_cpu(
    start: Start, digits: EnginePackage, broker: Broker, questions: list[tuple[bytes, int]], tmp_path: Path
) -> None:
    """INT8 with zero points, as CPUs take it: the model is READY on onnxruntime and says what TensorRT said."""
    if digits.manifest.architecture != "x86_64":
        pytest.skip("the scheme for this CPU is one that TensorRT takes")
    altered(digits, tmp_path / "engines" / "digits")
    with start("refused", tmp_path / "engines") as daemon, Client(broker.url, device="refused") as client:
        eventually(lambda: "No engine could be built" in daemon.said(), "the build has failed")
        metadata = daemon.wait_for_state(client, "digits", "READY")
        answer = client.infer("digits", questions[0][0])

    assert "onnxruntime" == metadata["backend"]
    assert "does not take the node DequantizeLinear" in metadata["reason"]
    assert questions[0][1] == answer.predictions[0].index
    assert 1 == daemon.said().count("Building an engine")


def test_a_store_that_cannot_be_written_is_said_once(
    start: Start, broker: Broker, questions: list[tuple[bytes, int]], tmp_path: Path
) -> None:
    """In the log at the start, and in the model's topic; nothing is built, and the CPU answers."""
    (tmp_path / "file").write_bytes(b"")
    with (
        start("unwritable", store=tmp_path / "file" / "store") as daemon,
        Client(broker.url, device="unwritable") as client,
    ):
        metadata = daemon.wait_for_state(client, "digits", "READY")
        answer = client.infer("digits", questions[0][0])

    assert "onnxruntime" == metadata["backend"]
    assert "cannot be read: Not a directory" in metadata["reason"]
    assert str(tmp_path) not in metadata["reason"]
    assert questions[0][1] == answer.predictions[0].index
    assert 1 == daemon.said().count("engines are not built here")
    assert 0 == daemon.said().count("Building an engine")


def test_a_builder_that_is_killed_takes_nothing_with_it(
    start: Start, broker: Broker, questions: list[tuple[bytes, int]]
) -> None:
    """As the kernel would, for its memory: the CPU goes on, the reason is said, and a reload builds anew."""
    with (
        start("killed") as daemon,
        Client(broker.url, device="killed") as client,
        contextlib.ExitStack() as asking,
    ):
        builder = held_builder(daemon)
        daemon.wait_for_state(client, "digits", "BUILDING")
        asker = asking.enter_context(Asker(broker, "killed", questions))
        builder.kill()
        eventually(lambda: "No engine could be built" in daemon.said(), "the build has failed")
        metadata = daemon.wait_for_state(client, "digits", "READY")
        daemon.hang_up()
        eventually(lambda: daemon.said().count("Building an engine") == 2, "another build")
        eventually(lambda: client.metadata("digits").get("backend") == "tensorrt", "the engine is in service")

    assert "onnxruntime" == metadata["backend"]
    assert "SIGKILL" in metadata["reason"]
    assert (None, 0) == (asker.error, asker.wrong)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_builder_does_not_outlive_its_daemon(start: Start, broker: Broker, number: signal.Signals) -> None:
    """A stop does not wait for a build; nor does a crash leave one behind. The next start builds from the beginning."""
    with start(f"ended-{number.value}") as daemon, Client(broker.url, device=f"ended-{number.value}") as client:
        builder = held_builder(daemon)
        assert daemon.process is not None
        daemon.process.send_signal(number)
        code = daemon.process.wait(10)
        eventually(lambda: not builder.is_running() or builder.status() == psutil.STATUS_ZOMBIE, "the builder is gone")
        daemon.start()
        eventually(lambda: client.metadata("digits").get("backend") == "tensorrt", "the engine is in service")

    assert (0 if number == signal.SIGTERM else -number) == code


def test_a_builder_stands_back(start: Start) -> None:
    """It runs at the lowest priority, and the kernel takes it first when memory runs out."""
    with start("niced") as daemon:
        assert daemon.process is not None
        builder = held_builder(daemon)
        niceness, score = builder.nice(), Path(f"/proc/{builder.pid}/oom_score_adj").read_text()
        of_daemon = os.getpriority(os.PRIO_PROCESS, daemon.process.pid)

    assert (19, True) == (niceness, int(score) > 0)
    assert 19 > of_daemon
