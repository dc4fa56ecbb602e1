"""From a whole clip's latents to one section as the sampler will meet it: its target and its history.

The sections and the packing are the worker's own (`core.pipeline`), so that what is trained is what is run.
"""

from dataclasses import replace
from types import SimpleNamespace

import torch

from core.pipeline.profiles import Direction
from core.pipeline.sampling import pack_history
from core.pipeline.sections import HISTORY_FRAMES, Section, SectionPlan, plan_sections
from diffusers_helper.transformer import PackedHistory

WINDOW = 9
SECTIONS = 4
CLIP_LATENTS = 1 + SECTIONS * WINDOW
CLIP_FRAMES = 4 * (CLIP_LATENTS - 1) + 1  # 145


def training_plan(direction: Direction) -> SectionPlan:
    """Four sections: with I2V one for each padding from 3 to 0."""
    return plan_sections(CLIP_FRAMES / 30, WINDOW, direction)


def cut_section(
    latents: torch.Tensor,
    section: Section,
    direction: Direction,
    known: int,
    dtype: torch.dtype,
    history_noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, PackedHistory]:
    """The latents (B, 16, 9, h, w) of `section` of a clip (B, 16, 37, h, w), and the history it sees.

    `known` of the clip's sections lie behind it in sampling order, as far as there are so many: with I2V
    the ones that follow in the video, with F1 the ones before (of which there are just `section.index`).
    `history_noise` (B, 1, 1, 1, 1) is the spread of noise that is added to the history, not to the start.
    """
    start = latents[:, :, :1]
    if direction == "i2v":
        first = 1 + (SECTIONS - 1 - section.index) * WINDOW
        behind = latents[:, :, first + WINDOW : first + (1 + known) * WINDOW]
    else:
        first = 1 + section.index * WINDOW
        behind = latents[:, :, 1:first]
    target = latents[:, :, first : first + WINDOW]
    if history_noise is not None:
        behind = behind + history_noise * torch.randn_like(behind)
    empty = torch.zeros_like(latents[:, :, :1]).expand(-1, -1, HISTORY_FRAMES, -1, -1)
    if direction == "i2v":
        history = torch.cat([behind, empty], dim=2)
    else:
        history = torch.cat([empty, start, behind], dim=2)
    where = SimpleNamespace(device=latents.device, transformer_dtype=dtype)
    packed = pack_history(section, start, history, direction == "f1", where)
    return target, on_device(packed, latents.device)


def on_device(packed: PackedHistory, device: torch.device) -> PackedHistory:
    """With its indices on the device too, where a compiled model wants them."""
    return replace(packed, **{name: value.to(device) for name, value in vars(packed).items()})
