"""The section loop: samples each section's latents from the history, and owns that history."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from core.pipeline.caching import NewCache, step_caches
from core.pipeline.checkpoint import Checkpoint
from core.pipeline.conditioning import Conditioning, SectionConditioning
from core.pipeline.models import Models
from core.pipeline.sections import HISTORY, HISTORY_FRAMES, Section, SectionPlan
from core.request import VideoRequest
from core.timing import JobTimer
from diffusers_helper.guidance import guided_velocity
from diffusers_helper.samplers import SAMPLERS
from diffusers_helper.schedule import flow_shift_mu, shifted_sigmas
from diffusers_helper.step_cache import StepCache
from diffusers_helper.text import PromptEmbeds
from diffusers_helper.transformer import PackedHistory, PreparedCondition

TIMESTEPS = 1000.0  # the model's timestep is sigma · 1000, its guidance embedding likewise

# called after each step, 1 … steps, with its x0-prediction; may raise to stop
OnStep = Callable[[Section, int, torch.Tensor], None]


@dataclass(frozen=True)
class SampledSection:
    section: Section
    latents: torch.Tensor  # (1, 16, W, H/8, W/8), float32 on the CPU: what the sampler returned
    to_decode: torch.Tensor  # the newest latent frames, in the video's order
    generator_state: torch.Tensor  # after this section's noise was drawn


def sample_sections(
    models: Models,
    plan: SectionPlan,
    conditioning: Conditioning,
    request: VideoRequest,
    seed: int,
    timer: JobTimer,
    on_step: OnStep,
    preserved_gb: float,
    resumed: Checkpoint | None = None,
    new_cache: NewCache | None = None,
) -> Iterator[SampledSection]:
    """Sample the plan's sections in order. All noise comes from one CPU generator seeded with `seed`.

    An I2V video may have an end image: its latent is the history that the first section sampled, the video's
    end, would else find empty. It is no part of the video.

    Where the plan extends a given video, the video's latents are the history from the start: those before the
    new part for F1, which begins with nothing else, and those after it for I2V. What is decoded has as many
    of them as there are new ones, so that there is something to blend.

    In swap mode `preserved_gb` of GPU memory are kept free of the transformer's weights. The first sections
    come from `resumed`, as they were sampled then; the rest goes on with its generator. `new_cache` makes
    other step caches than the request's. Raises RequestError where the model cannot have the request's.
    """
    new_cache = new_cache or step_caches(request, models.direction, models.magnitudes)
    generator = torch.Generator("cpu").manual_seed(seed)
    known = resumed.sections if resumed else ()
    if resumed:
        generator.set_state(resumed.generator_state)
    start = conditioning.start_latent
    _, channels, _, height, width = start.shape
    history = torch.zeros(1, channels, HISTORY_FRAMES, height, width)
    kept = HISTORY_FRAMES + 2 * plan.window + 1  # the most that a section sees or decodes beside its own
    forward = plan.direction == "f1"
    source = conditioning.source_latents
    if forward:
        history = torch.cat([history, start if source is None else source], dim=2)
    elif source is not None:
        history = torch.cat([source, history], dim=2)
    elif conditioning.end_latent is not None:
        history[:, :, :1] = conditioning.end_latent

    for section in plan.sections:
        timer.start_section()
        if section.index < len(known):
            latents = known[section.index]
            timer.sections[-1] |= {"sample": 0.0, "steps": request.steps, "steps_computed": 0}
        else:
            noise = torch.randn(1, channels, plan.window, height, width, generator=generator)
            seen = conditioning.of(section)
            packed = pack_history(section, seen.start_latent, history, forward, models)
            with (
                timer.section_span("sample"),
                models.on_device("transformer", preserved_gb=preserved_gb),
            ):
                latents = sample_latents(
                    models, noise, packed, seen, request, section, timer, on_step, new_cache
                ).cpu()

        new = torch.cat([start, latents], dim=2) if section.adds_start else latents
        if forward:
            history = torch.cat([history, new], dim=2)
            real = history[:, :, HISTORY_FRAMES:]
            to_decode = real if section.decode_frames is None else real[:, :, -section.decode_frames :]
            history = history[:, :, -kept:]
        else:
            history = torch.cat([new, history], dim=2)
            if section.index == 0 and request.end_image_mode == "embedding":
                history[:, :, -HISTORY_FRAMES] = 0  # the end image was for this section only
            real = history[:, :, :-HISTORY_FRAMES]
            to_decode = real[:, :, : section.decode_frames]
            history = history[:, :, :kept]
        yield SampledSection(section, latents, to_decode, generator.get_state())


def pack_history(
    section: Section, start: torch.Tensor, history: torch.Tensor, forward: bool, models: Models
) -> PackedHistory:
    """The start latent and the history frames nearest to the section, on the model's device and dtype."""
    if forward:
        history_4x, history_2x, nearest = history[:, :, -HISTORY_FRAMES:].split(HISTORY[::-1], dim=2)
    else:
        nearest, history_2x, history_4x = history[:, :, :HISTORY_FRAMES].split(HISTORY, dim=2)
    return pack(section, torch.cat([start, nearest], dim=2), history_2x, history_4x, models)


def pack(
    section: Section,
    clean: torch.Tensor,
    history_2x: torch.Tensor | None,
    history_4x: torch.Tensor | None,
    models: Models,
) -> PackedHistory:
    """These latents at the section's positions, on the model's device and in its dtype."""

    def there(latents: torch.Tensor | None) -> torch.Tensor | None:
        return None if latents is None else latents.to(models.device, models.transformer_dtype)

    return PackedHistory(
        indices_latents=torch.tensor(section.latents),
        latents_clean=there(clean),
        indices_latents_clean=torch.tensor(section.clean),
        latents_history_2x=there(history_2x),
        indices_latents_history_2x=torch.tensor(section.history_2x),
        latents_history_4x=there(history_4x),
        indices_latents_history_4x=torch.tensor(section.history_4x),
    )


@torch.inference_mode()
def sample_latents(
    models: Models,
    noise: torch.Tensor,
    packed: PackedHistory,
    conditioning: SectionConditioning,
    request: VideoRequest,
    section: Section,
    timer: JobTimer,
    on_step: OnStep,
    new_cache: NewCache,
) -> torch.Tensor:
    """Denoise `noise` (1, 16, T, H/8, W/8) with the request's sampler; the transformer is on its device."""
    device, dtype = models.device, models.transformer_dtype
    sigmas = shifted_sigmas(request.steps, schedule_mu(models, request, noise.shape))

    guided = request.cfg != 1
    transformer = models.transformer
    history = transformer.prepare_history(packed)
    positive = _prepare(models, conditioning.positive, conditioning, request.gs)
    negative = _prepare(models, conditioning.negative, conditioning, request.gs) if guided else None
    levels = sigmas[:-1].tolist()
    positive_cache, negative_cache = new_cache(levels), new_cache(levels)

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        x = x.to(dtype)  # the official wrapper rounds x first and takes x0 from the rounded x
        timestep = _scaled(sigma, models)
        v = transformer.velocity(x, timestep, history, positive, positive_cache).float()
        if guided:
            v_negative = transformer.velocity(x, timestep, history, negative, negative_cache).float()
            v = guided_velocity(v, v_negative, request.cfg, request.rs)
        return x.float() - sigma * v

    def after_step(i: int, x0: torch.Tensor) -> None:
        timer.step_done()
        on_step(section, i + 1, x0)

    latents = SAMPLERS[request.sampler](denoise, noise.to(device), sigmas, after_step)
    timer.sections[-1] |= {
        "steps": request.steps,
        "steps_computed": steps_computed(request.steps, positive_cache, negative_cache),
    }
    return latents


def schedule_mu(models: Models, request: VideoRequest, shape: Sequence[int]) -> float:
    """mu of the noise schedule for a section's latents of `shape`: the log of the request's shift, or from
    the sequence length."""
    if request.shift:
        return math.log(request.shift)
    *_, frames, height, width = shape
    p = models.transformer.config.patch_size
    return flow_shift_mu(frames * (height // p) * (width // p))


def steps_computed(steps: int, *caches: StepCache | None) -> int:
    """In how many steps a guidance pass ran the model's blocks. A pass that was not run has computed none."""
    if None in caches:
        return steps
    return len({step for cache in caches for step in cache.computed})


def _prepare(
    models: Models, prompt: PromptEmbeds, conditioning: SectionConditioning, guidance_scale: float
) -> PreparedCondition:
    """What one guidance pass is conditioned on, once for all steps."""
    return models.transformer.prepare_condition(
        prompt.encoder_hidden_states,
        prompt.encoder_attention_mask,
        prompt.pooled_projections,
        conditioning.image_embeds,
        _scaled(guidance_scale, models),
    )


def _scaled(value: float, models: Models) -> torch.Tensor:
    """A sigma or guidance scale as the model takes it, (1,) in its dtype.

    Filled on the device: a copy from the host would wait until the GPU has nothing left to do.
    """
    return torch.full((1,), value * TIMESTEPS, device=models.device).to(models.transformer_dtype)
