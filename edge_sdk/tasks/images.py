"""A JPEG or PNG becomes a model's input: decoded by Pillow under limits, then preprocessed as the spec declares.

The size in the header is checked before a pixel is decoded, so a small file that claims a huge picture costs nothing.
A JPEG much larger than what the model looks at is decoded at half, a quarter or an eighth of its size (libjpeg does
that while decoding), which saves most of the time on camera pictures. EXIF rotation is applied; alpha is dropped; the
first frame of an animation counts. The same code prepares calibration photos and requests, so an engine is calibrated
on exactly what it will see. Only the part that `center_crop` keeps is resized.

Pillow decodes with libjpeg-turbo. Wrappers of that library alone do no better where it counts (Pillow 13.0, simplejpeg
1.9, processor time on one x86-64 core): at half size a JPEG of 2 million pixels takes 8.8 ms against 8.6, one of 12
million 30.4 against 29.2; a small photo of 500 x 375 takes 0.9 against 0.7 ms, of 1.5 with what follows.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge_sdk.errors import BackendUnavailable, Malformed, TooLarge, UnsupportedType
from edge_sdk.spec import Preprocess
from edge_sdk.tensors import Array

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 50_000_000
"""More than any camera an edge device is likely to see; 150 MB once decoded."""

_MAX_RESIZED_PIXELS = 8192 * 8192
"""The most that engine.toml can ask for. It bounds the result and what Pillow computes on the way to it."""

_MAX_ASPECT = 100
"""A picture of one pixel's height has few pixels until its shorter side is resized to 224; no photo is so thin."""

_SHARPNESS = 2
"""A JPEG is never decoded to less than this many times the size it is resized to."""


def decode_image(data: bytes, preprocess: Preprocess) -> Array:
    """The picture in `data` as float32 [1, C, H, W] (or [1, H, W, C]).

    Raises UnsupportedType if it is not a JPEG or PNG, TooLarge beyond MAX_PIXELS, Malformed if it is broken.
    """
    picture = _open(data)
    _check_pixels(picture.size)
    target = _resized_size(picture.size, preprocess)
    _check_cost(picture.size, preprocess)
    try:
        picture.draft("RGB", (target[0] * _SHARPNESS, target[1] * _SHARPNESS))
        picture = _in_color(_upright(picture), preprocess)
        pixels = np.asarray(_resized_and_cropped(picture, preprocess))
    except (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError) as exc:  # as Pillow's plugins do
        raise Malformed("The picture is broken or cut off; it cannot be decoded.") from exc
    return normalize(pixels, preprocess)


def open_picture(data: bytes) -> Image:
    """The whole picture in `data`, upright and in RGB; raises as `decode_image` does."""
    picture = _open(data)
    _check_pixels(picture.size)
    try:
        return _in_color(_upright(picture), _IN_RGB)
    except (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError) as exc:  # as Pillow's plugins do
        raise Malformed("The picture is broken or cut off; it cannot be decoded.") from exc


_IN_RGB = Preprocess(resize=(1, 1))


def decoding_s(data: bytes) -> float:
    """About how many seconds `decode_image` takes, on one x86-64 core; 0.0 for what is no picture.

    Nothing but the header is read, for the size that it claims. Measured over photos of 0.2 to 12 million pixels and
    black ones, and right within a factor of two: a JPEG costs by its bytes, a progressive one several times as much, a
    PNG by its bytes and its pixels, since it cannot be decoded at a smaller size.
    """
    if data.startswith(b"\x89PNG"):
        width, height = (int.from_bytes(data[place : place + 4], "big") for place in (16, 20))
        return 1e-4 + 25e-9 * len(data) + 5e-9 * min(width * height, MAX_PIXELS)
    if not data.startswith(b"\xff\xd8"):
        return 0.0
    marker, pixels = _jpeg_frame(data)
    return 1e-4 + (50e-9 if marker == _PROGRESSIVE else 20e-9) * len(data) + 1e-9 * min(pixels, MAX_PIXELS)


_PROGRESSIVE = 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG (ITU-T T.81, table B.1) that begin a frame, whose header has the picture's size."""
_SEGMENTS = 64
"""More segments than any camera writes before the frame."""


def _jpeg_frame(data: bytes) -> tuple[int, int]:
    """The marker of the frame and the number of pixels it claims; zeros where there is none to be found."""
    place = 2
    for _ in range(_SEGMENTS):
        if place + 9 > len(data) or data[place] != 0xFF:
            break
        marker = data[place + 1]
        if marker in _FRAMES:
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (place + 5, place + 7))
            return marker, height * width
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0, 0


def normalize(pixels: Array, preprocess: Preprocess) -> Array:
    """uint8 [H, W] or [H, W, 3] in RGB order -> float32 with a leading axis of 1, as `preprocess` declares."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, np.newaxis]
    if preprocess.color == "BGR":
        pixels = pixels[:, :, ::-1]
    std = np.asarray(preprocess.std, dtype=np.float32)
    gain: Array = np.float32(preprocess.scale) / std
    offset: Array = -np.asarray(preprocess.mean, dtype=np.float32) / std
    if preprocess.layout == "NCHW":
        pixels, gain, offset = pixels.transpose(2, 0, 1), gain.reshape(-1, 1, 1), offset.reshape(-1, 1, 1)
    prepared = np.empty(pixels.shape, dtype=np.float32)
    np.multiply(pixels, gain, out=prepared, dtype=np.float32)
    prepared += offset
    return prepared[np.newaxis]


def check_pillow() -> None:
    """Raise BackendUnavailable where Pillow is missing: when a model is loaded, not when its first photo comes."""
    try:
        import PIL.Image  # noqa: F401  # a broken build fails here, where its C part is loaded
    except ImportError as exc:
        raise BackendUnavailable(
            f"Pillow cannot be imported: {exc}.", fix="Pictures need it: pip install 'edge-sdk[vision]'."
        ) from exc


def _check_pixels(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise TooLarge(f"The picture is {width} x {height}; at most {MAX_PIXELS:,} pixels are decoded.")


def _open(data: bytes) -> Image:
    check_pillow()
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise TooLarge(f"The picture is far larger than the {MAX_PIXELS:,} pixels that are decoded.") from exc
    except UnidentifiedImageError as exc:
        raise UnsupportedType("The body is neither a JPEG nor a PNG picture.") from exc
    except (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError) as exc:
        raise Malformed("The picture's header is broken; it cannot be decoded.") from exc


def _in_color(picture: Image, preprocess: Preprocess) -> Image:
    """In RGB, or in L where the model wants one channel; 16-bit pictures keep their upper 8 bits."""
    from PIL import Image

    picture.info.pop("transparency", None)  # Pillow would warn that a palette's alpha is lost
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    return picture.convert("L" if preprocess.color == "L" else "RGB")


def _upright(picture: Image) -> Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(picture)


def _resized_size(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """Width and height after resizing, before cropping."""
    if preprocess.resize is not None:
        height, width = preprocess.resize
        return width, height
    assert preprocess.resize_short_side is not None
    width, height = size
    short = min(width, height)
    return (
        max(1, round(width * preprocess.resize_short_side / short)),
        max(1, round(height * preprocess.resize_short_side / short)),
    )


@dataclass(frozen=True)
class _Cut:
    """What is computed: `size` pixels, from the part `box` of the picture, put at `at` on black of `canvas` pixels."""

    size: tuple[int, int]
    box: tuple[float, float, float, float]
    at: tuple[int, int]
    canvas: tuple[int, int]


def _cut(size: tuple[int, int], preprocess: Preprocess) -> _Cut:
    """The crop, mapped back to the picture of `size` that it is taken from: only what is kept is ever resized."""
    resized = _resized_size(size, preprocess)
    sides = resized if preprocess.center_crop is None else (preprocess.center_crop,) * 2
    starts = [(whole - side) // 2 for whole, side in zip(resized, sides)]
    low = [max(0, start) for start in starts]
    high = [min(whole, start + side) for whole, start, side in zip(resized, starts, sides)]
    left, top = (place * whole / new for place, whole, new in zip(low, size, resized))
    right, bottom = (min(whole, place * whole / new) for place, whole, new in zip(high, size, resized))
    return _Cut(
        size=(high[0] - low[0], high[1] - low[1]),
        box=(left, top, right, bottom),
        at=(low[0] - starts[0], low[1] - starts[1]),
        canvas=(sides[0], sides[1]),
    )


def _check_cost(size: tuple[int, int], preprocess: Preprocess) -> None:
    """Raise TooLarge where resizing a picture of `size` would cost more than any photo does, held either way up."""
    width, height = size
    if preprocess.resize is None and max(size) > _MAX_ASPECT * min(size):
        raise TooLarge(
            f"The picture is {width} x {height}; one side may be at most {_MAX_ASPECT} times as long as the other."
        )
    for turned in (size, (height, width)):
        cut = _cut(turned, preprocess)
        rows = cut.box[3] - cut.box[1]  # Pillow resizes along the rows first, and keeps them all until it has
        if max(cut.size[0] * rows, cut.size[0] * cut.size[1]) > _MAX_RESIZED_PIXELS:
            raise TooLarge(f"The picture is {width} x {height}; resized for the model it would be far larger.")


def _resized_and_cropped(picture: Image, preprocess: Preprocess) -> Image:
    from PIL import Image

    resample = {
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
        "nearest": Image.Resampling.NEAREST,
    }[preprocess.interpolation]
    cut = _cut(picture.size, preprocess)
    kept = picture.resize(cut.size, resample, box=cut.box)
    if cut.size == cut.canvas:
        return kept
    canvas = Image.new(picture.mode, cut.canvas)
    canvas.paste(kept, cut.at)
    return canvas
