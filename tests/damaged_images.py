"""PNG, JPEG and WebP files of every kind, made here; a hypothesis strategy for damaging them; what must hold.

What a format protects, a PNG's checksums above all, is put right again after most of the damage: a decoder
that stops there would see little of the rest.
"""

import re
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import ImageCms

from core.errors import ImageError, ImageTooLargeError
from core.images import MAX_ASPECT, MAX_PIXELS, decode_image
from tests.hostile_inputs import assert_sentence
from tests.test_images import (
    GARBAGE_EXIF,
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGB_ALPHA,
    encoded,
    picture,
    png,
    to_base64,
    with_orientation,
)

Parts = list[tuple[bytes, bytes]]  # name and content of each chunk or segment

WIDTH, HEIGHT = 20, 12
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
DEPTHS = {GREY: (1, 2, 4, 8, 16), PALETTE: (1, 2, 4, 8)} | dict.fromkeys(
    (RGB, GREY_ALPHA, RGB_ALPHA), (8, 16)
)
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
PNG_START = b"\x89PNG\r\n\x1a\n"
START_OF_SCAN = b"\xda"
LIKELY_NUMBERS = (0, 1, 2, 127, 255, 256, 7071, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1)
PART_CHANGES = ("change", "change", "inflate", "drop", "repeat", "add", "rename", "move")
BYTE_CHANGES = ("flip", "flip", "write", "write", "cut", "drop", "repeat", "insert", "splice")


@cache
def samples() -> dict[str, list[bytes]]:
    """Good files by format."""
    small = picture(WIDTH, HEIGHT)
    alpha = small.convert("RGBA")
    alpha.putalpha(small.convert("L"))
    frames = {"save_all": True, "append_images": [small.rotate(180), small.rotate(90)]}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exifs = [*map(with_orientation, (3, 5, 6, 8)), *GARBAGE_EXIF.values()]
    files = {format: [encoded(small, format, exif=exif) for exif in exifs] for format in FORMATS}
    files["PNG"] += [
        *(_plain_png(colour, depth) for colour, depths in DEPTHS.items() for depth in depths),
        _interlaced_png(),
        encoded(small, "PNG", icc_profile=profile, dpi=(72, 72)),
        encoded(alpha, "PNG", **frames),
    ]
    files["JPEG"] += [
        *(encoded(small.convert(mode), "JPEG") for mode in ("L", "RGB", "CMYK")),
        encoded(small, "JPEG", progressive=True, icc_profile=profile, comment=b"comment", dpi=(72, 72)),
        encoded(small, "JPEG", quality=5, subsampling=0, restart_marker_rows=1),
        encoded(small, "MPO", **frames),
    ]
    files["WEBP"] += [
        *(encoded(image, "WEBP", lossless=exact) for image in (small, alpha) for exact in (True, False)),
        *(encoded(image, "WEBP", **frames) for image in (small, alpha)),
        encoded(small, "WEBP", icc_profile=profile, xmp=b"<x/>"),
    ]
    return files


def _plain_png(colour: int, depth: int) -> bytes:
    length = -(-WIDTH * CHANNELS[colour] * depth // 8)
    rows = [bytes((7 * x + 31 * y) % 256 for x in range(length)) for y in range(HEIGHT)]
    chunks = [(b"PLTE", (bytes(range(256)) * 3)[: 3 * 2**depth])] if colour == PALETTE else []
    transparent = {GREY: b"\0\1", RGB: b"\0\1\0\2\0\3", PALETTE: b"\0\x80"}
    chunks += [(b"tRNS", transparent[colour])] if colour in transparent else []
    return png(WIDTH, HEIGHT, depth, colour, rows, chunks)


def _interlaced_png() -> bytes:
    pixels = np.asarray(picture(WIDTH, HEIGHT))
    rows = [row.tobytes() for x, y, dx, dy in ADAM7 for row in pixels[y::dy, x::dx]]
    (name, header), *rest = _png_parts(png(WIDTH, HEIGHT, 8, RGB, rows))
    return _png_file([(name, header[:-1] + b"\1"), *rest])


def _png_parts(data: bytes) -> Parts:
    parts, position = [], len(PNG_START)
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        parts.append((name, data[position + 8 : position + 8 + length]))
        position += 12 + length
    return parts


def _png_file(parts: Parts) -> bytes:
    return PNG_START + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    )


def with_checksums(data: bytes) -> bytes:
    """A PNG's put right, any other file as it is."""
    return _png_file(_png_parts(data)) if data.startswith(PNG_START) else data


def _jpeg_parts(data: bytes) -> Parts:
    """The segments, the last with all that follows its head."""
    parts, position, name = [], 2, b""
    while name != START_OF_SCAN:
        name, length = data[position + 1 : position + 2], int.from_bytes(data[position + 2 : position + 4])
        parts.append((name, data[position + 4 : position + 2 + length]))
        position += 2 + length
    return [*parts, (b"", data[position:])]


def _jpeg_file(parts: Parts) -> bytes:
    return b"\xff\xd8" + b"".join(
        b"\xff" + name + struct.pack(">H", (len(content) + 2) % 2**16) + content if name else content
        for name, content in parts
    )


def _webp_parts(data: bytes) -> Parts:
    parts, position = [], len(b"RIFF....WEBP")
    while position < len(data):
        name, length = struct.unpack_from("<4sI", data, position)
        parts.append((name, data[position + 8 : position + 8 + length]))
        position += 8 + length + length % 2
    return parts


def _webp_file(parts: Parts) -> bytes:
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
        for name, content in parts
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


FORMATS = {
    "PNG": (_png_parts, _png_file),
    "JPEG": (_jpeg_parts, _jpeg_file),
    "WEBP": (_webp_parts, _webp_file),
}


@st.composite
def damaged_images(draw: Any) -> bytes:
    """A file with its parts rearranged and changed, or its bytes changed, or both."""
    format = draw(st.sampled_from([*FORMATS]))
    files, (split, join) = st.sampled_from(samples()[format]), FORMATS[format]
    data = draw(files)
    if changes := draw(st.integers(0, 2)):
        parts = split(data)
        for _ in range(changes):
            _rearrange(draw, parts, split(draw(files)))
        data = join(parts)
    for _ in range(draw(st.sampled_from([0, 0, 1]))):
        data = _changed(draw, data, draw(files))
    return data


def _rearrange(draw: Any, parts: Parts, others: Parts) -> None:
    """Change the list of parts in one way; `others` are another file's."""
    place = draw(st.integers(0, len(parts) - 1)) if parts else 0
    name, content = parts[place] if parts else (b"", b"")
    other_name, other_content = draw(st.sampled_from(others))
    match draw(st.sampled_from(PART_CHANGES)):
        case "change":
            parts[place : place + 1] = [(name, _changed(draw, content, other_content))]
        case "inflate":  # change what is compressed
            parts[place : place + 1] = [(name, _changed_inside(draw, content, other_content))]
        case "drop":
            del parts[place : place + 1]
        case "repeat":
            parts[place:place] = [(name, content)] * draw(st.sampled_from([1, 2, 200]))
        case "add":
            parts.insert(place, (other_name, other_content))
        case "rename":
            parts[place : place + 1] = [(other_name, content)]
        case "move":
            parts.append(parts.pop(place) if parts else (name, content))


def _changed_inside(draw: Any, content: bytes, other: bytes) -> bytes:
    try:
        inside = zlib.decompress(content)
    except zlib.error:
        return content
    return zlib.compress(_changed(draw, inside, other), 1)


def _changed(draw: Any, data: bytes, other: bytes) -> bytes:
    """`data` with one change; `other` gives bytes of a likely form."""
    place = draw(st.integers(0, len(data)))
    before, after = data[:place], data[place:]
    match draw(st.sampled_from(BYTE_CHANGES)):
        case "flip":
            return before + bytes([after[0] ^ 1 << draw(st.integers(0, 7))]) + after[1:] if after else data
        case "write":
            number = draw(st.sampled_from(LIKELY_NUMBERS))
            form = draw(st.sampled_from([">I", "<I", ">H", "<H", "B"]))
            written = struct.pack(form, number % 256 ** struct.calcsize(form))
            return before + written + after[len(written) :]
        case "cut":
            return before
        case "drop":
            return before + after[draw(st.integers(1, 20)) :]
        case "repeat":
            return before + after[:20] * draw(st.sampled_from([2, 3, 300])) + after
        case "insert":
            return before + draw(st.binary(min_size=1, max_size=20)) + after
        case "splice":
            return before + other[draw(st.integers(0, len(other))) :]


def check_image(data: bytes) -> str:
    """Decode it and look at what comes of it: `decoded`, or the kind of the sentence."""
    try:
        pixels = decode_image(to_base64(data))
    except ImageError as error:
        assert type(error) in (ImageError, ImageTooLargeError)
        assert_sentence(str(error))
        return re.sub(r" \(.*\)| but a.*(?=\.)", "", str(error))
    height, width, colours = pixels.shape
    assert (pixels.dtype, colours) == ("uint8", 3)
    assert 0 < height * width <= MAX_PIXELS
    assert max(height, width) <= MAX_ASPECT * min(height, width)
    return "decoded"
