"""Pixels ↔ latents through AutoencoderKLHunyuanVideo (8× in space, 4× in time, 16 channels)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoMidBlock3D
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from einops import rearrange
from torch import nn


@dataclass(frozen=True)
class ImagePosterior:
    """What the VAE makes of an image, or of a clip of T latent frames: latents are drawn from it."""

    parameters: torch.Tensor  # mean and log-variance, (1, 32, T, H/8, W/8), in the VAE's dtype
    scaling_factor: float

    @property
    def nbytes(self) -> int:
        return self.parameters.nbytes

    def to(self, device: torch.device) -> "ImagePosterior":
        return replace(self, parameters=self.parameters.to(device))

    def part(self, frames: slice) -> "ImagePosterior":
        """Of these latent frames alone."""
        return replace(self, parameters=self.parameters[:, :, frames])

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """Latent (1, 16, T, H/8, W/8), scaled, in the VAE's dtype, on the posterior's device.

        The official code draws from the global generator, so that its start latent does not follow from the
        job's seed.
        """
        distribution = DiagonalGaussianDistribution(self.parameters)
        return distribution.sample(generator=generator) * self.scaling_factor


@torch.no_grad()
def encode_image(image: np.ndarray, vae: AutoencoderKLHunyuanVideo, device: torch.device) -> ImagePosterior:
    """(H, W, 3) uint8 → the posterior of its latent."""
    return encode_clip(image[None], vae, device)


@torch.no_grad()
def encode_clip(
    frames: np.ndarray,
    vae: AutoencoderKLHunyuanVideo,
    device: torch.device,
    tiled: bool = False,
    check: Callable[[], None] = lambda: None,
) -> ImagePosterior:
    """(T, H, W, 3) uint8 → the posterior of its latents, (T + 3) / 4 frames for T = 1, 5, 9 …

    The library encodes 17 frames at a time, so length hardly matters to memory; `tiled` does so in 256-pixel
    tiles. `check` runs before each of the encoder's calls and may raise to stop.
    """
    pixels = torch.empty(frames.shape, device=device, dtype=vae.dtype)
    for place, frame in zip(pixels, frames, strict=True):  # in float32 one at a time
        place.copy_(torch.from_numpy(frame.copy()).float() / 127.5 - 1)
    pixels = pixels.permute(3, 0, 1, 2)[None]  # as the official code lays an image out
    with _calls(vae.encoder, device, check), _tiling(vae, tiled):
        return ImagePosterior(vae.encode(pixels).latent_dist.parameters, vae.config.scaling_factor)


@torch.no_grad()
def decode_latents(
    latents: torch.Tensor,
    vae: AutoencoderKLHunyuanVideo,
    device: torch.device,
    tiled: bool = False,
    check: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """(1, 16, T, h, w) → pixels (1, 3, 4T − 3, 8h, 8w) in −1…1 on the CPU, in the VAE's dtype.

    `tiled` decodes 256-pixel tiles and blends them at their seams: less memory, slightly other pixels.
    `check` runs before each of the decoder's calls, one for every few latent frames, and may raise to stop.
    """
    latents = latents / vae.config.scaling_factor
    with _calls(vae.decoder, device, check), _tiling(vae, tiled):
        return vae.decode(latents.to(device, vae.dtype), return_dict=False)[0].cpu()


@contextmanager
def _calls(coder: nn.Module, device: torch.device, check: Callable[[], None]) -> Iterator[None]:
    """`check` runs before each call of the encoder or decoder."""

    def stop_or_go_on(*_: object) -> None:
        if device.type == "cuda":
            # else all calls are queued before the first has run
            torch.cuda.current_stream(device).synchronize()
        check()

    hook = coder.register_forward_pre_hook(stop_or_go_on)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _tiling(vae: AutoencoderKLHunyuanVideo, tiled: bool) -> Iterator[None]:
    vae.use_tiling = tiled
    try:
        yield
    finally:
        vae.use_tiling = False  # the next job's image is encoded whole


class DecodedTiles:
    """What the decoder made of the latest clip's tiles, so that one that comes again is not decoded again.

    The library decodes a clip in tiles of five latent frames, one every three. Clips that overlap by a
    multiple of three frames have whole tiles in common, from the same latents to the last bit. They are kept
    on the host, in the VAE's dtype: the pixels of one clip and a third more.
    """

    def __init__(self) -> None:
        self._earlier: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._latest: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def used_by(self, vae: AutoencoderKLHunyuanVideo) -> Iterator[None]:
        """For the decode of one clip: tiles of the clip before it are recalled, and its own remembered."""
        self._earlier, self._latest = self._latest, []
        decoder = vae.decoder
        vae.decoder = _RecallingDecoder(decoder, self)
        try:
            yield
        finally:
            vae.decoder = decoder

    def recall(self, latents: torch.Tensor) -> torch.Tensor | None:
        return next((pixels for known, pixels in self._earlier if _same(known, latents)), None)

    def remember(self, latents: torch.Tensor, pixels: torch.Tensor) -> None:
        self._latest.append((latents, pixels))


class _RecallingDecoder(nn.Module):
    """A decoder that looks for each tile among those it knows."""

    def __init__(self, decoder: nn.Module, tiles: DecodedTiles) -> None:
        super().__init__()
        self.decoder = decoder
        self.tiles = tiles

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        pixels = self.tiles.recall(latents)
        result = self.decoder(latents) if pixels is None else pixels.to(latents.device, copy=True)
        # a copy either way: the library blends tiles in place
        self.tiles.remember(latents, result.to("cpu", copy=True) if pixels is None else pixels)
        return result


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


class FramewiseMidBlock(HunyuanVideoMidBlock3D):
    """The library's middle block without its attention mask.

    Each frame attends to itself and the frames before it. The library states that as a mask of all pixels
    against all, over a gigabyte at 640×608 and built for every five latent frames; attending frame by frame
    needs none and computes half as much. Same function, other rounding.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.resnets[0](hidden_states)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:
                hidden_states = hidden_states + _attend_to_the_past(attention, hidden_states)
            hidden_states = resnet(hidden_states)
        return hidden_states


def attend_framewise(vae: AutoencoderKLHunyuanVideo) -> None:
    """Have `vae`, with the weights it has, use `FramewiseMidBlock`."""
    for coder in (vae.encoder, vae.decoder):
        coder.mid_block.__class__ = FramewiseMidBlock


def _attend_to_the_past(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) → the same: one head, keys and values of frames 0 … t for the queries of frame t."""
    _, _, frames, height, width = x.shape
    x = rearrange(attention.group_norm(rearrange(x, "b c t h w -> b c (t h w)")), "b c n -> b n c")
    query, key, value = (
        rearrange(project(x), "b n (heads c) -> b heads n c", heads=attention.heads)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    n = height * width
    attended = [
        nn.functional.scaled_dot_product_attention(
            query[:, :, t * n : (t + 1) * n], key[:, :, : (t + 1) * n], value[:, :, : (t + 1) * n]
        )
        for t in range(frames)
    ]
    out = attention.to_out[0](rearrange(torch.cat(attended, dim=2), "b heads n c -> b n (heads c)"))
    return rearrange(out, "b (t h w) c -> b c t h w", t=frames, h=height, w=width)
