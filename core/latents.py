"""A job's checkpoint ↔ a safetensors file, so that another job may go on from it.

Tensors: `history` (1, 16, n·W, h, w) float32, the latents of all sampled sections in the video's order,
without the start latent; `start_latent` (1, 16, 1, h, w) float32; `image` (8h, 8w, 3) uint8;
`generator_state` uint8. Metadata: `format`, and as JSON `job`: what the latents follow from besides that.

The file comes back from strangers, so it is believed in nothing but what is checked here.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from core.errors import LatentsError, LatentsMismatchError
from core.frame import frame_size, resolution_of
from core.lora_files import shown_name
from core.pipeline.caching import cache_threshold
from core.pipeline.checkpoint import Checkpoint
from core.pipeline.models import Models
from core.pipeline.sections import plan_video
from core.request import MAX_SEED, SECRETS, VideoRequest
from diffusers_helper.buckets import resize_and_center_crop

FORMAT = "framepack-latents-1"
TENSORS = ("generator_state", "history", "image", "start_latent")
CHANNELS = 16  # of HunyuanVideo's latents
MAX_HEADER_BYTES = 1_000_000
MAX_LATENT = 1e4  # real ones stay within 10; what is larger would overflow half precision
MAX_SHOWN = 40  # characters of what the file says

# fields that the sampled latents do not depend on; the length is looked at by itself
FREE = {
    "input_image",
    "total_second_length",
    "gpu_memory_preservation",
    "mp4_crf",
    "output",
    "s3_config",
    "timeout_s",
    "partial",
    "preview",
    "return_latents",
    "resume_latents",
    "format",
    "codec",
    "fps",
    "poster",
    "embed_parameters",
    "exact_length",
    "include_source",
    "num_outputs",
}


@dataclass(frozen=True)
class SavedLatents:
    checkpoint: Checkpoint
    job: dict  # parameters by name, `sections` that were planned, `transformer` by its digest

    @property
    def seed(self) -> int:
        return self.job["seed"]


def job_of(request: VideoRequest, seed: int, models: Models, direction: str, sections: int) -> dict:
    """What latents follow from, JSON-safe: every field of the request that is not free, as really used."""
    used = request.model_dump(mode="json", exclude=FREE | {"sections"})
    for name in used.keys() & set(SECRETS):  # too large, or nobody's business
        used[name] = used[name] and _digest(json.dumps(used[name]).encode())
    timed = request.model_dump_json(include={"sections"}).encode()
    return used | {
        "loras": [
            {"name": shown_name(lora), "weight": lora.weight, "url": lora.url and _digest(lora.url.encode())}
            for lora in request.loras
        ],
        "cache": request.cache_kind,
        "cache_threshold": cache_threshold(request),
        "seed": seed,
        "model": direction,
        "resolution": resolution_of(request, models.profile),
        "sections": sections,
        "timed": _digest(timed) if request.sections else None,
    }


def transformer_digest(models: Models) -> str:
    """Of the output projection: small, another in every model, the same wherever it was loaded from."""
    weight = models.transformer.proj_out.weight.detach().float().cpu().contiguous()
    return _digest(weight.numpy().tobytes())


def write_latents(path: Path, checkpoint: Checkpoint, job: dict, digest: str) -> None:
    """Write the file. Raises OSError."""
    sections = checkpoint.sections if job["model"] == "f1" else checkpoint.sections[::-1]
    tensors = {
        "history": torch.cat(sections, dim=2).float(),
        "start_latent": checkpoint.start_latent.contiguous(),
        "image": torch.from_numpy(checkpoint.image.copy()),
        "generator_state": checkpoint.generator_state,
    }
    metadata = {"format": FORMAT, "job": json.dumps(job | {"transformer": digest})}
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error


def most_bytes(request: VideoRequest, models: Models) -> int:
    """What the largest file may have that this request can go on from."""
    resolution = resolution_of(request, models.profile)
    plan = plan_video(request, request.model or models.profile.direction)
    height, width = frame_size(request, None, resolution)
    pixels = height * width
    latent_frames = len(plan.sections) * plan.window + 1
    latent_frame = CHANNELS * pixels // 64 * torch.float32.itemsize
    return latent_frames * latent_frame + 3 * pixels + 2 * MAX_HEADER_BYTES


def parse_latents(data: bytes) -> SavedLatents:
    """Read the file. Raises LatentsError with one sentence unless it is whole and consistent."""
    job = _job_in(_metadata(data))
    try:
        tensors = safetensors.torch.load(data)
    except Exception:  # a dtype torch lacks, offsets that overlap, an end that is missing…
        raise LatentsError("The latents are damaged or cut short.") from None
    if tuple(sorted(tensors)) != TENSORS:
        raise LatentsError(f"The latents must have just the tensors {', '.join(TENSORS)}.")
    return SavedLatents(_checkpoint(tensors, job), job)


def check_latents(saved: SavedLatents, request: VideoRequest, job: dict, image: np.ndarray | None) -> None:
    """Raise LatentsMismatchError, naming the first difference, unless `saved` can become `job`'s video.

    `image`, where the request has one, must give the picture that the latents began with.
    """
    if saved.job.get("timed") != job["timed"]:
        raise LatentsMismatchError("The latents were made with other `sections`.")
    for name, wanted in job.items():
        if name not in ("sections", "timed") and (made := saved.job.get(name, _default(name))) != wanted:
            raise LatentsMismatchError(
                f"The latents were made with `{name}` {_shown(made)}, not {_shown(wanted)}."
            )
    _check_length(saved, job)
    began = saved.checkpoint.image
    height, width = began.shape[:2]
    if frame_size(request, began, job["resolution"]) != (height, width):
        raise LatentsMismatchError(f"The latents are of {width}×{height} pixels, not of the size asked for.")
    if image is None:
        return
    field = "input_image" if request.input_video is None else "input_video"
    if frame_size(request, image, job["resolution"]) != (height, width):
        raise LatentsMismatchError(f"The latents were made from an `{field}` of another shape.")
    if not np.array_equal(resize_and_center_crop(image, height, width), began):
        raise LatentsMismatchError(f"The latents were made from another `{field}`.")


def check_transformer(saved: SavedLatents, models: Models) -> None:
    """Raise LatentsMismatchError unless this worker has the model, and the VAE's channels, of the latents."""
    if saved.job["transformer"] != transformer_digest(models):
        raise LatentsMismatchError("The latents were made with other weights of the model.")
    channels, expected = saved.checkpoint.start_latent.shape[1], models.vae.config.latent_channels
    if channels != expected:
        raise LatentsMismatchError(f"The latents have {channels} channels, not {expected}.")


def _check_length(saved: SavedLatents, job: dict) -> None:
    done, planned, wanted = saved.checkpoint.count, saved.job["sections"], job["sections"]
    if job["model"] == "i2v" and wanted != planned:
        raise LatentsMismatchError(
            f"The latents are of a video of {planned} sections and `total_second_length` asks for {wanted}: "
            "I2V samples the end first, by the number of sections, so only F1 can go on to another length."
        )
    if wanted < done:
        raise LatentsMismatchError(
            f"The latents have {done} sections and `total_second_length` asks for {wanted} only."
        )


def _metadata(data: bytes) -> dict[str, Any]:
    """The file's own words, from its header: 8 bytes of length, then JSON."""
    not_safetensors = LatentsError("The latents are not a safetensors file.")
    if len(data) < 8:
        raise not_safetensors
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise not_safetensors
    if length > MAX_HEADER_BYTES:
        raise LatentsError(
            f"The latents' header has {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read."
        )
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        raise not_safetensors from None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise LatentsError(f"The latents are not of the format {FORMAT}, which `return_latents` gives.")
    return metadata


def _job_in(metadata: dict[str, Any]) -> dict:
    """`job`, with what is used of it before it is compared with the request."""
    damaged = LatentsError("The latents' metadata is damaged.")
    try:
        job = json.loads(metadata["job"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise damaged from None
    if not isinstance(job, dict) or not isinstance(job.get("transformer"), str):
        raise damaged
    for name, low, high in (("seed", 0, MAX_SEED), ("latent_window_size", 1, 33), ("sections", 1, 10_000)):
        value = job.get(name)
        if type(value) is not int or not low <= value <= high:
            raise damaged
    if job.get("model") not in ("i2v", "f1"):
        raise damaged
    return job


def _checkpoint(tensors: dict[str, torch.Tensor], job: dict) -> Checkpoint:
    start, history = tensors["start_latent"], tensors["history"]
    image, state = tensors["image"], tensors["generator_state"]
    for name, tensor, dtype in (
        ("start_latent", start, torch.float32),
        ("history", history, torch.float32),
        ("image", image, torch.uint8),
        ("generator_state", state, torch.uint8),
    ):
        if tensor.dtype != dtype:
            raise LatentsError(f"The latents' `{name}` is not {str(dtype).removeprefix('torch.')}.")
    window = job["latent_window_size"]
    if start.ndim != 5 or start.shape[0] != 1 or start.shape[2] != 1 or not start.numel():
        raise LatentsError(f"The latents' `start_latent` has the shape {_shape(start)}, not 1×16×1×h×w.")
    _, channels, _, height, width = start.shape
    frames = history.shape[2] if history.ndim == 5 else 0
    count = frames // window
    if tuple(history.shape) != (1, channels, count * window, height, width) or not count:
        raise LatentsError(
            f"The latents' `history` has the shape {_shape(history)}, not whole sections of {window} "
            "frames like `start_latent`."
        )
    if count > job["sections"]:
        raise LatentsError(f"The latents have {count} sections of {job['sections']}.")
    if tuple(image.shape) != (8 * height, 8 * width, 3):
        raise LatentsError(f"The latents' `image` has the shape {_shape(image)}, not that of the video.")
    for name, tensor in (("start_latent", start), ("history", history)):
        low, high = tensor.aminmax()
        if not (low >= -MAX_LATENT and high <= MAX_LATENT):  # of NaN nothing is true
            raise LatentsError(f"The latents' `{name}` has values that no latents have.")
    try:
        torch.Generator("cpu").set_state(state)
    except RuntimeError:
        raise LatentsError("The latents' `generator_state` is damaged.") from None
    sections = history.split(window, dim=2)
    return Checkpoint(
        image=image.numpy(),
        start_latent=start,
        sections=sections if job["model"] == "f1" else sections[::-1],
        generator_state=state,
    )


def _default(name: str) -> Any:
    """Of a field that the file's writer did not know yet: it did what the default does."""
    field = VideoRequest.model_fields.get(name)
    return None if field is None or field.is_required() else field.default


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _shape(tensor: torch.Tensor) -> str:
    shape = "×".join(map(str, tensor.shape[:8]))
    return shape if len(shape) <= MAX_SHOWN else "of another kind"


def _shown(value: Any) -> str:
    text = json.dumps(value)  # ASCII, on one line
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
