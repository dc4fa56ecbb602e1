"""Latents → a small picture of them, in microseconds and for any VAE.

Previews elsewhere multiply latents with a table fitted once for one VAE. Here every job fits its own: the
start image and its latent are some thousands of pairs of 16 channels and a colour, more than enough for the
17 × 3 numbers of a linear map (ridge regression).
"""

import io

import numpy as np
import torch
from einops import rearrange, reduce
from PIL import Image

RIDGE = 1e-3  # of the mean squared latent: colours that the image lacks stay near its mean
STRIP_FRAMES = 5
ENLARGED = 2  # latents are an eighth of the video's width
MAX_BYTES = 60_000  # of JPEG; base64 adds a third, and RunPod's updates should stay small


class LatentPreview:
    """The linear map of one job's latents to colours."""

    def __init__(self, start_latent: torch.Tensor, image: np.ndarray) -> None:
        """Fit to `start_latent` (1, 16, 1, h, w) and the `image` (8h, 8w, 3) uint8 that it encodes."""
        _, _, _, height, width = start_latent.shape
        colours = reduce(
            torch.from_numpy(image.copy()).double(), "(h a) (w b) c -> (h w) c", "mean", h=height, w=width
        )
        latents = rearrange(start_latent, "1 c 1 h w -> (h w) c").double().cpu()
        self._latent_mean, self._colour_mean = latents.mean(0), colours.mean(0)
        x, y = latents - self._latent_mean, colours - self._colour_mean
        strength = RIDGE * len(x) * latents.square().mean() + 1e-12  # never 0: a black latent has a map too
        ridge = strength * torch.eye(x.shape[1], dtype=x.dtype)
        self._weights = torch.linalg.solve(x.T @ x + ridge, x.T @ y)  # (16, 3)

    def frames(self, latents: torch.Tensor) -> np.ndarray:
        """(1, 16, T, h, w) → (T, h, w, 3) uint8."""
        x = rearrange(latents, "1 c t h w -> t h w c").double().cpu()
        colours = (x - self._latent_mean) @ self._weights + self._colour_mean
        return colours.nan_to_num().round().clamp(0, 255).to(torch.uint8).numpy()

    def strip(self, latents: torch.Tensor) -> bytes:
        """A JPEG of up to five frames of `latents`, evenly spaced and side by side; at most 60 kB."""
        count = min(STRIP_FRAMES, latents.shape[2])
        chosen = torch.linspace(0, latents.shape[2] - 1, count).round().long()
        row = rearrange(self.frames(latents[:, :, chosen]), "t h w c -> h (t w) c")
        picture = Image.fromarray(row)
        picture = picture.resize(
            (picture.width * ENLARGED, picture.height * ENLARGED), Image.Resampling.BICUBIC
        )
        for quality in (85, 60, 30, 10):
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= MAX_BYTES:
                break
        return buffer.getvalue()
