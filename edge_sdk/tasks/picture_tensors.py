"""The task `tensors` of a model that has a [preprocess] table: pictures in as well, and its tensors out as they are.

What a detector is asked with, whose boxes somebody else reads from its tensors.
"""

from __future__ import annotations

from edge_sdk.tasks.base import Body, Decoded
from edge_sdk.tasks.image_classification import ImageClassification, ImageReply
from edge_sdk.tasks.oip import OipRequest
from edge_sdk.tasks.tensors import TensorReply
from edge_sdk.tensors import Outputs


class PictureTensors(ImageClassification):
    """Pictures or tensors in, tensors out."""

    def encode(self, outputs: Outputs, decoded: Decoded) -> Body:
        reply = decoded.reply
        if isinstance(reply, ImageReply):
            decoded = decoded._replace(reply=TensorReply(reply.accept, OipRequest({})))
        return super().encode(outputs, decoded)
