"""The kinds of file a worker makes, and what a whole one of each has."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from client.errors import SaveError

SUFFIXES = {
    "video/mp4": ".mp4",
    "video/webm": ".webm",
    "image/gif": ".gif",
    "application/zip": ".zip",
    "image/png": ".png",
}
FORMATS = {"mp4": ".mp4", "webm": ".webm", "gif": ".gif", "png_sequence": ".zip", "png": ".png"}


def suffix_of(content_type: Any) -> str:
    """What the worker calls a video, whatever it says, is an MP4 unless it is known to be something else."""
    return SUFFIXES.get(content_type, ".mp4") if isinstance(content_type, str) else ".mp4"


def named_after(path: Path, content_type: Any) -> Path:
    """`path` with the kind's suffix; a picture's name is another than that of the image it was made from."""
    suffix = suffix_of(content_type)
    return path.with_name(f"{path.stem}-picture.png") if suffix == ".png" else path.with_suffix(suffix)


def check_whole(file: BinaryIO, content_type: Any) -> None:
    """Raises SaveError unless the file is a whole one of its kind."""
    checks = {
        ".mp4": _check_mp4,
        ".webm": _check_webm,
        ".gif": _check_gif,
        ".zip": _check_zip,
        ".png": _check_png,
    }
    checks[suffix_of(content_type)](file)


def check_latents(file: BinaryIO) -> None:
    """Raises SaveError unless the file is a safetensors file with the data of all its tensors."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")  # of the header; then comes the data
    try:
        header = json.loads(file.read(min(length, size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        raise SaveError("What came as the latents is not a safetensors file.") from None
    if size != whole:
        raise SaveError("The file of latents is cut short.")


def _check_webm(file: BinaryIO) -> None:
    """An EBML header, and a segment that is as long as it says."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(64)
    segment = head.find(b"\x18\x53\x80\x67")
    if not head.startswith(b"\x1a\x45\xdf\xa3") or segment < 0:
        raise SaveError("What came as the video is not a WebM.")
    length = int.from_bytes(head[segment + 5 : segment + 12])  # after 01: seven bytes
    if head[segment + 4] != 1 or segment + 12 + length != size:
        raise SaveError("The video is cut short.")


def _check_gif(file: BinaryIO) -> None:
    file.seek(0)
    if file.read(4) != b"GIF8":
        raise SaveError("What came as the video is not a GIF.")
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b";":
        raise SaveError("The video is cut short.")


def _check_png(file: BinaryIO) -> None:
    file.seek(0)
    content = file.read()
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise SaveError("What came as the picture is not a PNG.")
    if not content.endswith(b"IEND\xaeB`\x82"):
        raise SaveError("The picture is cut short.")


def _check_zip(file: BinaryIO) -> None:
    file.seek(0)
    if file.read(2) != b"PK":
        raise SaveError("What came as the video is not a zip.")
    if not zipfile.is_zipfile(file):
        raise SaveError("The video is cut short.")


def _check_mp4(file: BinaryIO) -> None:
    """Raises SaveError unless the file is a row of whole boxes that holds an index and the pictures."""
    size = file.seek(0, os.SEEK_END)
    start, kinds = 0, []
    while start < size:
        file.seek(start)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4]), header[4:8]
        if length == 1:  # too long for 32 bits
            length = int.from_bytes(header[8:16])
        elif length == 0:  # up to the end
            length = size - start
        if not kinds and kind != b"ftyp":
            break
        kinds.append(kind)
        start += max(length, 8)
    if not kinds:
        raise SaveError("What came as the video is not an MP4.")
    if start != size or not {b"moov", b"mdat"} <= {*kinds}:
        raise SaveError("The video is cut short.")
