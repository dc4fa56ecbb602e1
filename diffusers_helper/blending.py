"""Join decoded sections into one video, in either direction, keeping only the open edge in full precision."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

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


def first_frames(clips: Iterable[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
    """Consecutive clips (1, 3, T, H, W), cut off after `count` frames."""
    for clip in clips:
        if count <= 0:
            return
        yield clip[:, :, :count]
        count -= clip.shape[2]


class SectionJoiner:
    """Collects sections and hands the video out as uint8.

    Only the `overlap` frames at the growing end can still change; the rest is kept as bytes, a quarter of
    float32, by `hold`: without one in memory, 3·H·W bytes a frame.
    """

    def __init__(self, overlap: int, hold: Hold = lambda clip: lambda: clip) -> None:
        self.overlap = overlap
        self._hold = hold
        self._closed: deque[Callable[[], torch.Tensor]] = deque()
        self._edge: torch.Tensor | None = None

    def append(self, pixels: torch.Tensor) -> None:
        """Add the next section (1, 3, T, H, W) on a CPU at the end; its first frames fade in."""
        if self._edge is not None:
            blended = crossfade(self._edge, pixels[:, :, : self.overlap])
            pixels = torch.cat([blended, pixels[:, :, self.overlap :]], dim=2)
        self._edge = pixels[:, :, -self.overlap :].clone()
        self._closed.append(self._hold(to_uint8(pixels[:, :, : -self.overlap])))

    def prepend(self, pixels: torch.Tensor) -> None:
        """Add the section that comes before all the others; its last frames fade out."""
        if self._edge is not None:
            blended = crossfade(pixels[:, :, -self.overlap :], self._edge)
            pixels = torch.cat([pixels[:, :, : -self.overlap], blended], dim=2)
        self._edge = pixels[:, :, : self.overlap].clone()
        self._closed.appendleft(self._hold(to_uint8(pixels[:, :, self.overlap :])))

    def clips(self, *, prepended: bool) -> Iterator[torch.Tensor]:
        """The whole video as consecutive uint8 clips (1, 3, T, H, W)."""
        edge = to_uint8(self._edge)
        for clip in [lambda: edge, *self._closed] if prepended else [*self._closed, lambda: edge]:
            if (frames := clip()).shape[2]:
                yield frames
