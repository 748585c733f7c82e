"""Faults of models, runtimes and devices, with a real model or the reference engine that misbehaves: cases 52 to 64."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from edge_sdk.errors import EngineHung, NoAnswer, Unavailable
from edge_sdk.mqtt.client import Client
from edge_sdk.mqtt.transports.base import Message, Properties
from tests.brokers import Broker, eventually, free_port
from tests.daemon.processes import error_of
from tests.daemon.test_requests import Wire
from tests.faults.conftest import MODELS, POISON, OpenDaemon, OpenScene, alive, doubled, numbers, stats_from, status_of
from tests.faults.fleet import FACTOR, PATIENT, Load
from tests.faults.history import Answered, Life
from tests.faults.scene import DEVICE, busy
from tests.faults.systemd import Ear
from tests.machines import JETSON, put
from tests.packages import filling, graph, make_package, scaling

Engines = Callable[..., Path]


def flipped(data: bytes) -> bytes:
    """Every 16th byte with its bits the other way round."""
    return bytes(byte ^ 0xFF if number % 16 == 5 else byte for number, byte in enumerate(data))


def of_strange_operators() -> bytes:
    """A graph with an operator of a domain that no runtime knows."""
    node = helper.make_node("Frobnicate", ["x"], ["y"], domain="com.example")
    row = (TensorProto.FLOAT, ("batch", 4))
    model = graph([node], {"x": row}, {"y": row})
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    return bytes(model.SerializeToString())


def of_opset(version: int) -> bytes:
    model = scaling()
    model.opset_import[0].version = version
    return bytes(model.SerializeToString())


def test_case_52_54_models_that_do_not_load(tmp_path: Path, mosquitto: Broker, open_daemon: OpenDaemon) -> None:
    """Cut short, bits flipped, empty, of operators or an opset that nobody knows: UNAVAILABLE with a reason each; the
    model beside them serves."""
    whole = scaling().SerializeToString()
    broken = {
        "cut": whole[: len(whole) // 2],
        "flipped": flipped(whole),
        "empty": b"",
        "strange": of_strange_operators(),
        "future": of_opset(9_999),
    }
    engines = tmp_path / "engines"
    make_package(engines / "scale", scaling(FACTOR), name="scale")
    declared = scaling()
    for name, data in broken.items():
        package = make_package(engines / name, declared, name=name)
        _replace_graph(package.path, data)
    daemon = open_daemon(mosquitto.url, engines=engines)
    with Client(mosquitto.url, device=DEVICE, timeout_s=5) as client:
        reasons = {name: daemon.wait_for_state(client, name, "UNAVAILABLE")["reason"] for name in broken}
        answers = [client.infer("scale", numbers(2.0)) for _ in range(3)]
        refused = []
        for name in broken:
            try:
                client.infer(name, numbers(1.0), timeout_s=2)
            except Unavailable as exc:
                refused.append((name, exc.retryable))

    assert all(len(reason) > 20 for reason in reasons.values()), reasons
    assert not any(str(tmp_path) in reason for reason in reasons.values())
    assert [(name, False) for name in broken] == refused
    assert [4.0] * 3 == [doubled(answer.raw)[0] for answer in answers]


def _replace_graph(package: Path, data: bytes) -> None:
    """Seal other bytes in the place of the graph: the digests are right, the graph is not."""
    from edge_sdk.package import GRAPH, EnginePackage, seal, writing

    manifest = EnginePackage.open(package).manifest
    with writing(package) as staged:
        (staged / GRAPH).write_bytes(data)
        seal(staged, manifest)


def test_case_57_a_package_changes_under_load(tmp_path: Path, open_scene: OpenScene) -> None:
    """SIGHUP again and again, with a package that was written anew in between: no request fails."""
    engines = tmp_path / "changing"
    make_package(engines / "scale", scaling(FACTOR), name="scale")
    scene = open_scene(engines=engines, clients=PATIENT)
    for number in range(4):
        scene.wait_for_answers()
        with scene.fault("reload"):
            successor = scaling(FACTOR)
            successor.doc_string = f"number {number}"
            make_package(engines / "scale", successor, name="scale")
            scene.daemon.hang_up()
            ready = number + 2
            eventually(lambda: scene.daemon.said().count("is ready") >= ready, "the new package serves")  # noqa: B023
    report = scene.finish()

    assert report.kept, report


def test_case_59_no_memory_for_a_request(tmp_path: Path, mosquitto: Broker, open_daemon: OpenDaemon) -> None:
    """What does not fit is answered 507; the next request, which fits, is answered."""
    engines = tmp_path / "engines"
    make_package(engines / "fill", filling(), name="fill")
    make_package(engines / "scale", scaling(FACTOR), name="scale")
    daemon = open_daemon(mosquitto.url, engines=engines)
    with Client(mosquitto.url, device=DEVICE) as client:
        daemon.wait_for_state(client, "fill", "READY")
        wire = Wire(mosquitto.url)
        sizes = [np.array([size], np.int64).tobytes() for size in (2**46, 3)]
        too_much, little = (
            wire.ask(size, topic=f"{MODELS}/fill/infer", content_type="application/octet-stream") for size in sizes
        )
        wire.transport.close()
        other = client.infer("scale", numbers(1.0))

    assert (507, "out_of_memory") == error_of(too_much.payload)
    assert b"[0.0,0.0,0.0]" in little.payload.replace(b" ", b"")
    assert 2.0 == doubled(other.raw)[0]


def test_case_61_a_model_that_never_returns(
    mosquitto: Broker, open_daemon: OpenDaemon, misbehaving_engines: Engines, tmp_path: Path
) -> None:
    """On the network's thread it starves the watchdog: systemd ends the daemon, the next one serves, and once the
    request that did it has expired, nothing is left of it."""
    hanging = misbehaving_engines({"do": "sleep", "seconds": 600.0, "when": POISON})
    watchdog_s = 1.0
    with Ear(tmp_path, watchdog_s=watchdog_s) as ear, Client(mosquitto.url, device=DEVICE, timeout_s=60) as client:
        daemon = open_daemon(mosquitto.url, engines=hanging, extra=ear.environment)
        daemon.wait_for_state(client, "odd", "READY")
        wire = Wire(mosquitto.url)
        told = Properties(response_topic=wire.replies, correlation_data=b"poison", message_expiry_s=2)
        wire.send(Message(f"{MODELS}/odd/infer", numbers(POISON), properties=told))
        futures = [client.submit("scale", numbers(float(number))) for number in range(50)]
        kills = 0
        while not all(future.done() for future in futures):
            if ear.listen().count("READY=1") <= kills:  # the watchdog counts from there on
                busy(0.02)
                continue
            fed = ear.fed
            give_up_at = time.monotonic() + watchdog_s
            while ear.fed == fed and time.monotonic() < give_up_at:
                busy(0.02)
            if ear.fed == fed:  # systemd: WatchdogSec is over
                daemon.kill()
                kills += 1
                daemon.start(extra=ear.environment)
        answers = [future.result() for future in futures]
        wire.transport.close()

    assert 1 <= kills <= 5
    assert [2.0 * number for number in range(50)] == [doubled(answer.raw)[0] for answer in answers]


def test_case_61_a_slow_model_that_never_returns(
    mosquitto: Broker, open_daemon: OpenDaemon, misbehaving_engines: Engines
) -> None:
    """On a thread of its own it holds back nobody: its request is answered 408 at its deadline."""
    hanging = misbehaving_engines({"do": "sleep", "seconds": 600.0, "when": POISON})
    daemon = open_daemon(mosquitto.url, engines=hanging, serving__inline_ms="0")
    with Client(mosquitto.url, device=DEVICE) as client:
        daemon.wait_for_state(client, "odd", "READY")
        wire = Wire(mosquitto.url)
        told = Properties(response_topic=wire.replies, correlation_data=b"poison", message_expiry_s=1)
        wire.send(Message(f"{MODELS}/odd/infer", numbers(POISON), properties=told))
        answers = [client.infer("scale", numbers(float(number))) for number in range(20)]
        late = wire.next()
        wire.transport.close()

    assert (408, "deadline_exceeded") == error_of(late.payload)
    assert [2.0 * number for number in range(20)] == [doubled(answer.raw)[0] for answer in answers]


@pytest.mark.parametrize("inline_ms", ["10", "0"], ids=["on the network's thread", "on its own"])
def test_case_61_a_request_that_hangs_is_given_up(
    open_scene: OpenScene, misbehaving_engines: Engines, inline_ms: str
) -> None:
    """Without systemd: the daemon ends itself when a batch takes longer than `hang_s`, twice; then the request is
    answered 500, and whoever else asked meanwhile is answered once, and rightly."""
    hanging = misbehaving_engines({"do": "sleep", "seconds": 600.0, "when": POISON})
    scene = open_scene(
        engines=hanging,
        clients=PATIENT,
        supervised=True,
        promises={"recovery_s": 15.0},
        serving__hang_s="1",
        serving__inline_ms=inline_ms,
    )
    scene.wait_for_answers()
    wire = Wire(scene.broker.url)
    with scene.fault("hang"):
        poison(wire)
        answer = wire.next(40)
    wire.transport.close()
    scene.wait_for_answers(deadline_s=40)
    report = scene.finish()
    ends = [event.code for event in scene.history.events if isinstance(event, Life) and event.what == "ended"]

    assert (500, "inference_failed") == error_of(answer.payload)
    assert b"ended the device's process 2 times" in answer.payload
    assert [EngineHung.exit_code] * 2 + [0] == ends
    assert "of odd has taken more than 1 s" in scene.daemon.said()
    assert report.kept, report


def test_case_61_a_model_that_nobody_asks(
    tmp_path: Path, mosquitto: Broker, open_daemon: OpenDaemon, misbehaving_engines: Engines
) -> None:
    """The self-test finds it out: one that stops answering starves the watchdog and makes /healthz say so; one that
    hangs ends the daemon."""
    fails, hangs = tmp_path / "fails", tmp_path / "hangs"
    for mark in (fails, hangs):
        mark.touch()
    odd = misbehaving_engines(
        {"do": "raise", "once": str(fails)}, {"do": "sleep", "seconds": 600.0, "once": str(hangs)}
    )
    port, watchdog_s = free_port(), 1.0
    with Ear(tmp_path, watchdog_s=watchdog_s) as ear:
        daemon = open_daemon(
            mosquitto.url,
            engines=odd,
            extra=ear.environment,
            health=f"127.0.0.1:{port}",
            stats_interval_s="0.2",
            serving__self_test_s="0.5",
            serving__hang_s="1",
        )
        eventually(lambda: status_of(port, "readyz") == 200, "ready")
        eventually(lambda: stats_from(mosquitto)["self_test"]["models"] == "ok", "tested")

        def spoilt() -> bool:
            fails.unlink(missing_ok=True)
            return status_of(port, "healthz") == 503

        eventually(spoilt, "/healthz says that it fails")
        fed, until = ear.fed, time.monotonic() + watchdog_s
        while time.monotonic() < until:
            spoilt()
        fed_meanwhile = ear.fed - fed
        eventually(lambda: status_of(port, "healthz") == 200, "it answers again")
        hangs.unlink()
        assert daemon.process is not None
        code = daemon.process.wait(30)

    assert 0 == fed_meanwhile
    assert "odd/1 answered before, and gives no answer to zeros any more." in daemon.said()
    assert EngineHung.exit_code == code
    assert "a self-test of odd has taken more than 1 s" in daemon.said()


@pytest.mark.parametrize("delivery", ["at-least-once", "durable"])
def test_case_62_native_code_that_crashes(
    tmp_path: Path, open_scene: OpenScene, misbehaving_engines: Engines, delivery: str
) -> None:
    """A request that ends the process is answered 500 after the second time, and never computed again, however often
    it comes. Those of the same batch are computed one by one, and answered; everybody else, too."""
    crashing = misbehaving_engines(
        {"do": "abort", "when": POISON}, {"do": "sleep", "seconds": 1.0, "when": 5.0}, max_batch=8
    )
    scene = open_scene(
        engines=crashing,
        clients=PATIENT,
        supervised=True,
        promises={"recovery_s": 15.0},
        delivery=delivery,
        state=str(tmp_path / "state"),
        stats_interval_s="0.5",
        serving__inline_ms="0",
    )
    scene.wait_for_answers()
    with scene.fault("crash"), Client(scene.broker.url, device=DEVICE, timeout_s=60) as client:
        first = client.submit("odd", numbers(5.0))  # while it sleeps, the others gather and become one batch
        wire = Wire(scene.broker.url)
        futures = [client.submit("odd", numbers(float(number))) for number in range(3)]
        poison(wire)
        futures += [client.submit("odd", numbers(float(number))) for number in range(3, 5)]
        answer = wire.next(40)
        again = [poison(wire, wait=True) for _ in range(3)]
        wire.transport.close()
        innocents = [doubled(future.result().raw)[0] for future in [first, *futures]]
    quarantine = stats_from(scene.broker)["quarantine"]
    scene.wait_for_answers(deadline_s=40)
    crashes = scene.crashes
    report = scene.finish()

    assert (500, "inference_failed") == error_of(answer.payload)
    assert b"ended the device's process 2 times" in answer.payload
    assert {500} == {error_of(each.payload)[0] for each in again}
    assert [10.0, 0.0, 2.0, 4.0, 6.0, 8.0] == innocents
    assert {"suspects": 0, "barred": 1} == {key: quarantine[key] for key in ("suspects", "barred")}
    assert 2 == crashes
    assert report.kept, report


def poison(wire: Wire, *, wait: bool = False) -> Message:
    """Send the same request for `odd` once more; the answer, if it is waited for."""
    told = Properties(response_topic=wire.replies, correlation_data=b"poison", message_expiry_s=60)
    wire.send(Message(f"{MODELS}/odd/infer", numbers(POISON), properties=told))
    return wire.next() if wait else Message("", b"")


def test_case_63_a_device_that_became_slow(
    open_scene: OpenScene, misbehaving_engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as much is asked as can be computed: what can be, is; the rest is told 429 or 408, in time. The figures say
    that the device holds itself back, and how warm it is."""
    each_s = 0.02
    slow = misbehaving_engines({"do": "sleep", "seconds": each_s}, max_batch=1)
    load = Load(DEVICE, model="odd", in_flight=8, pause_s=0.01, timeout_s=15.0, expected=(200, 429, 408))
    machine = put(tmp_path / "machine", JETSON)
    monkeypatch.setenv("MACHINE_ROOT", str(machine))
    scene = open_scene(
        engines=slow,
        load=load,
        program="tests.daemon.another_machine",
        limits__max_queue="8",
        serving__inline_ms="0",
        stats_interval_s="0.2",
    )
    scene.wait_for_answers(20)
    cool = stats_from(scene.broker)["machine"]
    hot = {"sys/class/thermal/thermal_zone0/temp": "99500", "sys/class/thermal/cooling_device1/cur_state": "3"}
    put(machine, hot)
    before, begun = scene.answers(), time.monotonic()
    busy(4.0)
    goodput = (scene.answers() - before) / (time.monotonic() - begun)
    warm = stats_from(scene.broker)["machine"]
    report = scene.finish()
    refused = [e for e in scene.history.events if isinstance(e, Answered) and e.status in (408, 429)]

    assert refused
    assert goodput > 0.7 / each_s
    assert (False, 51.5) == (cool["throttled"], cool["temperature_c"]["cpu-thermal"])
    assert (True, 99.5) == (warm["throttled"], warm["temperature_c"]["cpu-thermal"])
    assert ["cpu-throttle-alert"] == warm["throttled_by"]
    assert report.kept, report


def test_case_64_killed_for_its_memory(open_scene: OpenScene) -> None:
    """The kernel's out-of-memory killer sends what a cgroup's limit sends, SIGKILL; systemd starts the next daemon."""
    scene = open_scene(clients=PATIENT, supervised=True)
    scene.wait_for_answers()
    with scene.fault("out of memory"):
        assert scene.daemon.process is not None
        scene.daemon.process.kill()
        eventually(lambda: scene.crashes == 1, "started again")
    scene.wait_for_answers()
    report = scene.finish()

    assert report.kept, report


def test_a_client_is_told_when_nobody_is_there(mosquitto: Broker, open_daemon: OpenDaemon) -> None:
    """The other side of every restart above: without one, a client hears so, and does not wait for its deadline."""
    daemon = open_daemon(mosquitto.url)
    with Client(mosquitto.url, device=DEVICE, wait_for_device_s=1.0) as client:
        daemon.wait_for_state(client, "scale", "READY")
        daemon.stop()
        begun = time.monotonic()
        try:
            client.infer("scale", numbers(1.0), timeout_s=30)
            told = False
        except NoAnswer:
            told = True
        took_s = time.monotonic() - begun

    assert told
    assert took_s < 5
    assert not alive(daemon)
