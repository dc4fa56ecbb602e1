"""A request's prompt and images → everything the transformer is conditioned on."""

from dataclasses import dataclass

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
class Conditioning:
    positive: PromptEmbeds  # in the transformer's dtype
    negative: PromptEmbeds  # zeros where cfg is 1; then never used
    image_embeds: torch.Tensor  # (1, patches, D), in the transformer's dtype
    start_latent: torch.Tensor  # (1, 16, 1, H/8, W/8), float32 on the CPU
    end_latent: torch.Tensor | None  # the same of the end image, times its strength
    warnings: tuple[str, ...]


def encode_conditioning(
    models: Models,
    image: np.ndarray,
    request: VideoRequest,
    seed: int,
    timer: JobTimer,
    end_image: np.ndarray | None = None,
) -> Conditioning:
    """Encode the prompts and the images, which must have their final size (H, W, 3)."""
    end_latent = None
    with timer.span("text_encode"), models.on_device("text_encoder", "text_encoder_2"):
        positive = _encode(models, request.prompt)
        negative = positive.zeros_like() if request.cfg == 1 else _encode(models, request.n_prompt)
    with timer.span("vae_encode"), models.on_device("vae"):
        start_latent = _latent(models, image, VAE_SEED_OFFSET + seed)
        if end_image is not None:
            end_latent = request.end_image_strength * _latent(models, end_image, END_SEED_MASK ^ seed)
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
        start_latent=start_latent,
        end_latent=end_latent,
        warnings=tuple(
            f"`{name}` is longer than the 256 tokens the model reads; the rest was ignored."
            for name, embeds in (("prompt", positive), ("n_prompt", negative))
            if embeds.truncated
        ),
    )


def _latent(models: Models, image: np.ndarray, seed: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return vae.encode_image(image, models.vae, generator, models.device).float().cpu()


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
