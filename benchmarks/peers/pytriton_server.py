"""Triton through pytriton: dynamic batching up to 16, one millisecond of waiting; HTTP with binary tensors."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def main(port: int, model: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    spec, result = session.get_inputs()[0], session.get_outputs()[0]

    @batch
    def infer(image: np.ndarray) -> dict[str, np.ndarray]:
        return {"answer": session.run(None, {spec.name: image})[0]}

    config = TritonConfig(http_port=port, grpc_port=port + 1, metrics_port=port + 2, log_verbose=0)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="model",
            infer_func=infer,
            inputs=[Tensor(name="image", dtype=np.float32, shape=tuple(spec.shape[1:]))],
            outputs=[Tensor(name="answer", dtype=np.float32, shape=tuple(result.shape[1:]))],
            config=ModelConfig(max_batch_size=16, batcher=DynamicBatcher(max_queue_delay_microseconds=1000)),
        )
        triton.serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
