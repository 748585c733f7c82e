"""Sequences over MQTT, with the real voice detector: the daemon keeps the state, and never goes on from a wrong one."""

from __future__ import annotations

import json
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_sdk.cli import main
from edge_sdk.compile.pipeline import build_engine
from edge_sdk.errors import QueueFull, SequenceOutOfStep, SequenceUnknown
from edge_sdk.mqtt.client import Answer, Client
from edge_sdk.tasks.base import SequencePart
from edge_sdk.tensors import Array
from tests.brokers import Broker, eventually
from tests.daemon.processes import DaemonProcess, running_daemon
from tests.faults.conftest import stats_from

DEVICE = "listening"
MODEL = "vad"
CHUNK = 512
CHUNKS = 100
"""Of 1,875: enough for the state to go wrong in, with speech and silence."""
ROUNDED = 1e-4
"""The expected probabilities have four digits."""
OTHER_SUMS = 1e-5
"""Kernels for a batch may add up in another order than for one row."""


@pytest.fixture(scope="module")
def engines(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Silero's detector, as its spec says that it is one: 512 new samples a request, and a state of its own."""
    folder = tmp_path_factory.mktemp("vad")
    spec = folder / "spec"
    spec.mkdir()
    (spec / "engine.toml").write_text(
        f'name = "{MODEL}"\nmodel = "{shared / "models" / "silero-vad-16k.onnx"}"\n'
        "[axes]\nsequence = {min = 576, best = 576, max = 576}\n"
        "[batching]\nmax_wait_ms = 20\n"  # for company: these clients wait for one another
        '[sequence]\nstates = [{input = "state", output = "stateN", batch_axis = 1}]\n'
        'constants = {sr = 16000}\ncontext = {input = "input", samples = 64}\ntimeout_s = 3.0\nmax_sequences = 4\n'
    )
    package = build_engine(spec, precision="fp32", output=folder / "engines" / MODEL)

    assert package.manifest.batching.max_batch > 1, "its requests were found to stack"
    return folder / "engines"


@pytest.fixture
def listening(engines: Path, broker: Broker, tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(engines, broker.url, tmp_path, ready=[MODEL], device=DEVICE, stats_interval_s="0.2") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def speech(shared: Path) -> Array:
    with wave.open(str(shared / "audio" / "speech-16k.wav")) as recording:
        samples = np.frombuffer(recording.readframes(recording.getnframes()), "<i2")
    chunks: Array = (samples[: len(samples) // CHUNK * CHUNK].astype(np.float32) / 32768).reshape(-1, CHUNK)
    return chunks


@pytest.fixture(scope="module")
def expected(shared: Path) -> list[float]:
    probabilities: list[float] = json.loads((shared / "models" / "silero-vad-expected.json").read_text())[
        "probabilities"
    ]
    return probabilities


def voice(answer: Answer) -> float:
    return float(answer.outputs["output"][0, 0])


def test_speech_is_found_as_it_was_expected(
    listening: DaemonProcess, broker: Broker, speech: Array, expected: list[float]
) -> None:
    """One sequence by the client library, over MQTT 5 and 3.1.1: the published probabilities."""
    with Client(broker.url, device=DEVICE) as client, client.sequence(MODEL) as sequence:
        metadata = client.metadata(MODEL)
        found = [voice(sequence.infer(chunk)) for chunk in speech[:CHUNKS]]

    assert [[-1, CHUNK]] == [tensor["shape"] for tensor in metadata["inputs"]]
    assert {"timeout_s": 3.0, "max_sequences": 4} == metadata["sequence"]
    assert np.abs(np.array(found) - expected[:CHUNKS]).max() <= ROUNDED
    with Client(broker.url, device=DEVICE, protocol="3.1.1") as client, client.sequence(MODEL) as sequence:
        found = [voice(sequence.infer({"input": chunk[np.newaxis]})) for chunk in speech[:20]]

    assert np.abs(np.array(found) - expected[:20]).max() <= ROUNDED


def test_the_command_line_sends_row_by_row(
    listening: DaemonProcess, broker: Broker, engines: Path, speech: Array, expected: list[float], tmp_path: Path
) -> None:
    """`infer --sequence` and `bench`, in this process and over MQTT."""
    recording = tmp_path / "speech.npy"
    np.save(recording, speech[:10])
    there, package = ["--device", DEVICE, "--broker", broker.url], str(engines / MODEL)
    for place in ([MODEL, *there], ["--local", package]):
        asked = CliRunner().invoke(main, ["infer", *place, "--input", str(recording), "--sequence", "--json"])
        (output,) = json.loads(asked.stdout)["outputs"]

        assert [10, 1] == output["shape"]
        assert expected[:10] == pytest.approx(output["data"], abs=ROUNDED)
    for place in ([MODEL, *there], [package]):
        timed = CliRunner().invoke(main, ["bench", *place, "--seconds", "0.2", "--concurrency", "3", "--json"])

        assert 0 == json.loads(timed.stdout)["errors"]


def test_sequences_share_batches_and_nothing_else(listening: DaemonProcess, broker: Broker, speech: Array) -> None:
    """Three at a time at different places of the recording, two of one client: each is what it would be alone."""
    places = (0, 300, 900)

    def listen(client: Client, place: int, chunks: int) -> list[float]:
        with client.sequence(MODEL) as sequence:
            return [voice(sequence.infer(chunk)) for chunk in speech[place : place + chunks]]

    with Client(broker.url, device=DEVICE) as one, Client(broker.url, device=DEVICE) as other:
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(listen, (one, one, other), places, [30] * 3))
        counts = eventually(lambda: _counts(broker), "statistics", 30)
        alone = [listen(one, place, 30) for place in places]

    assert np.abs(np.array(together) - alone).max() <= OTHER_SUMS
    assert counts["mean_batch"] > 1.5


def test_what_the_device_does_not_have_it_does_not_make_up(
    listening: DaemonProcess, broker: Broker, speech: Array
) -> None:
    """After a time-out, and after the daemon was killed: a clear error, and a new beginning is as good as the first."""
    with Client(broker.url, device=DEVICE, timeout_s=30) as client:
        sequence = client.sequence(MODEL)
        first = voice(sequence.infer(speech[0]))
        eventually(lambda: _is_forgotten(client, sequence.id), "timed out")
        with pytest.raises(SequenceUnknown, match="was not used for 3 s"):
            sequence.infer(speech[1])
        sequence.restart()

        assert first == voice(sequence.infer(speech[0]))
        # Once another is answered, this one is acknowledged: else the next daemon would be given it, and begin with it.
        client.infer(MODEL, speech[0], sequence=SequencePart("another", start=True, end=True))
        listening.kill()
        listening.start(ready=[MODEL])
        with pytest.raises(SequenceUnknown, match="restarted"):
            sequence.infer(speech[1])
        sequence.restart()
        assert first == voice(sequence.infer(speech[0]))


def test_a_step_is_computed_once(listening: DaemonProcess, broker: Broker, speech: Array) -> None:
    """Sent again under another id it is refused, and so is one that leaves something out; then all goes on."""
    with Client(broker.url, device=DEVICE) as client:
        alone = [voice(answer) for answer in _asked(client, "alone", speech[:3])]
        answers = _asked(client, "mine", speech[:2])
        for step in (1, 3):
            with pytest.raises(SequenceOutOfStep):
                client.infer(MODEL, speech[1], sequence=SequencePart("mine", step=step))
        answers.append(client.infer(MODEL, speech[2], sequence=SequencePart("mine", step=2, end=True)))

        assert alone == pytest.approx([voice(answer) for answer in answers], abs=OTHER_SUMS)


def test_there_is_room_for_so_many(listening: DaemonProcess, broker: Broker, speech: Array) -> None:
    """The fifth of four is told to come back, and is let in as soon as another one has ended."""
    with Client(broker.url, device=DEVICE) as client:
        sequences = [client.sequence(MODEL) for _ in range(5)]
        for sequence in sequences[:4]:
            sequence.infer(speech[0])
        with pytest.raises(QueueFull, match="4 sequences open"):
            sequences[4].infer(speech[0], timeout_s=0.5)
        sequences[0].close()
        sequences[4].infer(speech[0])
        for sequence in sequences[1:]:
            sequence.close()


def _asked(client: Client, name: str, chunks: Array) -> list[Answer]:
    return [
        client.infer(MODEL, chunk, sequence=SequencePart(name, start=not step, step=step))
        for step, chunk in enumerate(chunks)
    ]


def _is_forgotten(client: Client, name: str) -> bool:
    """Asked with a step that is refused while there is the sequence, and so does not keep it from timing out."""
    try:
        client.infer(MODEL, np.zeros(CHUNK, np.float32), sequence=SequencePart(name, step=99))
    except SequenceOutOfStep:
        return False
    except SequenceUnknown:
        return True
    raise AssertionError("step 99 was taken")


def _counts(broker: Broker) -> dict[str, float] | None:
    """What the device says of the model, once it has counted everything that was asked."""
    counts: dict[str, float] = stats_from(broker, DEVICE)["models"][f"{MODEL}/1"]
    return counts if counts["sequences"] == 0 and counts["batches"] else None
