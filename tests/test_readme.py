"""README.md tells the truth: its two commands are the ones that are used, and its snippets run as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_sdk.errors import NoAnswer, SpecError
from edge_sdk.mqtt.client import Client
from edge_sdk.spec import load_spec
from edge_sdk.toml import read_toml
from tests.brokers import MOSQUITTO, eventually, running_mosquitto

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A fenced block. `mark` is the comment above it: `run`, `background`, `parse`, or none."""

    mark: str
    language: str
    text: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    for found in re.finditer(r"^(?:<!-- (.+?) -->\n)?```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(found.group(1) or "", found.group(2), found.group(3), line)


BLOCKS = list(blocks(README))
QUICKSTART, TESTS = (block.text.strip() for block in BLOCKS[:2])
CONTRIBUTING = list(blocks((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
DOCUMENTS = [block for file in sorted((ROOT / "docs").glob("*.md")) for block in blocks(file.read_text("utf-8"))]
PARSED = ("sh", "python", "toml", "json", "yaml")


# The two commands


def test_the_second_command_is_what_ci_runs() -> None:
    """`.ci/run` calls exactly the README's command for the tests, from the repository's root."""
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()

    assert f"exec {TESTS}" == lines[-1]
    assert "#!/usr/bin/env bash" == lines[0]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_both_commands_are_one_line() -> None:
    """What is to be pasted is one line, which a shell can read."""
    for command in (QUICKSTART, TESTS):
        assert 1 == len(command.splitlines())
        subprocess.run(["bash", "-n"], input=command, text=True, check=True)


def test_the_scripts_can_be_read_by_bash() -> None:
    """`tests/run` and `.ci/run` have no syntax error."""
    for script in (ROOT / "tests" / "run", ROOT / ".ci" / "run"):
        subprocess.run(["bash", "-n", str(script)], check=True)


PYTHON_STUB = """#!/bin/sh
# Debian's python3: without python3-venv, `-m venv` leaves a folder without pip behind and fails.
mkdir -p .venv/bin
[ -e has-venv ] || exit 1
for tool in pip edge-sdk; do printf '#!/bin/sh\\necho %s "$@" >> told\\n' $tool > .venv/bin/$tool; done
chmod +x .venv/bin/*
"""
APT_STUB = """#!/bin/sh
echo apt-get "$@" >> told
case "$*" in *python3-venv*) touch has-venv ;; esac
"""


@pytest.fixture
def bare_system(tmp_path: Path) -> Path:
    """A folder with stand-ins for python3, apt-get and sudo; what they were told lands in `told`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("python3", PYTHON_STUB), ("apt-get", APT_STUB), ("sudo", '#!/bin/sh\nexec "$@"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return tmp_path


def pasted(command: str, folder: Path) -> list[str]:
    """What the stand-ins were told when the command was pasted into a shell there."""
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", command], cwd=folder, env=environment, check=True)
    told = (folder / "told").read_text().splitlines()
    (folder / "told").unlink()
    return told


INSTALLED = ["pip install .[quickstart]", "edge-sdk quickstart"]


def test_the_first_command_installs_what_is_missing(bare_system: Path) -> None:
    """Without python3-venv it installs that and starts over; the second time there is nothing to install."""

    assert ["apt-get update", "apt-get install -y python3-venv", *INSTALLED] == pasted(QUICKSTART, bare_system)
    assert INSTALLED == pasted(QUICKSTART, bare_system)


def test_the_first_command_installs_nothing_where_all_is_there(bare_system: Path) -> None:
    """With python3-venv, apt is not touched."""
    (bare_system / "has-venv").touch()

    assert INSTALLED == pasted(QUICKSTART, bare_system)


# The snippets


def test_every_snippet_is_run_or_parsed() -> None:
    """Each block of README says what the tests do with it; only listings, and C++, are left alone."""
    unmarked = [block for block in BLOCKS[2:] if not block.mark and block.language not in ("text", "cpp")]

    assert [] == unmarked


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{block.language}-{block.line}")
        for block in (*BLOCKS, *CONTRIBUTING, *DOCUMENTS)
        if block.language in PARSED
    ],
)
def test_snippets_can_be_parsed(block: Block, tmp_path: Path) -> None:
    """Shell, Python, JSON, YAML and TOML are at least that."""
    match block.language:
        case "sh":
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
        case "python":
            compile(block.text, f"line {block.line}", "exec")
        case "json":
            json.loads(block.text)
        case "yaml":
            yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
            assert yaml.safe_load(block.text)
        case "toml":
            (tmp_path / "block.toml").write_text(block.text, encoding="utf-8")
            assert read_toml(tmp_path / "block.toml", SpecError)


def test_the_engine_of_readme_is_a_sound_spec(tmp_path: Path) -> None:
    """Its engine.toml has the keys that there are, with values they take."""
    (tmp_path / "engine.toml").write_text(next(block.text for block in BLOCKS if block.mark == "engine.toml"))
    spec = load_spec(tmp_path)

    assert "image-classification" == spec.task
    assert tmp_path / "squeezenet.onnx" == spec.model


class Reader:
    """Somebody with a shell who follows README from top to bottom."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        self.running: list[subprocess.Popen[str]] = []

    def do(self, block: Block) -> str:
        """Run a block to its end; what it printed."""
        done = subprocess.run(
            self._command(block), cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=60
        )

        assert 0 == done.returncode, f"{block.text}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self, block: Block) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self._command(block, "exec "),  # so that stopping the shell stops what it runs
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.running.append(process)
        return process

    def stop(self) -> None:
        for process in self.running:
            process.terminate()
            process.communicate(timeout=20)

    def _command(self, block: Block, before: str = "set -e\n") -> list[str]:
        text = block.text.replace("1883", str(self.port))
        return [sys.executable, "-c", text] if block.language == "python" else ["bash", "-c", before + text]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """In a folder with the bundled engine's sources, `edge-sdk` on the PATH, and a broker on a port of its own."""
    if MOSQUITTO is None or shutil.which("mosquitto_rr") is None:
        pytest.skip("mosquitto and its clients are not installed")
    shutil.copytree(ROOT / "engines", tmp_path / "engines", ignore=shutil.ignore_patterns("build"))
    program = tmp_path / "bin" / "edge-sdk"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m edge_sdk "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with running_mosquitto(tmp_path) as broker:
        following = Reader(tmp_path, broker.port)
        try:
            yield following
        finally:
            following.stop()


def test_the_snippets_of_readme_run(reader: Reader) -> None:
    """Built, evaluated, served and asked, in the order of the page, each answer a 7 for the picture of a 7."""
    printed: list[str] = []
    listener: Block | None = None
    for block in BLOCKS:
        match block.mark:
            case "run":
                printed.append(reader.do(block))
            case "background: ready":
                reader.start(block)
                _wait_for(reader.port)
            case "background":
                listener = block
            case "run: answers the one above" | "run: answers with text":
                assert listener is not None
                printed.append(_heard(reader, listener, block))
    built, measured, asked, answered, listened, replied, texts = printed

    assert ["top-1", "top-1"] == re.findall("^top-1", built, re.MULTILINE)
    assert "(1, 10)" in measured
    assert asked.splitlines()[2].split()[0] == "7"
    assert answered.startswith("7 0.")
    assert "7" == json.loads(listened)["predictions"][0]["label"]
    assert [1, 10] == json.loads(replied)["outputs"][0]["shape"]
    assert re.match(r"0\.\d+:7:7", texts)


def _wait_for(port: int) -> None:
    with Client(f"mqtt://localhost:{port}", device="lab") as client:

        def ready() -> bool:
            try:
                return bool(client.metadata("digits")["state"] == "READY")
            except NoAnswer:
                return False

        eventually(ready, "digits READY")


def _heard(reader: Reader, listener: Block, block: Block) -> str:
    """What the listener printed; the request is repeated until it has been heard."""
    process = reader.start(listener)

    def ended() -> bool:
        reader.do(block)
        return process.poll() is not None

    eventually(ended, "an answer at the listener")
    return process.communicate()[0]


def test_no_port_of_a_snippet_is_left_to_chance() -> None:
    """Every snippet that speaks to a broker names its port, which the tests replace by a free one."""
    speaking = [block for block in BLOCKS if block.mark.startswith(("run", "background")) and "localhost" in block.text]

    assert len(speaking) >= 5
    assert [] == [block for block in speaking if "1883" not in block.text]
