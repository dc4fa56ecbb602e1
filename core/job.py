"""One job from JSON to JSON: the main path."""

import logging
import math
import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from core.deadline import Deadline
from core.delivery import CONTENT_TYPE, Deliver, inlined
from core.errors import OutOfMemoryError
from core.fetch import fetch_url
from core.images import Fetch, decode_image
from core.pipeline import GeneratedVideo, Models, Report, generate_video_sync
from core.pipeline.loras import load_loras, lora_warnings
from core.pipeline.sections import FPS
from core.progress import Progress
from core.request import MAX_SEED, SECRETS, VideoRequest, parse_request
from core.settings import Settings
from core.timing import JobTimer
from diffusers_helper import memory

log = logging.getLogger(__name__)

T = TypeVar("T")
LIBRARIES = ("torch", "diffusers", "transformers", "runpod")


def run_job(
    data: Any,
    models: Models,
    settings: Settings | None = None,
    *,
    job_id: str = "job",
    report: Report = lambda progress: None,
    check_cancelled: Callable[[], None] = lambda: None,
    deliver: Deliver = inlined,
) -> dict:
    """Make the video that `data`, a job's input, asks for. Returns the reply (docs/in_out_spec.md).

    `deliver` turns the finished MP4 into the reply's video fields (core/delivery.py).
    Raises WorkerError for whatever can be told to the caller; leaves no file behind and the models usable
    either way.
    """
    settings = settings or Settings()
    timer = JobTimer(wait=_gpu_wait(models.device), on_stage=_log_stage)
    request = parse_request(data)
    deadline = Deadline(min(request.timeout_s or math.inf, settings.job_timeout_s))
    report(Progress())
    with timer.span("input"):
        image = decode_image(request.input_image, fetch=_fetcher(settings, deadline, check_cancelled))

    def check() -> None:
        check_cancelled()
        deadline.check()

    with timer.span("loras"):
        loras = load_loras(request.loras, settings, models.lora_cache, deadline, check)
    seed = random.SystemRandom().randint(0, MAX_SEED) if request.seed in (None, -1) else request.seed
    with timer.span("model_load"):
        models.use_direction(request.model or models.profile.direction)
    if models.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(models.device)

    with ExitStack() as cleanup:

        def temporary_mp4(parent: Path | None = None) -> Path:
            folder = tempfile.TemporaryDirectory(prefix="framepack-", dir=parent)
            return Path(cleanup.enter_context(folder)) / "video.mp4"

        def spare_mp4() -> Path:
            """Elsewhere than where the encoding failed: on the volume, if there is one."""
            return temporary_mp4(settings.volume)

        output_filename = temporary_mp4()

        def generate(frugal: bool = False) -> tuple[GeneratedVideo, list[dict]]:
            with timer.span("loras"):
                used = models.use_loras(loras, check)
            video = generate_video_sync(
                models,
                image,
                request,
                output_filename,
                seed=seed,
                timer=timer,
                report=report,
                check_cancelled=check_cancelled,
                deadline=deadline,
                frugal=frugal,
                spare_filename=spare_mp4,
            )
            return video, used

        try:
            (video, used_loras), retried = _with_memory_retry(models, timer, generate)
        finally:
            memory.release_unused_memory(models.device)
        report(
            Progress(
                sections=video.sections,
                steps=request.steps,
                stage="deliver",
                section=video.sections,
                step=request.steps,
            )
        )
        with timer.span("deliver"):
            delivered = deliver(video.path, job_id, request, check_cancelled)

    warnings = _warnings(request, video, models, settings, retried) + lora_warnings(used_loras)
    if note := delivered.pop("delivery_warning", None):
        warnings.append(note)
    return delivered | {
        "content_type": CONTENT_TYPE,
        "seed": seed,
        "width": video.width,
        "height": video.height,
        "fps": FPS,
        "frames": video.frames,
        "duration_s": round(video.frames / FPS, 3),
        "sections": video.sections,
        "partial": video.sections < len(video.plan.sections),
        "parameters": _parameters(request, seed, models, used_loras),
        "loras": used_loras,
        "warnings": warnings,
        "timings": _timings(timer),
        "worker": _worker(models, retried),
    }


def _with_memory_retry(models: Models, timer: JobTimer, generate: Callable[..., T]) -> tuple[T, bool]:
    """Generate; when the GPU's memory runs out, once more with models swapped and the VAE tiled."""
    try:
        return generate(), False
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        log.warning("out of GPU memory; trying again with swapped models and a tiled VAE")
    # only here, outside the handler, are the failed attempt's tensors free
    mode = models.memory_mode
    try:
        models.set_memory_mode("swap")
        timer.restart()
        return generate(frugal=True), True
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
    finally:
        memory.release_unused_memory(models.device)
        models.set_memory_mode(mode)
    raise OutOfMemoryError(
        "The GPU has too little memory for this job, even with swapped models and a tiled VAE; "
        "try a smaller `resolution` or `latent_window_size`, or a larger `gpu_memory_preservation`."
    )


def _parameters(request: VideoRequest, seed: int, models: Models, loras: list[dict]) -> dict:
    used = request.model_dump(exclude={*SECRETS, "loras"})
    return used | {
        "loras": [{"name": lora["name"], "weight": lora["weight"]} for lora in loras],
        "seed": seed,
        "model": models.direction,
        "resolution": request.resolution or models.profile.resolution,
    }


def _warnings(
    request: VideoRequest, video: GeneratedVideo, models: Models, settings: Settings, retried: bool
) -> list[str]:
    warnings = [*video.warnings]
    planned = len(video.plan.sections)
    if video.sections < planned:
        which = "end" if video.plan.direction == "i2v" else "start"
        warnings.append(
            f"The time was up after {video.sections} of {planned} sections; they are the video's {which}."
        )
    if request.partial and request.timeout_s is None and settings.job_timeout_s == math.inf:
        warnings.append("`partial` had no effect: the job has no time limit (`timeout_s`).")
    given = request.model_fields_set
    if request.cfg == 1:
        if request.n_prompt:
            warnings.append("`n_prompt` had no effect: it acts only where `cfg` is above 1.")
        if request.rs:
            warnings.append("`rs` had no effect: it acts only where `cfg` is above 1.")
    if "gpu_memory_preservation" in given and models.memory_mode != "swap" and not retried:
        warnings.append(
            f"`gpu_memory_preservation` had no effect: the memory mode is {models.memory_mode}, not swap."
        )
    if retried:
        warnings.append(
            "The GPU's memory ran out; the job was run again with swapped models and a tiled VAE."
        )
    elif video.tiled_decode:
        warnings.append("The video was decoded in tiles to fit the GPU's memory; seams are blended.")
    return warnings


def _fetcher(settings: Settings, deadline: Deadline, check_cancelled: Callable[[], None]) -> Fetch:
    """What gets an input's URL, within the job's time."""

    def fetch(url: str, max_bytes: int) -> bytes:
        return fetch_url(
            url,
            max_bytes=max_bytes,
            timeout_s=min(settings.download_timeout_s, deadline.left),
            allowed_hosts=settings.input_hosts,
            check_cancelled=check_cancelled,
        )

    return fetch


def _log_stage(name: str, seconds: float) -> None:
    log.info("%s: %.2f s", name, seconds)


def _timings(timer: JobTimer) -> dict:
    return {
        "input": timer.seconds("input"),
        "model_load": timer.seconds("model_load"),
        "loras": timer.seconds("loras"),
        "text_encode": timer.seconds("text_encode"),
        "image_encode": {"vae": timer.seconds("vae_encode"), "clip_vision": timer.seconds("clip_vision")},
        "sections": timer.sections,
        "step": timer.step_summary(),
        "mp4_encode": timer.seconds("mp4_encode"),
        "deliver": timer.seconds("deliver"),
        "total": timer.total(),
    }


def _worker(models: Models, retried: bool) -> dict:
    gpu = models.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(models.device) if gpu else "cpu",
        "peak_memory_gb": round(torch.cuda.max_memory_allocated(models.device) / memory.GB, 2)
        if gpu
        else None,
        "precision": str(models.transformer_dtype).removeprefix("torch."),
        "memory_mode": "swap" if retried else models.memory_mode,
        "profile": models.profile.name,
        "model_load_s": round(models.load_seconds, 3),
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
    }


def _version(library: str) -> str | None:
    """None where it is not installed: behind Lambda there need be no runpod."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _gpu_wait(device: torch.device) -> Callable[[], None]:
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
