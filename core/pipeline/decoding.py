"""Section latents → pixels, joined into one video."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from core.pipeline.clips import ClipStore
from core.pipeline.models import Models
from core.pipeline.sections import SectionPlan
from core.timing import JobTimer
from diffusers_helper.blending import SectionJoiner, from_uint8
from diffusers_helper.vae import DecodedTiles, decode_latents
from diffusers_helper.vae_fused import kernels_work


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
        edge: np.ndarray | None = None,
    ) -> None:
        """`edge`, (T, H, W, 3) uint8, is what there is of a given video to blend the first section with."""
        self._models = models
        self._timer = timer
        self._prepends = plan.direction == "i2v"
        self._force_tiling = force_tiling
        self._tiles = DecodedTiles()
        self._store = ClipStore(folder)
        begun = None if edge is None else from_uint8(edge, models.vae.dtype)
        self._joiner = SectionJoiner(plan.overlap, self._store.hold, begun)
        self.tiled = False
        self.sections = 0  # how many are in

    def add(self, latents: torch.Tensor, check: Callable[[], None] = lambda: None) -> None:
        """Decode (1, 16, T, h, w), the newest latent frames, and blend them on.

        `check` runs now and then and may raise to stop; what was added before stays whole.
        """
        models = self._models
        with self._timer.section_span("decode"), models.on_device("vae"):
            *_, height, width = latents.shape
            scale = models.vae.spatial_compression_ratio
            tiled = self._force_tiling or not fits_untiled(models, height * scale, width * scale)
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


def fits_untiled(models: Models, height: int, width: int) -> bool:
    """Whether the GPU has memory to decode such a frame as a whole, or to encode it, which takes less."""
    return models.device.type == "cpu" or models.has_gpu_memory(decode_bytes(models, height, width))


def decode_bytes(models: Models, height: int, width: int) -> int:
    """Memory that decoding a frame, or a tile, of so many pixels takes at its peak, measured and scaled.

    The VAE decodes `tile_sample_min_num_frames` frames at a time, so length hardly matters.
    """
    vae = models.vae
    activation = height * width * (vae.tile_sample_min_num_frames + 1) * vae.config.block_out_channels[0]
    alive = FUSED_PEAK if kernels_work(models.device) else UNTILED_PEAK
    return int(alive * activation * vae.dtype.itemsize)


# activations alive at once; 13.3 were measured at 608×640 (21.0 GB), and 6.1 where all is fused (9.7 GB)
UNTILED_PEAK, FUSED_PEAK = 14.0, 6.5
