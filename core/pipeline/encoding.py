"""Prompts and images → their encodings, each made once, and not at all where the worker's cache has it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from core.pipeline.decoding import fits_untiled
from core.pipeline.encoding_cache import content_key
from core.pipeline.models import Models
from core.timing import JobTimer
from diffusers_helper import clip_vision, vae
from diffusers_helper.text import PromptEmbeds, encode_prompt

CPU = torch.device("cpu")


class Encoder:
    """One job's encoder; results lie on the CPU, in the order of what was given.

    `timer` gets the seconds and counts hits and misses; `check` runs before each thing that is encoded and
    may raise to stop. Clips are encoded in spatial tiles where memory is short, or it is `frugal`.
    """

    def __init__(
        self,
        models: Models,
        timer: JobTimer,
        check: Callable[[], None] = lambda: None,
        frugal: bool = False,
    ) -> None:
        self._models = models
        self._frugal = frugal
        self._timer = timer
        self._check = check

    def prompts(self, prompts: Sequence[str]) -> list[PromptEmbeds]:
        with self._timer.span("text_encode"):
            return self._encode("text", prompts, self._prompt, "text_encoder", "text_encoder_2")

    def posteriors(self, images: Sequence[np.ndarray]) -> list[vae.ImagePosterior]:
        """Of (H, W, 3) uint8 each."""
        with self._timer.span("vae_encode"):
            return self._encode("vae", images, self._posterior, "vae")

    def clip(self, frames: np.ndarray) -> vae.ImagePosterior:
        """Of (T, H, W, 3) uint8, T being 1, 5, 9 …"""
        with self._timer.span("vae_encode"):
            (posterior,) = self._encode("vae_clip", [frames], self._clip, "vae")
            return posterior

    def image_embeds(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """(H, W, 3) uint8 each → (1, patches, D) each."""
        with self._timer.span("clip_vision"):
            return self._encode("clip_vision", images, self._embeds, "image_encoder")

    def _encode(self, kind: str, contents: Sequence, encode: Callable[[Any], Any], *names: str) -> list:
        """The models named are brought to the GPU only if there is something to encode."""
        cache, counts = self._models.encodings, self._timer.encodings
        keys = [content_key(kind, content) for content in contents]
        found = {key: known for key in keys if (known := cache.get(key)) is not None}
        missing = {key: content for key, content in zip(keys, contents, strict=True) if key not in found}
        counts["hits"] += len(found)
        counts["misses"] += len(missing)
        if missing:
            with self._models.on_device(*names):
                for key, content in missing.items():
                    self._check()
                    found[key] = encode(content)
                    cache.keep(key, found[key])
        return [found[key] for key in keys]

    def _prompt(self, prompt: str) -> PromptEmbeds:
        models = self._models
        embeds = encode_prompt(
            prompt,
            tokenizer=models.tokenizer,
            text_encoder=models.text_encoder,
            tokenizer_2=models.tokenizer_2,
            text_encoder_2=models.text_encoder_2,
            device=models.device,
        )
        return embeds.to(CPU, models.encoder_dtype)

    def _posterior(self, image: np.ndarray) -> vae.ImagePosterior:
        return vae.encode_image(image, self._models.vae, self._models.device).to(CPU)

    def _clip(self, frames: np.ndarray) -> vae.ImagePosterior:
        models = self._models
        _, height, width, _ = frames.shape
        tiled = self._frugal or not fits_untiled(models, height, width)
        return vae.encode_clip(frames, models.vae, models.device, tiled, self._check).to(CPU)

    def _embeds(self, image: np.ndarray) -> torch.Tensor:
        models = self._models
        return clip_vision.encode_image(
            image, models.feature_extractor, models.image_encoder, models.device
        ).cpu()
