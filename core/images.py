"""base64, data URI or URL → (H, W, 3) uint8 RGB. Everything is checked before it is decoded."""

import base64
import binascii
import io
import re
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from core.errors import ImageError, ImageTooLargeError, RequestError

MAX_BYTES = 20 * 1000 * 1000
MAX_PIXELS = 50_000_000
MAX_ASPECT = 10  # longer strips would be enlarged to gigapixels before the crop
FORMATS = ("PNG", "JPEG", "WEBP")

_DATA_URI = re.compile(r"data:[\w.+/-]*(;[\w=.-]+)*,", re.IGNORECASE)
_URL = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)

Fetch = Callable[[str, int], bytes]  # URL and the most bytes to accept → content


def _no_urls(url: str, max_bytes: int) -> bytes:
    raise ImageError("The input image cannot be given as a URL here.")


def decode_image(
    text: str,
    fetch: Fetch = _no_urls,
    on_file: Callable[[bytes], None] = lambda data: None,
    what: str = "input image",
) -> np.ndarray:
    """Decode one of the request's images: first frame, upright by EXIF, transparency on white.

    `on_file` is shown the image's file. Raises ImageError or ImageTooLargeError with the sentence for the
    caller, which speaks of `what`, or what `fetch` raises.
    """
    data = read_input(text, fetch, what, MAX_BYTES, ImageError, ImageTooLargeError)
    on_file(data)
    return _to_rgb(data, what)


def read_input(
    text: str,
    fetch: Fetch,
    what: str,
    max_bytes: int,
    wrong: type[RequestError],
    too_large: type[RequestError],
) -> bytes:
    """The file that a URL, a data URI or plain base64 stands for, of at most `max_bytes`.

    Raises `wrong` or `too_large` with a sentence that speaks of `what`, or what `fetch` raises.
    """
    if _URL.match(text[:64]):
        return fetch(text.strip(), max_bytes)
    text = text.lstrip()
    if match := _DATA_URI.match(text[:256]):
        if ";base64" not in match[0].lower():
            raise wrong(f"The {what}'s data URI must be base64.")
        text = text[match.end() :]
    text = "".join(text.split()).rstrip("=")
    if len(text) * 3 // 4 > max_bytes:  # just what it decodes to
        raise too_large(f"The {what} has over {max_bytes // 1_000_000} MB.")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise wrong(f"The {what} is not valid base64.") from None


def check_shape(height: int, width: int, what: str, wrong: type[RequestError]) -> None:
    """Raises `wrong` for what is too long a strip."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise wrong(f"The {what} is too elongated ({width}×{height}): at most {MAX_ASPECT}:1.")


def _to_rgb(data: bytes, what: str) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL has a line for each wrong EXIF tag, 65,000 in one file
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return _checked(data, what)


def _checked(data: bytes, what: str) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLargeError(_too_many_pixels(what)) from None
    except Exception:
        raise ImageError(f"The {what} is not a PNG, JPEG or WebP{_guess(data)}.") from None

    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"The {what} is empty ({width}×{height} pixels).")
    if width * height > MAX_PIXELS:
        raise ImageTooLargeError(_too_many_pixels(what, width, height))
    check_shape(height, width, what, ImageError)
    try:
        image.load()
        return np.asarray(_flatten(_upright(image)))
    except Exception:
        raise ImageError(f"The {what} is damaged or cut short.") from None


def _upright(image: Image.Image) -> Image.Image:
    """As its EXIF orientation says; unreadable EXIF says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _flatten(image: Image.Image) -> Image.Image:
    """Any PIL mode → RGB, transparent parts on white."""
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip instead of scaling
        grey = np.asarray(image)
        scaled = (grey // 257).clip(0, 255).astype(np.uint8)
        if "transparency" in image.info:
            scaled[grey == image.info["transparency"]] = 255
        return Image.fromarray(scaled).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _too_many_pixels(what: str, width: int = 0, height: int = 0) -> str:
    size = f" ({width}×{height})" if width else ""
    return f"The {what} has over {MAX_PIXELS // 1_000_000} megapixels{size}."


def _guess(data: bytes) -> str:
    for magic, name in (
        (b"GIF8", "GIF"),
        (b"BM", "BMP"),
        (b"%PDF", "PDF"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
    ):
        if data.startswith(magic):
            return f" but a {name}"
    if data[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1"):
        return " but a HEIC or AVIF"
    return ""
