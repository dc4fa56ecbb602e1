"""Frames → H.264 MP4, streamed to ffmpeg frame by frame."""

import errno
import logging
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import imageio_ffmpeg
import torch
from einops import rearrange

from core.errors import VideoEncodingError

log = logging.getLogger(__name__)

FULL_BYTES = 64 * 1024  # less free than this, and a failed write is put down to the disk


def save_bcthw_as_mp4(
    clips: Iterable[torch.Tensor], output_filename: str | Path, fps: int = 30, crf: int = 16
) -> int:
    """Write consecutive uint8 RGB clips (1, 3, T, H, W) as one MP4; returns the number of frames.

    libx264, yuv420p, index in front (faststart). Raises VideoEncodingError, or whatever `clips` raises,
    with ffmpeg stopped and no file left behind either way.
    """
    path = Path(output_filename)
    frames = 0
    writer = None
    try:
        for clip in clips:
            _, _, _, height, width = clip.shape
            if writer is None:
                writer = _open(path, width, height, fps, crf)
            for frame in rearrange(clip, "1 c t h w -> t h w c").contiguous().numpy():
                writer.send(frame)
                frames += 1
        if writer is None:
            raise VideoEncodingError("There are no frames to encode.")
        writer.close()
        _check_complete(path)
    except BaseException as error:
        if writer is not None:
            writer.close()
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            log.warning("encoding failed: %s", error)
            raise VideoEncodingError(f"The video could not be encoded: {_reason(error, path)}.") from error
        raise
    return frames


def _check_complete(path: Path) -> None:
    """ffmpeg moves the index in front as its last act; without it (a full disk, say) nothing can play."""
    with path.open("rb") as file:
        if b"moov" not in file.read(4096):
            raise OSError("ffmpeg did not finish the file")


def _reason(error: OSError, path: Path) -> str:
    """ffmpeg says nothing of its reason through the pipe, so a full disk is looked for."""
    with suppress(OSError):
        if error.errno == errno.ENOSPC or shutil.disk_usage(path.parent).free < FULL_BYTES:
            return "the disk is full"
    return error.strerror or "ffmpeg stopped before it was complete"


def _open(path: Path, width: int, height: int, fps: int, crf: int):
    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "there is no ffmpeg") from None
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=fps,
        codec="libx264",
        pix_fmt_in="rgb24",
        pix_fmt_out="yuv420p",
        quality=None,
        macro_block_size=1,
        ffmpeg_log_level="error",
        output_params=["-crf", str(crf), "-movflags", "+faststart"],
    )
    writer.send(None)
    return writer
