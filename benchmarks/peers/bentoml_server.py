"""BentoML: one service, one worker, a multipart upload in and bytes out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(workers=1, traffic={"timeout": 60})
class Bench:
    def __init__(self) -> None:
        self._session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], providers=["CPUExecutionProvider"])
        spec = self._session.get_inputs()[0]
        self._input, self._shape = spec.name, [1, *spec.shape[1:]]

    @bentoml.api(route="/infer")
    def infer(self, image: Path) -> list[float]:
        array = np.frombuffer(image.read_bytes(), dtype=np.float32).reshape(self._shape)
        return self._session.run(None, {self._input: array})[0].ravel().tolist()


if __name__ == "__main__":
    os.environ["BENCH_MODEL"] = str(Path(sys.argv[2]).resolve())
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    os.chdir(Path(__file__).parent)
    command = ["bentoml", "serve", "bentoml_server:Bench", "--host", "127.0.0.1", "--port", sys.argv[1]]
    os.execvp(Path(sys.executable).parent / "bentoml", command)
