"""Section latents → pixels, joined into one video."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from core.pipeline.clips import ClipStore
from core.pipeline.models import Models
from core.pipeline.sections import SectionPlan
from core.timing import JobTimer
from diffusers_helper.blending import SectionJoiner
from diffusers_helper.vae import DecodedTiles, decode_latents


class VideoDecoder:
    """Decodes sections as they come and joins them at the end that grows; long videos wait in `folder`.

    `tiled` is set as soon as one decode had to be split into spatial tiles for lack of memory; tiles are
    blended at their seams, so such a video differs slightly from an untiled one.
    """

    def __init__(
        self,
        models: Models,
        plan: SectionPlan,
        timer: JobTimer,
        folder: Path,
        force_tiling: bool = False,
    ) -> None:
        self._models = models
        self._timer = timer
        self._prepends = plan.direction == "i2v"
        self._force_tiling = force_tiling
        self._tiles = DecodedTiles()
        self._store = ClipStore(folder)
        self._joiner = SectionJoiner(plan.overlap, self._store.hold)
        self.tiled = False
        self.sections = 0  # how many are in

    def add(self, latents: torch.Tensor, check: Callable[[], None] = lambda: None) -> None:
        """Decode (1, 16, T, h, w), the newest latent frames, and blend them on.

        `check` runs now and then and may raise to stop; what was added before stays whole.
        """
        models = self._models
        with self._timer.section_span("decode"), models.on_device("vae"):
            tiled = self._force_tiling or not self._fits(latents)
            self.tiled |= tiled
            with self._tiles.used_by(models.vae):
                pixels = decode_latents(latents, models.vae, models.device, tiled, check)
            if self._prepends:
                self._joiner.prepend(pixels)
            else:
                self._joiner.append(pixels)
        self.sections += 1

    def clips(self) -> Iterator[torch.Tensor]:
        """The video so far: consecutive uint8 clips (1, 3, T, H, W)."""
        return self._joiner.clips(prepended=self._prepends)

    def _fits(self, latents: torch.Tensor) -> bool:
        models = self._models
        return models.device.type == "cpu" or models.has_gpu_memory(untiled_decode_bytes(models.vae, latents))


def untiled_decode_bytes(vae, latents: torch.Tensor) -> int:
    """GPU memory an untiled decode takes at its peak, measured and scaled by pixels and channels.

    The VAE decodes `tile_sample_min_num_frames` frames at a time, so length hardly matters.
    """
    _, _, _, height, width = latents.shape
    return decode_bytes(vae, height * vae.spatial_compression_ratio, width * vae.spatial_compression_ratio)


def decode_bytes(vae, height: int, width: int) -> int:
    """The same for a frame, or a tile, of so many pixels."""
    frames = vae.tile_sample_min_num_frames + 1
    return int(UNTILED_PEAK * height * width * frames * vae.config.block_out_channels[0] * vae.dtype.itemsize)


UNTILED_PEAK = 14.0  # activations alive at once; 13.3 were measured at 608×640 (21.0 GB)
