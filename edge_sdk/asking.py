"""Asking a model from the command line: a package in this process, or a device over MQTT, with the same result.

A local package is asked through the very task and worker that the daemon uses, a local pipeline through its service, so
what is seen here is what a client of the daemon would get.
"""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_sdk import console
from edge_sdk.bench import BenchResult, device_figures, drive
from edge_sdk.errors import DataError, NoAnswer, RequestError
from edge_sdk.local import in_process
from edge_sdk.package import EnginePackage
from edge_sdk.settings import Settings
from edge_sdk.stages import PipelinePackage, holds_pipeline
from edge_sdk.tasks.base import NPY, Payload, SequencePart
from edge_sdk.tasks.npy import decode_npy, encode_npy
from edge_sdk.tasks.oip import OipResponse, decode_response, encode_request, to_list
from edge_sdk.tensors import DTYPE_FROM_OIP, OIP_FROM_DTYPE, Array, TensorSpec, dtype_name, zeros

if TYPE_CHECKING:
    from edge_sdk.mqtt.client import Answer, Client

_SHOWN = 8
"""Elements of a tensor that are shown to a person."""
_DEVICE_S = 2.0
"""Enough for the median of what an engine takes alone."""


@dataclass(frozen=True)
class Answered:
    """An answer, whoever gave it."""

    model: str
    version: str
    outputs: dict[str, Array]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    device: str | None = None

    def to_dict(self) -> dict[str, Any]:
        described: dict[str, Any] = {"model_name": self.model, "model_version": self.version}
        if self.device is not None:
            described["device"] = self.device
        if self.predictions:
            described["predictions"] = self.predictions
        described["outputs"] = [
            {
                "name": name,
                "datatype": OIP_FROM_DTYPE[dtype_name(array)],
                "shape": list(array.shape),
                "data": to_list(name, array),
            }
            for name, array in self.outputs.items()
        ]
        return described

    def text(self) -> str:
        """For a person: labels and how sure the model is, or the beginning of each tensor."""
        if self.predictions:
            rows = [("label", "score", "class")]
            rows += [(p["label"], f"{100 * p['score']:.1f} %", str(p["index"])) for p in self.predictions]
            return console.table(rows)
        lines = []
        for name, array in self.outputs.items():
            values = to_list(name, array)
            shown = ", ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values[:_SHOWN])
            more = f", ... ({len(values)} in all)" if len(values) > _SHOWN else ""
            lines.append(f"{name}: {dtype_name(array)}{list(array.shape)} = {shown}{more}")
        return "\n".join(lines)


def ask_package(package: Path, data: bytes, *, timeout_s: float, sequence: bool = False) -> Answered:
    """The answer of the package or pipeline in that directory to a payload whose type its bytes tell; RequestErrors.

    With `sequence`, the rows of an .npy array are one sequence of a stateful model, and the answer has a row for each.
    """
    opened = _opened(package)
    if sequence and isinstance(opened, PipelinePackage):
        raise DataError(f"{package} is a pipeline, and has no sequences.", fix="Leave --sequence out.")
    with in_process(opened) as submit:

        def ask(payload: Payload) -> Answered:
            try:
                body = submit(payload).result(timeout_s)
            except FutureTimeoutError as exc:
                why = f"{package} gave no answer within {timeout_s:g} s."
                raise NoAnswer(why, fix="Give more with --timeout.") from exc
            told: OipResponse = decode_response(body.data, body.header_length)
            return Answered(told.model_name, told.model_version, told.outputs, told.extra.get("predictions", []))

        if not sequence:
            return ask(Payload(data))
        return _one_after_the_other(
            [
                ask(Payload(encode_npy(row), NPY, sequence=SequencePart("rows", start=not step, step=step)))
                for step, row in enumerate(_rows(data))
            ]
        )


def ask_device(
    model: str,
    data: bytes,
    *,
    settings: Settings,
    client_id: str | None = None,
    device: str | None,
    timeout_s: float,
    group: str | None = None,
    sequence: bool = False,
) -> Answered:
    """The answer of a device, or of whichever of a group gets the request; raises RequestErrors for its errors,
    NoAnswer, BrokerError, SettingsError. `sequence` as in `ask_package`."""

    def answered(answer: Answer) -> Answered:
        predictions = [asdict(prediction) for prediction in answer.predictions]
        return Answered(model, answer.model_version, answer.outputs, predictions, answer.device)

    with _client(settings, device, client_id, timeout_s=timeout_s) as client:
        if not sequence:
            return answered(client.infer(model, data, group=group))
        with client.sequence(model) as open_sequence:
            return _one_after_the_other([answered(open_sequence.infer(row)) for row in _rows(data)])


def _rows(data: bytes) -> Array:
    """An .npy array to be sent row by row; DataError if it is none, or empty."""
    try:
        rows = decode_npy(data)
    except RequestError as exc:
        raise DataError(f"The rows of a sequence come as one .npy array. {exc.problem}") from exc
    if not rows.ndim or not len(rows):
        raise DataError(f"The .npy array of shape {list(rows.shape)} has no rows to send.")
    return rows


def _one_after_the_other(answers: list[Answered]) -> Answered:
    """The answers to the rows of a sequence as one."""
    names = answers[0].outputs
    outputs = {name: np.concatenate([np.atleast_1d(each.outputs[name]) for each in answers]) for name in names}
    return replace(answers[-1], outputs=outputs)


def command_device(
    device: str,
    name: str,
    arguments: dict[str, str],
    *,
    settings: Settings,
    client_id: str | None = None,
    timeout_s: float,
) -> dict[str, Any]:
    """What a device says about a command that it carried out; raises CommandFailed, NoAnswer, BrokerError."""
    with _client(settings, device, client_id, timeout_s=timeout_s) as client:
        return client.command(name, arguments)


def device_stats(
    device: str | None, *, settings: Settings, client_id: str | None = None, timeout_s: float
) -> dict[str, Any]:
    """The next statistics of a device; raises NoAnswer, BrokerError."""
    with _client(settings, device, client_id) as client:
        return client.stats(timeout_s=timeout_s)


def bench_package(package: Path, data: bytes | None, *, concurrency: int, seconds: float) -> BenchResult:
    """A package in this process; without `data`, zeros are sent. A pipeline, asked with the picture that `data` is."""
    opened = _opened(package)
    if data is not None:
        payload = Payload(data)
    elif isinstance(opened, PipelinePackage):
        raise _no_picture(opened.spec.name)
    else:
        body = encode_request(zeros(opened.manifest.asked))
        payload = Payload(body.data, body.content_type, body.header_length)
    with in_process(opened) as submit:
        result = drive(lambda: submit(payload), concurrency=concurrency, seconds=seconds)
    if isinstance(opened, PipelinePackage):
        return result
    return replace(result, device=device_figures(opened, seconds=min(seconds, _DEVICE_S)))


def bench_device(
    model: str,
    data: bytes | None,
    *,
    settings: Settings,
    client_id: str | None = None,
    device: str | None,
    concurrency: int,
    seconds: float,
) -> BenchResult:
    """A model over MQTT; without `data`, zeros of the shape that the model's metadata gives."""
    with _client(settings, device, client_id) as client:
        metadata = client.metadata(model)
        if data is None and metadata.get("task") == "pipeline":
            raise _no_picture(model)
        payload: Any = zeros(_inputs(metadata)) if data is None else data
        numbers = itertools.count()

        def submit() -> Future[Any]:
            alone = SequencePart(str(next(numbers)), start=True, end=True) if "sequence" in metadata else None
            return client.submit(model, payload, sequence=alone)

        return drive(submit, concurrency=concurrency, seconds=seconds)


def _opened(folder: Path) -> EnginePackage | PipelinePackage:
    return PipelinePackage.open(folder) if holds_pipeline(folder) else EnginePackage.open(folder)


def _no_picture(pipeline: str) -> DataError:
    return DataError(f"The pipeline {pipeline} takes a picture, and zeros are none.", fix="Give one with --input FILE.")


def _client(settings: Settings, device: str | None, client_id: str | None, **more: Any) -> Client:
    """A client at the broker of `settings`, with the way in that they describe."""
    from edge_sdk.mqtt.client import Client

    broker = settings.broker
    return Client(
        broker.url,
        access=settings.access(),
        protocol=broker.protocol,
        root=settings.root,
        device=device,
        client_id=client_id,
        **more,
    )


def _inputs(metadata: dict[str, Any]) -> tuple[TensorSpec, ...]:
    """The inputs in a model's retained metadata."""
    return tuple(
        TensorSpec(t["name"], DTYPE_FROM_OIP[t["datatype"]], tuple(axis if axis >= 0 else "?" for axis in t["shape"]))
        for t in metadata.get("inputs", [])
    )
