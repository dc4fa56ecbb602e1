"""Section latents → pixels, joined into one video."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextvars import copy_context
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from core.pipeline.clips import ClipStore
from core.pipeline.models import Models
from core.pipeline.sections import SectionPlan
from core.timing import JobTimer
from diffusers_helper import memory
from diffusers_helper.blending import SectionJoiner, from_uint8
from diffusers_helper.vae import DecodedTiles, decode_latents
from diffusers_helper.vae_fused import kernels_work


class VideoDecoder:
    """Decodes sections as they come and joins them at the end that grows; long videos wait in `folder`.

    To be used as a context: a GPU on which the models are resident decodes a section beside the next one's
    steps, in a thread and a stream of its own. What goes wrong there is raised by the next call, or at the
    context's end. `tiled` is set as soon as one decode had to be split into spatial tiles for lack of memory;
    tiles are blended at their seams, so such a video differs slightly from an untiled one.
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
        self._pending: Future[None] | None = None

    def __enter__(self) -> "VideoDecoder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for what is under way; where another error is on its way, that one counts."""
        if error is None:
            self._finish()
        elif self._pending:
            wait([self._pending])

    def add(self, latents: torch.Tensor, check: Callable[[], None] = lambda: None) -> None:
        """Decode (1, 16, T, h, w), the newest latent frames, and blend them on.

        `check` runs now and then and may raise to stop; what was added before stays whole.
        """
        self._finish()
        models = self._models
        height, width = (side * models.vae.spatial_compression_ratio for side in latents.shape[-2:])
        tiled = self._force_tiling or not fits_untiled(models, height, width)
        self.tiled |= tiled
        decode = partial(self._decode, latents, len(self._timer.sections), tiled, check)
        if decodes_beside(models, height, width):
            context = copy_context()  # the log has the job's id there, too
            self._pending = models.decode_thread.submit(context.run, decode, models.decode_stream)
        else:
            decode()

    def look(self) -> None:
        """Raise what a decode beside the steps has already failed by."""
        if self._pending and self._pending.done():
            self._finish()

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _decode(
        self,
        latents: torch.Tensor,
        number: int,
        tiled: bool,
        check: Callable[[], None],
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        models = self._models
        with torch.cuda.stream(stream), self._timer.section_span("decode", number), models.on_device("vae"):
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


def decodes_beside(models: Models, height: int, width: int) -> bool:
    """Whether a section is decoded beside steps: where no model has to come and go for it, and a decode's
    memory is free twice over, as the other's stays for steps, which take less."""
    if models.device.type == "cpu" or models.memory_mode != "resident":
        return False
    return memory.free_gpu_memory(models.device) >= 2 * decode_bytes(models, height, width)


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
