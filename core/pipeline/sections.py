"""Which sections a video is made of, and which latent positions each one sees. Pure arithmetic, no torch.

FramePack (arXiv 2504.12626) samples a video section by section of W latent frames. I2V works backwards from
the end ("inverted anti-drifting"), each section seeing the start image and what follows it; F1 works
forwards, each section seeing the start image and what came before.
"""

from dataclasses import dataclass

from core.weights.profiles import Direction

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
    exact_frames: int | None = None  # video frames to keep, from the start; None: all

    @property
    def overlap(self) -> int:
        """Video frames over which two decoded sections are blended, 4W − 3."""
        return frames_of(self.window)

    @property
    def frames(self) -> int:
        """Length of the finished video."""
        frames = frames_of(len(self.sections) * self.window + 1)
        return frames if self.exact_frames is None else self.exact_frames

    def position(self, section: Section) -> int:
        """Its place in the video, from 0: I2V samples the last one first."""
        return section.index if self.direction == "f1" else len(self.sections) - 1 - section.index

    @property
    def middles_s(self) -> list[float]:
        """The second at the middle of each section, in the video's order.

        Frame 0 is the start image; the section at place k makes the frames 4Wk + 1 … 4W(k + 1).
        """
        stride = self.window * TEMPORAL_COMPRESSION
        return [(1 + stride * (k + 0.5)) / FPS for k in range(len(self.sections))]


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


def plan_sections(seconds: float, window: int, direction: Direction, exact: bool = False) -> SectionPlan:
    """The sections of a video of about `seconds`, in the order they are sampled.

    Where `exact`, there are enough for `seconds` and the plan says how many frames of them to keep.
    """
    count = section_count(seconds, window)
    exact_frames = round(seconds * FPS) if exact else None
    if exact_frames is not None and frames_of(count * window + 1) < exact_frames:
        count += 1  # the count was rounded down, by half a section at most
    if direction == "f1":
        sections = [_forward_section(index, window) for index in range(count)]
    else:
        sections = [_inverted_section(index, pad, window) for index, pad in enumerate(paddings(count))]
    return SectionPlan(direction, window, tuple(sections), exact_frames)


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
