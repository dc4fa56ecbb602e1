"""Which sections a video is made of, and which latent positions each one sees. Pure arithmetic, no torch.

FramePack (arXiv 2504.12626) samples a video section by section of W latent frames. I2V works backwards from
the end ("inverted anti-drifting"), each section seeing the start image and what follows it; F1 works
forwards, each section seeing the start image and what came before.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from core.weights.profiles import Direction

if TYPE_CHECKING:
    from core.request import VideoRequest

FPS = 30
TEMPORAL_COMPRESSION = 4  # video frames per latent frame, after the first
HISTORY = (1, 2, 16)  # latent frames seen at full, half (2×) and quarter (4×) resolution
HISTORY_FRAMES = sum(HISTORY)


@dataclass(frozen=True)
class Section:
    """One section; positions are indices on its own time axis, in latent frames."""

    index: int  # in sampling order, from 0
    latents: tuple[int, ...]
    clean: tuple[int, ...]  # the start image and the nearest history frame; in a picture what it is made with
    history_2x: tuple[int, ...]
    history_4x: tuple[int, ...]
    adds_start: bool  # I2V's last section gets the start latent put before it
    decode_frames: int | None  # newest latent frames to decode; None: all there are


@dataclass(frozen=True)
class SectionPlan:
    direction: Direction
    window: int
    sections: tuple[Section, ...]
    exact_frames: int | None = None  # video frames to keep; None: all
    extends: bool = False  # it goes on from a given video: forward from its end (F1) or back from its start

    @property
    def overlap(self) -> int:
        """Video frames over which two decoded sections are blended, 4W − 3."""
        return frames_of(self.window)

    @property
    def frames(self) -> int:
        """Length of the finished video; of the new part alone where it extends another."""
        return self.frames_with(len(self.sections)) if self.exact_frames is None else self.exact_frames

    def frames_with(self, sections: int) -> int:
        """Length of the first `sections` that were made, nothing cut off."""
        return self._first_frame + TEMPORAL_COMPRESSION * self.window * sections

    @property
    def _first_frame(self) -> int:
        """Place of the first frame that the earliest section's stride of 4W brings.

        Before it is the start image. A new part that a video follows has none, its first latent frame is a
        single frame and not four, and its last frame is the given video's first.
        """
        if not self.extends:
            return 1
        return 0 if self.direction == "f1" else -TEMPORAL_COMPRESSION

    def position(self, section: Section) -> int:
        """Its place in the video, from 0: I2V samples the last one first."""
        return section.index if self.direction == "f1" else len(self.sections) - 1 - section.index

    @property
    def middles_s(self) -> list[float]:
        """The second at the middle of each section, in the video's order.

        Frame 0 is the start image; the section at place k makes the frames 4Wk + 1 … 4W(k + 1). Seconds of a
        part that extends a video are the part's own.
        """
        stride = self.window * TEMPORAL_COMPRESSION
        return [(self._first_frame + stride * (k + 0.5)) / FPS for k in range(len(self.sections))]


@dataclass(frozen=True)
class Join:
    """Where a given video of `frames` frames meets what is made: at its end if `forward`, or at its start.

    The model sees the video as latents of the frames nearest to the join, as far as its history reaches, or
    one section, which is decoded again beside the new ones and blended with the video's own pixels.
    """

    FEWEST: ClassVar[int] = 1 + TEMPORAL_COMPRESSION  # frames: two latent frames, the first of one frame

    forward: bool
    window: int
    frames: int

    @classmethod
    def most_seen(cls, window: int) -> int:
        """Frames that are encoded of a long video."""
        return frames_of(_most_latents(window) + 1)

    @property
    def seen(self) -> int:
        """Frames that are encoded: one, and four for each latent frame after the first."""
        return min(
            (self.frames - 1) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION + 1, self.most_seen(self.window)
        )

    @property
    def latents(self) -> slice:
        """Which of the encoded latent frames are history.

        The first stands for one frame, as an image's does, and all others for four. Forward it is the far end
        of a short video, where F1's history has the start image; backward it would lie next to the new part,
        in the midst of the history, so that it is left out and the part's last frame takes its place.
        """
        return slice(0 if self.forward and self._encoded <= _most_latents(self.window) else 1, None)

    @property
    def overlap(self) -> int:
        """Frames of the video that are decoded again with the first section sampled, and blended."""
        near = min(self._encoded - (self.latents.start or 0), self.window)
        return frames_of(near if self.forward else near + 1)

    @property
    def _encoded(self) -> int:
        return (self.seen - 1) // TEMPORAL_COMPRESSION + 1


def _most_latents(window: int) -> int:
    """Latent frames of a given video that a section sees or decodes."""
    return max(HISTORY_FRAMES, window)


def frames_of(latent_frames: int) -> int:
    """Video frames the VAE makes of so many latent frames."""
    return TEMPORAL_COMPRESSION * (latent_frames - 1) + 1


def section_count(seconds: float, window: int) -> int:
    return max(1, round(seconds * FPS / (window * TEMPORAL_COMPRESSION)))


def paddings(count: int) -> list[int]:
    """How many sections lie between each I2V section and the start, in sampling order.

    From 5 sections on the middle ones all claim to be two away: the official choice, which looks better
    than distances the model was not trained on.
    """
    if count > 4:
        return [3] + [2] * (count - 3) + [1, 0]
    return list(range(count - 1, -1, -1))


def plan_sections(
    seconds: float, window: int, direction: Direction, exact: bool = False, extends: bool = False
) -> SectionPlan:
    """The sections of a video of about `seconds`, in the order they are sampled.

    Where `exact`, there are enough for `seconds` and the plan says how many frames of them to keep. Where it
    `extends` a given video, that is no part of the `seconds`.
    """
    count = section_count(seconds, window)
    plan = _plan(count, window, direction, extends)
    if not exact:
        return plan
    exact_frames = round(seconds * FPS)
    while plan.frames < exact_frames:  # the count was rounded down, by half a section and a frame or so
        count += 1
        plan = _plan(count, window, direction, extends)
    return replace(plan, exact_frames=exact_frames)


def plan_video(request: "VideoRequest", direction: Direction) -> SectionPlan:
    """The sections of the video that is asked for."""
    return plan_sections(
        request.total_second_length,
        request.latent_window_size,
        direction,
        request.exact_length,
        extends=request.input_video is not None,
    )


def _plan(count: int, window: int, direction: Direction, extends: bool) -> SectionPlan:
    if direction == "f1":
        sections = [_forward_section(index, window) for index in range(count)]
    elif extends:
        # A longer video's last ones: what comes before a video has no picture that it starts with, so the
        # model is never told that the start image is near, or next.
        far = paddings(count + 2)[:count]
        sections = [_inverted_section(index, pad, window) for index, pad in enumerate(far)]
    else:
        sections = [_inverted_section(index, pad, window) for index, pad in enumerate(paddings(count))]
    if extends:  # each is decoded with what is next to it, the first one with the given video
        sections = [replace(section, decode_frames=2 * window) for section in sections]
    return SectionPlan(direction, window, tuple(sections), extends=extends)


def _inverted_section(index: int, padding: int, window: int) -> Section:
    """start | blank (padding sections) | section | clean history | 2× | 4×"""
    start, _, latents, clean, history_2x, history_4x = _split(1, padding * window, window, *HISTORY)
    ends_at_start = padding == 0
    return Section(
        index=index,
        latents=latents,
        clean=(*start, *clean),
        history_2x=history_2x,
        history_4x=history_4x,
        adds_start=ends_at_start,
        decode_frames=None if index == 0 else 2 * window + ends_at_start,
    )


def _forward_section(index: int, window: int) -> Section:
    """start | 4× | 2× | clean history | section"""
    start, history_4x, history_2x, clean, latents = _split(1, *reversed(HISTORY), window)
    return Section(
        index=index,
        latents=latents,
        clean=(*start, *clean),
        history_2x=history_2x,
        history_4x=history_4x,
        adds_start=False,
        decode_frames=None if index == 0 else 2 * window,
    )


def _split(*lengths: int) -> list[tuple[int, ...]]:
    """0, 1, 2, … cut into consecutive runs of these lengths."""
    runs, position = [], 0
    for length in lengths:
        runs.append(tuple(range(position, position + length)))
        position += length
    return runs
