"""What MLServer loads: onnxruntime on the bytes of one image."""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, Parameters, ResponseOutput


class Bare(MLModel):
    async def load(self) -> bool:
        self._session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], providers=["CPUExecutionProvider"])
        spec = self._session.get_inputs()[0]
        self._input, self._shape = spec.name, [1, *spec.shape[1:]]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        data = payload.inputs[0].data[0]
        image = np.frombuffer(data, dtype=np.float32).reshape(self._shape)
        answer = self._session.run(None, {self._input: image})[0]
        output = ResponseOutput(
            name="answer",
            shape=[1],
            datatype="BYTES",
            data=[answer.tobytes()],
            parameters=Parameters(content_type=None),
        )
        return InferenceResponse(model_name=self.name, outputs=[output])
