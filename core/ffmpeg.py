"""ffmpeg as a process that is fed with frames: which encoders it has, how each is asked, and how it ends."""

import errno
import functools
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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
# A GIF takes two passes with one palette for all frames: one for each takes ffmpeg longer, and one for all in
# a single pass holds every frame in memory until the last is known. Before both, colours are rounded to 6
# bits a channel, or grain would make millions of them, each of which is counted and looked up by itself.
# Ordered dithering stands still where the picture does.
PALETTE_SIDE = 16
PALETTE_BYTES = PALETTE_SIDE**2 * 4  # RGBA
ROUND_COLOURS = "lutrgb=" + ":".join(f"{channel}=round(round(val*63/255)*255/63)" for channel in "rgb")
FIND_PALETTE = ("-vf", f"{ROUND_COLOURS},palettegen", "-f", "rawvideo", "-pix_fmt", "rgba")
USE_PALETTE = ("-filter_complex", f"[0:v]{ROUND_COLOURS}[v];[v][1:v]paletteuse=dither=bayer:bayer_scale=3")


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
        found = encoders(executable())
    except OSError as error:
        raise VideoEncodingError(f"The video could not be encoded: {error.strerror or error}.") from error
    except subprocess.SubprocessError as error:
        raise VideoEncodingError("The video could not be encoded: ffmpeg does not run.") from error
    if encoder not in found:
        field = "`format`" if format == "gif" else "`codec`"
        raise RequestError(f"{field} {codec} cannot be had: this worker's ffmpeg has no {encoder}.")


class _Ffmpeg:
    """One ffmpeg that reads raw RGB frames."""

    def __init__(self, width: int, height: int, fps: int, arguments: Sequence[str], **process: Any) -> None:
        """`arguments` say what becomes of the frames, `process` is for Popen. Raises OSError."""
        frames = (*_raw_input("rgb24", width, height), "-r", str(fps), "-i", "-")
        self._process = subprocess.Popen(
            [executable(), "-y", *frames, *arguments],
            stdin=subprocess.PIPE,
            env=os.environ | {"SVT_LOG": "1"},  # errors only, as -v error does not tell SVT-AV1
            process_group=0,  # a Ctrl-C at a terminal is the worker's to handle
            **{"stdout": subprocess.DEVNULL} | process,
        )

    def write(self, frame: np.ndarray) -> None:
        """(H, W, 3) uint8. Raises OSError."""
        self._process.stdin.write(frame)

    def finish(self) -> None:
        """Wait until all is written. Raises OSError."""
        self._process.stdin.close()
        if self._process.wait():
            raise OSError("ffmpeg did not finish the file")

    def stop(self) -> None:
        """End it at once; what it has written is worth nothing."""
        self._process.kill()
        self._process.wait()
        with suppress(OSError):  # what it had not read yet
            self._process.stdin.close()


class PaletteFinder(_Ffmpeg):
    """Sees all frames of a GIF and then has the 256 colours that suit them best, one of them transparent."""

    def __init__(self, width: int, height: int) -> None:
        """Raises OSError."""
        arguments = (*FIND_PALETTE, "-v", "error", "pipe:1")
        super().__init__(width, height, 1, arguments, stdout=subprocess.PIPE)
        self.palette = b""  # RGBA, once finished

    def finish(self) -> None:
        """Raises OSError."""
        self._process.stdin.close()
        with self._process.stdout as pipe:
            self.palette = pipe.read()
        super().finish()
        if len(self.palette) != PALETTE_BYTES:
            raise OSError("ffmpeg found no palette")

    def stop(self) -> None:
        super().stop()
        self._process.stdout.close()


class FfmpegWriter(_Ffmpeg):
    """Writes the frames to `path`."""

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
        palette: bytes = b"",
    ) -> None:
        """`metadata` is a file in ffmpeg's own format (core/embedding.py), `palette` is for a GIF.

        Raises OSError.
        """
        end = ("-v", "error", str(path))
        if codec is None:
            with _readable(palette) as pipe:
                colours = (*_raw_input("rgba", PALETTE_SIDE, PALETTE_SIDE), "-i", f"pipe:{pipe}")
                super().__init__(width, height, fps, (*colours, *USE_PALETTE, *end), pass_fds=[pipe])
            return
        arguments = []
        if metadata is not None:
            arguments += ["-f", "ffmetadata", "-i", str(metadata), "-map", "0:v", "-map_metadata", "1"]
        encoder, options = ENCODERS[codec]
        if encoder == "libsvtav1":
            crf = max(crf, 1)  # ffmpeg takes 0 for "not given" there, and the encoder then takes 35
        arguments += ["-an", "-vcodec", encoder, "-pix_fmt", "yuv420p", "-crf", str(crf), *options]
        super().__init__(width, height, fps, (*arguments, *CONTAINERS[format], *end))


def _raw_input(pixels: str, width: int, height: int) -> tuple[str, ...]:
    return "-f", "rawvideo", "-vcodec", "rawvideo", "-s", f"{width}x{height}", "-pix_fmt", pixels


@contextmanager
def _readable(data: bytes) -> Iterator[int]:
    """A descriptor to read `data` from, which must fit into a pipe (4 kB at least). Raises OSError."""
    reader, writer = os.pipe()
    try:
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(data)
        yield reader
    finally:
        os.close(reader)


def executable() -> str:
    """Raises FileNotFoundError where there is none."""
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "there is no ffmpeg") from None


@functools.cache
def encoders(executable: str) -> frozenset[str]:
    """The names it lists. Asked once; raises OSError and SubprocessError, which are not remembered."""
    listing = subprocess.run(
        [executable, "-hide_banner", "-encoders"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=PROBE_TIMEOUT_S,
    )
    lines = listing.stdout.decode("utf-8", "replace").splitlines()
    return frozenset(words[1] for line in lines if len(words := line.split()) > 1)
