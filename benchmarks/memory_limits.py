"""Whole jobs through `handler.handler` at full size with less and less GPU memory.

    python -m benchmarks.memory_limits MODELS [--steps 6] [--swap-gb 24 12] [--out-of-memory]
                                       [--official FRAMEPACK_CHECKOUT]

MODELS is a folder made by `benchmarks.full_size_models` (or one with the real weights in the same layout).
The settings are the environment's. The digests of the latents and of the video tell whether a job with less
memory gave the same bits. With --official the official demo, its models loaded anew and swapped by its own
means, does the same jobs with the same limits.
"""

import argparse
import asyncio
import base64
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import core.job
import handler
from benchmarks.full_size import machine
from benchmarks.full_size_models import HEIGHT, PROMPT, WIDTH, profile_of, random_image, random_pixels
from benchmarks.official import OfficialDemo, from_disk
from core.pipeline import Models, generate_video_sync
from core.pipeline.models import MODULES
from core.settings import Settings
from core.worker import Worker
from diffusers_helper import memory
from diffusers_helper.vae import decode_latents


def run(title: str, **fields) -> dict:
    """One job through the handler; prints its timings and digests of its latents and its video."""
    latents = hashlib.sha256()
    core.job.generate_video_sync = partial(
        generate_video_sync, on_section=lambda sampled: latents.update(sampled.latents.numpy().tobytes())
    )
    job = {"id": title, "input": {"input_image": random_image(), "prompt": PROMPT} | fields}
    reply = asyncio.run(handler.handler(job))
    video = base64.b64decode(reply.pop("video_base64", ""))
    reply["latents"], reply["video"] = latents.hexdigest()[:8], hashlib.sha256(video).hexdigest()[:8]
    shown = {
        k: reply.get(k) for k in ("error", "timings", "worker", "warnings", "frames", "latents", "video")
    }
    print(f"== {title}\n{json.dumps(shown, indent=1)}", flush=True)
    return reply


def decode_peaks(models: Models, frames: int) -> None:
    """Peak GPU memory of a decode above what is allocated before it, untiled and tiled."""
    latents = torch.randn(
        1, 16, frames, HEIGHT // 8, WIDTH // 8, device=models.device, dtype=models.vae.dtype
    )
    for tiled in (False, True):
        memory.release_unused_memory(models.device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        decode_latents(latents, models.vae, models.device, tiled)
        seconds = time.perf_counter() - started
        allocated = (torch.cuda.max_memory_allocated() - before) / memory.GB
        reserved = torch.cuda.max_memory_reserved() / memory.GB - before / memory.GB
        print(
            f"decode of {frames} latent frames, tiled={tiled}: {seconds:.2f} s, "
            f"peak {allocated:.1f} GB allocated, {reserved:.1f} GB reserved",
            flush=True,
        )


@contextmanager
def limited(device: torch.device, gigabytes: float) -> Iterator[None]:
    """Let this process have only so much GPU memory."""
    memory.release_unused_memory(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(gigabytes * memory.GB / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def official_jobs(checkout: Path, models: Path, limits: list[float], fields: dict) -> dict[float, str]:
    """By limit: the official demo's rows of the table."""
    device = torch.device("cuda", 0)
    limit = 0.0

    def free_gb() -> float:
        return limit - torch.cuda.memory_allocated(device) / memory.GB

    rows = {}
    with TemporaryDirectory() as folder:
        demo = OfficialDemo(checkout, from_disk(models), Path(folder), free_gb)
        for limit in limits:
            with limited(device, limit):
                try:
                    job = demo.run(random_pixels(), fields)
                except RuntimeError as error:  # what it printed ends with the reason
                    rows[limit] = f"| official, {limit:g} GB | {str(error).splitlines()[-1]} |"
                    continue
            print(f"official, {limit:g} GB: {job}", flush=True)
            encode = [f"{job.encode:.2f} (all three)", "", ""]
            stages = job.sample, job.step, job.decode, job.mp4, job.total, job.peak_gb or 0
            rows[limit] = row(f"official, {limit:g} GB", encode, *stages)
    return rows


def row(
    title: str,
    encode: list[str],
    sample: list[float],
    step: float,
    decode: list[float],
    mp4: float,
    total: float,
    peak_gb: float,
    digests: Sequence[str] = ("", ""),
) -> str:
    """A job's line in the table; `sample` and `decode` are its sections' seconds."""
    cells = [
        title,
        *encode,
        " + ".join(f"{seconds:.1f}" for seconds in sample),
        f"{1000 * step:.0f} ms",
        " + ".join(f"{seconds:.1f}" for seconds in decode),
        f"{mp4:.2f}",
        f"{total:.1f} s",
        f"{peak_gb:.1f}",
        *digests,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--swap-gb", type=float, nargs="*", default=[24, 12])
    parser.add_argument("--out-of-memory", action="store_true", help="a resident job with no room to work in")
    parser.add_argument("--official", type=Path, help="a checkout of the official code; without it only ours")
    options = parser.parse_args()

    uncached = replace(Settings.from_env(), encoding_cache_mb=0)  # each job encodes, as the first one does
    device = torch.device("cuda", 0)
    models = Models(profile_of(options.models), device, "resident", uncached)
    weights = sum(memory.weight_bytes(getattr(models, name)) for name in MODULES) / memory.GB
    print(f"loaded in {models.load_seconds:.1f} s, {weights:.1f} GB of weights", flush=True)
    handler.worker = Worker(lambda: models)
    exact = {"use_teacache": False, "steps": options.steps, "total_second_length": 1}
    replies = {}

    def job(title: str, **fields) -> None:
        replies[title] = run(title, **fields)

    decode_peaks(models, 9)
    job("resident", **exact)
    if options.out_of_memory:
        title = "resident, 1 GB beside the weights, 2 steps"
        with limited(device, torch.cuda.memory_allocated() / memory.GB + 1):
            job(title, total_second_length=1, steps=2)
    models.set_memory_mode("swap")
    started = time.perf_counter()
    for module in (models.text_encoder, models.transformer):
        memory.DynamicSwapInstaller.install_model(module, models.device)
        memory.DynamicSwapInstaller.uninstall_model(module)
    print(f"text encoder and transformer pinned in {time.perf_counter() - started:.1f} s", flush=True)
    job("swap, all memory", **exact)
    for limit in options.swap_gb:
        with limited(device, limit):
            job(f"swap, {limit:g} GB", **exact)
    official = {}
    if options.official:
        fields = exact | {"prompt": PROMPT, "seed": 31337, "latent_window_size": 9, "mp4_crf": 16}
        official = official_jobs(options.official, options.models, options.swap_gb, fields)

    print(f"\n{machine()}, {models.precision}, {models.attention}")
    print(f"{WIDTH}×{HEIGHT}, window 9, {options.steps} steps")
    print("| job | text | VAE | CLIP | sample | step | decode | MP4 | total | peak GB | latents | video |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for title, reply in replies.items():
        if "error" in reply:
            print(f"| {title} | {reply['error']} |")
            continue
        t, sections = reply["timings"], reply["timings"]["sections"]
        image = t["image_encode"]
        print(
            row(
                title,
                [f"{seconds:.2f}" for seconds in (t["text_encode"], image["vae"], image["clip_vision"])],
                [section["sample"] for section in sections],
                t["step"]["median"],
                [section["decode"] for section in sections],
                t["mp4_encode"],
                t["total"],
                reply["worker"]["peak_memory_gb"],
                (reply["latents"], reply["video"]),
            )
        )
    print("\n".join(official.values()))


if __name__ == "__main__":
    main()
