"""A request's prompts and images → what the transformer is conditioned on, section by section."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from core.pipeline.encoding import Encoder
from core.pipeline.models import Models
from core.pipeline.sections import FPS, Section, SectionPlan
from core.request import VideoRequest
from core.timeline import Cue, read_timeline, without_effect
from diffusers_helper.text import PromptEmbeds, mix_prompts
from diffusers_helper.vae import ImagePosterior

if TYPE_CHECKING:
    from core.input_video import SourceVideo

# Each draw has a generator of its own, so that the sections' noise is the official one: the start's with
# the job's seed, the end image's with another, so that the start latent is the same with and without.
START_SEED_MASK, END_SEED_MASK = 0, 0x9E3779B9
SOURCE_SEED_MASK = 0x7F4A7C15  # a given video's, likewise


@dataclass(frozen=True)
class SectionConditioning:
    """What one section sees besides its history; on the transformer's device and in its dtype."""

    positive: PromptEmbeds
    negative: PromptEmbeds  # zeros where cfg is 1; then never used
    image_embeds: torch.Tensor  # (1, patches, D)
    start_latent: torch.Tensor  # (1, 16, 1, H/8, W/8), float32 on the CPU: what is in the start image's place


@dataclass(frozen=True)
class ImageLatent:
    """An image's latent, and what it takes to draw it anew for another seed."""

    latent: torch.Tensor  # (1, 16, 1, H/8, W/8), float32 on the CPU; of a clip more frames than 1
    posterior: ImagePosterior  # on the CPU
    device: torch.device  # that draws it, the VAE's
    seed_mask: int  # the draw's seed is the job's XOR this
    strength: float = 1.0

    @classmethod
    def of(
        cls,
        posterior: ImagePosterior,
        device: torch.device,
        seed: int,
        seed_mask: int,
        strength: float = 1.0,
    ) -> "ImageLatent":
        generator = torch.Generator("cpu").manual_seed(seed ^ seed_mask)
        latent = strength * posterior.to(device).draw(generator).float().cpu()
        return cls(latent, posterior, device, seed_mask, strength)

    def drawn(self, seed: int) -> "ImageLatent":
        return self.of(self.posterior, self.device, seed, self.seed_mask, self.strength)


@dataclass(frozen=True)
class StartImage:
    """What can be in the start image's place: that image itself, or a keyframe."""

    drawn: ImageLatent
    embeds: torch.Tensor  # (1, patches, D), on the CPU


@dataclass(frozen=True)
class Conditioning:
    """All encodings of a job, on the CPU, and which of them each section is given."""

    cues: tuple[Cue, ...]  # in sampling order
    prompts: Mapping[str, PromptEmbeds]
    negative: PromptEmbeds | None  # None where cfg is 1
    images: Mapping[int | None, StartImage]  # by the keyframe of a cue; None is the video's first frame
    end: ImageLatent | None  # of the end image
    source: ImageLatent | None  # of a given video: its frames nearest to the join
    device: torch.device  # the transformer's
    dtype: torch.dtype
    warnings: tuple[str, ...]

    @property
    def start_latent(self) -> torch.Tensor:
        """The video's first frame, (1, 16, 1, H/8, W/8), float32 on the CPU."""
        return self.images[None].drawn.latent

    @property
    def end_latent(self) -> torch.Tensor | None:
        """The same of the end image, times its strength."""
        return self.end and self.end.latent

    @property
    def source_latents(self) -> torch.Tensor | None:
        """Of a given video that is gone on from, (1, 16, T, H/8, W/8) in its order, float32 on the CPU."""
        return self.source and self.source.latent

    def starting_at(self, latent: torch.Tensor) -> "Conditioning":
        """The same with this start latent, which an earlier job had."""
        first = self.images[None]
        first = replace(first, drawn=replace(first.drawn, latent=latent))
        return replace(self, images={**self.images, None: first})

    def for_seed(self, seed: int) -> "Conditioning":
        """The same for another seed: only the latents of the images depend on it."""
        images = {k: replace(image, drawn=image.drawn.drawn(seed)) for k, image in self.images.items()}
        end, source = (latent and latent.drawn(seed) for latent in (self.end, self.source))
        return replace(self, images=images, end=end, source=source)

    def of(self, section: Section) -> SectionConditioning:
        cue = self.cues[section.index]
        positive = mix_prompts([(self.prompts[prompt], weight) for prompt, weight in cue.prompts])
        negative = self.negative or positive.zeros_like()
        image = self.images[cue.keyframe]
        return SectionConditioning(
            positive=positive.to(self.device, self.dtype),
            negative=negative.to(self.device, self.dtype),
            image_embeds=image.embeds.to(self.device, self.dtype),
            start_latent=image.drawn.latent,
        )


def encode_conditioning(
    models: Models,
    image: np.ndarray,
    plan: SectionPlan,
    request: VideoRequest,
    seed: int,
    encoder: Encoder,
    keyframes: Mapping[int, np.ndarray] | None = None,
    end_image: np.ndarray | None = None,
    source: "SourceVideo | None" = None,
) -> Conditioning:
    """Encode what the plan's sections need of the request's prompts and images.

    The images, (H, W, 3), have their final size; `keyframes` are by their places in `request.sections`.
    `source` is a video that is gone on from, and `image` its frame at the join.
    """
    timeline = read_timeline(request.prompt, request.sections)
    by_time = timeline.cues(plan.middles_s, request.blend_sections)
    cues = tuple(by_time[plan.position(section)] for section in plan.sections)

    prompts = list(dict.fromkeys(prompt for cue in cues for prompt, _ in cue.prompts))
    guided = request.cfg != 1
    texts = encoder.prompts([*prompts, request.n_prompt] if guided else prompts)

    places = [None, *sorted({cue.keyframe for cue in cues} - {None})]
    pixels = [image if place is None else keyframes[place] for place in places]
    ends = [] if end_image is None else [end_image]
    posteriors = encoder.posteriors(pixels + ends)
    starts = [ImageLatent.of(p, models.device, seed, START_SEED_MASK) for p in posteriors[: len(pixels)]]
    end = None
    if ends:
        end = ImageLatent.of(posteriors[-1], models.device, seed, END_SEED_MASK, request.end_image_strength)
    clip = None
    if source is not None:
        posterior = encoder.clip(source.seen).part(source.join.latents)
        clip = ImageLatent.of(posterior, models.device, seed, SOURCE_SEED_MASK)
    averaged = ends if request.end_image_mode == "embedding" else []
    embeds = encoder.image_embeds(pixels + averaged)
    if averaged:
        share = request.end_image_strength / 2  # at full strength the mean of the two
        embeds = [(1 - share) * each + share * embeds[-1] for each in embeds]
    return Conditioning(
        cues=cues,
        prompts=dict(zip(prompts, texts, strict=False)),
        negative=texts[-1] if guided else None,
        images=dict(zip(places, map(StartImage, starts, embeds), strict=False)),
        end=end,
        source=clip,
        device=models.device,
        dtype=models.transformer_dtype,
        warnings=(
            *(
                f"{name} is longer than the 256 tokens the model reads; the rest was ignored."
                for name, embeds in zip([*map(timeline.name_of, prompts), "`n_prompt`"], texts, strict=False)
                if embeds.truncated
            ),
            *without_effect(timeline, plan.middles_s, plan.frames / FPS, request.blend_sections),
        ),
    )
