"""A given video and its new part, as one stream of frames or the new part alone.

Forward the video comes first, else the new part. What lies in the overlap is in the new part's clips, where
it is blended already; the rest of the video is decoded from its file as it is wanted.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import torch

from diffusers_helper.blending import frames_between

if TYPE_CHECKING:
    from core.input_video import SourceVideo


def joined(
    clips: Iterable[torch.Tensor],
    source: "SourceVideo",
    new_frames: int,
    kept: int,
    include_source: bool,
    check_cancelled: Callable[[], None],
) -> Iterator[torch.Tensor]:
    """uint8 clips (1, 3, T, H, W) of the whole, or without `source`.

    `clips` are the overlap and `new_frames` frames, of which those `kept` stay that are nearest to the video.
    """
    length, overlap = source.join.frames, source.join.overlap
    if source.join.forward:
        before = source.clips(0, length - overlap, check_cancelled) if include_source else ()
        skipped = 0 if include_source else overlap
        there = length if include_source else overlap
        return frames_between(chain(before, clips), skipped, there + kept)
    after = source.clips(overlap, length, check_cancelled) if include_source else ()
    end = new_frames + (length if include_source else 0)
    return frames_between(chain(clips, after), new_frames - kept, end)
