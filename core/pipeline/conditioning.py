"""A request's prompt and image → everything the transformer is conditioned on."""

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


@dataclass(frozen=True)
class Conditioning:
    positive: PromptEmbeds  # in the transformer's dtype
    negative: PromptEmbeds  # zeros where cfg is 1; then never used
    image_embeds: torch.Tensor  # (1, patches, D), in the transformer's dtype
    start_latent: torch.Tensor  # (1, 16, 1, H/8, W/8), float32 on the CPU
    warnings: tuple[str, ...]
    start_posterior: vae.ImagePosterior  # that the start latent was drawn from

    def for_seed(self, seed: int) -> "Conditioning":
        """The same for another seed: only the start latent depends on it."""
        return replace(self, start_latent=_drawn(self.start_posterior, seed))


def encode_conditioning(
    models: Models, image: np.ndarray, request: VideoRequest, seed: int, timer: JobTimer
) -> Conditioning:
    """Encode the prompts and the image, which must have its final size (H, W, 3)."""
    with timer.span("text_encode"), models.on_device("text_encoder", "text_encoder_2"):
        positive = _encode(models, request.prompt)
        negative = positive.zeros_like() if request.cfg == 1 else _encode(models, request.n_prompt)
    with timer.span("vae_encode"), models.on_device("vae"):
        posterior = vae.encode_image(image, models.vae, models.device)
        start_latent = _drawn(posterior, seed)
    with timer.span("clip_vision"), models.on_device("image_encoder"):
        image_embeds = clip_vision.encode_image(
            image, models.feature_extractor, models.image_encoder, models.device
        )
    target = models.device, models.transformer_dtype
    return Conditioning(
        positive=positive.to(*target),
        negative=negative.to(*target),
        image_embeds=image_embeds.to(*target),
        start_latent=start_latent,
        start_posterior=posterior,
        warnings=tuple(
            f"`{name}` is longer than the 256 tokens the model reads; the rest was ignored."
            for name, embeds in (("prompt", positive), ("n_prompt", negative))
            if embeds.truncated
        ),
    )


def _drawn(posterior: vae.ImagePosterior, seed: int) -> torch.Tensor:
    return posterior.draw(torch.Generator("cpu").manual_seed(VAE_SEED_OFFSET + seed)).float().cpu()


def _encode(models: Models, prompt: str) -> PromptEmbeds:
    return encode_prompt(
        prompt,
        tokenizer=models.tokenizer,
        text_encoder=models.text_encoder,
        tokenizer_2=models.tokenizer_2,
        text_encoder_2=models.text_encoder_2,
        device=models.device,
    )
