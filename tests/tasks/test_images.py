"""Pictures: decoded as declared, under limits, and whatever a stranger calls a JPEG is answered with a status."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

Image = pytest.importorskip("PIL.Image", reason="pictures need the extra `vision`", exc_type=ImportError)

from edge_sdk.errors import Malformed, RequestError, TooLarge, UnsupportedType  # noqa: E402
from edge_sdk.spec import Preprocess  # noqa: E402
from edge_sdk.tasks.images import decode_image, decoding_s, normalize  # noqa: E402
from edge_sdk.tensors import Array  # noqa: E402

SMALL = Preprocess(resize=(16, 16))
ORIENTATION = 0x0112


def gradient(width: int = 64, height: int = 48) -> Array:
    """A smooth picture whose three channels differ."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1).astype(np.uint8)


def encoded(pixels: Any, form: str, **options: Any) -> bytes:
    """The bytes of a picture (an array or a Pillow image) in a format."""
    picture = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def png_claiming(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG whose header claims a size; `rows` are its deflated pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that really holds all the pixels it claims."""
    deflate = zlib.compressobj(9)
    row = bytes(width + 1)
    rows = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    return png_claiming(width, height, rows)


def jpeg_claiming(width: int, height: int) -> bytes:
    """A sound JPEG whose frame header was changed to another size."""
    data = bytearray(encoded(gradient(16, 16), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def pixels_of(data: bytes, preprocess: Preprocess = SMALL) -> Array:
    """Decoded as H x W x C again, to compare with what was drawn."""
    return np.moveaxis(decode_image(data, preprocess)[0], 0, -1)


# What it will cost


def test_the_cost_is_told_from_the_header() -> None:
    """By bytes and claimed pixels, whatever stands before the frame; nothing for what is no picture."""
    plain, exif = Image.fromarray(gradient(1600, 1200)), Image.Exif()
    exif[ORIENTATION] = 6
    forms: dict[str, dict[str, Any]] = {"plain": {}, "progressive": {"progressive": True}, "turned": {"exif": exif}}
    costs = {name: decoding_s(encoded(plain, "JPEG", quality=95, **options)) for name, options in forms.items()}
    small = decoding_s(encoded(gradient(64, 48), "PNG"))

    assert 0.001 < costs["plain"] < costs["progressive"]
    assert costs["plain"] == pytest.approx(costs["turned"], rel=0.01)
    assert 0.04 < decoding_s(jpeg_claiming(9000, 5500)) < decoding_s(png_claiming(9000, 5500)) < 0.3
    assert small < 0.001
    assert [0.0, 0.0] == [decoding_s(b"{}"), decoding_s(b"")]


@given(st.sampled_from([b"", b"\x89PNG", b"\xff\xd8\xff", b"\xff\xd8\xff\xc0\x00\x11\x08"]), st.binary(max_size=60))
def test_the_cost_of_anything_is_bounded(start: bytes, rest: bytes) -> None:
    """No bytes raise, and none costs more than the largest picture that is decoded."""

    assert 0.0 <= decoding_s(start + rest) < 0.3


# What is declared is what happens


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("color", ["RGB", "BGR", "L"])
def test_preprocessing_is_plain_arithmetic(color: str, layout: str) -> None:
    """(pixel * scale - mean) / std in the order of `color`, as a few lines of numpy compute it."""
    pixels = gradient()
    channels = 1 if color == "L" else 3
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    preprocess = Preprocess.model_validate(
        {"resize": (48, 64), "color": color, "scale": 1 / 255, "mean": mean, "std": std, "layout": layout}
    )
    ordered = {
        "RGB": pixels,
        "BGR": pixels[:, :, ::-1],
        "L": np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None],
    }
    expected = (ordered[color].astype(np.float64) / 255 - mean) / std
    actual = decode_image(encoded(pixels, "PNG"), preprocess)

    assert np.float32 == actual.dtype
    np.testing.assert_allclose(actual[0], expected.transpose(2, 0, 1) if layout == "NCHW" else expected, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "short_side", "crop", "shape"),
    [
        ((64, 48), 24, None, (24, 32)),
        ((48, 64), 24, None, (32, 24)),
        ((64, 48), 24, 16, (16, 16)),
        ((8, 8), 24, 32, (32, 32)),
    ],
)
def test_the_shorter_side_is_resized_and_the_middle_is_cut_out(
    size: tuple[int, int], short_side: int, crop: int | None, shape: tuple[int, int]
) -> None:
    """The aspect ratio is kept; a crop larger than the picture is filled with black."""
    preprocess = Preprocess(resize_short_side=short_side, center_crop=crop)

    assert (1, 3, *shape) == decode_image(encoded(gradient(*size), "PNG"), preprocess).shape


def test_the_middle_is_the_middle() -> None:
    """Without resizing, a crop is a slice."""
    pixels = gradient(64, 48)
    cropped = pixels_of(encoded(pixels, "PNG"), Preprocess(resize=(48, 64), center_crop=16))

    assert pixels[16:32, 24:40].tolist() == cropped.tolist()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize(
    ("size", "resizing"),
    [
        ((640, 427), {"resize_short_side": 256}),
        ((427, 641), {"resize_short_side": 97}),
        ((100, 75), {"resize_short_side": 231}),
        ((300, 200), {"resize": (91, 120)}),
        ((60, 40), {"resize": (60, 300)}),
    ],
    ids=["photo", "upright", "enlarged", "as given", "crop wider than the picture"],
)
def test_only_what_is_cropped_is_resized(size: tuple[int, int], resizing: dict[str, Any], interpolation: str) -> None:
    """Resizing the part that is kept gives what resizing everything and then cropping gives, to a rounding."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    preprocess = Preprocess.model_validate({**resizing, "center_crop": 80, "interpolation": interpolation})
    scale = preprocess.resize_short_side / min(size) if preprocess.resize_short_side else 0
    target = (round(size[0] * scale), round(size[1] * scale)) if scale else tuple(reversed(preprocess.resize or ()))
    whole = Image.fromarray(pixels).resize(target, Image.Resampling[interpolation.upper()])
    left, top = (target[0] - 80) // 2, (target[1] - 80) // 2
    expected = np.asarray(whole.crop((left, top, left + 80, top + 80))).astype(int)
    actual = pixels_of(encoded(pixels, "PNG"), preprocess).astype(int)

    if interpolation == "nearest":  # where a pixel's middle falls on a border of two, either is nearest
        assert np.mean(actual != expected) < 0.02
    else:
        assert np.abs(actual - expected).max() <= 1


@pytest.mark.parametrize(
    ("width", "height", "preprocess"),
    [
        (1, 90, Preprocess(resize_short_side=1024, center_crop=224)),
        (90, 1, Preprocess(resize_short_side=1024, center_crop=224)),
        (2, 180, Preprocess(resize_short_side=256)),
    ],
    ids=["column", "row", "not cropped"],
)
def test_a_strip_costs_what_is_kept_of_it(width: int, height: int, preprocess: Preprocess) -> None:
    """A picture of a hundred bytes, long and thin, is not blown up to millions of pixels on its way to a small one."""
    before = peak_memory_bytes(Preprocess(resize_short_side=224, center_crop=224), png_bomb(8, 8))
    after = peak_memory_bytes(preprocess, png_bomb(width, height))

    assert after - before < 120_000_000


@pytest.mark.parametrize(
    ("width", "height", "preprocess"),
    [
        (10, 4_900_000, Preprocess(resize=(224, 224))),
        (1, 101, Preprocess(resize_short_side=256)),
        (1900, 1, Preprocess(resize_short_side=256, center_crop=224)),
    ],
    ids=["tall", "strip", "cropped strip"],
)
def test_a_shape_no_photo_has_is_refused(width: int, height: int, preprocess: Preprocess) -> None:
    """413 before a pixel is decoded, where resizing would cost more than any photo does."""
    started = time.process_time()
    with pytest.raises(TooLarge, match=f"{width} x {height}"):
        decode_image(png_claiming(width, height), preprocess)

    assert time.process_time() - started < 0.1


def peak_memory_bytes(preprocess: Preprocess, data: bytes) -> int:
    """The most memory a process ever has that decodes one picture; Pillow's own memory is in it."""
    program = (
        "import resource, sys; from edge_sdk.spec import Preprocess; from edge_sdk.tasks.images import decode_image\n"
        f"decode_image({data!r}, Preprocess.model_validate({preprocess.model_dump()!r}))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_interpolation_is_pillows(interpolation: str) -> None:
    """The names mean what Pillow means by them, antialiasing included."""
    pixels = gradient()
    resample = Image.Resampling[interpolation.upper()]
    expected = np.asarray(Image.fromarray(pixels).resize((16, 12), resample))
    preprocess = Preprocess.model_validate({"resize": (12, 16), "interpolation": interpolation})

    assert expected.tolist() == pixels_of(encoded(pixels, "PNG"), preprocess).tolist()


def test_a_large_jpeg_is_decoded_small() -> None:
    """Decoding at a fraction of the size shows the same picture: a mean difference of less than one level in 255."""
    pixels = gradient(1600, 1200)
    preprocess = Preprocess(resize_short_side=64)
    data = encoded(pixels, "JPEG", quality=95)
    full = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((85, 64), Image.Resampling.BILINEAR))
    difference = np.abs(pixels_of(data, preprocess) - full.astype(np.float32))

    assert difference.mean() < 1.0
    assert difference.max() < 8.0


def test_normalize_takes_gray_and_color() -> None:
    """[H, W] and [H, W, 3] become [1, C, H, W] float32."""
    gray = Preprocess(resize=(4, 4), color="L", mean=(1.0,), std=(2.0,))

    assert [[[[0.5]]]] == normalize(np.array([[2]], np.uint8), gray).tolist()
    assert (1, 3, 2, 5) == normalize(np.zeros((2, 5, 3), np.uint8), SMALL).shape


# Every kind of picture


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_rotated_picture_is_set_upright(form: str, orientation: int) -> None:
    """A camera held sideways says so in EXIF; every one of the eight orientations is undone."""
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    upright = Image.fromarray(gradient(64, 48))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    held = upright if orientation == 1 else upright.transpose(turned[orientation])
    preprocess = Preprocess(resize=(48, 64))
    difference = pixels_of(encoded(held, form, exif=exif), preprocess) - gradient(64, 48)

    assert np.abs(difference).mean() < 3


def gray16() -> Any:
    return Image.fromarray((np.asarray(Image.fromarray(gradient()).convert("L")).astype(np.uint16) << 8) + 77)


def animated() -> bytes:
    first, second = Image.fromarray(gradient()), Image.new("RGB", (64, 48))
    return encoded(first, "PNG", save_all=True, append_images=[second], duration=100)


def with_alpha() -> Any:
    picture = Image.fromarray(gradient()).convert("RGBA")
    picture.putalpha(7)
    return picture


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(gradient()).convert("CMYK"), "JPEG", quality=95),
        encoded(gradient(), "JPEG", quality=95, progressive=True),
        encoded(with_alpha(), "PNG"),
        encoded(Image.fromarray(gradient()).quantize(256), "PNG"),
        encoded(Image.fromarray(gradient()).quantize(256), "PNG", transparency=bytes(range(256))),
        animated(),
        encoded(gradient(), "JPEG", quality=95) + b"PK\x03\x04 and a whole archive",
        encoded(gradient(), "PNG") + b"%PDF-1.7",
    ],
    ids=["CMYK", "progressive", "alpha", "palette", "palette with alpha", "animated", "JPEG + zip", "PNG + PDF"],
)  # fmt: skip
def test_uncommon_pictures_are_seen(data: bytes) -> None:
    """CMYK, alpha, palettes, animations (their first frame) and polyglots show the picture they hold."""
    difference = pixels_of(data, Preprocess(resize=(48, 64))) - gradient()

    assert np.abs(difference).mean() < 12


def test_sixteen_bits_keep_their_upper_eight() -> None:
    """A 16-bit gray PNG is as bright as its 8-bit twin, and turned upright like any other."""
    gray = np.asarray(Image.fromarray(gradient()).convert("L"))
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    preprocess = Preprocess(resize=(48, 64), color="L")

    assert gray.tolist() == pixels_of(encoded(gray16(), "PNG"), preprocess)[:, :, 0].tolist()
    assert gray[::-1, ::-1].tolist() == pixels_of(encoded(gray16(), "PNG", exif=exif), preprocess)[:, :, 0].tolist()


# What is refused


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png_bomb(30_000, 2_000), TooLarge),
        (png_claiming(50_000, 50_000), TooLarge),
        (png_bomb(20_000, 1), TooLarge),
        (png_claiming(1, 40_000_000), TooLarge),
        (jpeg_claiming(65_500, 65_500), TooLarge),
        (jpeg_claiming(0, 16), RequestError),
        (encoded(gradient(), "JPEG")[:500], Malformed),
        (encoded(gradient(), "PNG")[:100], Malformed),
        (encoded(gradient(), "JPEG")[:2], RequestError),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', UnsupportedType),
        (b"8BPS\x00\x01" + bytes(100), UnsupportedType),
        (encoded(gradient(), "TIFF"), UnsupportedType),
        (encoded(gradient(), "GIF"), UnsupportedType),
        (encoded(gradient(), "BMP"), UnsupportedType),
        (encoded(gradient(), "EPS"), UnsupportedType),
        (b"", UnsupportedType),
    ],
    ids=["PNG bomb", "PNG claiming 50k x 50k", "PNG of one row", "PNG of one column", "JPEG claiming 65500 x 65500",
         "JPEG of no width", "cut JPEG", "cut PNG", "two bytes", "SVG", "PSD", "TIFF", "GIF", "BMP", "EPS", "nothing"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_decent_picture_is_refused(data: bytes, expected: type[RequestError]) -> None:
    """413, 400 or 415, within a second and without the memory of what was claimed."""
    preprocess = Preprocess(resize_short_side=224, center_crop=224) if expected is TooLarge else SMALL
    started = time.process_time()
    tracemalloc.start()
    with pytest.raises(expected) as caught:
        decode_image(data, preprocess)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert "/" not in str(caught.value)
    assert time.process_time() - started < 1.0
    assert peak < 10_000_000


@settings(deadline=None, max_examples=300)
@given(st.randoms(use_true_random=False), st.sampled_from(["JPEG", "PNG", "EXIF"]))
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_picture_is_seen_or_refused(chance: random.Random, kind: str) -> None:
    """Bytes overwritten, cut or repeated anywhere: an array of the right shape, or a RequestError."""
    data = bytearray(SOUND[kind])
    for _ in range(chance.randint(1, 8)):
        match chance.randrange(4):
            case 0:
                data[chance.randrange(len(data))] = chance.randrange(256)
            case 1:
                del data[chance.randrange(2, len(data) + 1) :]
            case 2:
                position = chance.randrange(len(data))
                data[position:position] = data[position : position + chance.randrange(40)]
            case _:
                position = chance.randrange(min(len(data), 200))  # headers are where decoders go wrong
                data[position] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
    try:
        picture = decode_image(bytes(data), SMALL)
    except RequestError as exc:
        str(exc).encode()
    else:
        assert (1, 3, 16, 16) == picture.shape


def _with_exif() -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010E] = "a description"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    return encoded(gradient(), "JPEG", exif=exif)


SOUND = {"JPEG": encoded(gradient(), "JPEG"), "PNG": encoded(gradient(24, 24), "PNG"), "EXIF": _with_exif()}


def test_photos_of_the_real_world(shared: Path) -> None:
    """Every photo at hand is seen."""
    photos = sorted(file for file in shared.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))[:20]
    if not photos:
        pytest.skip(f"there are no photos in {shared}")
    for photo in photos:
        assert (1, 3, 16, 16) == decode_image(photo.read_bytes(), SMALL).shape
