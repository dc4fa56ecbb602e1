"""Previews: a linear map from latents to colours, fitted on the job's own image."""

import io

import numpy as np
import pytest
import torch
from einops import rearrange, repeat
from PIL import Image

from diffusers_helper.preview import MAX_BYTES, LatentPreview


def psnr(a, b):
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b.astype(float)).mean())


def smooth_colours(height, width, seed=0):
    """(h, w, 3) uint8: every colour appears, near ones next to each other."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (x / width, y / height, (np.sin(x / 5 + seed) + 1) / 2)
    return (255 * np.stack(channels, axis=-1)).astype(np.uint8)


def made_of(colours, matrix):
    """Latents (1, 16, T, h, w) that are a linear function of colours (T, h, w, 3)."""
    return rearrange(torch.from_numpy(colours).double() @ matrix, "t h w c -> 1 c t h w").float()


def test_a_linear_vae_is_read_exactly():
    """Fitted on one picture, other pictures of the same VAE come out right."""
    matrix = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).double()
    start, later = smooth_colours(24, 16), np.stack([smooth_colours(24, 16, seed) for seed in (2, 3)])
    image = repeat(start, "h w c -> (h a) (w b) c", a=8, b=8)
    preview = LatentPreview(made_of(start[None], matrix), image)
    assert psnr(preview.frames(made_of(later, matrix)), later) > 45


@pytest.mark.parametrize("frames", [1, 2, 9, 33])
@pytest.mark.parametrize("size", [(28, 16), (80, 76), (176, 80)])
def test_a_strip_is_a_small_jpeg(frames, size):
    """Noise is what compresses worst."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, frames, *size, generator=generator)
    image = np.random.default_rng(0).integers(0, 256, (8 * size[0], 8 * size[1], 3), dtype=np.uint8)
    jpeg = LatentPreview(latents[:, :, :1], image).strip(latents)
    assert len(jpeg) <= MAX_BYTES
    picture = Image.open(io.BytesIO(jpeg))
    assert picture.format == "JPEG"
    assert picture.size == (2 * size[1] * min(5, frames), 2 * size[0])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e30])
def test_odd_latents_are_no_fault(value):
    latents = torch.full((1, 16, 3, 4, 6), value)
    assert LatentPreview(latents[:, :, :1], np.zeros((32, 48, 3), np.uint8)).strip(latents)
