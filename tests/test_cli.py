"""The command line: what each command shows, what it says when something is wrong, and how it ends.

Errors are one paragraph on stderr, without a traceback, and the exit code says whose fault it is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from edge_sdk import __version__, resources
from edge_sdk.cli import main
from edge_sdk.console import table
from edge_sdk.package import EnginePackage
from edge_sdk.profiles import profile_names
from tests.brokers import MOSQUITTO, Broker, eventually, free_port, running_amqtt, running_mosquitto
from tests.daemon.processes import DEVICE, running_daemon
from tests.packages import make_package, scaling

ROOT = Path(__file__).resolve().parent.parent
DIGITS = resources.EXAMPLES / "digits"
SEVEN = DIGITS / "heldout" / "7" / "0017.png"


class Ended:
    """How a command ended, and what it said."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one paragraph of an error; progress lines may stand before it."""
        before, found, paragraph = self.err.rpartition("Error: ")

        assert found, self.err
        assert "Traceback" not in before + paragraph
        assert 1 == len(paragraph.strip().splitlines()), self.err
        return paragraph.strip()


def edge_sdk(*arguments: str | Path, stdin: bytes = b"", **environment: str) -> Ended:
    """The command, in this process: it is the same code, and there are many tests."""
    clean: dict[str, str | None] = {key: None for key in os.environ if key.startswith("EDGE_SDK_")}
    runner = CliRunner(env={**clean, **environment})
    result = runner.invoke(main, [str(argument) for argument in arguments], input=stdin, prog_name="edge-sdk")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


def started(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """The command as a process of its own, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "edge_sdk", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], limit_s: float = 60) -> Ended:
    out, err = process.communicate(timeout=limit_s)
    return Ended(process.returncode, out, err)


# Asking for help


def test_version() -> None:
    """`--version` prints the version."""

    assert f"edge-sdk, version {__version__}\n" == edge_sdk("--version").out


def test_no_command_shows_what_there_is() -> None:
    """Nothing but the name shows the help, as a wrong usage."""
    shown = edge_sdk()

    assert 2 == shown.code
    assert "quickstart" in shown.out + shown.err


# Profiles


def test_profiles_are_listed() -> None:
    """Every profile that ships, for a person and for a script."""

    assert profile_names() == [line.split()[0] for line in edge_sdk("profiles", "list").out.splitlines()[2:]]
    assert profile_names() == [profile["name"] for profile in edge_sdk("profiles", "list", "--json").json]


def test_a_profile_is_shown_with_its_sources() -> None:
    """One profile, with where its numbers came from."""
    shown = edge_sdk("profiles", "show", "jetson-orin-nano")

    assert "sources:" in shown.out
    assert "jetson-orin-nano" == edge_sdk("profiles", "show", "jetson-orin-nano", "--json").json["name"]


def test_the_profile_of_this_machine_is_detected() -> None:
    """A name on the first line, where a script can cut it off, and the reason."""
    found = edge_sdk("profiles", "detect", "--json").json

    assert found["name"] in profile_names()
    assert [found["name"], found["why"]] == edge_sdk("profiles", "detect").out.splitlines()


# Inspecting


def test_a_model_is_inspected() -> None:
    """Inputs, outputs, operators and size of an ONNX file."""
    found = edge_sdk("inspect", DIGITS / "digits.onnx", "--json").json

    assert 17 == found["opsets"][""]
    assert 4 == found["operators"]["Conv"]
    assert "image: float32['batch', 1, 8, 8]" in edge_sdk("inspect", DIGITS / "digits.onnx").out


def test_a_package_is_inspected(digits: EnginePackage) -> None:
    """Its manifest, its digests, and whether it fits this machine."""
    found = edge_sdk("inspect", digits.path, "--json").json
    shown = edge_sdk("inspect", digits.path)

    assert ("digits", "int8", True, []) == (found["name"], found["precision"], found["fits"], found["why_not"])
    assert ["every file matches its digest", "it fits this machine"] == shown.out.splitlines()[-2:]


def test_a_package_for_another_machine_says_why_it_does_not_fit(tmp_path: Path) -> None:
    """A sound package that does not fit is an answer, not an error."""
    package = make_package(tmp_path / "alien", scaling(), architecture="riscv64")
    shown = edge_sdk("inspect", package.path)

    assert 0 == shown.code
    assert "does not fit this machine: it was built for riscv64" in shown.out
    assert edge_sdk("inspect", package.path, "--json").json["fits"] is False


# Building and evaluating


def test_a_second_build_is_unchanged(tmp_path: Path) -> None:
    """The same build twice: the second does nothing and says so; --force builds all the same."""
    arguments = ("build-engine", DIGITS / "digits.onnx", "--precision", "fp32", "--output", tmp_path / "digits")
    first, second = edge_sdk(*arguments), edge_sdk(*arguments, "--json")
    created = EnginePackage.open(tmp_path / "digits").manifest.created

    assert 0 == first.code
    assert f"package:  {tmp_path / 'digits'}" in first.out
    assert "decision: FP32, as asked." in first.out
    assert second.json["unchanged"] is True
    assert "unchanged, nothing to do" in edge_sdk(*arguments).out
    assert edge_sdk(*arguments, "--force", "--json").json["unchanged"] is False
    assert created <= EnginePackage.open(tmp_path / "digits").manifest.created


def test_json_of_a_build_is_alone_on_stdout(tmp_path: Path) -> None:
    """With --json nothing else is printed, not even progress."""
    built = edge_sdk("build-engine", DIGITS / "digits.onnx", "--output", tmp_path / "bare", "--json")

    assert str(tmp_path / "bare") == built.json["path"]
    assert "" == built.err


def test_a_bare_model_takes_calibration_and_samples(tmp_path: Path) -> None:
    """--calibration and --samples make INT8 of an ONNX file without a spec."""
    rows = np.random.default_rng(7).random((24, 1, 8, 8), np.float32)
    np.savez(tmp_path / "rows.npz", x=rows)
    options = ("--calibration", tmp_path / "rows.npz", "--samples", "16", "--precision", "int8")
    built = edge_sdk("build-engine", DIGITS / "digits.onnx", *options, "--output", tmp_path / "bare", "--json")

    assert 0 == built.code, built.err
    assert "int8" == built.json["precision"]
    assert built.json["calibration"]["samples"] <= 16


def test_a_package_is_evaluated_against_another(digits: EnginePackage) -> None:
    """Accuracy, agreement and latency, for a person and for a script."""
    arguments = ("evaluate", digits.path, "--data", DIGITS / "heldout", "--samples", "40", "--against", digits.path)
    found = edge_sdk(*arguments, "--json").json

    assert 40 == found["samples"]
    assert 100.0 == found["agreement_percent"]
    assert found["package"]["latency_ms"] > 0
    assert "agreement: 100.00 %" in edge_sdk(*arguments).out


# Asking a package


def test_a_picture_is_asked_locally(digits: EnginePackage) -> None:
    """Labels, the best first."""
    asked = edge_sdk("infer", "--local", digits.path, "--input", SEVEN)

    assert ["label", "score", "class"] == asked.out.splitlines()[0].split()
    assert "7" == asked.out.splitlines()[2].split()[0]
    assert "7" == edge_sdk("infer", "--local", digits.path, "--input", SEVEN, "--json").json["predictions"][0]["label"]


def test_an_array_is_asked_locally(digits: EnginePackage, tmp_path: Path) -> None:
    """A .npy array in, a tensor out."""
    np.save(tmp_path / "zeros.npy", np.zeros((1, 1, 8, 8), np.float32))
    asked = edge_sdk("infer", "--local", digits.path, "--input", tmp_path / "zeros.npy")
    found = edge_sdk("infer", "--local", digits.path, "--input", tmp_path / "zeros.npy", "--json").json

    assert asked.out.startswith("probabilities: float32[1, 10] = ")
    assert "(10 in all)" in asked.out
    assert [1, 10] == found["outputs"][0]["shape"]
    assert 10 == len(found["outputs"][0]["data"])


def test_anything_is_asked_through_stdin(digits: EnginePackage, tmp_path: Path) -> None:
    """`--input -` reads a body from stdin, whatever it is."""
    package = make_package(tmp_path / "double", scaling(2.0))
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
    found = edge_sdk("infer", "--local", package.path, "--input", "-", "--json", stdin=json.dumps(body).encode())
    picture = edge_sdk("infer", "--local", digits.path, "--input", "-", "--json", stdin=SEVEN.read_bytes())

    assert [2.0, 4.0, 6.0, 8.0] == found.json["outputs"][0]["data"]
    assert "7" == picture.json["predictions"][0]["label"]


# Measuring


def test_a_package_is_measured(digits: EnginePackage) -> None:
    """Requests a second and percentiles, for a person and for a script."""
    found = edge_sdk("bench", digits.path, "--seconds", "0.3", "--concurrency", "4", "--json").json

    assert 4 == found["concurrency"]
    assert 0 == found["errors"]
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert "requests/s, p50" in edge_sdk("bench", digits.path, "--seconds", "0.1", "--input", SEVEN).out


def test_a_package_is_measured_here_whatever_the_environment_says(digits: EnginePackage) -> None:
    """A broker in the environment does not turn the path of a package into the name of a model."""
    nobody = f"mqtt://127.0.0.1:{free_port()}"

    assert 0 == edge_sdk("bench", digits.path, "--seconds", "0.1", EDGE_SDK_BROKER__URL=nobody).code


def test_failed_requests_fail_the_measurement(digits: EnginePackage, tmp_path: Path) -> None:
    """What the model does not take is an error with its reason, before anything is measured."""
    (tmp_path / "nonsense.json").write_text("{}")
    failed = edge_sdk("bench", digits.path, "--input", tmp_path / "nonsense.json", "--seconds", "0.1")

    assert 6 == failed.code
    assert "inputs" in failed.error


# Doctor


def test_doctor_says_what_is_wrong_and_what_to_do(digits: EnginePackage) -> None:
    """Nobody listens at the broker: a fault, with a next step, and exit code 4."""
    nobody = f"mqtt://127.0.0.1:{free_port()}"
    found = edge_sdk("doctor", "--broker", nobody, "--engines", digits.path.parent, "--json")
    findings = {finding["subject"]: finding for finding in found.json}

    assert 4 == found.code
    assert "fault" == findings["broker"]["level"]
    assert "--broker" in findings["broker"]["fix"]
    assert "ok" == findings["digits 1 (int8, profile " + digits.manifest.profile + ")"]["level"]
    assert "FAULT  broker" in edge_sdk("doctor", "--broker", nobody, "--engines", digits.path.parent).out


def test_doctor_finds_an_altered_package(tmp_path: Path) -> None:
    """A package whose file was changed is a fault, by name."""
    package = make_package(tmp_path / "double", scaling())
    (package.path / "graph.onnx").write_bytes(b"something else")
    found = edge_sdk("doctor", "--engines", tmp_path, "--json", "--broker", f"mqtt://127.0.0.1:{free_port()}")
    faults = [finding["subject"] for finding in found.json if finding["level"] == "fault"]

    assert "package double" in faults


# What goes wrong


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    file = tmp_path / "broken.onnx"
    file.write_bytes(b"\x08\x07garbage")
    return file


def test_a_broken_model_is_the_inputs_fault(broken: Path, tmp_path: Path) -> None:
    """3, whichever command reads it; a build leaves nothing behind."""
    inspected = edge_sdk("inspect", broken)
    built = edge_sdk("build-engine", broken, "--output", tmp_path / "package")

    assert (3, 3) == (inspected.code, built.code)
    assert "broken.onnx" in inspected.error
    assert "broken.onnx" in built.error
    assert [broken] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [
        (3, ("inspect", "/nowhere.onnx"), "/nowhere.onnx"),
        (3, ("inspect", "."), "not an engine package"),
        (3, ("build-engine", "/nowhere"), "There is nothing at /nowhere"),
        (3, ("build-engine", DIGITS, "--calibration", "/nowhere", "--output", "@"), "no data at /nowhere"),
        (4, ("build-engine", DIGITS, "--profile", "toaster"), "no device profile 'toaster'"),
        (4, ("build-engine", DIGITS, "--profile", "cpu-x86", "--precision", "fp16", "--output", "@"), "fp16"),
        (4, ("profiles", "show", "toaster"), "raspberry-pi-5"),
        (3, ("evaluate", ".", "--data", "."), "not an engine package"),
        (3, ("serve", "--config", "/nowhere.toml"), "/nowhere.toml"),
        (3, ("serve", "--device", "a/b"), "'a/b' cannot name a device"),
        (3, ("serve", "--broker", "http://localhost"), "mqtt://"),
        (3, ("infer", "--local", ".", "--input", SEVEN), "not an engine package"),
        (2, ("infer", "--input", SEVEN), "Give a MODEL"),
        (2, ("infer", "digits", "--local", ".", "--input", SEVEN), "either a MODEL"),
        (2, ("infer", "digits", "--input", "/nowhere.png"), "/nowhere.png"),
        (2, ("bench", "nowhere"), "no package directory"),
        (2, ("build-engine", DIGITS, "--precision", "int4"), "int4"),
        (2, ("build-engine", DIGITS, "--samples", "0"), "--samples"),
        (2, ("toast",), "No such command"),
    ],
)  # fmt: skip
def test_errors_are_one_paragraph_with_the_code_of_whose_fault_it_is(
    code: int, arguments: tuple[str | Path, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was wrong, in a sentence or two, and the documented exit code. `@` is a place to write to."""
    monkeypatch.chdir(tmp_path)
    failed = edge_sdk(*(tmp_path / "package" if argument == "@" else argument for argument in arguments))

    assert code == failed.code
    assert says in failed.error
    assert "" == failed.out


def test_no_broker(tmp_path: Path) -> None:
    """5, whichever command wants one, naming the address."""
    nobody = f"127.0.0.1:{free_port()}"
    for arguments in (("infer", "digits", "--input", str(SEVEN)), ("bench", "digits"), ("quickstart",)):
        failed = edge_sdk(*arguments, "--broker", f"mqtt://{nobody}", XDG_CACHE_HOME=str(tmp_path))

        assert 5 == failed.code
        assert nobody in failed.error


def test_the_broker_comes_from_the_environment_too() -> None:
    """EDGE_SDK_BROKER__URL is the default of --broker."""
    nobody = f"127.0.0.1:{free_port()}"

    assert nobody in edge_sdk("infer", "digits", "--input", SEVEN, EDGE_SDK_BROKER__URL=f"mqtt://{nobody}").error


def test_errors_of_a_process_are_the_same(broken: Path) -> None:
    """The same through a real process: one paragraph on stderr, nothing on stdout."""
    failed = ended(started("inspect", broken))

    assert 3 == failed.code
    assert "broken.onnx" in failed.error
    assert "" == failed.out


def test_an_interrupt_ends_a_command_with_130(digits: EnginePackage) -> None:
    """Ctrl-C in the middle of a measurement: a word, no traceback, 130."""
    process = started("bench", digits.path, "--seconds", "60", "--concurrency", "2")
    eventually(lambda: psutil.Process(process.pid).num_threads() > 1, "the worker's thread at work")
    process.send_signal(signal.SIGINT)
    interrupted = ended(process, 20)

    assert 130 == interrupted.code
    assert "Interrupted." == interrupted.err.strip()


def test_a_closed_pipe_is_no_error() -> None:
    """`edge-sdk profiles list | head -1` ends quietly."""
    command = f"{sys.executable} -m edge_sdk profiles list --json | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    assert "[\n" == done.stdout
    assert "" == done.stderr


# Over MQTT


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """mosquitto where it is installed, otherwise the embedded broker."""
    folder = tmp_path_factory.mktemp("broker")
    with running_mosquitto(folder) if MOSQUITTO else running_amqtt(folder) as running:
        yield running


@pytest.fixture(scope="module")
def url(broker: Broker, digits: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A broker with one daemon that serves the digits."""
    folder = tmp_path_factory.mktemp("daemon")
    with running_daemon(digits.path.parent, broker.url, folder, ready=["digits"], stats_interval_s="0.5"):
        yield broker.url


def test_a_device_is_asked(url: str) -> None:
    """The only device online is the default; the answer names it."""
    found = edge_sdk("infer", "digits", "--input", SEVEN, "--broker", url, "--json").json

    assert (DEVICE, "7") == (found["device"], found["predictions"][0]["label"])
    assert "7" == edge_sdk("infer", "digits", "--input", SEVEN, "--broker", url).out.splitlines()[2].split()[0]


def test_a_device_answers_as_the_package_does(url: str, digits: EnginePackage) -> None:
    """Over MQTT and in this process: the same answer, but for the device's name."""
    over = edge_sdk("infer", "digits", "--input", SEVEN, "--broker", url, "--json").json
    here = edge_sdk("infer", "--local", digits.path, "--input", SEVEN, "--json").json
    del over["device"]

    assert here == over


def test_a_device_says_who_holds_what(url: str) -> None:
    """The next document of its stats topic, whole for a script, and in words."""
    found = edge_sdk("stats", "--broker", url, "--json").json
    said = edge_sdk("stats", DEVICE, "--broker", url, "--timeout", "25").out

    memory = found["models"]["digits/1"]["memory"]
    assert memory["resident"]
    assert 0 < memory["held_bytes"] == found["memory"]["models_bytes"] <= found["memory"]["budget_bytes"]
    assert "READY" == found["models"]["digits/1"]["state"]
    digits = next(line.split() for line in said.splitlines() if line.startswith("digits/1"))
    assert ["digits/1", "READY"] == digits[:2]
    assert f"{memory['held_bytes'] / (1e6 if memory['held_bytes'] >= 1e6 else 1e3):.1f}" == digits[2]
    assert "answers kept" in said


def test_a_device_that_says_nothing_is_no_answer(url: str) -> None:
    """6, and what to look at."""
    done = edge_sdk("stats", "nobody", "--broker", url, "--timeout", "0.2")

    assert 6 == done.code
    assert "nobody published no statistics within 0.2 s" in done.err


def test_a_device_is_measured(url: str) -> None:
    """The same loop over MQTT."""
    found = edge_sdk("bench", "--broker", url, "digits", "--seconds", "0.2", "--concurrency", "4", "--json").json

    assert found["requests"] > 0
    assert 0 == found["errors"]


def test_no_answer_is_6(url: str, tmp_path: Path) -> None:
    """A device that is not there, a model that it does not have, a body that it cannot read."""
    (tmp_path / "bad.json").write_text('{"inputs": 7}')
    nobody = edge_sdk("infer", "digits", "--input", SEVEN, "--broker", url, "--device", "nobody", "--timeout", "2")
    missing = edge_sdk("infer", "cats", "--input", SEVEN, "--broker", url)
    malformed = edge_sdk("infer", "digits", "--input", tmp_path / "bad.json", "--broker", url)

    assert (6, 6, 6) == (nobody.code, missing.code, malformed.code)
    assert "nobody" in nobody.error
    assert "'cats'" in missing.error
    assert "`inputs`" in malformed.error


def test_doctor_finds_a_broker(broker: Broker) -> None:
    """A broker that answers is named, with the protocol it speaks."""
    found = edge_sdk("doctor", "--broker", broker.url, "--json")
    findings = {finding["subject"]: finding for finding in found.json}

    assert "ok" == findings["broker"]["level"]
    assert "MQTT" in findings["broker"]["detail"]


def test_serve_stops_in_order_on_ctrl_c(broker: Broker, tmp_path: Path) -> None:
    """SIGINT ends the daemon as SIGTERM does: with 0."""
    process = started("serve", "--engines", tmp_path, "--broker", broker.url, "--device", "brief")
    assert process.stderr is not None
    said = iter(process.stderr.readline, "")
    connected = any("Connected" in line for line in said)
    process.send_signal(signal.SIGINT)

    assert connected
    assert 0 == ended(process, 20).code


# Quickstart


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    return found


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_quickstart_shows_figures_and_leaves_nothing_running(tmp_path: Path) -> None:
    """Exit code 0, a table with both precisions, and three commands that can be pasted."""
    process = started("quickstart", "--seconds", "0.5", XDG_CACHE_HOME=str(tmp_path))
    children: set[psutil.Process] = set()

    def over() -> bool:
        if process.poll() is None:
            children.update(descendants(process))
        return process.poll() is not None

    eventually(over, "the end of quickstart", 60)
    done = ended(process)

    assert 0 == done.code, done.err
    assert ["digits", "FP32", "INT8"] in [line.split() for line in done.out.splitlines()]
    assert len(children) >= 2, "a broker and a daemon were seen"
    assert gone(list(children))
    infer, bench, serve = (line.strip() for line in done.out.split("Try next:")[1].strip().splitlines())
    for command in (infer, f"{bench} --seconds 0.1"):
        subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL, env=_environment(tmp_path))
    assert " serve --engines " in serve


def _environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}


def test_quickstart_tells_a_script(broker: Broker, tmp_path: Path) -> None:
    """--json: one document on stdout, its words on stderr; --broker: no broker of its own."""
    arguments = ("quickstart", "--seconds", "0.2", "--json", "--broker", broker.url)
    done = ended(started(*arguments, XDG_CACHE_HOME=str(tmp_path)), 90)

    assert 0 == done.code, done.err
    assert done.json["right"] is True
    assert done.json["asked"] == done.json["same_as_local"] == 360
    assert done.json["broker"].startswith(broker.url)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_quickstart_cleans_up_when_it_is_interrupted(number: signal.Signals, tmp_path: Path) -> None:
    """Stopped while broker and daemon run: 130, and neither outlives it."""
    process = started("quickstart", "--seconds", "60", XDG_CACHE_HOME=str(tmp_path))
    children = eventually(lambda: _at_work(process), "broker and daemon", 60)
    process.send_signal(number)
    interrupted = ended(process, 40)

    assert 130 == interrupted.code
    assert "Interrupted." == interrupted.err.strip().splitlines()[-1]
    assert "Traceback" not in interrupted.err
    eventually(lambda: gone(children), "the end of what quickstart started", 2)


def _at_work(process: subprocess.Popen[str]) -> list[psutil.Process] | None:
    """The processes that quickstart started, once the daemon is among them."""
    children = descendants(process)
    for child in children:
        try:
            if "serve" in child.cmdline():
                return children
        except psutil.NoSuchProcess:
            continue
    return None


def test_tables_are_aligned() -> None:
    """A table's columns of numbers are set to the right, the others to the left."""
    shown = table([("name", "n"), ("a", "1"), ("bb", "22")]).splitlines()

    assert ["name   n", "----  --", "a      1", "bb    22"] == shown
