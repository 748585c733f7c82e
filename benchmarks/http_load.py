"""A load generator for HTTP servers: a closed loop over kept connections, as lean as `load.py` is over MQTT.

    python benchmarks/http_load.py PORT PATH KIND PAYLOAD_BYTES CONCURRENCY SECONDS

KIND is how the image travels: `triton` (a JSON header, then the tensor), `multipart`, or `json` (base64). It prints one
line of JSON: requests, errors (anything but 200), and p50 and p99 of the round trip in milliseconds. A tenth of the
time is warm-up and is not counted. Only the standard library is used, so any server's environment can run it.
"""

from __future__ import annotations

import base64
import json
import selectors
import socket
import sys
import time


def body_of(kind: str, size: int, shape: list[int]) -> tuple[bytes, list[str]]:
    """The bytes of one request, and its headers. Zeros: no server here looks at the numbers."""
    image = bytes(size)
    if kind == "triton":
        tensor = {"name": "image", "shape": [1, *shape], "datatype": "FP32", "parameters": {"binary_data_size": size}}
        wanted = {"name": "answer", "parameters": {"binary_data": True}}
        head = json.dumps({"inputs": [tensor], "outputs": [wanted]}).encode()
        return head + image, ["Content-Type: application/octet-stream", f"Inference-Header-Content-Length: {len(head)}"]
    if kind == "multipart":
        part = b'--edge\r\nContent-Disposition: form-data; name="image"; filename="image.bin"\r\n'
        part += b"Content-Type: application/octet-stream\r\n\r\n" + image + b"\r\n--edge--\r\n"
        return part, ["Content-Type: multipart/form-data; boundary=edge"]
    return json.dumps({"image": base64.b64encode(image).decode()}).encode(), ["Content-Type: application/json"]


class Connection:
    """One kept connection with one request on it at a time."""

    def __init__(self, port: int, request: bytes) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.started = 0.0
        self._request = request
        self._held = b""

    def ask(self) -> None:
        self.started = time.perf_counter()
        self.sock.sendall(self._request)

    def read(self) -> int | None:
        """The status once the whole response is here, else None; 0: the server hung up."""
        piece = self.sock.recv(262_144)
        if not piece:
            return 0
        self._held += piece
        head, separator, body = self._held.partition(b"\r\n\r\n")
        if not separator:
            return None
        lowered = head.lower()
        if b"transfer-encoding: chunked" in lowered:
            if not body.endswith(b"0\r\n\r\n"):
                return None
        else:
            length = lowered.partition(b"content-length:")[2].split(b"\r\n", 1)[0]
            if len(body) < int(length or 0):
                return None
        status = int(head.split(b" ", 2)[1])
        self._held = b""
        return status


def main(port: int, path: str, kind: str, size: int, concurrency: int, seconds: float) -> None:
    channels = 3
    side = round((size // 4 // channels) ** 0.5)
    body, headers = body_of(kind, size, [channels, side, side])
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *headers]
    request = "\r\n".join([*lines, "", ""]).encode() + body
    selector = selectors.DefaultSelector()
    for _ in range(concurrency):
        connection = Connection(port, request)
        selector.register(connection.sock, selectors.EVENT_READ, connection)
        connection.ask()
    begin = time.perf_counter() + seconds / 10
    end = begin + seconds
    latencies: list[float] = []
    errors = 0
    while time.perf_counter() < end:
        for key, _ in selector.select(1.0):
            connection = key.data
            status = connection.read()
            if status is None:
                continue
            now = time.perf_counter()
            if status != 200:
                errors += 1
            elif now >= begin:
                latencies.append(now - connection.started)
            if status:
                connection.ask()
            else:
                selector.unregister(connection.sock)
    latencies.sort()
    p50, p99 = (latencies[int(len(latencies) * q)] * 1e3 if latencies else 0.0 for q in (0.5, 0.99))
    print(json.dumps({"requests": len(latencies), "errors": errors, "p50_ms": p50, "p99_ms": p99}), flush=True)


if __name__ == "__main__":
    port, path, kind, size, concurrency, seconds = sys.argv[1:]
    main(int(port), path, kind, int(size), int(concurrency), float(seconds))
