"""A request's prompt and images → everything the transformer is conditioned on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from core.pipeline.models import Models
from core.request import VideoRequest
from core.timing import JobTimer
from diffusers_helper import clip_vision, vae
from diffusers_helper.text import PromptEmbeds, encode_prompt

# The VAE's draw has its own generator, seeded beyond every job's seed, so that the noise is the official one.
VAE_SEED_OFFSET = 2**32
# The end image's draw has another, so that the start latent is the same with and without. Not by an offset:
# torch's CPU generator reads only the low 32 bits of its seed.
END_SEED_MASK = 0x9E3779B9


@dataclass(frozen=True)
class ImageLatent:
    """An image's latent, and what it takes to draw it anew for another seed."""

    latent: torch.Tensor  # (1, 16, 1, H/8, W/8), float32 on the CPU
    posterior: vae.ImagePosterior
    mixed_seed: Callable[[int], int]
    strength: float = 1.0

    @classmethod
    def of(
        cls, posterior: vae.ImagePosterior, seed: int, mixed_seed: Callable[[int], int], strength: float = 1.0
    ) -> "ImageLatent":
        generator = torch.Generator("cpu").manual_seed(mixed_seed(seed))
        return cls(strength * posterior.draw(generator).float().cpu(), posterior, mixed_seed, strength)

    def drawn(self, seed: int) -> "ImageLatent":
        return self.of(self.posterior, seed, self.mixed_seed, self.strength)


@dataclass(frozen=True)
class Conditioning:
    positive: PromptEmbeds  # in the transformer's dtype
    negative: PromptEmbeds  # zeros where cfg is 1; then never used
    image_embeds: torch.Tensor  # (1, patches, D), in the transformer's dtype
    start: ImageLatent
    end: ImageLatent | None  # of the end image
    warnings: tuple[str, ...]

    @property
    def start_latent(self) -> torch.Tensor:
        """(1, 16, 1, H/8, W/8), float32 on the CPU."""
        return self.start.latent

    @property
    def end_latent(self) -> torch.Tensor | None:
        """The same of the end image, times its strength."""
        return self.end and self.end.latent

    def starting_at(self, latent: torch.Tensor) -> "Conditioning":
        """The same with this start latent, which an earlier job had."""
        return replace(self, start=replace(self.start, latent=latent))

    def for_seed(self, seed: int) -> "Conditioning":
        """The same for another seed: only the latents of the images depend on it."""
        return replace(self, start=self.start.drawn(seed), end=self.end and self.end.drawn(seed))


def encode_conditioning(
    models: Models,
    image: np.ndarray,
    request: VideoRequest,
    seed: int,
    timer: JobTimer,
    end_image: np.ndarray | None = None,
) -> Conditioning:
    """Encode the prompts and the images, which must have their final size (H, W, 3)."""
    end = None
    with timer.span("text_encode"), models.on_device("text_encoder", "text_encoder_2"):
        positive = _encode(models, request.prompt)
        negative = positive.zeros_like() if request.cfg == 1 else _encode(models, request.n_prompt)
    with timer.span("vae_encode"), models.on_device("vae"):
        posterior = vae.encode_image(image, models.vae, models.device)
        start = ImageLatent.of(posterior, seed, _start_seed)
        if end_image is not None:
            posterior = vae.encode_image(end_image, models.vae, models.device)
            end = ImageLatent.of(posterior, seed, _end_seed, request.end_image_strength)
    with timer.span("clip_vision"), models.on_device("image_encoder"):
        image_embeds = _image_embeds(models, image)
        if end_image is not None and request.end_image_mode == "embedding":
            share = request.end_image_strength / 2  # at full strength the mean of the two
            image_embeds = (1 - share) * image_embeds + share * _image_embeds(models, end_image)
    target = models.device, models.transformer_dtype
    return Conditioning(
        positive=positive.to(*target),
        negative=negative.to(*target),
        image_embeds=image_embeds.to(*target),
        start=start,
        end=end,
        warnings=tuple(
            f"`{name}` is longer than the 256 tokens the model reads; the rest was ignored."
            for name, embeds in (("prompt", positive), ("n_prompt", negative))
            if embeds.truncated
        ),
    )


def _start_seed(seed: int) -> int:
    return VAE_SEED_OFFSET + seed


def _end_seed(seed: int) -> int:
    return END_SEED_MASK ^ seed


def _image_embeds(models: Models, image: np.ndarray) -> torch.Tensor:
    return clip_vision.encode_image(image, models.feature_extractor, models.image_encoder, models.device)


def _encode(models: Models, prompt: str) -> PromptEmbeds:
    return encode_prompt(
        prompt,
        tokenizer=models.tokenizer,
        text_encoder=models.text_encoder,
        tokenizer_2=models.tokenizer_2,
        text_encoder_2=models.text_encoder_2,
        device=models.device,
    )
