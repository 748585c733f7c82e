"""LitServe: batches of up to 8, one millisecond of waiting; the image base64 in JSON, as its documentation does it."""

import base64
import sys

import litserve
import numpy as np
import onnxruntime


class Bench(litserve.LitAPI):
    def __init__(self, model: str) -> None:
        super().__init__(max_batch_size=8, batch_timeout=0.001)
        self._model = model

    def setup(self, device: str) -> None:
        self._session = onnxruntime.InferenceSession(self._model, providers=["CPUExecutionProvider"])
        spec = self._session.get_inputs()[0]
        self._input, self._shape = spec.name, spec.shape[1:]

    def decode_request(self, request):  # LitServe makes a schema of annotations here
        return np.frombuffer(base64.b64decode(request["image"]), dtype=np.float32).reshape(self._shape)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, images: np.ndarray) -> np.ndarray:
        return self._session.run(None, {self._input: images})[0]

    def unbatch(self, answers: np.ndarray) -> list[np.ndarray]:
        return list(answers)

    def encode_response(self, answer):
        return {"answer": answer.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Bench(sys.argv[2]), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
