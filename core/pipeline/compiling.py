"""Compiling before there is a job: the transformer's blocks are run once, and what that made is kept.

It is kept as torch's own bundle of its caches (`torch.compiler.save_cache_artifacts`), one file for each kind
of device, version and model, from which another worker starts without compiling. Such a bundle holds
programs: its folder is to be trusted as the weights' is.
"""

import hashlib
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

import torch

from core.pipeline.models import Models
from core.pipeline.sampling import pack_history
from core.pipeline.sections import HISTORY_FRAMES, plan_sections
from diffusers_helper.compiled import is_compiled

log = logging.getLogger(__name__)

# No two sizes of a block's inputs are equal, or the graph would be for equal ones only.
WINDOW, HEIGHT, WIDTH = 3, 12, 20
IMAGE_TOKENS, TEXT_TOKENS, REAL_TOKENS = 30, 512, 23


def warm_up(models: Models, folder: Path | None) -> None:
    """Compile the transformer's blocks, with what is kept in `folder`, and keep it there if nothing was.

    Where they cannot be compiled, they run as they are, and the replies say so. Takes no part in a job:
    nothing is sampled.
    """
    if not is_compiled(models.transformer):
        return
    started = time.perf_counter()
    kept = folder / f"{_key(models)}.bin" if folder else None
    known = kept is not None and _load(kept)
    try:
        run_blocks(models)
    except Exception as error:  # compilers fail in many ways, and jobs can do without them
        log.warning("the transformer's blocks could not be compiled", exc_info=True)
        models.do_without_compiling(f"compiling failed ({type(error).__name__})")
    else:
        if kept is not None and not known:
            _save(kept)
    seconds = time.perf_counter() - started
    models.load_seconds += seconds
    log.info("compiled in %.1f s, %s kept artifacts", seconds, "with" if known else "without")


@torch.inference_mode()
def run_blocks(models: Models) -> None:
    """One small step of the transformer, on zeros."""
    model, dtype = models.transformer, models.transformer_dtype
    section = plan_sections(1.0, WINDOW, models.direction).sections[0]
    channels = model.config.in_channels

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=models.device, dtype=dtype)

    start = torch.zeros(1, channels, 1, HEIGHT, WIDTH)
    history = torch.zeros(1, channels, HISTORY_FRAMES + 1, HEIGHT, WIDTH)
    packed = pack_history(section, start, history, models.direction == "f1", models)
    mask = torch.arange(TEXT_TOKENS, device=models.device)[None] < REAL_TOKENS
    condition = model.prepare_condition(
        zeros(1, TEXT_TOKENS, model.config.text_embed_dim),
        mask,
        zeros(1, model.config.pooled_projection_dim),
        zeros(1, IMAGE_TOKENS, model.config.image_proj_dim),
        zeros(1),
    )
    model.velocity(
        zeros(1, channels, WINDOW, HEIGHT, WIDTH), zeros(1), model.prepare_history(packed), condition
    )
    if models.device.type == "cuda":
        torch.cuda.synchronize(models.device)


def _key(models: Models) -> str:
    """Of what a compiled block depends on."""
    gpu = models.device.type == "cuda"
    device = torch.cuda.get_device_name(models.device) if gpu else "cpu"
    model = models.transformer
    what = [torch.__version__, device, models.precision, model.kernels, dict(model.config)]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _load(path: Path) -> bool:
    """Whether the file's artifacts are in torch's caches."""
    try:
        return path.is_file() and torch.compiler.load_cache_artifacts(path.read_bytes()) is not None
    except Exception:
        log.warning("%s holds no artifacts that can be used", path, exc_info=True)
        return False


def _save(path: Path) -> None:
    """What has been compiled in this process; no other worker sees a part of the file."""
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is None:
        return
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(artifacts[0])
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        log.warning("what was compiled could not be kept: %s", error)
