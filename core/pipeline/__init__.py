"""Image and prompt in, video out: the official FramePack job as two calls.

models = initialize_models()
video = generate_video_sync(models, image, request, "out.mp4")
"""

import base64
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from core.deadline import Deadline
from core.errors import TimeLimitError, VideoEncodingError
from core.file_format import codec_of
from core.frame import check_direction, end_picture, frame_size, resolution_of, start_picture
from core.pipeline.capacity import check_capacity
from core.pipeline.checkpoint import Checkpoint, Recorder
from core.pipeline.conditioning import Conditioning, encode_conditioning
from core.pipeline.decoding import VideoDecoder
from core.pipeline.encoding import Encoder
from core.pipeline.extension import joined
from core.pipeline.models import Models
from core.pipeline.one_frame import plan_one_frame, sample_one_frame
from core.pipeline.sampling import SampledSection, sample_sections, schedule_mu
from core.pipeline.sections import Section, SectionPlan, plan_video
from core.pipeline.start import initialize_models
from core.progress import Pace, Progress
from core.request import VideoRequest
from core.timing import JobTimer
from core.video import VideoFile, first_frame_jpeg, save_video
from core.weights.profiles import Direction
from diffusers_helper.blending import frames_between
from diffusers_helper.buckets import resize_and_center_crop
from diffusers_helper.preview import LatentPreview

if TYPE_CHECKING:
    from core.input_video import SourceVideo

__all__ = ["GeneratedVideo", "Models", "generate_video_sync", "initialize_models"]

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class GeneratedVideo:
    path: Path
    width: int
    height: int
    frames: int
    plan: SectionPlan
    sections: int  # finished; fewer than planned only where the time ran out and `partial` was asked
    tiled_decode: bool
    source: "SourceVideo | None"  # what it goes on from
    shift: float  # of the noise schedule
    warnings: tuple[str, ...]
    poster: bytes | None  # a JPEG of the first frame, where it was asked for
    conditioning: Conditioning


def generate_video_sync(
    models: Models,
    input_image: np.ndarray | None,
    request: VideoRequest,
    output_filename: str | Path,
    *,
    end_image: np.ndarray | None = None,
    keyframes: Mapping[int, np.ndarray] | None = None,
    seed: int | None = None,
    timer: JobTimer | None = None,
    report: Report = lambda progress: None,
    check_cancelled: Callable[[], None] = lambda: None,
    deadline: Deadline | None = None,
    on_section: Callable[[SampledSection], None] = lambda sampled: None,
    frugal: bool = False,
    spare_filename: Callable[[], Path] | None = None,
    shared: Conditioning | None = None,
    embed: Callable[[dict[str, Any]], str] | None = None,
    recorder: Recorder | None = None,
    resumed: Checkpoint | None = None,
    source: "SourceVideo | None" = None,
) -> GeneratedVideo:
    """Animate `input_image` (H, W, 3) uint8 as `request` asks and write the file to `output_filename`.

    Without one the video starts with the picture that the request's `start` names. `end_image`, of any size
    too, is what the video leads up to, and `keyframes` are the images of the request's `sections`, by their
    places there. Raises TooLargeForMemoryError before anything is computed.
    `seed` replaces the request's (which may ask for a drawn one). `check_cancelled` runs after every stage
    and step and may raise to stop; `report` is told where the job stands; `on_section` sees each section's
    latents; `frugal` spends time for memory (no transformer block kept on the GPU in swap mode, a tiled VAE).
    Encoding that fails is tried once more, at `spare_filename()`. Once `deadline` has passed no further step
    or decode starts: TimeLimitError, or where the request says `partial` the sections finished by then.
    `shared` is the conditioning of an earlier video of the same request; `embed` makes a text for the file
    from the parameters that were only decided here.
    `recorder` has what can be gone on from; `resumed` is what to go on from, and its image the `input_image`.
    `source` is the request's `input_video`, in place of the `input_image`: F1 goes on from its last frame,
    and I2V makes what comes before its first. The model sees its latents as history (`sections.Join`), and
    its frame at the join as start image and image embedding: F1 as in FramePack-Studio, but for what
    docs/imp_memo.md says.
    The transformer's LoRAs are not looked at: `models.use_loras` has them in place before.
    Reproduces the official `worker`, except that the start latent follows from the seed.
    """
    seed = request.seed if seed is None else seed
    timer = timer or JobTimer()
    deadline = deadline or Deadline()
    direction = request.model or models.profile.direction
    check_direction(request, direction)
    plan = _plan(request, direction)
    progress = Progress(sections=len(plan.sections), steps=request.steps)
    pace = Pace(len(plan.sections) * request.steps, given=resumed.count * request.steps if resumed else 0)

    def check() -> None:
        check_cancelled()
        deadline.check()

    def stage(name: str, section: int = 0, step: int = 0, **values: Any) -> None:
        check()
        now = progress.at(name, section, step, **values)
        report(replace(now, seconds_left=pace.left(now.steps_done)) if section else now)

    def on_step(section: Section, step: int, x0: torch.Tensor) -> None:
        decoder.look()
        stage("sample", section.index + 1, step, preview=preview_of(x0))

    resolution = resolution_of(request, models.profile)
    if source:
        input_image, height, width = source.at_the_join, source.height, source.width
    else:
        height, width = frame_size(request, input_image, resolution)
    check_capacity(models, plan, height, width, len(source.seen) if source else 0)
    image = start_picture(request, input_image, height, width, seed)
    end_image = end_picture(request, end_image, height, width)
    keyframes = {k: resize_and_center_crop(frame, height, width) for k, frame in (keyframes or {}).items()}

    stage("encode")
    if shared is None or request.start == "noise":  # which is another picture for each seed
        encoder = Encoder(models, timer, check, frugal)
        conditioning = encode_conditioning(
            models, image, plan, request, seed, encoder, keyframes, end_image, source
        )
    else:
        conditioning = shared.for_seed(seed)
    if resumed:
        conditioning = conditioning.starting_at(resumed.start_latent)
    if recorder:
        recorder.begin(image, conditioning.start_latent)
    shift = math.exp(schedule_mu(models, request, (plan.window, *conditioning.start_latent.shape[-2:])))
    preview_of = _previews(conditioning.start_latent, image) if request.preview else lambda x0: None

    path = Path(output_filename)
    edge = source.blended if source else None
    decoder = VideoDecoder(models, plan, timer, path.parent, force_tiling=frugal, edge=edge)
    preserved_gb = math.inf if frugal else request.gpu_memory_preservation
    try:
        stage("sample", section=1)
        job = models, plan, conditioning, request, seed, timer, on_step, preserved_gb
        with decoder:
            for sampled in sample_one_frame(*job) if request.one_frame else sample_sections(*job, resumed):
                on_section(sampled)
                if recorder:
                    recorder.add(sampled.latents, sampled.generator_state)
                stage("decode", sampled.section.index + 1, request.steps, preview=preview_of(sampled.latents))
                decoder.add(sampled.to_decode, check)
    except TimeLimitError as error:
        if not (request.partial and decoder.sections):
            raise _with_sections(error, decoder.sections, plan) from None
        timer.drop_sections(decoder.sections)

    clips = _FinishedClips(decoder, plan, source, request.include_source, check_cancelled)
    report(progress.at("mp4_encode", section=decoder.sections, step=request.steps))
    with timer.span("mp4_encode"):
        file = _file(request, embed({"shift": shift}) if embed else None)
        try:
            frames = save_video(clips, path, file)
        except VideoEncodingError:
            path = spare_filename() if spare_filename else path
            frames = save_video(clips, path, file)
        poster = first_frame_jpeg(clips) if request.poster else None
    return GeneratedVideo(
        path=path,
        width=width,
        height=height,
        frames=frames,
        plan=plan,
        sections=decoder.sections,
        tiled_decode=decoder.tiled,
        source=source,
        shift=shift,
        warnings=conditioning.warnings,
        poster=poster,
        conditioning=conditioning,
    )


def _plan(request: VideoRequest, direction: Direction) -> SectionPlan:
    if request.one_frame:
        return plan_one_frame(request, direction)
    return plan_video(request, direction)


@dataclass(frozen=True)
class _FinishedClips:
    """The video's clips from the first on, each time they are gone through."""

    decoder: VideoDecoder
    plan: SectionPlan
    source: "SourceVideo | None"
    include_source: bool
    check_cancelled: Callable[[], None]

    def __iter__(self) -> Iterator[torch.Tensor]:
        made = self.plan.frames_with(self.decoder.sections)
        kept = self.plan.frames if self.decoder.sections == len(self.plan.sections) else made
        clips = self.decoder.clips()
        if self.source:
            clips = joined(clips, self.source, made, kept, self.include_source, self.check_cancelled)
        elif kept < made:
            clips = frames_between(clips, 0, kept)
        for clip in clips:
            self.check_cancelled()
            yield clip


def _file(request: VideoRequest, embedded: str | None) -> VideoFile:
    codec = codec_of(request.format, request.codec)
    return VideoFile(request.format, codec, request.fps, request.mp4_crf, embedded)


def _previews(start_latent: torch.Tensor, image: np.ndarray) -> Callable[[torch.Tensor], Callable[[], str]]:
    """Latents → what makes a base64 JPEG of them, when it is wanted."""
    preview = LatentPreview(start_latent, image)
    return lambda latents: lambda: base64.b64encode(preview.strip(latents)).decode("ascii")


def _with_sections(error: TimeLimitError, finished: int, plan: SectionPlan) -> TimeLimitError:
    """What the caller could have had, or why there was nothing to have."""
    count = len(plan.sections)
    hint = "; ask for `partial` to get what is finished" if finished else ""
    return TimeLimitError(f"{str(error)[:-1]}, with {finished} of {count} sections finished{hint}.")
