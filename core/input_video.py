"""base64, data URI or URL → the frames of a stranger's video: at 30 fps, at the job's size, one by one.

Bounds: the file's bytes, a frame's pixels, the number of frames, and the time that decoding may take. No
more than a few frames are in memory at any time, but for those that the model is to see.
"""

import logging
import math
import re
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from einops import rearrange

from core.errors import VideoError, VideoTooLargeError
from core.extension import MAX_BYTES
from core.ffmpeg_reader import MAX_PIXELS, DecodingError, FfmpegReader
from core.images import Fetch, check_shape, read_input
from core.pipeline.sections import FPS, Join
from diffusers_helper.buckets import covering_size

log = logging.getLogger(__name__)

MAX_SECONDS = 60
MAX_FRAMES = MAX_SECONDS * FPS
DECODE_S = 180.0  # spent waiting for frames, until it is known what the model sees
CLIP_FRAMES = 8  # handed on at once
PPM_HEADER = re.compile(rb"P6\n(\d{1,5}) (\d{1,5})\n255\n")
PPM_LONGEST = len(b"P6\n99999 99999\n255\n")

Check = Callable[[], None]


class InputVideo:
    """A video that can be gone through any number of times. Its file has no name, and goes with this object.

    `first_frame` is (H, W, 3) uint8, upright, of the file's own size.
    """

    def __init__(self, data: bytes, check: Check = lambda: None) -> None:
        """`data` is the file, of which the first frame is decoded; `check` is called while ffmpeg is waited
        for, here as later, and may raise to stop.

        Raises VideoError or VideoTooLargeError with a sentence for the caller, as does what decodes later.
        """
        self._demuxer = _demuxer(data)
        self._file = tempfile.TemporaryFile(prefix="framepack-")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._file.write(data)
        self._file.flush()
        self.first_frame = self._first_frame(check)
        check_shape(*self.first_frame.shape[:2], "input video", VideoError)

    def frames(
        self, height: int, width: int, check: Check = lambda: None, timeout_s: float | None = None
    ) -> Iterator[np.ndarray]:
        """All frames at 30 fps, (height, width, 3) uint8 each: resized to cover that, then the centre.

        More than `timeout_s` (DECODE_S) spent waiting for them are a VideoTooLargeError.
        """
        down, across = covering_size(*self.first_frame.shape[:2], height, width)
        filters = (
            f"scale={across}:{down}:flags=lanczos+accurate_rnd,format=rgb24,crop={width}:{height}",
            # last: for a gap in time ffmpeg has all its frames at once, which are then references to one
            f"fps={FPS},trim=end_frame={MAX_FRAMES + 1}",
        )
        output = ("-vf", ",".join(filters), *_AS_RGB, "-f", "rawvideo")
        with self._decoding(output, check, DECODE_S if timeout_s is None else timeout_s) as reader:
            for count in range(MAX_FRAMES + 1):
                frame = np.empty((height, width, 3), np.uint8)
                if not _filled(reader, frame):
                    return
                if count == MAX_FRAMES:
                    raise VideoTooLargeError(f"The input video is longer than {MAX_SECONDS} seconds.")
                yield frame

    def _first_frame(self, check: Check) -> np.ndarray:
        """As a PPM, which says how large it is. What a file says of itself before is only its word."""
        output = ("-frames:v", "1", *_AS_RGB, "-c:v", "ppm", "-f", "image2pipe")
        with self._decoding(output, check, DECODE_S) as reader:
            head = bytearray(PPM_LONGEST)
            count = reader.read_into(memoryview(head))
            if not (size := PPM_HEADER.match(head[:count])):
                raise VideoError("The input video has no frames.")
            width, height = map(int, size.groups())
            frame = np.empty((height, width, 3), np.uint8)
            begun = head[size.end() : count]
            pixels = memoryview(frame.reshape(-1))
            pixels[: len(begun)] = begun
            if reader.read_into(pixels[len(begun) :]) < len(pixels) - len(begun):
                raise VideoError(_DAMAGED)
            return frame

    @contextmanager
    def _decoding(self, output: tuple[str, ...], check: Check, timeout_s: float) -> Iterator[FfmpegReader]:
        """ffmpeg at work, and its failures as what the caller is told."""
        reader = FfmpegReader(self._file, self._demuxer, output, check, timeout_s)
        try:
            yield reader
        except DecodingError as error:
            log.info("the input video was not decoded: %s", error)
            raise _told(str(error)) from None
        except TimeoutError:
            raise VideoTooLargeError(f"The input video takes over {timeout_s:g} s to decode.") from None
        finally:
            reader.stop()


@dataclass(frozen=True)
class SourceVideo:
    """The input video as one job uses it."""

    video: InputVideo
    height: int
    width: int
    join: Join
    seen: np.ndarray  # (T, height, width, 3) uint8: the frames nearest to the join, which the model sees

    @property
    def at_the_join(self) -> np.ndarray:
        """The frame that is gone on from, (height, width, 3) uint8."""
        return self.seen[-1 if self.join.forward else 0]

    @property
    def blended(self) -> np.ndarray:
        """The frames over which source and new part are blended, (T, height, width, 3) uint8."""
        return self.seen[-self.join.overlap :] if self.join.forward else self.seen[: self.join.overlap]

    def clips(self, start: int, stop: int, check: Check = lambda: None) -> Iterator[torch.Tensor]:
        """The frames from `start` to before `stop`, decoded again, as uint8 clips (1, 3, T, H, W).

        However long that takes: the new part is not lost to a machine that is slower now.
        """
        if start >= stop:
            return
        frames = islice(self.video.frames(self.height, self.width, check, math.inf), start, stop)
        count = 0
        while some := list(islice(frames, CLIP_FRAMES)):
            count += len(some)
            yield torch.from_numpy(rearrange(np.stack(some), "t h w c -> 1 c t h w"))
        if count < stop - start:
            raise VideoError(_DAMAGED)

    def told(self) -> dict[str, Any]:
        """What the reply says of it."""
        height, width = self.video.first_frame.shape[:2]
        return {
            "width": width,
            "height": height,
            "frames": self.join.frames,
            "duration_s": round(self.join.frames / FPS, 3),
            "seen_frames": len(self.seen),
            "blended_frames": self.join.overlap,
        }


def open_video(
    text: str, fetch: Fetch, on_file: Callable[[bytes], None] = lambda data: None, check: Check = lambda: None
) -> InputVideo:
    """The request's video; `on_file` is shown its file. Raises as InputVideo does, or what `fetch` raises."""
    data = read_input(text, fetch, "input video", MAX_BYTES, VideoError, VideoTooLargeError)
    on_file(data)
    return InputVideo(data, check)


def fit_video(
    video: InputVideo, height: int, width: int, window: int, forward: bool, check: Check = lambda: None
) -> SourceVideo:
    """Go through `video` at the job's size, and keep what the model sees of it. Raises as InputVideo does."""
    longest = Join.most_seen(window)
    seen: deque[np.ndarray] = deque(maxlen=longest if forward else None)
    frames = 0
    for frame in video.frames(height, width, check):
        frames += 1
        if forward or frames <= longest:
            seen.append(frame)
    join = Join(forward, window, frames)
    if frames < Join.FEWEST:
        raise VideoError(
            f"The input video is too short: {frames} frames at {FPS} per second; it must have {Join.FEWEST}."
        )
    kept = list(seen)
    kept = kept[-join.seen :] if forward else kept[: join.seen]
    return SourceVideo(video, height, width, join, np.stack(kept))


_AS_RGB = ("-pix_fmt", "rgb24", "-fps_mode", "passthrough")  # else a late start would be filled with frames
_DAMAGED = "The input video is damaged or cut short."


def _filled(reader: FfmpegReader, frame: np.ndarray) -> bool:
    """Whether there was another frame. Raises VideoError for a part of one."""
    count = reader.read_into(memoryview(frame.reshape(-1)))
    if 0 < count < frame.nbytes:
        raise VideoError(_DAMAGED)
    return bool(count)


def _demuxer(data: bytes) -> str:
    """ffmpeg's name of what reads such a file; it is not left to guess."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return "mov"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if data.startswith(b"GIF8"):
        return "gif"
    raise VideoError("The input video is not an MP4, MOV, WebM, MKV or GIF.")


def _told(messages: str) -> VideoError:
    """The sentence for what ffmpeg says of a file."""
    if "exceeds specified max pixel count" in messages:
        return VideoTooLargeError(f"The input video's frames have over {MAX_PIXELS / 1e6:.1f} megapixels.")
    if "not on whitelist" in messages and "opening decoder" in messages:  # sound's is not opened, either
        return VideoError("The input video's codec is not H.264, H.265, VP8, VP9, AV1 or GIF.")
    if "matches no streams" in messages:
        return VideoError("The input video has no pictures in it.")
    return VideoError(_DAMAGED)
