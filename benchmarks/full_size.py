"""Whole jobs through `handler.handler` at full size, resident and swapped, beside the official model's step.

    python -m benchmarks.full_size MODELS [--official FRAMEPACK_CHECKOUT] [--swap-gb 24 12] [--out-of-memory]

MODELS is a folder made by `benchmarks.full_size_models` (or one with the real weights in the same layout).
The official checkout is read from where it lies; only its model class is run, on the very same weights.
"""

import argparse
import asyncio
import base64
import hashlib
import importlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch

import core.job
import handler
from benchmarks.full_size_models import HEIGHT, PROMPT, WIDTH, profile_of, random_image
from core.pipeline import Models, generate_video_sync
from core.pipeline.models import MODULES
from core.pipeline.sampling import pack_history
from core.pipeline.sections import plan_sections
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


def official_class(checkout: Path) -> type:
    """The official model class; its package has our package's name, so ours steps aside while it loads."""
    ours = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "diffusers_helper"
    }
    path = sys.path
    sys.path = [
        str(checkout),
        *(p for p in path if not (Path(p or ".") / "diffusers_helper/__init__.py").exists()),
    ]
    try:
        module = importlib.import_module("diffusers_helper.models.hunyuan_video_packed")
    finally:
        sys.path = path
        for name in [name for name in sys.modules if name.split(".")[0] == "diffusers_helper"]:
            del sys.modules[name]
        sys.modules.update(ours)
    return module.HunyuanVideoTransformer3DModelPacked


def compare_with_official(models: Models, checkout: Path, rounds: int) -> None:
    """Both models on the same inputs and weights, in turn: relative difference and step time."""
    device, dtype = models.device, models.transformer_dtype
    ours = models.transformer
    with torch.device("meta"):
        theirs = official_class(checkout).from_config(ours.config)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.eval().requires_grad_(False)
    theirs.high_quality_fp32_output_for_inference = True

    generator = torch.Generator(device).manual_seed(1)

    def randn(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(to)

    section = plan_sections(5, 9, "i2v").sections[1]
    h, w = HEIGHT // 8, WIDTH // 8
    history = pack_history(
        section, randn(1, 16, 1, h, w).float().cpu(), randn(1, 16, 19, h, w).float().cpu(), False, models
    )
    mask = torch.zeros(1, 512, dtype=torch.bool, device=device)
    mask[:, :80] = True
    shared = {
        "hidden_states": randn(1, 16, 9, h, w),
        "timestep": torch.tensor([700.0], device=device, dtype=dtype),
        "guidance": torch.tensor([10_000.0], device=device, dtype=dtype),
        "encoder_hidden_states": randn(1, 512, ours.config.text_embed_dim),
        "encoder_attention_mask": mask,
        "pooled_projections": randn(1, ours.config.pooled_projection_dim),
    }
    image = randn(1, 729, ours.config.image_proj_dim)
    names = {
        "indices_latents": "latent_indices",
        "latents_clean": "clean_latents",
        "indices_latents_clean": "clean_latent_indices",
        "latents_history_2x": "clean_latents_2x",
        "indices_latents_history_2x": "clean_latent_2x_indices",
        "latents_history_4x": "clean_latents_4x",
        "indices_latents_history_4x": "clean_latent_4x_indices",
    }
    packed = {
        theirs_name: value[None] if value.ndim == 1 else value
        for name, theirs_name in names.items()
        if (value := getattr(history, name)) is not None
    }
    calls = {
        "ours": lambda: ours(**shared, image_embeds=image, history=history),
        "official": lambda: theirs(**shared, image_embeddings=image, return_dict=False, **packed)[0],
    }
    with torch.inference_mode():
        outputs = {name: call().float() for name, call in calls.items()}
        difference = (outputs["ours"] - outputs["official"]).norm() / outputs["official"].norm()
        times = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                torch.cuda.synchronize()
                started = time.perf_counter()
                call()
                torch.cuda.synchronize()
                times[name].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(times["ours"], times["official"], strict=True)]
    print(f"relative difference of the outputs: {difference.item():.3g}")
    for name, values in times.items():
        print(f"{name}: median {1000 * median(values):.1f} ms, min {1000 * min(values):.1f} ms")
    print(f"step ours/official: median {median(ratios):.4f} over {rounds} pairs", flush=True)


@contextmanager
def limited(models: Models, gigabytes: float) -> Iterator[None]:
    """Let this process have only so much GPU memory."""
    memory.release_unused_memory(models.device)
    total = torch.cuda.get_device_properties(models.device).total_memory
    torch.cuda.set_per_process_memory_fraction(gigabytes * memory.GB / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--official", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--resident", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--swap-gb", type=float, nargs="*", default=[])
    parser.add_argument("--out-of-memory", action="store_true", help="a resident job with no room to work in")
    options = parser.parse_args()

    models = Models(profile_of(options.models), torch.device("cuda", 0), "resident")
    weights = sum(memory.weight_bytes(getattr(models, name)) for name in MODULES) / memory.GB
    print(f"loaded in {models.load_seconds:.1f} s, {weights:.1f} GB of weights", flush=True)
    handler.worker = Worker(lambda: models)
    exact = {"use_teacache": False, "steps": options.steps}
    replies = {}

    def job(title: str, **fields) -> None:
        replies[title] = run(title, **fields)

    if options.official:
        compare_with_official(models, options.official, options.rounds)
    if options.resident:
        decode_peaks(models, 9)
        job("resident, 1 section", total_second_length=1, **exact)
        job("resident, 2 sections", total_second_length=2.4, **exact)
        job("resident, 2 sections, TeaCache", total_second_length=2.4, steps=options.steps)
    if options.out_of_memory:
        title = "resident, 1 GB beside the weights, 2 steps"
        with limited(models, torch.cuda.memory_allocated() / memory.GB + 1):
            job(title, total_second_length=1, steps=2)
    if options.swap_gb:
        models.set_memory_mode("swap")
        started = time.perf_counter()
        for module in (models.text_encoder, models.transformer):
            memory.DynamicSwapInstaller.install_model(module, models.device)
            memory.DynamicSwapInstaller.uninstall_model(module)
        print(f"text encoder and transformer pinned in {time.perf_counter() - started:.1f} s", flush=True)
        job("swap, all memory", total_second_length=1, **exact)
    for limit in options.swap_gb:
        with limited(models, limit):
            job(f"swap, {limit:g} GB", total_second_length=1, **exact)

    card, size = torch.cuda.get_device_name(0), f"{WIDTH}×{HEIGHT}"
    print(f"\n{card}, torch {torch.__version__}, bf16, {size}, window 9, {options.steps} steps")
    print("| job | text | VAE | CLIP | sample | step | decode | MP4 | total | peak GB | latents | video |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for title, reply in replies.items():
        if "error" in reply:
            print(f"| {title} | {reply['error']} |")
            continue
        t = reply["timings"]
        cells = [
            title,
            f"{t['text_encode']:.2f}",
            f"{t['image_encode']['vae']:.2f}",
            f"{t['image_encode']['clip_vision']:.2f}",
            " + ".join(f"{s['sample']:.1f}" for s in t["sections"]),
            f"{1000 * t['step']['median']:.0f} ms",
            " + ".join(f"{s['decode']:.1f}" for s in t["sections"]),
            f"{t['mp4_encode']:.2f}",
            f"{t['total']:.1f} s",
            f"{reply['worker']['peak_memory_gb']:.1f}",
            reply["latents"],
            reply["video"],
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
