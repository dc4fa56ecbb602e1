"""Clips of the world as the transformer is trained on them: latents, start images, prompts, encoded once."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import AutoencoderKLHunyuanVideo
from einops import rearrange

from builder.demo.devices import on_device
from builder.demo.encoders import Encoders
from builder.demo.layouts import CLIP_FRAMES, SHORT_FRAMES, Part


@dataclass(frozen=True)
class Batch:
    """Samples whose clips have one size and whose prompts have equally many tokens."""

    latents: torch.Tensor  # (B, 16, T, h, w), float32
    text: torch.Tensor  # (B, n, D)
    pooled: torch.Tensor  # (B, P)
    image_embeds: torch.Tensor  # (B, patches, D)


@dataclass
class _Clips:
    """All clips of one size and part."""

    latents: list[torch.Tensor] = field(default_factory=list)  # (B, 16, T, h, w), float16 on the device
    image_embeds: list[torch.Tensor] = field(default_factory=list)
    prompts: list[list[str]] = field(default_factory=list)  # every clip's paraphrases
    # number of tokens → (clip, paraphrase); filled by `ClipBank.encode_prompts`
    by_length: dict[int, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))


class ClipBank:
    """Encoded clips by size and part. Fill it with `add`, call `encode_prompts`, then draw batches.

    A late clip has the start image of its video before it, in place of its own first frame.
    """

    def __init__(self, vae: AutoencoderKLHunyuanVideo, encoders: Encoders, seed: int) -> None:
        self._encode, self._encoders = partial(encode_clips, vae), encoders
        self._random = random.Random(seed)
        self._clips: dict[tuple[Part, int, int], _Clips] = defaultdict(_Clips)  # of one height and width
        self._texts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return sum(len(clips.prompts) for clips in self._clips.values())

    @torch.no_grad()
    def add(
        self, pixels: torch.Tensor, prompts: Sequence[list[str]], starts: torch.Tensor, late: bool = False
    ) -> None:
        """Add clips (B, 37 or 145, H, W, 3) uint8 on the device, each with its paraphrases.

        `starts` (B, H, W, 3) uint8 are their videos' start images, on the host, where nothing waits for them.
        The first frame of late clips is not used.
        """
        batch, frames, height, width, _ = pixels.shape
        if frames not in (SHORT_FRAMES, CLIP_FRAMES) or batch != len(prompts):
            raise ValueError(f"{batch} clips of {frames} frames with {len(prompts)} lists of prompts")
        part = "short" if frames == SHORT_FRAMES else "late" if late else "whole"
        clips = self._clips[part, height, width]
        latents = self._encode(pixels)
        if late:
            begin = self._encode(on_device(starts[:, None], pixels.device))
            latents = torch.cat([begin, latents[:, :, 1:]], dim=2)
        clips.latents.append(latents.half())
        clips.image_embeds.append(self._encoders.images(starts))
        clips.prompts += prompts

    def encode_prompts(self) -> None:
        """Encode what is new of all prompts, and the empty one."""
        new = {p for clips in self._clips.values() for several in clips.prompts for p in several} | {""}
        new = sorted(new - self._texts.keys())
        self._texts |= dict(zip(new, self._encoders.text(new), strict=True))
        for clips in self._clips.values():
            clips.latents = [torch.cat(clips.latents)]
            clips.image_embeds = [torch.cat(clips.image_embeds)]
            clips.by_length.clear()
            for clip, several in enumerate(clips.prompts):
                for prompt in several:
                    clips.by_length[len(self._texts[prompt][0])].append((clip, prompt))

    def draw(self, batch: int, part: Part, no_text: float = 0.1) -> Batch:
        """`batch` samples, with repetition; so often of the times all of them without their prompts."""
        sizes = [clips for (of, *_), clips in self._clips.items() if of == part]
        (clips,) = self._random.choices(sizes, [len(clips.prompts) for clips in sizes])
        lengths = [*clips.by_length]
        (length,) = self._random.choices(lengths, [len(clips.by_length[n]) for n in lengths])
        chosen = self._random.choices(clips.by_length[length], k=batch)
        members = on_device([clip for clip, _ in chosen], clips.latents[0].device)
        without = self._random.random() < no_text
        texts = [self._texts["" if without else prompt] for _, prompt in chosen]
        return Batch(
            latents=clips.latents[0][members].float(),
            text=torch.stack([hidden for hidden, _ in texts]),
            pooled=torch.stack([pooled for _, pooled in texts]),
            image_embeds=clips.image_embeds[0][members],
        )


@torch.no_grad()
def encode_clips(vae: AutoencoderKLHunyuanVideo, pixels: torch.Tensor) -> torch.Tensor:
    """(B, T, H, W, 3) uint8 → the posterior's means (B, 16, 1 + (T−1)/4, H/8, W/8), each clip as a whole."""
    x = rearrange(pixels, "b t h w c -> b c t h w").to(vae.dtype) / 127.5 - 1
    moments = vae.quant_conv(vae.encoder(x))
    return moments[:, : vae.config.latent_channels].float()


def latent_statistics(
    vae: AutoencoderKLHunyuanVideo, clips: Callable[[], torch.Tensor], batches: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread (16,) of each latent channel over so many batches of `clips()`."""
    latents = torch.cat(
        [rearrange(encode_clips(vae, clips()), "b c t h w -> c (b t h w)") for _ in range(batches)], dim=1
    )
    return latents.mean(dim=1), latents.std(dim=1)
