"""A request's prompts and images → what the transformer is conditioned on, section by section."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from core.pipeline.encoding import Encoder, drawn
from core.pipeline.models import Models
from core.pipeline.sections import FPS, Section, SectionPlan
from core.request import VideoRequest
from core.timeline import Cue, read_timeline, without_effect
from diffusers_helper.text import PromptEmbeds, mix_prompts
from diffusers_helper.vae import ImagePosterior


@dataclass(frozen=True)
class SectionConditioning:
    """What one section sees besides its history; on the transformer's device and in its dtype."""

    positive: PromptEmbeds
    negative: PromptEmbeds  # zeros where cfg is 1; then never used
    image_embeds: torch.Tensor  # (1, patches, D)
    start_latent: torch.Tensor  # (1, 16, 1, H/8, W/8), float32 on the CPU: what is in the start image's place


@dataclass(frozen=True)
class EncodedImage:
    """On the CPU."""

    posterior: ImagePosterior
    latent: torch.Tensor  # drawn from it, (1, 16, 1, H/8, W/8), float32
    embeds: torch.Tensor  # (1, patches, D)


@dataclass(frozen=True)
class Conditioning:
    """All encodings of a job, on the CPU, and which of them each section is given."""

    cues: tuple[Cue, ...]  # in sampling order
    prompts: Mapping[str, PromptEmbeds]
    negative: PromptEmbeds | None  # None where cfg is 1
    images: Mapping[int | None, EncodedImage]  # by the keyframe of a cue; None is the input image
    device: torch.device  # the transformer's
    dtype: torch.dtype
    warnings: tuple[str, ...]

    @property
    def start_latent(self) -> torch.Tensor:
        """The video's first frame, (1, 16, 1, H/8, W/8), float32 on the CPU."""
        return self.images[None].latent

    def for_seed(self, seed: int) -> "Conditioning":
        """The same for another seed: only what is drawn depends on it."""
        images = {
            place: replace(image, latent=drawn(image.posterior, seed, self.device))
            for place, image in self.images.items()
        }
        return replace(self, images=images)

    def starting_from(self, latent: torch.Tensor) -> "Conditioning":
        """The same with `latent` (1, 16, 1, H/8, W/8) as the video's first frame."""
        return replace(self, images={**self.images, None: replace(self.images[None], latent=latent)})

    def of(self, section: Section) -> SectionConditioning:
        cue = self.cues[section.index]
        positive = mix_prompts([(self.prompts[prompt], weight) for prompt, weight in cue.prompts])
        negative = self.negative or positive.zeros_like()
        image = self.images[cue.keyframe]
        return SectionConditioning(
            positive=positive.to(self.device, self.dtype),
            negative=negative.to(self.device, self.dtype),
            image_embeds=image.embeds.to(self.device, self.dtype),
            start_latent=image.latent,
        )


def encode_conditioning(
    models: Models,
    image: np.ndarray,
    keyframes: Mapping[int, np.ndarray],
    plan: SectionPlan,
    request: VideoRequest,
    seed: int,
    encoder: Encoder,
) -> Conditioning:
    """Encode what the plan's sections need of the request's prompts and images.

    The images, (H, W, 3), have their final size; `keyframes` are by their places in `request.sections`.
    """
    timeline = read_timeline(request.prompt, request.sections)
    by_time = timeline.cues(plan.middles_s, request.blend_sections)
    cues = tuple(by_time[plan.position(section)] for section in plan.sections)

    prompts = list(dict.fromkeys(prompt for cue in cues for prompt, _ in cue.prompts))
    guided = request.cfg != 1
    texts = encoder.prompts([*prompts, request.n_prompt] if guided else prompts)

    places = [None, *sorted({cue.keyframe for cue in cues} - {None})]
    pixels = [image if place is None else keyframes[place] for place in places]
    images = [
        EncodedImage(posterior, drawn(posterior, seed, models.device), embeds)
        for posterior, embeds in zip(encoder.posteriors(pixels), encoder.image_embeds(pixels), strict=True)
    ]
    return Conditioning(
        cues=cues,
        prompts=dict(zip(prompts, texts, strict=False)),
        negative=texts[-1] if guided else None,
        images=dict(zip(places, images, strict=True)),
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
