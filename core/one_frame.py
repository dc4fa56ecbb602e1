"""A single picture in place of a video: what a request for one may say, and what it then means.

The model makes one latent frame at a chosen place of the time axis ("one frame inference", which users of
FramePack found). Positions count latent frames, the input image being at 0; names and defaults are those of
musubi-tuner.
"""

from typing import TYPE_CHECKING

from core.errors import RequestError
from core.timeline import Timeline

if TYPE_CHECKING:
    from core.request import OneFrame, VideoRequest


def with_its_format(request: "VideoRequest", timeline: Timeline) -> "VideoRequest":
    """The request, whose times are `timeline`, with the `format` that follows from `one_frame`.

    Raises RequestError for contradictions.
    """
    if request.one_frame is None:
        if request.format == "png":
            raise RequestError("`format` png is one picture and needs `one_frame`; a video has png_sequence.")
        return request
    if "format" in request.model_fields_set and request.format != "png":
        raise RequestError(f"`format` must be png with `one_frame` (got {request.format}).")
    for name in ("return_latents", "resume_latents"):
        if getattr(request, name):
            raise RequestError(f"`{name}` must not be given with `one_frame`: a picture does not go on.")
    if timeline.entries:
        raise RequestError(
            "`sections` and timed prompts must not be given with `one_frame`: it has one time."
        )
    return request.model_copy(update={"format": "png"})


def sees_reference(request: "VideoRequest") -> bool:
    """Whether the picture is made with a second image, the request's `end_image`."""
    return request.end_image is not None and request.end_image_strength > 0


def as_used(request: "VideoRequest") -> "OneFrame":
    """The request's `one_frame` with its positions filled in."""
    given, window = request.one_frame, request.latent_window_size
    return given.model_copy(
        update={
            "target_index": window if given.target_index is None else given.target_index,
            "end_index": _end_index(given, window) if sees_reference(request) else None,
        }
    )


def inert_one_frame_fields(request: "VideoRequest") -> list[str]:
    """Sentences for the fields that were given and had no effect on a picture."""
    if request.one_frame is None:
        return []
    one = request.one_frame
    asked = {
        "total_second_length": "total_second_length" in request.model_fields_set,
        "exact_length": request.exact_length,
        "partial": request.partial,
    }
    inert = [f"`{name}` had no effect: `one_frame` makes a picture." for name in asked if asked[name]]
    if one.end_index is not None and not sees_reference(request):
        inert.append("`one_frame.end_index` had no effect: there is no `end_image`.")
    chosen = one.target_index is not None and (one.end_index is not None or not sees_reference(request))
    free = chosen and one.no_post and one.no_2x and one.no_4x
    if free and "latent_window_size" in request.model_fields_set:
        inert.append("`latent_window_size` had no effect: no position of `one_frame` follows from it.")
    return inert


def _end_index(one: "OneFrame", window: int) -> int:
    return window + 1 if one.end_index is None else one.end_index
