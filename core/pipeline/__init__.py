"""Image and prompt in, video out: the official FramePack job as two calls.

models = initialize_models()
video = generate_video_sync(models, image, request, "out.mp4")
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.pipeline.conditioning import encode_conditioning
from core.pipeline.decoding import VideoDecoder
from core.pipeline.models import Models, initialize_models
from core.pipeline.sampling import SampledSection, sample_sections
from core.pipeline.sections import FPS, Section, SectionPlan, plan_sections
from core.progress import Progress
from core.request import VideoRequest
from core.timing import JobTimer
from core.video import save_bcthw_as_mp4
from diffusers_helper.buckets import nearest_bucket, resize_and_center_crop

__all__ = ["GeneratedVideo", "Models", "generate_video_sync", "initialize_models"]

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class GeneratedVideo:
    path: Path
    width: int
    height: int
    frames: int
    plan: SectionPlan
    tiled_decode: bool
    warnings: tuple[str, ...]


def generate_video_sync(
    models: Models,
    input_image: np.ndarray,
    request: VideoRequest,
    output_filename: str | Path,
    *,
    seed: int | None = None,
    timer: JobTimer | None = None,
    report: Report = lambda progress: None,
    check_cancelled: Callable[[], None] = lambda: None,
    on_section: Callable[[SampledSection], None] = lambda sampled: None,
    frugal: bool = False,
) -> GeneratedVideo:
    """Animate `input_image` (H, W, 3) uint8 as `request` asks and write the MP4 to `output_filename`.

    `seed` replaces the request's (which may ask for a drawn one). `check_cancelled` runs after every stage
    and step and may raise to stop; `report` is told where the job stands; `on_section` sees each section's
    latents; `frugal` spends time for memory (no transformer block kept on the GPU in swap mode, a tiled VAE).
    Reproduces the official `worker`, except that the start latent follows from the seed.
    """
    seed = request.seed if seed is None else seed
    timer = timer or JobTimer()
    direction = request.model or models.profile.direction
    plan = plan_sections(request.total_second_length, request.latent_window_size, direction)
    progress = Progress(sections=len(plan.sections), steps=request.steps)

    def stage(name: str, **position: int) -> None:
        check_cancelled()
        report(progress.at(name, **position))

    def on_step(section: Section, step: int) -> None:
        stage("sample", section=section.index + 1, step=step)

    resolution = request.resolution or models.profile.resolution
    height, width = nearest_bucket(*input_image.shape[:2], resolution)
    image = resize_and_center_crop(input_image, height, width)

    stage("encode")
    conditioning = encode_conditioning(models, image, request, seed, timer)

    decoder = VideoDecoder(models, plan, timer, force_tiling=frugal)
    stage("sample", section=1)
    preserved_gb = math.inf if frugal else request.gpu_memory_preservation
    for sampled in sample_sections(
        models, plan, conditioning, request, seed, timer, on_step, preserved_gb=preserved_gb
    ):
        on_section(sampled)
        stage("decode", section=sampled.section.index + 1, step=request.steps)
        decoder.add(sampled.to_decode)

    stage("mp4_encode", section=len(plan.sections), step=request.steps)
    with timer.span("mp4_encode"):
        frames = save_bcthw_as_mp4(decoder.clips(), output_filename, FPS, request.mp4_crf)
    return GeneratedVideo(
        path=Path(output_filename),
        width=width,
        height=height,
        frames=frames,
        plan=plan,
        tiled_decode=decoder.tiled,
        warnings=conditioning.warnings,
    )
