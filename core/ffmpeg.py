"""ffmpeg as a process that is fed with frames: which encoders it has, how each is asked, and how it ends."""

import errno
import functools
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from core.errors import RequestError, VideoEncodingError

PROBE_TIMEOUT_S = 60

# codec → ffmpeg's encoder and what it is told besides the quality, which is `-crf` for all of them
ENCODERS = {
    "h264": ("libx264", ()),
    # the tag is the one that Apple's players know
    "h265": ("libx265", ("-tag:v", "hvc1", "-x265-params", "log-level=error")),
    # without -b:v 0 the CRF would be a ceiling on a default bit rate
    "vp9": ("libvpx-vp9", ("-b:v", "0", "-deadline", "good", "-cpu-used", "4", "-row-mt", "1")),
    "av1": ("libsvtav1", ("-preset", "8")),
}
CHECKED_AT_START = "libx264"  # by core/fitness.py

CONTAINERS = {
    "mp4": ("-movflags", "+faststart"),  # the index in front
    "webm": ("-fflags", "+bitexact"),  # else every file has a number drawn for it
}
# A palette for each frame: one for all would hold every frame in memory until the last is known. Ordered
# dithering stands still where the picture does.
GIF = (
    "-filter_complex",
    "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=bayer:bayer_scale=3",
)


def check_encoder(codec: str | None, format: str) -> None:
    """Raises RequestError where this machine's ffmpeg cannot write that, VideoEncodingError without one."""
    if format == "gif":
        codec, encoder = "gif", "gif"
    elif codec is None:
        return
    else:
        encoder, _ = ENCODERS[codec]
    if encoder == CHECKED_AT_START:
        return
    try:
        found = _encoders(_executable())
    except OSError as error:
        raise VideoEncodingError(f"The video could not be encoded: {error.strerror or error}.") from error
    if encoder not in found:
        field = "`format`" if format == "gif" else "`codec`"
        raise RequestError(f"{field} {codec} cannot be had: this worker's ffmpeg has no {encoder}.")


class FfmpegWriter:
    """One ffmpeg that reads raw RGB frames and writes `path`."""

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        *,
        format: str,
        codec: str | None,
        fps: int,
        crf: int,
        metadata: Path | None = None,
    ) -> None:
        """`metadata` is a file in ffmpeg's own format (core/embedding.py). Raises OSError."""
        raw = ["-f", "rawvideo", "-vcodec", "rawvideo", "-s", f"{width}x{height}", "-pix_fmt", "rgb24"]
        command = [_executable(), "-y", *raw, "-r", str(fps), "-i", "-"]
        if metadata is not None:
            command += ["-f", "ffmetadata", "-i", str(metadata), "-map", "0:v", "-map_metadata", "1"]
        if codec is None:
            command += GIF
        else:
            encoder, options = ENCODERS[codec]
            if encoder == "libsvtav1":
                crf = max(crf, 1)  # ffmpeg takes 0 for "not given" there, and the encoder then takes 35
            command += ["-an", "-vcodec", encoder, "-pix_fmt", "yuv420p", "-crf", str(crf), *options]
            command += CONTAINERS[format]
        self._process = subprocess.Popen(
            [*command, "-v", "error", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"SVT_LOG": "1"},  # errors only, as -v error does not tell SVT-AV1
            process_group=0,  # a Ctrl-C at a terminal is the worker's to handle
        )

    def write(self, frame: np.ndarray) -> None:
        """(H, W, 3) uint8. Raises OSError."""
        self._process.stdin.write(frame)

    def finish(self) -> None:
        """Wait for the whole file. Raises OSError."""
        self._process.stdin.close()
        if self._process.wait():
            raise OSError("ffmpeg did not finish the file")

    def stop(self) -> None:
        """End it at once; what there is of the file is worth nothing."""
        self._process.kill()
        self._process.wait()
        with suppress(OSError):  # what it had not read yet
            self._process.stdin.close()


def _executable() -> str:
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "there is no ffmpeg") from None


@functools.cache
def _encoders(executable: str) -> frozenset[str]:
    """The names it lists. Asked once; raises OSError, which is not remembered."""
    try:
        listing = subprocess.run(
            [executable, "-hide_banner", "-encoders"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=PROBE_TIMEOUT_S,
        )
    except subprocess.SubprocessError as error:
        raise OSError("ffmpeg does not run") from error
    lines = listing.stdout.decode("utf-8", "replace").splitlines()
    return frozenset(words[1] for line in lines if len(words := line.split()) > 1)
