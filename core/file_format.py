"""Which kinds of file a video can become, and which codec goes into which. Pure arithmetic of names."""

from dataclasses import dataclass
from pathlib import Path

from core.errors import RequestError

MAX_GIF_FPS = 50  # a GIF counts in hundredths of a second, and players take 1 for a mistake


@dataclass(frozen=True)
class FileFormat:
    suffix: str
    content_type: str
    codecs: tuple[str, ...] = ()  # the first is the default; none where there is nothing to choose


FORMATS = {
    "mp4": FileFormat(".mp4", "video/mp4", ("h264", "h265", "av1")),
    "webm": FileFormat(".webm", "video/webm", ("vp9", "av1")),
    "gif": FileFormat(".gif", "image/gif"),
    "png_sequence": FileFormat(".zip", "application/zip"),
    "png": FileFormat(".png", "image/png"),  # of a single picture
}


LATENTS = FileFormat(".safetensors", "application/octet-stream")  # what `return_latents` returns


def codec_of(format: str, codec: str | None) -> str | None:
    """The codec asked for, else the format's default; None for a format of pictures."""
    return codec or next(iter(FORMATS[format].codecs), None)


def content_type_of(path: Path) -> str:
    """By the file's suffix, which every file of ours has from its format."""
    return next(kind.content_type for kind in [*FORMATS.values(), LATENTS] if kind.suffix == path.suffix)


def suffix_of(content_type: object) -> str:
    """Of a file with this content type; what is not one of ours counts as an MP4."""
    return next((kind.suffix for kind in FORMATS.values() if kind.content_type == content_type), ".mp4")


def check_file(format: str, codec: str | None, fps: int) -> None:
    """Raises RequestError for what no such file can hold."""
    codecs = FORMATS[format].codecs
    if codec is not None and codec not in codecs:
        can = f"a {format} holds {' or '.join(codecs)}" if codecs else f"{format} has no codec to choose"
        raise RequestError(f"`codec` {codec} does not go with `format` {format}: {can}.")
    if format == "gif" and fps > MAX_GIF_FPS:
        raise RequestError(f"`fps` must be at most {MAX_GIF_FPS} where `format` is gif (got {fps}).")


def inert_fields(format: str, given: set[str]) -> list[str]:
    """Sentences for those of the `given` fields that such a file makes no use of."""
    if FORMATS[format].codecs:
        return []
    inert = [("mp4_crf", "it is the quality of the video codecs")]
    if format == "png_sequence":
        inert.append(("fps", "PNGs have no pace; only `duration_s` is reckoned with it"))
    if format == "png":
        inert.append(("fps", "a picture has no pace"))
    return [f"`{name}` had no effect on the {format}: {reason}." for name, reason in inert if name in given]
