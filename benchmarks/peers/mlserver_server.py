"""MLServer: one BYTES input (it unpacks float tensors into Python lists), no worker processes, no REST, gRPC.

python mlserver_server.py PORT MODEL.onnx              serves (gRPC on PORT + 1)
python mlserver_server.py load PORT BYTES C SECONDS    asks, for MLServer's gRPC stubs live in its environment
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path


def serve(port: int, model: str) -> None:
    os.environ["BENCH_MODEL"] = str(Path(model).resolve())
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "settings.json").write_text(
            json.dumps(
                {
                    "http_port": port, "grpc_port": port + 1, "metrics_port": port + 2, "parallel_workers": 0,
                    "host": "127.0.0.1", "metrics_endpoint": None, "debug": False,
                }
            )
        )  # fmt: skip
        Path(folder, "model-settings.json").write_text(
            json.dumps({"name": "model", "implementation": "mlserver_model.Bare"})
        )
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)
        os.execvp(Path(sys.executable).parent / "mlserver", ["mlserver", "start", folder])


def load(port: int, size: int, concurrency: int, seconds: float) -> None:
    """A closed loop of `concurrency` threads, as `http_load.py` is one of connections; the same line of JSON."""
    import grpc
    from mlserver.grpc import dataplane_pb2 as pb
    from mlserver.grpc.dataplane_pb2_grpc import GRPCInferenceServiceStub

    request = pb.ModelInferRequest(model_name="model")
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(bytes(size))
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    stub = GRPCInferenceServiceStub(grpc.insecure_channel(f"127.0.0.1:{port + 1}", options=options))
    begin = time.perf_counter() + seconds / 10
    end = begin + seconds
    latencies: list[float] = []
    errors: list[str] = []

    def ask() -> None:
        while (now := time.perf_counter()) < end:
            try:
                stub.ModelInfer(request, timeout=30)
            except grpc.RpcError as err:
                errors.append(str(err))
                return
            if now >= begin:
                latencies.append(time.perf_counter() - now)

    threads = [threading.Thread(target=ask) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    latencies.sort()
    p50, p99 = (latencies[int(len(latencies) * q)] * 1e3 if latencies else 0.0 for q in (0.5, 0.99))
    print(json.dumps({"requests": len(latencies), "errors": len(errors), "p50_ms": p50, "p99_ms": p99}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "load":
        load(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
    else:
        serve(int(sys.argv[1]), sys.argv[2])
