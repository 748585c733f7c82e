"""The task `image-classification`: a photo in, its best labels out.

The model has one picture as its input and one row of scores as its first output. JPEG and PNG go through the declared
preprocessing. The answer is an Open Inference Protocol body with the output `classification` (`score:index:label`
strings) and, for people who would rather not split strings, the same as `predictions`:

    {"model_name": "squeezenet", "model_version": "1",
     "outputs": [{"name": "classification", "datatype": "BYTES", "shape": [2],
                  "data": ["0.912000:207:golden retriever", "0.041000:208:Labrador retriever"]}],
     "predictions": [{"label": "golden retriever", "index": 207, "score": 0.912}, ...]}

`accept: text/plain` gives the strings alone, one a line, for a microcontroller. Tensors are answered with tensors, as
by the task `tensors`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_sdk.errors import InferenceFailed, UnsupportedType
from edge_sdk.spec import Postprocess, Preprocess
from edge_sdk.tasks.base import BINARY, JPEG, JSON, NPY, PNG, TEXT, Body, Decoded, Payload
from edge_sdk.tasks.images import decode_image, decoding_s
from edge_sdk.tasks.oip import encode_response
from edge_sdk.tasks.tensors import TensorTask, class_text, sniff
from edge_sdk.tensors import Array, Outputs, TensorSpec, check_feeds


@dataclass(frozen=True)
class ImageReply:
    """How the answer to a photo is to look."""

    accept: str | None


class ImageClassification(TensorTask):
    """Photos in, labels out; tensors in, tensors out."""

    content_types: tuple[str, ...] = (JPEG, PNG, JSON, BINARY, NPY)
    takes_pictures = True

    def __init__(
        self,
        name: str,
        version: str,
        *,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        labels: tuple[str, ...],
        preprocess: Preprocess,
        postprocess: Postprocess,
    ) -> None:
        super().__init__(name, version, inputs=inputs, outputs=outputs, labels=labels)
        self.preprocess = preprocess
        self.postprocess = postprocess

    def decode_s(self, payload: Payload) -> float:
        return decoding_s(payload.data)

    def decode(self, payload: Payload) -> Decoded:
        content_type = payload.content_type or sniff(payload.data)
        if content_type not in (JPEG, PNG):
            return super().decode(payload)
        sniffed = sniff(payload.data)
        if sniffed not in (JPEG, PNG):
            raise UnsupportedType(f"The payload says it is {content_type}; its first bytes say {sniffed}.")
        spec = self.inputs[0]
        picture = decode_image(payload.data, self.preprocess)
        feeds = {spec.name: picture.astype(spec.dtype, copy=False)}
        check_feeds(feeds, self.inputs)
        return Decoded(feeds, 1 if self.batchable else 0, ImageReply(payload.accept))

    def encode(self, outputs: Outputs, decoded: Decoded) -> Body:
        if not isinstance(decoded.reply, ImageReply):
            return super().encode(outputs, decoded)
        scores = self.probabilities(outputs[self.outputs[0].name].ravel())
        best = best_classes(scores, self.postprocess.top_k)
        texts = [class_text(float(scores[index]), index, self.labels) for index in best]
        if decoded.reply.accept == TEXT:
            return Body("\n".join(texts).encode(), TEXT)
        predictions = [
            {
                "label": self.labels[index] if index < len(self.labels) else str(index),
                "index": index,
                "score": round(float(scores[index]), 6),
            }
            for index in best
        ]
        return encode_response(
            {"classification": np.array([text.encode() for text in texts], dtype=object)},
            model_name=self.name,
            model_version=self.version,
            binary=decoded.reply.accept == BINARY,
            extra={"predictions": predictions},
        )

    def probabilities(self, scores: Array) -> Array:
        """`scores` [classes] as float32, softmax applied to logits; InferenceFailed if they are not numbers."""
        values = scores.astype(np.float32)
        if not np.isfinite(values).all():
            raise InferenceFailed("The model answered NaN or infinite scores for this picture.")
        if self.postprocess.scores == "logits":
            values = np.exp(values - values.max())
            values /= values.sum()
        return values


def best_classes(scores: Array, top_k: int) -> list[int]:
    """The indices of the `top_k` highest of `scores` [classes], best first; equal scores keep their order."""
    best: list[int] = np.argsort(-scores, kind="stable")[:top_k].tolist()
    return best
