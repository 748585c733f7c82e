"""Arrays and bodies to draw from, for every test of a codec."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from edge_sdk.tensors import OIP_FROM_DTYPE, Array

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
NUMBERS = [dtype for dtype in OIP_FROM_DTYPE if dtype != "string"]


@st.composite
def arrays(draw: st.DrawFn, *, finite: bool = False, strings: bool = True) -> Array:
    """An array of any dtype of the wire, of up to three axes, in any memory layout."""
    shape: tuple[int, ...] = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    count = int(np.prod(shape))
    dtype = draw(st.sampled_from([*NUMBERS, *(["string"] if strings else [])]))
    if dtype == "string":
        element = st.text(st.characters(codec="utf-8"), max_size=5).map(str.encode) if finite else st.binary(max_size=5)
        words = np.empty(count, dtype=object)
        words[:] = draw(st.lists(element, min_size=count, max_size=count))
        return words.reshape(shape)
    size = count * np.dtype(dtype).itemsize
    array: Array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype=dtype).reshape(shape)
    if dtype == "bool":
        array = (array.view(np.uint8) & 1).view(bool)
    if finite and array.dtype.kind == "f":
        array = np.where(np.isfinite(array), array, array.dtype.type(0))
    if draw(st.booleans()):
        array = np.asfortranarray(array)
    return array.astype(array.dtype.newbyteorder(draw(st.sampled_from("<>"))))


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, NaNs included, whatever the byte order and layout."""
    if one.dtype == object:
        return bool(one.shape == other.shape and one.tolist() == other.tolist())
    native = one.astype(one.dtype.newbyteorder("=")), other.astype(other.dtype.newbyteorder("="))
    return bool(one.shape == other.shape and native[0].dtype == native[1].dtype) and (
        native[0].tobytes() == native[1].tobytes()
    )
