"""The images of a request's timed sections → pixels of the video's size."""

from collections.abc import Callable, Sequence

import numpy as np

from core.errors import DownloadError, UrlRefusedError
from core.images import Fetch, decode_image
from core.request import TimedSection
from diffusers_helper.buckets import resize_and_center_crop


def decode_keyframes(
    sections: Sequence[TimedSection],
    fetch: Fetch,
    size: tuple[int, int],
    check_cancelled: Callable[[], None] = lambda: None,
) -> dict[int, np.ndarray]:
    """Each image by its place in `sections`, (height, width, 3) uint8 as `size` says.

    Each is cropped as it comes, so that one of them at a time has all its pixels in memory. Raises what
    `decode_image` and `fetch` do, in a sentence that names the field.
    """
    keyframes = {}
    for place, section in enumerate(sections):
        if section.image is None:
            continue
        check_cancelled()
        name = f"The image of `sections[{place}]`"
        try:
            pixels = decode_image(section.image, fetch, name)
        except (UrlRefusedError, DownloadError) as error:
            raise type(error)(f"{name} could not be fetched: {error}") from None
        keyframes[place] = resize_and_center_crop(pixels, *size)
    return keyframes
