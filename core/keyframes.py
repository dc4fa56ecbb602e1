"""The images of a request's timed sections → pixels of the video's size."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import DownloadError, UrlRefusedError
from core.images import Fetch, decode_image
from core.request import TimedSection
from diffusers_helper.buckets import resize_and_center_crop


@dataclass(frozen=True)
class Keyframe:
    pixels: np.ndarray  # (height, width, 3) uint8, of the video's size
    sha256: str  # of the image's file


def decode_keyframes(
    sections: Sequence[TimedSection],
    fetch: Fetch,
    size: tuple[int, int],
    check_cancelled: Callable[[], None] = lambda: None,
) -> dict[int, Keyframe]:
    """Each image by its place in `sections`, of `size` (height, width).

    Each is cropped as it comes, so that one of them at a time has all its pixels in memory. Raises what
    `decode_image` and `fetch` do, in a sentence that names the field.
    """
    keyframes = {}
    for place, section in enumerate(sections):
        if section.image is None:
            continue
        check_cancelled()
        file = hashlib.sha256()
        try:
            pixels = decode_image(section.image, fetch, file.update, f"image of `sections.{place}`")
        except (UrlRefusedError, DownloadError) as error:
            raise type(error)(f"`sections.{place}.image`: {error}") from None
        keyframes[place] = Keyframe(resize_and_center_crop(pixels, *size), file.hexdigest())
    return keyframes
