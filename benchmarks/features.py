"""What each feature adds to a job of two sections, on models of full size.

    python -m benchmarks.features MODELS [--only "end image,LoRA"] [--steps 6] [--rounds 3]

MODELS is a folder made by `benchmarks.full_size_models` (or one with the real weights in the same layout).
Every feature's job runs right after a plain one, and after a short one of its own; what it adds is the median
of the differences. Most add nothing to a step, so that few steps tell; what changes the steps' number or
their cost has to be read with `--steps 25`.
"""

import argparse
import base64
import os
import tempfile
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from safetensors.torch import save_file

from benchmarks.full_size import machine
from benchmarks.full_size_models import PROMPT, profile_of, random_image
from benchmarks.timed_job import KeptVideo
from core.pipeline import Models
from core.settings import Settings
from core.worker import Worker

SECONDS, WARM_STEPS = 2.4, 1  # two sections
RANK = 16
LORA = "measured.safetensors"
_ids = count()


def features(image: str, video: str) -> dict[str, dict]:
    """What each changes in the plain request; `image` and `video` are base64."""
    half = SECONDS / 2
    return {
        "end image": {"end_image": image},
        "end image, half its strength": {"end_image": image, "end_image_strength": 0.5},
        "timed prompts": {"sections": [{"start_s": half, "end_s": SECONDS, "prompt": "She stops."}]},
        "timed prompts, blended": {
            "sections": [{"start_s": half, "end_s": SECONDS, "prompt": "She stops."}],
            "blend_sections": 1,
        },
        "keyframe": {"sections": [{"start_s": half, "end_s": SECONDS, "image": image}]},
        "from noise": {"input_image": None, "start": "noise", "resolution": 640, "aspect_ratio": "1:1"},
        "before a video": {"input_image": None, "input_video": video},
        "LoRA": {"loras": [{"name": LORA, "weight": 0.8}]},
        "TeaCache": {"cache": "teacache"},
        "MagCache": {"cache": "magcache"},
        "first-block cache": {"cache": "firstblock"},
        "guidance of 2": {"cfg": 2.0},
        "sampler euler": {"sampler": "euler"},
        "exact length": {"exact_length": True, "total_second_length": 2.0},
        "two outputs": {"num_outputs": 2},
        "previews": {"preview": True},
        "poster": {"poster": True},
        "latents kept": {"return_latents": True},
        "H.265": {"codec": "h265"},
        "AV1": {"codec": "av1"},
        "WebM": {"format": "webm"},
        "GIF": {"format": "gif"},
        "PNG sequence": {"format": "png_sequence"},
        "one frame": {"one_frame": {"target_index": 9}},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--only", help="features whose names begin so, with commas; default: all")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    # not Settings of our own: each job reads the environment anew
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"ENCODING_CACHE_MB": "0", "LORA_DIR": folder, "VOLUME_DIR": folder}),
    ):
        print(table(measured(options, Path(folder)), options.steps))


def measured(options: argparse.Namespace, folder: Path) -> list[tuple[str, list[float], list[float] | str]]:
    """Of every feature the plain jobs' seconds and its own, or why it is not to be had here."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    models = Models(profile_of(options.models), device, "resident", Settings.from_env())
    write_lora(models.transformer, folder / LORA)
    kept = KeptVideo(folder / "plain.mp4")
    worker = Worker(lambda: models, deliver=kept)
    image = random_image()
    plain = {
        "input_image": image,
        "prompt": PROMPT,
        "seed": 31337,
        "total_second_length": SECONDS,
        "steps": options.steps,
        "cache": "none",
    }

    def seconds(fields: dict) -> float:
        started = time.perf_counter()
        reply = worker.submit(f"feature-{next(_ids)}", fields).result()
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return time.perf_counter() - started

    seconds(plain | {"steps": WARM_STEPS})
    video = base64.b64encode(kept.path.read_bytes()).decode()
    wanted = tuple((options.only or "").split(","))
    found = []
    for name, changed in features(image, video).items():
        if not name.startswith(wanted):
            continue
        fields = {key: value for key, value in (plain | changed).items() if value is not None}
        before, with_it = [], []
        try:
            seconds(fields | {"steps": WARM_STEPS})
            for _ in range(options.rounds):
                before.append(seconds(plain))
                with_it.append(seconds(fields))
            found.append((name, before, with_it))
        except RuntimeError as error:
            found.append((name, before, str(error)))
        print(name, before, found[-1][2], flush=True)
    return found


def write_lora(transformer: torch.nn.Module, path: Path) -> None:
    """A LoRA for the attention of every block, in diffusers' names, small and random."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in transformer.named_modules():
        if name.rpartition(".")[2] in ("to_q", "to_k", "to_v") and "transformer_blocks" in name:
            outputs, inputs = module.weight.shape
            down, up = (RANK, inputs), (outputs, RANK)
            tensors[f"transformer.{name}.lora_A.weight"] = 0.01 * torch.randn(down, generator=generator)
            tensors[f"transformer.{name}.lora_B.weight"] = 0.01 * torch.randn(up, generator=generator)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path)


def table(found: list[tuple[str, list[float], list[float] | str]], steps: int) -> str:
    lines = [
        f"\n{machine()}, two sections, {steps} steps",
        "| feature | plain job | with it | adds |",
        "|---|---|---|---|",
    ]
    for name, before, with_it in found:
        if isinstance(with_it, str):
            lines.append(f"| {name} | — | — | {with_it} |")
        else:
            adds = median(b - a for a, b in zip(before, with_it, strict=True))
            lines.append(f"| {name} | {median(before):.2f} s | {median(with_it):.2f} s | {adds:+.2f} s |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
