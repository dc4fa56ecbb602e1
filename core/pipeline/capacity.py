"""Is there memory for a job? Estimated from its size before anything is computed.

Only what could not run even with swapped models and a tiled VAE is refused; a job that is larger than the
memory at hand, but not than that, has its second attempt (core/job.py).
"""

import math
import re
from pathlib import Path

from core.errors import TooLargeForMemoryError
from core.pipeline.clips import IN_MEMORY
from core.pipeline.decoding import decode_bytes
from core.pipeline.models import Models
from core.pipeline.sections import HISTORY, SectionPlan, frames_of
from diffusers_helper import memory

MEMORY_INFO = Path("/proc/meminfo")
CPU_SHARE = 0.5  # of what a GPU takes; measured with a VAE of 8 channels at 512×512 (1.0 GB)
TOKEN_PEAK = 19.0  # hidden states alive at once: 2.0 GB beside the weights at 640×608 and W = 9


def check_capacity(models: Models, plan: SectionPlan, height: int, width: int, held_frames: int = 0) -> None:
    """Raises TooLargeForMemoryError where the GPU, or the machine's own memory, cannot hold the job.

    `held_frames` are those of a given video that lie in memory, as bytes, and are encoded.
    """
    device = models.device
    needed = max(
        sampling_bytes(models, plan, height, width),
        decoding_bytes(models, plan, height, width),
        _vae_bytes(models, height, width, held_frames),
    )
    video = min(3 * height * width * plan.frames, IN_MEMORY)  # as bytes, until the file is written
    video += 3 * height * width * held_frames
    if device.type == "cpu":
        _check(video + needed, available_memory(), "memory", plan, height, width)
    else:
        freed = sum(map(memory.bytes_on_gpu, [*models.modules(), *models.idle]))
        _check(needed, memory.free_gpu_memory(device) + freed, "GPU memory", plan, height, width)
        _check(video, available_memory(), "memory", plan, height, width)


def sampling_bytes(models: Models, plan: SectionPlan, height: int, width: int) -> int:
    """Of one step: what is computed, and on a GPU the least of the transformer that must be there."""
    transformer = models.transformer
    tokens = section_tokens(plan, height, width, transformer.config.patch_size)
    hidden = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    computed = int(TOKEN_PEAK * tokens * hidden * models.transformer_dtype.itemsize)
    return computed + (memory.least_streamed_bytes(transformer) if models.device.type != "cpu" else 0)


def section_tokens(plan: SectionPlan, height: int, width: int, patch: int, compression: int = 8) -> int:
    """Of a section with its history; the prompt's and the image's few hundred are left out."""

    def frame(factor: int) -> int:
        return math.prod(math.ceil(side / (compression * patch * factor)) for side in (height, width))

    _, half, quarter = HISTORY
    clean = plan.window + len(plan.sections[0].clean)
    return clean * frame(1) + half // 2 * frame(2) + quarter // 4 * frame(4)


def decoding_bytes(models: Models, plan: SectionPlan, height: int, width: int) -> int:
    """Of the longest decode: in tiles on a GPU, where the VAE must be brought; whole on a CPU."""
    alone = len(plan.sections) == 1 and not plan.extends
    latent_frames = plan.window + 1 if alone else 2 * plan.window + 1
    return _vae_bytes(models, height, width, 2 * frames_of(latent_frames))  # in pieces, and joined


def _vae_bytes(models: Models, height: int, width: int, frames: int) -> int:
    """Of a decode, or of an encode, which computes less, beside the pixels of so many frames."""
    vae = models.vae
    pixels = 3 * height * width * frames * vae.dtype.itemsize
    if models.device.type == "cpu":
        return int(CPU_SHARE * decode_bytes(models, height, width)) + pixels
    tile = min(height, vae.tile_sample_min_height), min(width, vae.tile_sample_min_width)
    return memory.weight_bytes(vae) + decode_bytes(models, *tile) + pixels


def available_memory() -> float:
    """Bytes of this machine's memory that can still be had; infinite where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", MEMORY_INFO.read_text(), re.MULTILINE)
    except OSError:
        return math.inf
    return int(found[1]) * 1024 if found else math.inf


def _check(needed: int, available: float, what: str, plan: SectionPlan, height: int, width: int) -> None:
    if needed > available:
        raise TooLargeForMemoryError(
            f"A video of {width}×{height} pixels and {plan.frames} frames, {plan.window} latent frames a "
            f"section, needs about {needed / memory.GB:.1f} GB of {what}, and {available / memory.GB:.1f} GB "
            "can be had; a smaller frame, `latent_window_size` or `total_second_length` needs less."
        )
