"""One .npy array: what numpy writes is read, and nothing a stranger writes is believed."""

from __future__ import annotations

import io
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import InvalidTensor, Malformed, RequestError, UnsupportedType
from edge_sdk.tasks.npy import decode_npy, encode_npy
from edge_sdk.tensors import Array
from tests.tasks.strategies import arrays, same


def saved(array: Array, *, version: tuple[int, int] | None = None) -> bytes:
    """The bytes as numpy itself writes them."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    return stream.getvalue()


def headed(header: str, data: bytes = b"", *, claim: int | None = None) -> bytes:
    """A version 1.0 file with this header, which may claim another length."""
    padded = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded) if claim is None else claim) + padded + data


@given(arrays(strings=False))
def test_what_numpy_writes_is_read(array: Array) -> None:
    """Fortran order, either byte order, zero axes and empty arrays: the same numbers, native and in C order."""
    decoded = decode_npy(saved(array))

    assert same(array, decoded)
    assert decoded.dtype.isnative
    assert decoded.flags.c_contiguous


@given(arrays(strings=False))
def test_what_is_written_numpy_reads(array: Array) -> None:
    """The other way round."""
    loaded = np.load(io.BytesIO(encode_npy(array)), allow_pickle=False)

    assert same(array, loaded)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_format(version: tuple[int, int]) -> None:
    """1.0 is what numpy writes; the others are the same with a longer header."""

    assert [1, 2] == decode_npy(saved(np.array([1, 2]), version=version)).tolist()


def test_a_plain_array_is_a_view() -> None:
    """Nothing is copied when byte order and layout are native."""
    decoded = decode_npy(saved(np.zeros(1000, np.float32)))

    assert not decoded.flags.owndata
    assert not decoded.flags.writeable


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(np.array([{}], dtype=object)), UnsupportedType),
        (saved(np.array(["text"])), UnsupportedType),
        (saved(np.zeros(1, "datetime64[s]")), UnsupportedType),
        (saved(np.zeros(1, np.complex64)), UnsupportedType),
        (saved(np.zeros(1, np.longdouble)), UnsupportedType),
        (saved(np.zeros(1, [("a", "f4")])), UnsupportedType),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 30) + b"{}", Malformed),
        (headed("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", bytes(4)), Malformed),
        (headed("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", bytes(8)), Malformed),
        (headed("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", bytes(8)), InvalidTensor),
        (headed("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 8)}"), InvalidTensor),
        (headed("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4611686018427387904, 8)}"), InvalidTensor),
        (headed("__import__('os').system('false')"), Malformed),
        (headed("{'descr': '<f4'}"), Malformed),
        (headed("(" * 3000), Malformed),
        (headed("{[]: 1}"), Malformed),
        (headed("{1: 1, 'a': 2}"), Malformed),
        (headed("'''"), Malformed),
        (headed("{'descr': 'f4,,', 'fortran_order': False, 'shape': (1,)}", bytes(4)), Malformed),
        (headed("{'descr': [1], 'fortran_order': False, 'shape': (1,)}", bytes(4)), Malformed),
        (b"\x93NUMPY", Malformed),
        (b"", Malformed),
    ],
    ids=["objects", "text", "dates", "complex", "long double", "records", "1 GB header", "short", "long",
         "negative axis", "2^65 elements", "zero times 2^65", "code", "half a header", "nested",
         "unhashable", "keys without order", "open string", "no dtype", "no field", "magic", "nothing"],
)  # fmt: skip
def test_what_is_refused(data: bytes, expected: type[RequestError]) -> None:
    """No objects, no lies about sizes, no code: and no memory spent on finding out."""
    tracemalloc.start()
    with pytest.raises(expected):
        decode_npy(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 5_000_000


@given(st.binary(), st.integers(0, 200), st.binary(max_size=8))
def test_any_bytes_are_decoded_or_refused(noise: bytes, position: int, splice: bytes) -> None:
    """Noise, and sound files with a few bytes overwritten, are arrays or RequestErrors."""
    sound = saved(np.arange(6, dtype=np.float32).reshape(2, 3))
    for data in (noise, b"\x93NUMPY" + noise, sound[:position] + splice + sound[position + len(splice) :]):
        try:
            decode_npy(data)
        except RequestError as exc:
            str(exc).encode()
