"""A given video that is gone on from: which of a request's fields go with `input_video`."""

from typing import TYPE_CHECKING

from core.errors import RequestError

if TYPE_CHECKING:
    from core.request import VideoRequest

MAX_BYTES = 100 * 1000 * 1000  # of the video's file

REFUSED = {
    "input_image": "the video's frame at the join stands in its place",
    "start": "the video's frame at the join stands in its place",
    "end_image": "what follows is the video",
    "one_frame": "a picture goes on from none",
}


def check_extension(request: "VideoRequest") -> None:
    """Raises RequestError for fields that contradict each other."""
    if request.input_video is None:
        return
    for name, why in REFUSED.items():
        if getattr(request, name) is not None:
            raise RequestError(f"`{name}` must not be given with `input_video`: {why}.")


def inert_extension_fields(request: "VideoRequest") -> list[str]:
    """Sentences for the fields that were given and had no effect."""
    if request.input_video is None and "include_source" in request.model_fields_set:
        return ["`include_source` had no effect: there is no `input_video`."]
    return []
