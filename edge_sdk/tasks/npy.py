"""One array in numpy's .npy format, read without trusting it.

No pickle, a bounded header, and no allocation: a plain array is a read-only view of the payload's bytes.
"""

from __future__ import annotations

import io

import numpy as np

from edge_sdk.errors import Malformed, UnsupportedType
from edge_sdk.tensors import OIP_FROM_DTYPE, Array, dtype_name, element_count

MAGIC = b"\x93NUMPY"
_MAX_HEADER = 4096
"""numpy writes 128 bytes for any array without named fields."""


def decode_npy(data: bytes) -> Array:
    """The array in `data`, in native byte order and C order. Raises Malformed, UnsupportedType or InvalidTensor."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=_MAX_HEADER)
    except Exception as exc:
        # Everything: numpy reads the header with `ast`, `tokenize` and the dtype constructor, and lets through what
        # they raise - ValueError, SyntaxError, TypeError, TokenError, RecursionError, MemoryError, and where warnings
        # are errors those too. A numpy too old for `max_header_size` would hide here; pyproject.toml asks for 1.23.5.
        raise Malformed("The body is not a .npy array: its header cannot be read.") from exc
    if dtype.hasobject or dtype.kind not in "biuf" or dtype_name(np.empty(0, dtype)) not in OIP_FROM_DTYPE:
        raise UnsupportedType(f"The .npy array has dtype {str(dtype)[:40]}; only plain numbers are taken.")
    count = element_count(shape)
    offset = stream.tell()
    if len(data) - offset != count * dtype.itemsize:
        raise Malformed(f"The .npy header promises {count * dtype.itemsize} bytes; {len(data) - offset} follow it.")
    flat = np.frombuffer(data, dtype=dtype, count=count, offset=offset)
    array = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    return np.ascontiguousarray(array.astype(dtype.newbyteorder("="), copy=False)).reshape(shape)


def encode_npy(array: Array) -> bytes:
    """`array` as .npy bytes."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    return stream.getvalue()
