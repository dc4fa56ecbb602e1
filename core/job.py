"""One job from JSON to JSON: the main path."""

import base64
import hashlib
import logging
import math
import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.deadline import Deadline
from core.delivery import Deliver, inlined, inlined_bytes
from core.embedding import embedded
from core.errors import OutOfMemoryError, RequestError
from core.extension import inert_extension_fields
from core.fetch import fetch_url
from core.ffmpeg import check_encoder
from core.file_format import FORMATS, codec_of, inert_fields
from core.frame import check_direction, frame_size, inert_frame_fields, resolution_of
from core.images import Fetch, decode_image
from core.input_video import SourceVideo, fit_video, open_video
from core.keyframes import Keyframe, decode_keyframes
from core.latents import check_transformer
from core.lora_files import shown_name
from core.one_frame import as_used, inert_one_frame_fields
from core.outputs import Failure, Made, Turn, all_warnings, make_outputs
from core.pipeline import GeneratedVideo, Models, Report, generate_video_sync
from core.pipeline.caching import cache_threshold, step_caches
from core.pipeline.checkpoint import Checkpoint
from core.pipeline.loras import ChosenLora, fit_loras, load_loras, lora_warnings
from core.progress import Progress
from core.request import MAX_SEED, VideoRequest, echo_of, parse_request
from core.resume import Handover, open_saved
from core.settings import Settings
from core.timing import JobTimer
from core.weights.profiles import Direction
from diffusers_helper import memory

log = logging.getLogger(__name__)

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

    `deliver` turns a finished file into the reply's video fields (core/delivery.py).
    Raises WorkerError for whatever can be told to the caller; leaves no file behind and the models usable
    either way.
    """
    settings = settings or Settings()
    timer = JobTimer(wait=_gpu_wait(models.device), on_stage=_log_stage)
    request = parse_request(data)
    check_encoder(codec_of(request.format, request.codec), request.format)
    direction = request.model or models.profile.direction
    check_direction(request, direction)
    deadline = Deadline(min(request.timeout_s or math.inf, settings.job_timeout_s))
    report(Progress())
    fetch = _fetcher(settings, deadline, check_cancelled)

    def check() -> None:
        check_cancelled()
        deadline.check()

    resolution = resolution_of(request, models.profile)
    saved = source = None
    with timer.span("input"):
        images, sums = _images(request, fetch)
        if request.input_video:
            source, sums["input_video"] = _source(request, direction, resolution, fetch, check)
        begins_with = source.at_the_join if source else images.get("input_image")
        if request.resume_latents:
            saved = open_saved(request, begins_with, models, settings, fetch)
            images["input_image"] = begins_with = saved.checkpoint.image
        size = (source.height, source.width) if source else frame_size(request, begins_with, resolution)
        keyframes = decode_keyframes(request.sections, fetch, size, check_cancelled)

    with timer.span("loras"):
        loras = load_loras(request.loras, settings, models.lora_cache, deadline, check)
    seed = saved.seed if saved else _seed(request)
    with timer.span("model_load"):
        models.use_direction(direction)
    # these refuse what the model cannot have
    step_caches(request, models.direction, models.magnitudes)
    _, told = fit_loras(models.transformer, loras)
    if saved:
        models.use_loras(loras, check)  # as when the latents were made
        check_transformer(saved, models)
    if models.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(models.device)

    job = _Job(
        models,
        settings,
        request,
        images,
        source,
        sums,
        keyframes,
        saved.checkpoint if saved else None,
        loras,
        job_id,
        deadline,
        check_cancelled,
        deliver,
    )
    outputs, failure = make_outputs(job.make, seed, request.num_outputs, timer, report)
    parameters = _parameters(request, seed, models, keyframes)
    return _reply(request, models, seed, parameters, told, outputs, failure, timer)


@dataclass(frozen=True)
class _Job:
    """All that its outputs have in common."""

    models: Models
    settings: Settings
    request: VideoRequest
    images: dict[str, np.ndarray]  # by field
    source: SourceVideo | None
    sums: dict[str, str]  # SHA-256 of their files, as far as there are any
    keyframes: dict[int, Keyframe]  # by their places in the request's `sections`
    resumed: Checkpoint | None
    loras: tuple[ChosenLora, ...]
    job_id: str
    deadline: Deadline
    check_cancelled: Callable[[], None]
    deliver: Deliver

    def check(self) -> None:
        """Raises when the job is cancelled or its time is up."""
        self.check_cancelled()
        self.deadline.check()

    @property
    def reproducible(self) -> bool:
        """Whether the parameters and the images' files make the video again."""
        begins = self.request.start is not None or self.sums.keys() & {"input_image", "input_video"}
        return bool(begins) and all(lora.url is None for lora in self.request.loras)

    def make(self, turn: Turn) -> Made:
        """One video, generated and delivered; its file is gone when this returns."""
        handover = Handover(
            self.request, turn.seed, self.models, self.settings, turn.name(self.job_id), self.check_cancelled
        )
        with ExitStack() as cleanup, handover.even_on_errors():

            def temporary_file(parent: Path | None = None) -> Path:
                folder = tempfile.TemporaryDirectory(prefix="framepack-", dir=parent)
                return Path(cleanup.enter_context(folder)) / f"video{FORMATS[self.request.format].suffix}"

            output_filename = temporary_file()

            def embed(decided: dict) -> str:
                alone = _parameters(self.request, turn.seed, self.models, self.keyframes)
                alone |= {"num_outputs": 1} | decided
                return embedded(alone, self.models.profile.name, self.sums)

            def generate(frugal: bool = False) -> GeneratedVideo:
                with turn.timer.span("loras"):
                    self.models.use_loras(self.loras, self.check)
                return generate_video_sync(
                    self.models,
                    self.images.get("input_image"),
                    self.request,
                    output_filename,
                    end_image=self.images.get("end_image"),
                    keyframes={place: keyframe.pixels for place, keyframe in self.keyframes.items()},
                    seed=turn.seed,
                    timer=turn.timer,
                    report=turn.report,
                    check_cancelled=self.check_cancelled,
                    deadline=self.deadline,
                    frugal=frugal,
                    # elsewhere than where the encoding failed: on the volume, if there is one
                    spare_filename=lambda: temporary_file(self.settings.volume),
                    shared=turn.shared,
                    embed=embed if self.request.embed_parameters and self.reproducible else None,
                    recorder=handover.recorder if self.request.return_latents else None,
                    resumed=self.resumed,
                    source=self.source,
                )

            try:
                video, retried = _with_memory_retry(self.models, turn.timer, generate)
            finally:
                memory.release_unused_memory(self.models.device)
            progress = Progress(sections=video.sections, steps=self.request.steps)
            turn.report(progress.at("deliver", section=video.sections, step=self.request.steps))
            poster = video.poster or b""
            with turn.timer.span("deliver"):
                delivered = self.deliver(
                    video.path,
                    turn.name(self.job_id),
                    self.request,
                    self.check_cancelled,
                    turn.taken + len(poster),
                )
                if poster:
                    delivered["poster_base64"] = base64.b64encode(poster).decode("ascii")
                delivered |= handover.deliver(turn.taken + inlined_bytes(delivered))
        warnings = _warnings(self.request, video, self.models, self.settings, retried)
        warnings += _inert_choices(self.request, turn.timer)
        warnings += [
            note for key in ("delivery_warning", "latents_warning") if (note := delivered.pop(key, None))
        ]
        reply = delivered | {
            "seed": turn.seed,
            "frames": video.frames,
            "duration_s": None if self.request.one_frame else round(video.frames / self.request.fps, 3),
            "sections": video.sections,
            "partial": video.sections < len(video.plan.sections),
            **({"resumed_sections": self.resumed.count} if self.resumed else {}),
        }
        return Made(video, reply, inlined_bytes(delivered), warnings, retried, turn.timer)


def _reply(
    request: VideoRequest,
    models: Models,
    seed: int,
    parameters: dict,
    loras: list[dict],
    outputs: list[Made],
    failure: Failure | None,
    timer: JobTimer,
) -> dict:
    """One output's fields beside those of the job, or several outputs in a list."""
    first = outputs[0]
    common = {
        "content_type": FORMATS[request.format].content_type,
        "width": first.video.width,
        "height": first.video.height,
        "fps": request.fps,
        "requested_s": None if request.one_frame else request.total_second_length,
        **({"source": first.video.source.told()} if first.video.source else {}),
        "parameters": parameters | {"shift": first.video.shift},
        "loras": loras,
        "warnings": all_warnings(outputs) + lora_warnings(loras) + ([failure.sentence] if failure else []),
        "worker": _worker(models, any(output.retried for output in outputs)),
    }
    if request.num_outputs == 1:
        return first.reply | common | {"timings": _job_timings(timer) | _output_timings(timer)}
    listed = [output.reply | {"timings": _output_timings(output.timer)} for output in outputs]
    reply = {"outputs": listed, "seed": seed} | common | {"timings": _job_timings(timer)}
    return reply | ({"refresh_worker": True} if failure and failure.refresh_worker else {})


def _with_memory_retry(
    models: Models, timer: JobTimer, generate: Callable[..., GeneratedVideo]
) -> tuple[GeneratedVideo, bool]:
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


def _seed(request: VideoRequest) -> int:
    return random.SystemRandom().randint(0, MAX_SEED) if request.seed in (None, -1) else request.seed


def _parameters(request: VideoRequest, seed: int, models: Models, keyframes: dict[int, Keyframe]) -> dict:
    used = echo_of(request)
    for place, keyframe in keyframes.items():
        used["sections"][place]["image"] = f"sha256:{keyframe.sha256}"
    return used | {
        "loras": [{"name": shown_name(lora), "weight": lora.weight} for lora in request.loras],
        "seed": seed,
        "codec": codec_of(request.format, request.codec),
        "model": models.direction,
        "resolution": None if request.width else resolution_of(request, models.profile),
        "cache": request.cache_kind,
        "cache_threshold": cache_threshold(request),
        "one_frame": as_used(request).model_dump() if request.one_frame else None,
    }


def _warnings(
    request: VideoRequest, video: GeneratedVideo, models: Models, settings: Settings, retried: bool
) -> list[str]:
    warnings = [*video.warnings, *models.warnings]
    planned = len(video.plan.sections)
    if video.sections < planned:
        which = "end" if video.plan.direction == "i2v" else "start"
        whose = "new part" if video.source else "video"
        warnings.append(
            f"The time was up after {video.sections} of {planned} sections; they are the {whose}'s {which}."
        )
    limited = request.timeout_s is not None or settings.job_timeout_s < math.inf
    if request.partial and not limited and not request.one_frame:
        warnings.append("`partial` had no effect: the job has no time limit (`timeout_s`).")
    given = request.model_fields_set
    warnings += inert_frame_fields(request) + inert_fields(request.format, given)
    warnings += inert_one_frame_fields(request) + inert_extension_fields(request)
    if request.exact_length and video.sections < planned:
        warnings.append("`exact_length` had no effect: the video is partial, and not as long as asked.")
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


def _images(request: VideoRequest, fetch: Fetch) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The request's images by field, (H, W, 3) uint8 each, and the SHA-256 of their files."""

    def fetch_end(url: str, max_bytes: int) -> bytes:
        try:
            return fetch(url, max_bytes)
        except RequestError as error:  # of two URLs, this one
            raise type(error)(f"`end_image`: {error}") from error

    images, sums = {}, {}
    for name, get in (("input_image", fetch), ("end_image", fetch_end)):
        if (text := getattr(request, name)) is not None:
            file = hashlib.sha256()
            images[name] = decode_image(text, get, file.update, name.replace("_", " "))
            sums[name] = file.hexdigest()
    return images, sums


def _source(
    request: VideoRequest, direction: Direction, resolution: int, fetch: Fetch, check: Callable[[], None]
) -> tuple[SourceVideo, str]:
    """The request's video at the job's size, and the SHA-256 of its file."""
    file = hashlib.sha256()
    video = open_video(request.input_video, fetch, file.update, check)
    height, width = frame_size(request, video.first_frame, resolution)
    source = fit_video(video, height, width, request.latent_window_size, direction == "f1", check)
    return source, file.hexdigest()


def _inert_choices(request: VideoRequest, timer: JobTimer) -> list[str]:
    """Of the sampler, the schedule and the step cache, what was asked for and changed nothing."""
    warnings = []
    if request.steps <= 2 and request.sampler != "unipc_bh1":
        warnings.append("`sampler` had no effect: with one or two steps all samplers do the same.")
    if request.steps == 1 and request.shift:
        warnings.append("`shift` had no effect: a single step has no schedule.")
    choices = {
        "cache": request.cache not in (None, "none"),
        "cache_threshold": request.cache_threshold is not None,
        "cache_order": request.cache_order > 0,
    }
    asked = [name for name, is_asked in choices.items() if is_asked]
    if request.cache_kind == "none":
        warnings += [f"`{name}` had no effect: no step cache is used." for name in asked]
    elif asked and all(section["steps_computed"] == section["steps"] for section in timer.sections):
        warnings.append(f"`{asked[0]}` had no effect: every step was computed.")
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


def _job_timings(timer: JobTimer) -> dict:
    return {
        "input": timer.seconds("input"),
        "model_load": timer.seconds("model_load"),
        "loras": timer.seconds("loras"),
        "total": timer.total(),
    }


def _output_timings(timer: JobTimer) -> dict:
    return {
        "loras": timer.seconds("loras"),
        "text_encode": timer.seconds("text_encode"),
        "encodings": timer.encodings,
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
        "precision": models.precision,
        "compiled": models.compiled,
        "attention": models.attention,
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
    """For what the calling thread has the GPU do: a section may be decoded beside the next one's steps."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.cuda.current_stream(device).synchronize()
