"""The section loop: samples each section's latents from the history, and owns that history."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from core.pipeline.conditioning import Conditioning
from core.pipeline.models import Models
from core.pipeline.sections import HISTORY, HISTORY_FRAMES, Section, SectionPlan
from core.request import VideoRequest
from core.timing import JobTimer
from diffusers_helper.guidance import guided_velocity
from diffusers_helper.schedule import flow_shift_mu, shifted_sigmas
from diffusers_helper.teacache import TeaCache
from diffusers_helper.text import PromptEmbeds
from diffusers_helper.transformer import PackedHistory
from diffusers_helper.unipc import sample_unipc

TIMESTEPS = 1000.0  # the model's timestep is sigma · 1000, its guidance embedding likewise

# called after each step, 1 … steps, with its x0-prediction; may raise to stop
OnStep = Callable[[Section, int, torch.Tensor], None]


@dataclass(frozen=True)
class SampledSection:
    section: Section
    latents: torch.Tensor  # (1, 16, W, H/8, W/8), float32 on the CPU: what the sampler returned
    to_decode: torch.Tensor  # the newest latent frames, in the video's order


def sample_sections(
    models: Models,
    plan: SectionPlan,
    conditioning: Conditioning,
    request: VideoRequest,
    seed: int,
    timer: JobTimer,
    on_step: OnStep,
    preserved_gb: float,
) -> Iterator[SampledSection]:
    """Sample the plan's sections in order. All noise comes from one CPU generator seeded with `seed`.

    An I2V video may have an end image: its latent is the history that the first section sampled, the video's
    end, would else find empty. It is no part of the video.

    In swap mode `preserved_gb` of GPU memory are kept free of the transformer's weights.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    start = conditioning.start_latent
    _, channels, _, height, width = start.shape
    history = torch.zeros(1, channels, HISTORY_FRAMES, height, width)
    forward = plan.direction == "f1"
    if forward:
        history = torch.cat([history, start], dim=2)
    elif conditioning.end_latent is not None:
        history[:, :, :1] = conditioning.end_latent

    for section in plan.sections:
        timer.start_section()
        noise = torch.randn(1, channels, plan.window, height, width, generator=generator)
        packed = pack_history(section, start, history, forward, models)
        with (
            timer.section_span("sample"),
            models.on_device("transformer", preserved_gb=preserved_gb),
        ):
            latents = _sample(models, noise, packed, conditioning, request, section, timer, on_step).cpu()

        new = torch.cat([start, latents], dim=2) if section.adds_start else latents
        if forward:
            history = torch.cat([history, new], dim=2)
            real = history[:, :, HISTORY_FRAMES:]
            to_decode = real if section.decode_frames is None else real[:, :, -section.decode_frames :]
        else:
            history = torch.cat([new, history], dim=2)
            if section.index == 0 and request.end_image_mode == "embedding":
                history[:, :, -HISTORY_FRAMES] = 0  # the end image was for this section only
            real = history[:, :, :-HISTORY_FRAMES]
            to_decode = real[:, :, : section.decode_frames]
        yield SampledSection(section, latents, to_decode)


def pack_history(
    section: Section, start: torch.Tensor, history: torch.Tensor, forward: bool, models: Models
) -> PackedHistory:
    """The start latent and the history frames nearest to the section, on the model's device and dtype."""
    if forward:
        history_4x, history_2x, nearest = history[:, :, -HISTORY_FRAMES:].split(HISTORY[::-1], dim=2)
    else:
        nearest, history_2x, history_4x = history[:, :, :HISTORY_FRAMES].split(HISTORY, dim=2)
    target = models.device, models.transformer_dtype

    def positions(indices: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(indices)

    return PackedHistory(
        indices_latents=positions(section.latents),
        latents_clean=torch.cat([start, nearest], dim=2).to(*target),
        indices_latents_clean=positions(section.clean),
        latents_history_2x=history_2x.to(*target),
        indices_latents_history_2x=positions(section.history_2x),
        latents_history_4x=history_4x.to(*target),
        indices_latents_history_4x=positions(section.history_4x),
    )


@torch.inference_mode()
def _sample(
    models: Models,
    noise: torch.Tensor,
    packed: PackedHistory,
    conditioning: Conditioning,
    request: VideoRequest,
    section: Section,
    timer: JobTimer,
    on_step: OnStep,
) -> torch.Tensor:
    device, dtype = models.device, models.transformer_dtype
    _, _, frames, height, width = noise.shape
    p = models.transformer.config.patch_size
    mu = flow_shift_mu(frames * (height // p) * (width // p))
    sigmas = shifted_sigmas(request.steps, mu)
    guidance = torch.tensor([request.gs * TIMESTEPS], device=device).to(dtype)

    guided = request.cfg != 1
    positive_cache = TeaCache(request.steps) if request.use_teacache else None
    negative_cache = TeaCache(request.steps) if request.use_teacache and guided else None

    def velocity(x: torch.Tensor, sigma: float, prompt: PromptEmbeds, cache: TeaCache | None) -> torch.Tensor:
        return models.transformer(
            hidden_states=x,
            timestep=torch.tensor([sigma * TIMESTEPS], device=device).to(dtype),
            guidance=guidance,
            encoder_hidden_states=prompt.encoder_hidden_states,
            encoder_attention_mask=prompt.encoder_attention_mask,
            pooled_projections=prompt.pooled_projections,
            image_embeds=conditioning.image_embeds,
            history=packed,
            cache=cache,
        ).float()

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        x = x.to(dtype)  # the official wrapper rounds x first and takes x0 from the rounded x
        v = velocity(x, sigma, conditioning.positive, positive_cache)
        if guided:
            negative = velocity(x, sigma, conditioning.negative, negative_cache)
            v = guided_velocity(v, negative, request.cfg, request.rs)
        return x.float() - sigma * v

    def after_step(i: int, x0: torch.Tensor) -> None:
        timer.step_done()
        on_step(section, i + 1, x0)

    latents = sample_unipc(denoise, noise.to(device), sigmas, after_step)
    timer.sections[-1] |= {
        "steps": request.steps,
        "steps_computed": positive_cache.computed if positive_cache else request.steps,
    }
    return latents
