"""A single picture: one latent frame, sampled at a chosen position with images at chosen positions.

Positions and empty history are musubi-tuner's (`--one_frame_inference`), of which the files `*one_frame*` in
tests/golden are: for a window W the input image at `control_index`, the reference at `end_index`, an empty
frame at W + 1, and empty 2× and 4× history from W + 2 and W + 4 on; the latter three may be left out.
"""

from collections.abc import Iterator

import torch

from core.one_frame import as_used, sees_reference
from core.pipeline.caching import step_caches
from core.pipeline.conditioning import Conditioning
from core.pipeline.models import Models
from core.pipeline.sampling import OnStep, SampledSection, pack, sample_latents
from core.pipeline.sections import HISTORY, Section, SectionPlan
from core.request import VideoRequest
from core.timing import JobTimer
from core.weights.profiles import Direction
from diffusers_helper.transformer import PackedHistory


def plan_one_frame(request: VideoRequest, direction: Direction) -> SectionPlan:
    """One section of one latent frame, which is one frame of pixels. The same for both directions."""
    one = as_used(request)
    post = request.latent_window_size + 1
    _, half, quarter = HISTORY
    section = Section(
        index=0,
        latents=(one.target_index,),
        clean=(
            one.control_index,
            *([one.end_index] if sees_reference(request) else []),
            *([] if one.no_post else [post]),
        ),
        history_2x=() if one.no_2x else tuple(range(post + 1, post + 1 + half)),
        history_4x=() if one.no_4x else tuple(range(post + 1 + half, post + 1 + half + quarter)),
        adds_start=False,
        decode_frames=1,
    )
    return SectionPlan(direction, 1, (section,), exact_frames=1)


def sample_one_frame(
    models: Models,
    plan: SectionPlan,
    conditioning: Conditioning,
    request: VideoRequest,
    seed: int,
    timer: JobTimer,
    on_step: OnStep,
    preserved_gb: float,
) -> Iterator[SampledSection]:
    """The only section of `plan_one_frame`, as `sample_sections` gives a video's; parameters as there."""
    new_cache = step_caches(request, models.direction, models.magnitudes)
    (section,) = plan.sections
    seen = conditioning.of(section)
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(seen.start_latent.shape, generator=generator)
    images = [seen.start_latent, *([] if conditioning.end_latent is None else [conditioning.end_latent])]
    packed = _pack(section, images, models)
    timer.start_section()
    with timer.section_span("sample"), models.on_device("transformer", preserved_gb=preserved_gb):
        latents = sample_latents(
            models, noise, packed, seen, request, section, timer, on_step, new_cache
        ).cpu()
    yield SampledSection(section, latents, latents, generator.get_state())


def _pack(section: Section, images: list[torch.Tensor], models: Models) -> PackedHistory:
    """The images' latents, and zeros for all other positions that the section sees."""

    def padded(latents: list[torch.Tensor], positions: tuple[int, ...]) -> torch.Tensor | None:
        if not positions:
            return None
        batch, channels, _, *size = images[0].shape
        zeros = torch.zeros(batch, channels, len(positions) - len(latents), *size)
        return torch.cat([*latents, zeros], dim=2)

    clean, history_2x = padded(images, section.clean), padded([], section.history_2x)
    return pack(section, clean, history_2x, padded([], section.history_4x), models)
