"""Frames → H.264 MP4, streamed to ffmpeg frame by frame."""

from collections.abc import Iterable
from pathlib import Path

import imageio_ffmpeg
import torch
from einops import rearrange

from core.errors import VideoEncodingError


def save_bcthw_as_mp4(
    clips: Iterable[torch.Tensor], output_filename: str | Path, fps: int = 30, crf: int = 16
) -> int:
    """Write consecutive uint8 RGB clips (1, 3, T, H, W) as one MP4; returns the number of frames.

    libx264, yuv420p, index in front (faststart). Raises VideoEncodingError, leaving no file behind.
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
    except OSError as error:
        if writer is not None:
            writer.close()
        path.unlink(missing_ok=True)
        raise VideoEncodingError(f"The video could not be encoded: {error.strerror or error}.") from error
    return frames


def _check_complete(path: Path) -> None:
    """ffmpeg moves the index in front as its last act; without it (a full disk, say) nothing can play."""
    with path.open("rb") as file:
        if b"moov" not in file.read(4096):
            raise OSError("ffmpeg did not finish the file")


def _open(path: Path, width: int, height: int, fps: int, crf: int):
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
