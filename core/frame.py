"""What a video starts and ends with, and its size: which of a request's fields go together, and what follows.

A video starts with the input image or with a picture made here (`start`); it may lead up to a second image
(`end_image`). Both get the frame's size: the one asked for, or the bucket nearest to the image's shape.
"""

from typing import TYPE_CHECKING

import numpy as np

from core.errors import RequestError
from diffusers_helper.buckets import nearest_bucket, resize_and_center_crop, sides_of_ratio

if TYPE_CHECKING:
    from core.request import VideoRequest
    from core.weights.profiles import ModelProfile

NOTHING_TO_START_WITH = "`input_image`, `start` or `input_video` is required"
MAX_RATIO = 4  # of the longer side to the shorter
COLOURS = {"black": (0, 0, 0), "white": (255, 255, 255)}


def check_frame(request: "VideoRequest") -> None:
    """Raises RequestError for fields that contradict each other."""
    if request.input_image is not None and request.start is not None:
        raise RequestError("`input_image` and `start` must not both be given: a video starts with one.")
    if (request.width is None) != (request.height is None):
        given, missing = ("width", "height") if request.height is None else ("height", "width")
        raise RequestError(f"`{given}` needs `{missing}` beside it.")
    for name in ("resolution", "aspect_ratio"):
        if request.width is not None and getattr(request, name) is not None:
            raise RequestError(f"`{name}` must not be given with `width` and `height`, which are the size.")
    if request.aspect_ratio == "auto" and request.start is not None:
        raise RequestError("`aspect_ratio` must not be auto with `start`: there is no image to take it from.")
    if ratio := _ratio(request.aspect_ratio):
        across, down = ratio
        if max(across, down) > MAX_RATIO * min(across, down):
            raise RequestError(
                f"`aspect_ratio` must be between 1:{MAX_RATIO} and {MAX_RATIO}:1 (got {across}:{down})."
            )
    if request.model is not None:
        check_direction(request, request.model)


def check_direction(request: "VideoRequest", direction: str) -> None:
    """Raises RequestError where the model that will be used cannot do what is asked."""
    if request.end_image is not None and direction == "f1":
        raise RequestError(
            "`end_image` needs the `model` i2v: f1 makes the video forwards and sees only what came before."
        )


def inert_frame_fields(request: "VideoRequest") -> list[str]:
    """Sentences for the fields that were given and had no effect."""
    if request.end_image is not None:
        if request.end_image_strength == 0:
            return ["`end_image` had no effect: its `end_image_strength` is 0."]
        return []
    return [
        f"`{name}` had no effect: there is no `end_image`."
        for name in ("end_image_strength", "end_image_mode")
        if name in request.model_fields_set
    ]


def resolution_of(request: "VideoRequest", profile: "ModelProfile") -> int:
    """Side of the square whose area the frame has: the request's, or the profile's own."""
    return request.resolution or profile.resolution


def frame_size(request: "VideoRequest", image: np.ndarray | None, resolution: int) -> tuple[int, int]:
    """(height, width) of the video, for its input `image` (H, W, 3), if there is one yet.

    `resolution` counts where no width and height are given.
    """
    if request.width is not None:
        return request.height, request.width
    if ratio := _ratio(request.aspect_ratio):
        across, down = ratio
        return sides_of_ratio(down, across, resolution)
    if image is None or request.start is not None:  # a made picture is a square, in a checkpoint too
        return resolution, resolution
    return nearest_bucket(*image.shape[:2], resolution)


def start_picture(
    request: "VideoRequest", image: np.ndarray | None, height: int, width: int, seed: int
) -> np.ndarray:
    """The video's first frame, (height, width, 3) uint8: `image` cut to that, or what `start` says.

    That is one colour, by name or #rrggbb, or noise that follows from `seed`.
    """
    if image is not None:
        return resize_and_center_crop(image, height, width)
    start = request.start
    if start == "noise":
        # not default_rng, whose numbers may change with numpy's version; these never do
        return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    colour = COLOURS.get(start) or bytes.fromhex(start[1:])
    return np.broadcast_to(np.array([*colour], dtype=np.uint8), (height, width, 3)).copy()


def end_picture(
    request: "VideoRequest", image: np.ndarray | None, height: int, width: int
) -> np.ndarray | None:
    """`image` cut to (height, width, 3) uint8; None where there is none, or its strength is 0."""
    if image is None or request.end_image_strength == 0:
        return None
    return resize_and_center_crop(image, height, width)


def _ratio(text: str | None) -> tuple[int, int] | None:
    """ "16:9" → (16, 9); None where the image says."""
    if text in (None, "auto"):
        return None
    across, down = text.split(":")
    return int(across), int(down)
