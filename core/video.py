"""Frames → the file that was asked for, frame by frame: no more than one is held here."""

import errno
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image

from core import embedding
from core.errors import VideoEncodingError
from core.ffmpeg import FfmpegWriter, PaletteFinder
from core.file_format import FORMATS
from core.png_file import PngWriter
from core.png_zip import PngZipWriter

log = logging.getLogger(__name__)

POSTER_QUALITY = 90
FULL_BYTES = 64 * 1024  # less free than this, and a failed write is put down to the disk


@dataclass(frozen=True)
class VideoFile:
    """What kind of file, as core/file_format.py names it; `parameters` is a text to put into it."""

    format: str = "mp4"
    codec: str | None = "h264"
    fps: int = 30
    crf: int = 16  # the codec's own scale
    parameters: str | None = None


def save_bcthw_as_mp4(
    clips: Iterable[torch.Tensor], output_filename: str | Path, fps: int = 30, crf: int = 16
) -> int:
    """`save_video` as H.264, yuv420p, in an MP4."""
    return save_video(clips, output_filename, VideoFile(fps=fps, crf=crf))


def save_video(clips: Iterable[torch.Tensor], output_filename: str | Path, file: VideoFile) -> int:
    """Write consecutive uint8 RGB clips (1, 3, T, H, W) as one file; returns the number of frames.

    `clips` is gone through once, and for a GIF twice: it must begin again then. Raises VideoEncodingError, or
    whatever `clips` raises, with ffmpeg stopped and no file left behind either way.
    """
    path = Path(output_filename)
    metadata = path.with_name(f"{path.name}.metadata")  # ffmpeg reads it as a second input
    try:
        palette = b""
        if file.format == "gif":
            finder, _ = _written(clips, PaletteFinder)
            palette = finder.palette
        _, frames = _written(clips, partial(_open, path, file, metadata, palette))
        _check_complete(path, file.format)
        if file.format == "gif" and file.parameters is not None:
            embedding.append_to_gif(path, file.parameters)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            log.warning("encoding failed: %s", error)
            raise VideoEncodingError(f"The video could not be encoded: {_reason(error, path)}.") from error
        raise
    finally:
        metadata.unlink(missing_ok=True)
    return frames


def _written(clips: Iterable[torch.Tensor], open_writer: Callable[[int, int], Any]) -> tuple[Any, int]:
    """All frames through `open_writer(width, height)`: that writer, finished, and how many there were."""
    writer, frames = None, 0
    try:
        for clip in clips:
            _, _, _, height, width = clip.shape
            writer = writer or open_writer(width, height)
            for frame in rearrange(clip, "1 c t h w -> t h w c").contiguous().numpy():
                writer.write(frame)
                frames += 1
        if writer is None:
            raise VideoEncodingError("There are no frames to encode.")
        writer.finish()
    except BaseException:
        if writer is not None:
            writer.stop()
        raise
    return writer, frames


def first_frame_jpeg(clips: Iterable[torch.Tensor]) -> bytes:
    """Of uint8 RGB clips (1, 3, T, H, W)."""
    frame = rearrange(next(iter(clips))[0, :, 0], "c h w -> h w c").contiguous().numpy()
    jpeg = io.BytesIO()
    Image.fromarray(frame).save(jpeg, "JPEG", quality=POSTER_QUALITY)
    return jpeg.getvalue()


def _open(
    path: Path, file: VideoFile, metadata: Path, palette: bytes, width: int, height: int
) -> FfmpegWriter | PngZipWriter | PngWriter:
    if file.format == "png_sequence":
        return PngZipWriter(path, file.parameters)
    if file.format == "png":
        return PngWriter(path, file.parameters)
    embeds = file.parameters is not None and bool(FORMATS[file.format].codecs)
    if embeds:
        metadata.write_text(embedding.as_ffmetadata(file.parameters), encoding="utf-8", newline="\n")
    return FfmpegWriter(
        path,
        width,
        height,
        format=file.format,
        codec=file.codec,
        fps=file.fps,
        crf=file.crf,
        metadata=metadata if embeds else None,
        palette=palette,
    )


def _check_complete(path: Path, format: str) -> None:
    """What a file has only when it was finished: ffmpeg's word is not taken for it. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(4096)
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        tail = file.read()
    whole = {
        "mp4": b"moov" in head,  # the index comes in front as the last act
        "webm": head.startswith(b"\x1aE\xdf\xa3") and b"\x01\xff\xff\xff\xff\xff\xff\xff" not in head[:64],
        "gif": head.startswith(b"GIF8") and tail.endswith(b";"),
        "png_sequence": b"PK\x05\x06" in tail,
        "png": tail.endswith(b"IEND\xaeB`\x82"),
    }
    if not whole[format]:
        raise OSError("the file was not finished")


def _reason(error: OSError, path: Path) -> str:
    """ffmpeg says nothing of its reason through the pipe, so a full disk is looked for."""
    with suppress(OSError):
        if error.errno == errno.ENOSPC or shutil.disk_usage(path.parent).free < FULL_BYTES:
            return "the disk is full"
    return error.strerror or "ffmpeg stopped before it was complete"
