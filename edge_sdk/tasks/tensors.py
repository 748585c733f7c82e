"""The task `tensors`: arrays in, arrays out. Every model can be asked this way.

It takes Open Inference Protocol bodies (JSON and binary), a .npy array, or the raw bytes of one tensor, and answers in
the Open Inference Protocol, or in .npy if that was asked for and there is one output. A leading batch axis of 1 may be
left out of a .npy array.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_sdk.errors import InferenceFailed, InvalidTensor, Malformed, UnsupportedType
from edge_sdk.tasks.base import BINARY, JPEG, JSON, NPY, PNG, Body, Decoded, Payload
from edge_sdk.tasks.npy import MAGIC as NPY_MAGIC
from edge_sdk.tasks.npy import decode_npy, encode_npy
from edge_sdk.tasks.oip import OipRequest, OutputChoice, decode_request, encode_response
from edge_sdk.tensors import Array, Feeds, Outputs, TensorSpec, check_feeds, is_batchable, numpy_dtype


@dataclass(frozen=True)
class TensorReply:
    """How the answer to a tensor request is to look."""

    accept: str | None
    request: OipRequest


_NOTHING_SAID = OipRequest({})
"""Raw bytes ask for nothing in particular."""


class TensorTask:
    """Arrays in, arrays out, for a model with these inputs and outputs."""

    content_types: tuple[str, ...] = (JSON, BINARY, NPY)
    takes_pictures = False

    def __init__(
        self,
        name: str,
        version: str,
        *,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        labels: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.version = version
        self.inputs = inputs
        self.outputs = outputs
        self.labels = labels
        self.batchable = is_batchable(inputs, outputs)
        self._raw_shape = _fixed_shape(inputs[0])
        self._raw_dtype = numpy_dtype(inputs[0].dtype).newbyteorder("<")
        self._raw_bytes = math.prod(self._raw_shape or ()) * self._raw_dtype.itemsize

    def decode_s(self, payload: Payload) -> float:
        return 0.0

    def decode(self, payload: Payload) -> Decoded:
        content_type = payload.content_type or sniff(payload.data)
        if content_type == JSON:
            request = decode_request(payload.data)
        elif content_type == BINARY and payload.header_length:
            request = decode_request(payload.data, payload.header_length)
        elif content_type == BINARY:  # of the right length, it is of the right shape and dtype
            rows = 1 if self.batchable else 0
            return Decoded(self._raw_feeds(payload.data), rows, TensorReply(payload.accept, _NOTHING_SAID))
        elif content_type == NPY:
            request = OipRequest(self._npy_feeds(payload.data))
        else:
            raise UnsupportedType(
                f"The content type {str(content_type)[:80]!r} is not taken; this model takes {self._listed()}."
            )
        self._check_choices(request.outputs)
        check_feeds(request.feeds, self.inputs)
        return Decoded(request.feeds, self._rows(request.feeds), TensorReply(payload.accept, request), request.sequence)

    def encode(self, outputs: Outputs, decoded: Decoded) -> Body:
        reply = decoded.reply
        assert isinstance(reply, TensorReply)
        if reply.accept == NPY and len(outputs) == 1 and self.outputs[0].dtype != "string":
            return Body(encode_npy(next(iter(outputs.values()))), NPY)
        request = reply.request
        default = request.binary_output or reply.accept == BINARY
        if not request.outputs:
            everything = {spec.name: outputs[spec.name] for spec in self.outputs}
            return encode_response(
                everything, model_name=self.name, model_version=self.version, id=request.id, binary=default
            )
        choices = request.outputs
        chosen = {
            choice.name: self._classified(outputs[choice.name], choice.classification)
            if choice.classification
            else outputs[choice.name]
            for choice in choices
        }
        binary = {choice.name: default if choice.binary is None else choice.binary for choice in choices}
        return encode_response(chosen, model_name=self.name, model_version=self.version, id=request.id, binary=binary)

    def _rows(self, feeds: Feeds) -> int:
        """How many places of a batch the request takes; 0: it has to be computed alone."""
        if not self.batchable:
            return 0
        sizes = {len(array) for array in feeds.values()}
        if len(sizes) != 1 or 0 in sizes:
            raise InvalidTensor(f"The inputs' first axis is the batch: one size of 1 or more; {sorted(sizes)} came.")
        return sizes.pop()

    def _raw_feeds(self, data: bytes) -> Feeds:
        spec = self._only_input("raw bytes")
        if self._raw_shape is None:
            raise InvalidTensor(
                f"The input {spec.name!r} has no fixed size ({spec.oip_shape}), so raw bytes do not say its shape.",
                fix="Send .npy (application/x-npy) or an Open Inference Protocol body.",
            )
        if len(data) != self._raw_bytes:
            raise InvalidTensor(
                f"The input {spec.name!r} takes {self._raw_bytes} bytes ({spec.oip_datatype} {self._raw_shape}); "
                f"{len(data)} came."
            )
        return {spec.name: np.frombuffer(data, dtype=self._raw_dtype).reshape(self._raw_shape)}

    def _npy_feeds(self, data: bytes) -> Feeds:
        spec = self._only_input("a .npy array")
        array = decode_npy(data)
        if array.ndim == len(spec.shape) - 1 and (spec.shape[0] == 1 or isinstance(spec.shape[0], str)):
            array = array[np.newaxis]
        return {spec.name: array}

    def _only_input(self, what: str) -> TensorSpec:
        if len(self.inputs) != 1:
            raise InvalidTensor(
                f"The model has {len(self.inputs)} inputs, so {what} cannot say which one is meant.",
                fix="Send an Open Inference Protocol body.",
            )
        return self.inputs[0]

    def _check_choices(self, choices: tuple[OutputChoice, ...]) -> None:
        dtypes = {spec.name: spec.dtype for spec in self.outputs}
        for choice in choices:
            if choice.name not in dtypes:
                raise InvalidTensor(
                    f"The model has no output {choice.name[:80]!r}; its outputs are {', '.join(sorted(dtypes))}."
                )
            if choice.classification and dtypes[choice.name] == "string":
                raise InvalidTensor(f"The output {choice.name!r} is {dtypes[choice.name]}; it has no best classes.")
        if len({choice.name for choice in choices}) != len(choices):
            raise Malformed("An output is asked for twice.")

    def _classified(self, scores: Array, classes: int) -> Array:
        """The best `classes` of the last axis as `score:index:label` strings, one row for each of the others."""
        if scores.dtype.kind == "f" and not np.isfinite(scores).all():
            raise InferenceFailed("The model answered NaN or infinite scores, which have no order.")
        scores = np.atleast_1d(scores)
        best = np.argsort(-scores.astype(np.float64), axis=-1, kind="stable")[..., :classes]
        texts = np.empty(best.size, dtype=object)
        texts[:] = list(map(self._class_text, np.take_along_axis(scores, best, axis=-1).flat, best.flat))
        return texts.reshape(best.shape)

    def _class_text(self, score: Any, index: Any) -> bytes:
        return class_text(float(score), int(index), self.labels).encode()

    def _listed(self) -> str:
        return ", ".join(self.content_types)


def _fixed_shape(spec: TensorSpec) -> list[int] | None:
    """The shape of one request for `spec`, or None where only the request itself could say it."""
    shape = spec.at_batch(1)
    sizes = [axis for axis in shape if isinstance(axis, int)]
    return sizes if len(sizes) == len(shape) and spec.dtype != "string" else None


def class_text(score: float, index: int, labels: tuple[str, ...]) -> str:
    """A class as the Open Inference Protocol's classification writes it: `score:index:label`."""
    text = f"{score:.6f}:{index}"
    return f"{text}:{labels[index]}" if index < len(labels) else text


def sniff(data: bytes) -> str:
    """The content type of a payload that names none, from its first bytes; UnsupportedType if they do not tell."""
    if not data:
        raise Malformed("The payload is empty.")
    if data.startswith(b"\xff\xd8\xff"):
        return JPEG
    if data.startswith(b"\x89PNG"):
        return PNG
    if data.startswith(NPY_MAGIC):
        return NPY
    if data[:64].lstrip()[:1] == b"{":
        return JSON
    raise UnsupportedType(
        "The payload came without a content type, and its first bytes do not tell.",
        fix=f"Send a JPEG, PNG, .npy array or JSON body; raw bytes of a tensor need the content type {BINARY}.",
    )
