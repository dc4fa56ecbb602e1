"""From a whole clip's latents to one section as the sampler will meet it: its target and its history.

The sections and the packing are the worker's own (`core.pipeline`), so that what is trained is what is run.
"""

import random
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Literal

import torch

from core.pipeline.sampling import pack_history
from core.pipeline.sections import HISTORY_FRAMES, Section, SectionPlan, frames_of, plan_sections
from core.weights.profiles import Direction
from diffusers_helper.transformer import PackedHistory

WINDOW = 9
SECTIONS = 4
CLIP_FRAMES = frames_of(1 + SECTIONS * WINDOW)  # 145
SHORT_FRAMES = frames_of(1 + WINDOW)  # 37

# what a clip is: the whole of a video of one section, of one of four, or a part from the midst of a long one
Part = Literal["short", "whole", "late"]
PARTS: tuple[Part, ...] = ("short", "whole", "late")
PART_SHARES = (0.15, 0.75, 0.1)  # of the batches that are encoded, and of those that are trained on

F1_SHARE = 0.3  # of the samples
FIRST_SHARE = 0.5  # at least, of I2V's: the section sampled first, which knows the start image alone
LENGTHS = (0.25, 0.25, 0.5)  # how often a whole clip serves as a video of two, three and four sections


@cache
def training_plan(direction: Direction) -> SectionPlan:
    """Four sections: with I2V one for each padding from 3 to 0."""
    return plan_sections(CLIP_FRAMES / 30, WINDOW, direction)


@dataclass(frozen=True)
class Cut:
    """Which part of a clip is to be sampled, and how much of the clip the sampler has by then."""

    direction: Direction
    section: Section
    window: int  # of the clip's four
    known: int  # sections behind the window in sampling order

    @property
    def is_far(self) -> bool:
        """Whether the start image is all that is known, and not next to the window."""
        return self.direction == "i2v" and self.window > 0 and self.known == 0

    @classmethod
    def draw(cls, rng: random.Random, part: Part) -> "Cut":
        """A section of the videos that such a clip may be of."""
        direction: Direction = "f1" if rng.random() < F1_SHARE else "i2v"
        sections = training_plan(direction).sections
        last = SECTIONS - 1
        if part == "late" and direction == "f1":
            return cls(direction, sections[last], last, last)
        if part == "late":  # padding 2, as often as a long video has it
            window = rng.randrange(last)
            return cls(direction, sections[1], window, last - window)
        count = 1 if part == "short" else rng.choices(range(2, SECTIONS + 1), LENGTHS)[0]
        at = rng.randrange(count)  # in the video's order
        if direction == "i2v" and rng.random() < FIRST_SHARE:
            at = count - 1
        if direction == "f1":
            return cls(direction, sections[at], at, at)
        return cls(direction, sections[last - at], at, count - 1 - at)


def cut_section(
    latents: torch.Tensor, cut: Cut, dtype: torch.dtype, history_noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, PackedHistory]:
    """The latents (B, 16, 9, h, w) of the window of a clip (B, 16, T, h, w), and the history it sees.

    With I2V the history is what follows in the video, with F1 what comes before. `history_noise`
    (B, 1, 1, 1, 1) is the spread of noise that is added to the history, not to the start.
    """
    start = latents[:, :, :1]
    first = 1 + cut.window * WINDOW
    if cut.direction == "i2v":
        behind = latents[:, :, first + WINDOW : first + (1 + cut.known) * WINDOW]
    else:
        behind = latents[:, :, first - cut.known * WINDOW : first]
    target = latents[:, :, first : first + WINDOW]
    if history_noise is not None:
        behind = behind + history_noise * torch.randn_like(behind)
    empty = torch.zeros_like(start).expand(-1, -1, HISTORY_FRAMES, -1, -1)
    if cut.direction == "i2v":
        history = torch.cat([behind, empty], dim=2)
    else:
        history = torch.cat([empty, start, behind], dim=2)
    where = SimpleNamespace(device=latents.device, transformer_dtype=dtype)
    packed = pack_history(cut.section, start, history, cut.direction == "f1", where)
    return target, replace(packed, **_indices(cut.section, latents.device))


@cache
def _indices(section: Section, device: torch.device) -> dict[str, torch.Tensor]:
    """The section's positions on the device, where a compiled model wants them."""
    return {
        "indices_latents": torch.tensor(section.latents, device=device),
        "indices_latents_clean": torch.tensor(section.clean, device=device),
        "indices_latents_history_2x": torch.tensor(section.history_2x, device=device),
        "indices_latents_history_4x": torch.tensor(section.history_4x, device=device),
    }
