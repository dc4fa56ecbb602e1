"""How far each step cache's latents are from those of every step, and how many evaluations they take.

    python -m benchmarks.caches [--models models/demo] [--scenes 3]

Scenes of benchmarks/quality.py's set `costs`, with the demo models, and nothing decoded: so it runs on a CPU,
in a minute or two for each.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from torch.nn.functional import interpolate

from benchmarks.quality import (
    choices,
    draw_samples,
    loaded,
    measure_magnitudes,
    request_for,
    steps_computed,
)
from core.pipeline import Models, generate_video_sync
from core.timing import JobTimer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("models/demo"))
    parser.add_argument("--scenes", type=int, default=3)
    options = parser.parse_args(arguments)
    models = loaded(options.models)
    everything = draw_samples(["costs"])
    samples = everything[:: math.ceil(len(everything) / options.scenes)]
    offered = [choice for choice in choices(models.device) if "cache" in choice.fields]

    found: dict[str, list[tuple[float, int]]] = {choice.name: [] for choice in offered}
    for sample in samples:
        picture, job = sample.true_clip()[0], sample.job | {"cache": "none"}
        measure_magnitudes(models, job["model"])
        expected, _ = sampled(models, picture, job)
        for choice in offered:
            latents, computed = sampled(models, picture, job | choice.fields)
            found[choice.name].append((decibels(latents, expected), computed))
        print(f"“{job['prompt']}”", flush=True)

    print(f"\n{len(samples)} scenes\n")
    print("| cache | evaluations | dB to the exact latents | least |\n|---|---|---|---|")
    for name, of in found.items():
        distances, computed = zip(*of, strict=True)
        print(f"| {name} | {mean(computed):.1f} | {mean(distances):.1f} | {min(distances):.1f} |")


def sampled(models: Models, picture, job: dict) -> tuple[torch.Tensor, int]:
    """A job's latents (1, 16, T, h, w), and the evaluations they took."""
    request, timer, sections = request_for(picture, job), JobTimer(), []
    models.use_direction(request.model)
    with TemporaryDirectory() as folder, mock.patch("core.pipeline.decoding.decode_latents", undecoded):
        path = Path(folder) / "video.mp4"
        generate_video_sync(models, picture, request, path, timer=timer, on_section=sections.append)
    return torch.cat([section.latents for section in sections], dim=2), steps_computed(timer)


def undecoded(latents: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """For `decode_latents`: three latent channels, enlarged; the video still follows from the latents."""
    _, _, frames, height, width = latents.shape
    return interpolate(latents[:, :3], size=(4 * frames - 3, 8 * height, 8 * width)).clamp(-1, 1)


def decibels(latents: torch.Tensor, expected: torch.Tensor) -> float:
    """Of latents whose spread is 1; 100 for equal ones."""
    error = (latents - expected).square().mean().item()
    return min(100.0, -10 * math.log10(max(error, 1e-10)))


if __name__ == "__main__":
    main()
