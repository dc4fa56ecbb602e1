"""Join decoded sections into one video, in either direction, keeping only the open edge in full precision."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

# takes a finished clip, (1, 3, T, H, W) uint8, and returns what gives it back, as often as it is called
Hold = Callable[[torch.Tensor], Callable[[], torch.Tensor]]


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in −1…1 → uint8 0…255 (clamped, then truncated as the official writer does)."""
    return (torch.clamp(pixels.float(), -1.0, 1.0) * 127.5 + 127.5).to(torch.uint8)


def crossfade(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Blend two overlapping clips (1, 3, T, H, W): linear from all `before` to all `after` over T frames."""
    weights = torch.linspace(1, 0, before.shape[2], dtype=before.dtype).view(1, 1, -1, 1, 1)
    return weights * before + (1 - weights) * after


def from_uint8(frames: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """(T, H, W, 3) uint8 → pixels (1, 3, T, H, W) in −1…1 that `to_uint8` takes back to what they were."""
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None]
    return ((pixels.float() + 0.5) / 127.5 - 1).to(dtype)  # the middle of each level, as it truncates


def frames_between(clips: Iterable[torch.Tensor], start: int, stop: int) -> Iterator[torch.Tensor]:
    """Of consecutive clips (1, 3, T, H, W) the frames from `start` to before `stop`."""
    place = 0
    for clip in clips:
        kept = clip[:, :, max(start - place, 0) : stop - place]
        if kept.shape[2]:
            yield kept
        place += clip.shape[2]
        if place >= stop:
            return


class SectionJoiner:
    """Collects sections and hands the video out as uint8.

    Only the `overlap` frames at the growing end can still change; the rest is kept as bytes, a quarter of
    float32, by `hold`: without one in memory, 3·H·W bytes a frame. `edge`, (1, 3, T, H, W) of any length, is
    the end of a video that there is already, which the first section is blended with.
    """

    def __init__(
        self, overlap: int, hold: Hold = lambda clip: lambda: clip, edge: torch.Tensor | None = None
    ) -> None:
        self.overlap = overlap
        self._hold = hold
        self._closed: deque[Callable[[], torch.Tensor]] = deque()
        self._edge = edge

    def append(self, pixels: torch.Tensor) -> None:
        """Add the next section (1, 3, T, H, W) on a CPU at the end; its first frames fade in."""
        if self._edge is not None:
            overlap = self._edge.shape[2]
            blended = crossfade(self._edge, pixels[:, :, :overlap])
            pixels = torch.cat([blended, pixels[:, :, overlap:]], dim=2)
        self._edge = pixels[:, :, -self.overlap :].clone()
        self._closed.append(self._hold(to_uint8(pixels[:, :, : -self.overlap])))

    def prepend(self, pixels: torch.Tensor) -> None:
        """Add the section that comes before all the others; its last frames fade out."""
        if self._edge is not None:
            overlap = self._edge.shape[2]
            blended = crossfade(pixels[:, :, -overlap:], self._edge)
            pixels = torch.cat([pixels[:, :, :-overlap], blended], dim=2)
        self._edge = pixels[:, :, : self.overlap].clone()
        self._closed.appendleft(self._hold(to_uint8(pixels[:, :, self.overlap :])))

    def clips(self, *, prepended: bool) -> Iterator[torch.Tensor]:
        """The whole video as consecutive uint8 clips (1, 3, T, H, W)."""
        edge = to_uint8(self._edge)
        for clip in [lambda: edge, *self._closed] if prepended else [*self._closed, lambda: edge]:
            if (frames := clip()).shape[2]:
                yield frames
