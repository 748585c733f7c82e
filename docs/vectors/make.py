"""Writes the byte vectors beside this file: example payloads in hexadecimal, each with what it means.

They are made with Python's standard library alone, not with edge-sdk, so that edge-sdk is tested against them (in
tests/test_wire_contract.py) and not against itself. Another implementation of the contract can use them the same way.

    python docs/vectors/make.py            # afterwards `git diff docs/vectors` should be empty
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

X = {"name": "x", "datatype": "FP32", "shape": [1, 4]}
Y = {"name": "y", "datatype": "FP32", "shape": [1, 4]}
ASKED = [1.0, 2.0, 3.0, 4.0]
ANSWERED = [2.0, 4.0, 6.0, 8.0]
"""The vectors' model doubles its input."""


def floats(values: list[float], order: str = "<") -> bytes:
    return struct.pack(f"{order}{len(values)}f", *values)


def strings(values: list[bytes]) -> bytes:
    """The BYTES datatype: each element is its length as uint32, little-endian, and then its bytes."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def binary(header: dict[str, Any], *tensors: bytes) -> tuple[bytes, int]:
    """A binary body, and the length of its header."""
    head = json.dumps(header, separators=(",", ":")).encode()
    return head + b"".join(tensors), len(head)


def npy(descr: str, shape: tuple[int, ...], data: bytes, *, fortran: bool = False) -> bytes:
    """numpy's format, version 1.0: magic, version, header length, a Python literal padded to 64 bytes, the data."""
    header = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def tensor(described: dict[str, Any], data: list[Any]) -> dict[str, Any]:
    return {**described, "data": data}


def requests() -> list[dict[str, Any]]:
    sized = {"parameters": {"binary_data_size": 16}}
    body, header_length = binary(
        {"id": "r-1", "inputs": [{**X, **sized}], "parameters": {"binary_data_output": True}}, floats(ASKED)
    )
    texts = strings([b"edge", "Gr\u00fc\u00dfe".encode()])
    mixed, mixed_length = binary(
        {
            "inputs": [
                {"name": "flag", "datatype": "BOOL", "shape": [2], "parameters": {"binary_data_size": 2}},
                {"name": "text", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(texts)}},
                {"name": "count", "datatype": "INT64", "shape": [1], "data": [-3]},
            ],
            "outputs": [{"name": "y", "parameters": {"classification": 3}}],
        },
        b"\x01\x00",
        texts,
    )
    plain = {"id": "r-2", "inputs": [tensor(X, ASKED)], "outputs": [{"name": "y"}]}
    return [
        {
            "name": "binary",
            "says": "One FP32 tensor behind a JSON header, and a binary answer wanted.",
            "content_type": "application/octet-stream",
            "header_length": header_length,
            "payload_hex": body.hex(),
            "means": {"id": "r-1", "inputs": [tensor(X, ASKED)], "binary_output": True, "outputs": []},
        },
        {
            "name": "binary-mixed",
            "says": "BOOL and BYTES behind the header, INT64 as JSON in it, the best three classes of y wanted.",
            "content_type": "application/octet-stream",
            "header_length": mixed_length,
            "payload_hex": mixed.hex(),
            "means": {
                "id": None,
                "inputs": [
                    {"name": "flag", "datatype": "BOOL", "shape": [2], "data": [True, False]},
                    {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["edge", "Gr\u00fc\u00dfe"]},
                    {"name": "count", "datatype": "INT64", "shape": [1], "data": [-3]},
                ],
                "binary_output": False,
                "outputs": ["y"],
            },
        },
        {
            "name": "json",
            "says": "The same tensor as JSON.",
            "content_type": "application/json",
            "header_length": None,
            "payload_hex": json.dumps(plain).encode().hex(),
            "means": {"id": "r-2", "inputs": [tensor(X, ASKED)], "binary_output": False, "outputs": ["y"]},
        },
    ]


def responses() -> list[dict[str, Any]]:
    sized = {"parameters": {"binary_data_size": 16}}
    head = {"model_name": "double", "model_version": "1"}
    body, header_length = binary({**head, "id": "r-1", "outputs": [{**Y, **sized}]}, floats(ANSWERED))
    plain = {**head, "id": "r-2", "outputs": [tensor(Y, ANSWERED)]}
    return [
        {
            "name": "binary",
            "says": "The answer to the request `binary`.",
            "content_type": "application/octet-stream",
            "header_length": header_length,
            "payload_hex": body.hex(),
            "means": {**head, "id": "r-1", "outputs": [tensor(Y, ANSWERED)]},
        },
        {
            "name": "json",
            "says": "The answer to the request `json`.",
            "content_type": "application/json",
            "header_length": None,
            "payload_hex": json.dumps(plain).encode().hex(),
            "means": {**head, "id": "r-2", "outputs": [tensor(Y, ANSWERED)]},
        },
    ]


def arrays() -> list[dict[str, Any]]:
    """Content type application/x-npy."""
    grid = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    rows, columns = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]
    return [
        {
            "name": "row-major",
            "says": "float32 [2, 3], little-endian: what numpy.save writes on the machines one meets.",
            "payload_hex": npy("<f4", (2, 3), floats(rows)).hex(),
            "means": {"dtype": "float32", "shape": [2, 3], "data": grid},
        },
        {
            "name": "column-major",
            "says": "The same array in Fortran order.",
            "payload_hex": npy("<f4", (2, 3), floats(columns), fortran=True).hex(),
            "means": {"dtype": "float32", "shape": [2, 3], "data": grid},
        },
        {
            "name": "big-endian",
            "says": "The same array with the bytes of each element reversed.",
            "payload_hex": npy(">f4", (2, 3), floats(rows, ">")).hex(),
            "means": {"dtype": "float32", "shape": [2, 3], "data": grid},
        },
        {
            "name": "objects",
            "says": "An array of Python objects: refused with 415, and never unpickled.",
            "payload_hex": npy("|O", (1,), b"\x80\x04N.").hex(),
            "error": {"status": 415, "code": "unsupported_type"},
        },
        {
            "name": "cut-short",
            "says": "The header promises 24 bytes; 20 follow: 400.",
            "payload_hex": npy("<f4", (2, 3), floats(rows)[:-4]).hex(),
            "error": {"status": 400, "code": "malformed"},
        },
    ]


def topics() -> dict[str, Any]:
    """For the root `edge/v1` and the device `lab`."""
    models = "edge/v1/lab/models"
    return {
        "root": "edge/v1",
        "device": "lab",
        "subscriptions": [f"{models}/+/infer", f"{models}/+/infer/+/+", f"{models}/+/versions/+/infer"],
        "requests": [
            {"topic": f"{models}/digits/infer", "model": "digits", "result": f"{models}/digits/result"},
            {
                "topic": f"{models}/digits/infer/door-cam/17",
                "model": "digits",
                "client": "door-cam",
                "number": "17",
                "result": f"{models}/digits/result/door-cam/17",
            },
            {
                "topic": f"{models}/digits/versions/2.1/infer",
                "model": "digits",
                "version": "2.1",
                "result": f"{models}/digits/result",
            },
        ],
        "not_requests": [
            f"{models}/digits",
            f"{models}/digits/infer/door-cam",
            f"{models}/digits/infer/door cam/17",
            f"{models}/digits/result",
            "edge/v1/other/models/digits/infer",
            "edge/v2/lab/models/digits/infer",
        ],
        "response_topics": {
            "taken": ["edge/v1/reply/door-cam", "edge/v1/reply/door-cam/17"],
            "refused": [
                "edge/v1/reply/",
                "edge/v1/lab/models/digits/infer",
                "edge/v1/reply/+",
                "edge/v1/reply/#",
                "$SYS/broker",
                "home/light/set",
                "edge/v1/reply/a/b/c/d/e/f",
            ],
        },
    }


VECTORS = {"requests": requests(), "responses": responses(), "npy": arrays(), "topics": topics()}


def text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, value in VECTORS.items():
        (HERE / f"{name}.json").write_text(text(value), encoding="utf-8")
