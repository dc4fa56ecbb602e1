"""base64 → (H, W, 3) uint8: formats, modes, orientation, and what is refused before it is decoded."""

import base64
import contextlib
import io
import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from core.errors import ImageError
from core.images import decode_image

ROOT = Path(__file__).parents[1]
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # PNG colour types
COLOURS = ((200, 30, 40), (20, 180, 60), (30, 50, 220))


def png(width, height, depth, colour, rows=(), chunks=()) -> bytes:
    """A PNG with exactly this header, whatever its data."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks]
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(width=48, height=32) -> Image.Image:
    """Smooth, so that JPEG keeps it, and different in every corner."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def decoded(data: bytes | str) -> np.ndarray:
    pixels = decode_image(data if isinstance(data, str) else to_base64(data))
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    return pixels


def refusal(data: bytes | str, code: str = "invalid_image") -> str:
    """The sentence the image is refused with."""
    with pytest.raises(ImageError) as caught:
        decode_image(data if isinstance(data, str) else to_base64(data))
    assert caught.value.code == code
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    sentence = str(caught.value)
    assert len(sentence.splitlines()) == 1
    assert sentence.startswith("The input image")
    assert sentence.endswith(".")
    assert len(sentence) < 200
    return sentence


# base64


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_formats_as_base64_and_as_data_uri(format):
    lossless = {"WEBP": {"lossless": True}}.get(format, {})
    data = encoded(picture(), format, **lossless)
    pixels = decoded(data)
    difference = np.abs(pixels.astype(int) - np.asarray(picture()).astype(int))
    assert difference.max() <= (16 if format == "JPEG" else 0)
    uri = f"data:image/{format.lower()};base64,{to_base64(data)}"
    assert np.array_equal(decoded(uri), pixels)


@pytest.mark.parametrize(
    "prefix",
    [
        "data:;base64,",
        "DATA:IMAGE/PNG;BASE64,",
        "data:image/png;charset=utf-8;base64,",
        "data:application/octet-stream;base64,",
        "data:image/jpeg;base64,",
    ],
)
def test_data_uris(prefix):
    """The type in the URI is not believed."""
    assert decoded(prefix + to_base64(encoded(picture(), "PNG"))).shape == (32, 48, 3)


@pytest.mark.parametrize("wrap", ["\n", "\r\n", " ", "\t", "\n\n"], ids=repr)
def test_white_space_in_base64(wrap):
    text = to_base64(encoded(picture(), "PNG"))
    lines = wrap.join(text[i : i + 76] for i in range(0, len(text), 76))
    assert decoded(wrap + lines + wrap).shape == (32, 48, 3)
    assert decoded(f"data:image/png;base64,{wrap}{lines}{wrap}").shape == (32, 48, 3)


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_missing_padding(extra):
    data = encoded(picture(), "PNG")
    data += b"\0" * ((-len(data)) % 3 + extra)
    text = to_base64(data)
    assert text.count("=") == (-extra) % 3
    assert np.array_equal(decoded(text.rstrip("=")), decoded(text))


@pytest.mark.parametrize(
    "text", ["@@@@", "not base64!", "A", "AAAAA", "AB=CD", "🐈", "\0", "-_-_", "data:image/png;base64"]
)
def test_not_base64(text):
    assert refusal(text) == "The input image is not valid base64."


def test_data_uri_that_is_not_base64():
    assert "base64" in refusal("data:image/svg+xml,%3Csvg/%3E")


@pytest.mark.parametrize("text", ["", "   ", "\n", "====", "data:image/png;base64,"])
def test_empty(text):
    refusal(text)


def test_base64_of_a_text():
    assert "not a PNG, JPEG or WebP" in refusal(b"Once upon a time there was a cat.")


# files


@pytest.mark.parametrize(
    ("format", "name"), [("GIF", "GIF"), ("BMP", "BMP"), ("TIFF", "TIFF"), ("AVIF", "AVIF"), ("PDF", "PDF")]
)
def test_other_formats_are_named(format, name):
    assert name in refusal(encoded(picture(), format))


def test_animated_gif():
    data = encoded(picture(), "GIF", save_all=True, append_images=[picture().rotate(90)], duration=50)
    assert "GIF" in refusal(data)


@pytest.mark.parametrize("kept", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncated(format, kept):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    data = encoded(noise, format)
    assert decoded(data).shape == (96, 96, 3)
    refusal(data[: int(len(data) * kept)])


def test_truncated_images_are_called_that():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    for format in ("PNG", "JPEG"):
        data = encoded(noise, format)
        assert "damaged or cut short" in refusal(data[: len(data) // 2])
    data = encoded(noise, "JPEG", progressive=True)
    assert "damaged or cut short" in refusal(data[: len(data) // 2])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_flipped_bits_give_pixels_or_a_sentence(format):
    good = encoded(picture(), format, exif=with_orientation(6))
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(200):
        bad = bytearray(good)
        for position in random.integers(0, len(bad), 3):
            bad[position] ^= 1 << random.integers(8)
        try:
            outcomes.add(decoded(bytes(bad)).shape[2])
        except ImageError as error:
            outcomes.add(error.code)
    assert "invalid_image" in outcomes


def test_one_pixel():
    assert decoded(encoded(Image.new("RGB", (1, 1), COLOURS[0]), "PNG")).tolist() == [[list(COLOURS[0])]]


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_no_pixels(size):
    refusal(png(*size, 8, RGB))


@pytest.mark.parametrize("size", [(30, 10), (10, 30), (100, 10), (10, 100), (10, 1), (1, 10)])
def test_elongated(size):
    assert decoded(encoded(Image.new("RGB", size), "PNG")).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("size", [(101, 10), (10, 101), (11, 1), (1, 11), (65000, 1)])
def test_too_elongated(size):
    sentence = refusal(encoded(Image.new("RGB", size), "PNG"))
    assert "too elongated" in sentence
    assert f"{size[0]}×{size[1]}" in sentence


# sizes


def test_20_megabytes_and_not_a_byte_more():
    data = encoded(picture(), "PNG")
    most = data + b"\0" * (20_000_000 - len(data))  # readers stop at the PNG's end
    assert decoded(most).shape == (32, 48, 3)
    assert decoded("data:image/png;base64," + to_base64(most)).shape == (32, 48, 3)
    assert "20 MB" in refusal(most + b"\0", "image_too_large")
    assert "20 MB" in refusal(most + b"\0" * 10_000_000, "image_too_large")


def test_line_breaks_do_not_count_towards_20_megabytes():
    data = encoded(picture(), "PNG")
    data += b"\0" * (19_900_000 - len(data))
    assert decoded(base64.encodebytes(data).decode("ascii")).shape == (32, 48, 3)


@pytest.mark.parametrize(
    "size", [(8000, 6251), (10_000, 5001), (12_000, 8000), (40_000, 40_000), (2**31 - 1, 2**31 - 1)]
)
def test_over_50_megapixels(size):
    assert "50 megapixels" in refusal(png(*size, 8, RGB), "image_too_large")


def test_exactly_50_megapixels_are_not_too_many():
    assert "damaged" in refusal(png(10_000, 5000, 1, GREY))  # looked into, and found empty


def webp_bomb(width=16384, height=16383) -> bytes:
    """An animated WebP whose canvas is all it says about its size."""

    def chunk(name, data):
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    def three(*values):
        return b"".join(struct.pack("<I", value)[:3] for value in values)

    frame = encoded(picture(), "WEBP")[12:]
    body = b"WEBP" + chunk(b"VP8X", b"\x02\0\0\0" + three(width - 1, height - 1))
    body += chunk(b"ANIM", b"\0" * 6) + chunk(b"ANMF", three(0, 0, 47, 31, 100) + b"\0" + frame)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_bomb(width=65_500, height=65_500) -> bytes:
    data = encoded(picture(), "JPEG")
    start = data.index(b"\xff\xc0") + 5  # the frame header, at its height
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def exif_bomb(tags=1000, size=1_000_000) -> bytes:
    """EXIF whose every tag is the whole of it."""
    entries = b"".join(struct.pack("<HHII", tag, 1, size, 0) for tag in range(1, tags + 1))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", tags) + entries).ljust(size, b"\0")


BOMBS = {
    "PNG": png(40_000, 40_000, 8, RGB),
    "PNG of 4 exapixels": png(2**31 - 1, 2**31 - 1, 8, RGB),
    "PNG with endless text": png(
        1, 1, 8, GREY, [b"\0"], [(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000)))]
    ),
    "PNG with endless EXIF": png(1, 1, 8, GREY, [b"\0"], [(b"eXIf", exif_bomb())]),
    "JPEG": jpeg_bomb(),
    "WebP": webp_bomb(),
}


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WebP"])
def test_bomb(name):
    assert "50 megapixels" in refusal(BOMBS[name], "image_too_large")


def peak_growth() -> None:
    """Decode the images on stdin, base64 in a JSON list; print by how many bytes the peak memory grew."""

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    def attempt(text: str) -> None:
        with contextlib.suppress(ImageError):
            decode_image(text)

    images = json.load(sys.stdin)
    for format in ("PNG", "JPEG", "WEBP"):  # what the libraries need once
        attempt(to_base64(encoded(picture(), format)))
    before = peak()
    for text in images:
        attempt(text)
    sys.stdout.write(str(peak() - before))


def measured_growth(*images: bytes) -> int:
    """`peak_growth` in a process of its own, which has no earlier peak."""
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_images import peak_growth; peak_growth()"],
        input=json.dumps([to_base64(image) for image in images]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bombs_take_no_memory():
    """Decoded, each would take 200 MB or more; an image just small enough shows that the gauge works."""
    assert measured_growth(*BOMBS.values()) < 16_000_000
    assert measured_growth(png(10_000, 5000, 8, GREY, [bytes(10_000)] * 5000)) > 100_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_16_bits_take_little_more_memory_than_8():
    deep, plain = (png(10_000, 5000, bits, GREY, [bytes(1250 * bits)] * 5000) for bits in (16, 8))
    assert measured_growth(deep) < 1.5 * measured_growth(plain)


# modes


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(decoded(encoded(image, "JPEG")).astype(int) - (255, 0, 0)).max() <= 4


def test_grey_jpeg():
    assert np.abs(decoded(encoded(Image.new("L", (16, 16), 90), "JPEG")).astype(int) - 90).max() <= 1


def test_palette():
    palette = [(b"PLTE", bytes(sum(COLOURS, ())))]
    assert decoded(png(3, 1, 8, PALETTE, [b"\0\1\2"], palette)).tolist() == [[*map(list, COLOURS)]]


def test_palette_with_transparency():
    chunks = [(b"PLTE", bytes(sum(COLOURS, ()))), (b"tRNS", b"\0\xff\x80")]
    transparent, opaque, half = decoded(png(3, 1, 8, PALETTE, [b"\0\1\2"], chunks))[0].tolist()
    assert transparent == [255, 255, 255]
    assert opaque == list(COLOURS[1])
    assert np.abs(np.array(half) - (np.array(COLOURS[2]) + 255) / 2).max() <= 2


def test_palette_of_4_bits():
    palette = [(b"PLTE", bytes(sum(COLOURS, ())))]
    assert decoded(png(2, 1, 4, PALETTE, [b"\x12"], palette)).tolist() == [[*map(list, COLOURS[1:])]]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, {0}), (256, {0, 1}), (257, {1}), (32768, {127, 128}), (65278, {254}), (65535, {255})],
)
def test_16_bit_grey_is_scaled(value, expected):
    pixels = decoded(png(1, 1, 16, GREY, [struct.pack(">H", value)]))
    assert len({*pixels[0, 0].tolist()}) == 1
    assert {*pixels[0, 0].tolist()} <= expected


def test_16_bit_grey_is_monotonic():
    values = np.arange(0, 65536, 16, dtype=">u2").reshape(64, 64)
    pixels = decoded(png(64, 64, 16, GREY, [row.tobytes() for row in values]))
    steps = np.diff(pixels[..., 0].reshape(-1).astype(int))
    assert {*steps.tolist()} == {0, 1}


def test_16_bit_rgb():
    red, green, blue = decoded(png(1, 1, 16, RGB, [struct.pack(">HHH", 65535, 32768, 0)]))[0, 0].tolist()
    assert (red, blue) == (255, 0)
    assert green in (127, 128)


def test_16_bit_rgba_on_white():
    row = struct.pack(">8H", 1, 2, 3, 0, 65535, 0, 0, 65535)
    assert decoded(png(2, 1, 16, RGB_ALPHA, [row])).tolist() == [[[255, 255, 255], [255, 0, 0]]]


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_rgba_on_white(format):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(10, 20, 30, 0), (10, 20, 30, 255), (0, 0, 0, 128)])
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    transparent, opaque, half = decoded(encoded(image, format, **options))[0].tolist()
    assert transparent == [255, 255, 255]
    assert opaque == [10, 20, 30]
    assert all(126 <= value <= 128 for value in half)


def test_grey_with_alpha_on_white():
    assert decoded(png(3, 1, 8, GREY_ALPHA, [b"\0\0\x40\xff\0\xff"])).tolist() == [
        [[255, 255, 255], [64, 64, 64], [0, 0, 0]]
    ]


def test_one_bit():
    assert decoded(png(4, 1, 1, GREY, [b"\xa0"]))[0, :, 0].tolist() == [255, 0, 255, 0]


@pytest.mark.parametrize(
    ("depth", "colour", "row", "transparent"),
    [
        (8, GREY, b"\x10\x80", struct.pack(">H", 0x10)),
        (1, GREY, b"\x40", struct.pack(">H", 0)),
        (16, GREY, struct.pack(">HH", 0x1000, 0x8080), struct.pack(">H", 0x1000)),
        (8, RGB, b"\1\2\3\x80\x80\x80", struct.pack(">HHH", 1, 2, 3)),
    ],
    ids=["grey", "1 bit", "16-bit grey", "RGB"],
)
def test_a_transparent_colour_on_white(depth, colour, row, transparent):
    """PNG's way to have transparency without an alpha channel."""
    pixels = decoded(png(2, 1, depth, colour, [row], [(b"tRNS", transparent)]))
    opaque = 255 if depth == 1 else 128
    assert pixels.tolist() == [[[255, 255, 255], [opaque] * 3]]


# orientation and frames

# what a viewer does with the stored pixels, by the EXIF standard
ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def with_orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("number", ORIENTATIONS)
def test_exif_orientation(number, format):
    data = encoded(picture(), format, exif=with_orientation(number))
    stored = Image.open(io.BytesIO(data))
    pixels = decoded(data)
    assert np.array_equal(pixels, np.asarray(ImageOps.exif_transpose(stored)))
    assert np.array_equal(pixels, ORIENTATIONS[number](np.asarray(stored)))


def test_exif_orientation_of_16_bit_grey():
    exif = with_orientation(6).tobytes().removeprefix(b"Exif\0\0")
    row = struct.pack(">HHH", 0, 257, 514)
    assert decoded(png(3, 1, 16, GREY, [row], [(b"eXIf", exif)]))[:, :, 0].tolist() == [[0], [1], [2]]


def test_elongated_by_exif_orientation():
    exif = with_orientation(6)
    assert decoded(encoded(picture(100, 10), "JPEG", exif=exif)).shape == (100, 10, 3)


GARBAGE_EXIF = {
    "no header": b"Exif\0\0garbage",
    "nothing": b"Exif\0\0",
    "offset past the end": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "endless directory": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 40,
    "orientation 99": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
    "orientation a text": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
}


@pytest.mark.parametrize("garbage", GARBAGE_EXIF.values(), ids=GARBAGE_EXIF)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_garbage_exif_is_ignored(format, garbage, recwarn):
    plain = decoded(encoded(picture(), format))
    assert np.array_equal(decoded(encoded(picture(), format, exif=garbage)), plain)
    assert recwarn.list == []  # PIL's would fill the log


@pytest.mark.parametrize(
    ("format", "options"),
    [("WEBP", {"lossless": True}), ("PNG", {}), ("MPO", {})],
    ids=["WebP", "APNG", "MPO"],
)
def test_of_several_frames_the_first(format, options):
    """MPO is what many phones write as .jpg."""
    others = [Image.new("RGB", (48, 32), colour) for colour in COLOURS]
    data = encoded(picture(), format, save_all=True, append_images=others, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 4
    difference = np.abs(decoded(data).astype(int) - np.asarray(picture()).astype(int))
    assert difference.max() <= (16 if format == "MPO" else 0)
