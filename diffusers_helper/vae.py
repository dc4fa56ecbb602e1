"""Pixels ↔ latents through AutoencoderKLHunyuanVideo (8× in space, 4× in time, 16 channels)."""

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo


@torch.no_grad()
def encode_image(
    image: np.ndarray, vae: AutoencoderKLHunyuanVideo, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """(H, W, 3) uint8 → start latent (1, 16, 1, H/8, W/8), scaled, in the VAE's dtype.

    The posterior is sampled with `generator`; the official code draws from the global one, so that its
    start latent does not follow from the job's seed.
    """
    pixels = torch.from_numpy(image.copy()).float() / 127.5 - 1
    pixels = pixels.permute(2, 0, 1)[None, :, None].to(device, vae.dtype)
    latents = vae.encode(pixels).latent_dist.sample(generator=generator)
    return latents * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(
    latents: torch.Tensor, vae: AutoencoderKLHunyuanVideo, device: torch.device, tiled: bool = False
) -> torch.Tensor:
    """(1, 16, T, h, w) → pixels (1, 3, 4T − 3, 8h, 8w) in −1…1 on the CPU, in the VAE's dtype.

    `tiled` decodes 256-pixel tiles and blends them at their seams: less memory, slightly other pixels.
    """
    latents = latents / vae.config.scaling_factor
    vae.use_tiling = tiled
    try:
        return vae.decode(latents.to(device, vae.dtype), return_dict=False)[0].cpu()
    finally:
        vae.use_tiling = False  # the next job's image is encoded whole
