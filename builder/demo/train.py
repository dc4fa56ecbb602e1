"""Train the demo models from nothing, on one GPU, into a folder in the hub's layout.

    pip install -r builder/demo/requirements.txt
    python -m builder.demo.train FOLDER [--seed 0] [--vae-steps N] [--clips N] [--steps N]

Writes hunyuan/, redux/ and framepack/ (one transformer for both directions), and training.json: what was
done, how long each part took, and the losses on the way.
"""

import argparse
import json
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from einops import rearrange

from builder.demo.autoencoder import make_vae, set_posterior_noise, train_vae, whiten_latents
from builder.demo.bank import ClipBank, latent_statistics
from builder.demo.encoders import Encoders, write_encoders
from builder.demo.layouts import CLIP_FRAMES
from builder.demo.prompts import prompt_of
from builder.demo.scene import Scene, train_scene
from builder.demo.transformer import make_transformer, save_transformer, train_transformer
from builder.demo.world import render_batch
from diffusers_helper.buckets import buckets

SIZES = buckets(192)
LATEST_START = 300  # frames; shapes that have reached their goal by then are rare
VAE_FRAMES, VAE_CROP, VAE_BATCH = 17, 128, 12
BANK_BATCH, PARAPHRASES = 8, 3
BATCH = 48
AHEAD = 4
TOKENIZER_PROMPTS = 20_000
INFERENCE_NOISE = 0.01  # the start latent is as good as the decoder allows

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--clips", type=int, default=8000, help="of 145 frames, for the transformer")
    parser.add_argument("--steps", type=int, default=14_000, help="of the transformer")
    options = parser.parse_args()
    train(options.folder, options.seed, options.vae_steps, options.clips, options.steps)


def train(folder: Path, seed: int, vae_steps: int, clips: int, steps: int, batch: int = BATCH) -> None:
    """All of it; the same seed and numbers give the same models, within the noise of the GPU's sums."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    record = Record(folder / "training.json", seed=seed, vae_steps=vae_steps, clips=clips, steps=steps)

    with record.part("encoders"):
        write_encoders(folder, draw_prompts(random.Random(f"prompts {seed}"), TOKENIZER_PROMPTS), seed)
        encoders = Encoders(folder, device)

    with record.part("vae"):
        vae = make_vae()
        for row in train_vae(vae, ahead(vae_batch, f"vae {seed}", device), vae_steps, device):
            record.row(row)
        rng = random.Random(f"statistics {seed}")
        whiten_latents(vae, *latent_statistics(vae, lambda: vae_clips(rng, device), 20))
        set_posterior_noise(vae, INFERENCE_NOISE)
        vae.half().save_pretrained(folder / "hunyuan" / "vae")
        vae.float()

    with record.part("clips"):
        bank = ClipBank(vae, encoders, seed)
        for pixels, prompts in ahead(bank_batch, f"clips {seed}", device):
            bank.add(pixels, prompts)
            if len(bank) >= clips:
                break
        bank.encode_prompts()

    with record.part("transformer"):
        model = make_transformer()
        for row in train_transformer(model, bank, steps, batch, device, seed):
            record.row(row)
        save_transformer(model, folder / "framepack")


def draw_prompts(rng: random.Random, number: int) -> list[str]:
    return [prompt_of(train_scene(rng), rng) for _ in range(number)]


def vae_batch(rng: random.Random, device: torch.device) -> torch.Tensor:
    """(B, 3, 17, 128, 128) in −1…1: crops of scenes at any time."""
    return rearrange(vae_clips(rng, device), "b t h w c -> b c t h w").float() / 127.5 - 1


def vae_clips(rng: random.Random, device: torch.device) -> torch.Tensor:
    """The same as (B, 17, 128, 128, 3) uint8."""
    scenes, starts = draw_scenes(rng, VAE_BATCH)
    clips = render_batch(scenes, starts, VAE_FRAMES, device)
    _, _, height, width, _ = clips.shape
    top, left = rng.randrange(height - VAE_CROP + 1), rng.randrange(width - VAE_CROP + 1)
    return clips[:, :, top : top + VAE_CROP, left : left + VAE_CROP]


def bank_batch(rng: random.Random, device: torch.device) -> tuple[torch.Tensor, list[list[str]]]:
    """Whole clips (B, 145, H, W, 3) uint8 from their start image on, each with three ways to ask for it."""
    scenes, _ = draw_scenes(rng, BANK_BATCH)
    prompts = [[prompt_of(scene, rng) for _ in range(PARAPHRASES)] for scene in scenes]
    return render_batch(scenes, [0.0] * len(scenes), CLIP_FRAMES, device), prompts


def draw_scenes(rng: random.Random, number: int) -> tuple[list[Scene], list[float]]:
    """Scenes of one size, and a time to start at for each."""
    size = rng.choice(SIZES)
    return [train_scene(rng, size) for _ in range(number)], [
        rng.uniform(0, LATEST_START) for _ in range(number)
    ]


def ahead(draw: Callable[[random.Random, torch.device], T], seed: str, device: torch.device) -> Iterator[T]:
    """`draw(rng, device)` for ever, some ahead of their use, in a thread that ends with the iterator."""
    rng = random.Random(seed)
    with ThreadPoolExecutor(max_workers=1) as thread:  # one: the draws keep their order
        ready = deque(thread.submit(draw, rng, device) for _ in range(AHEAD))
        try:
            while True:
                item = ready.popleft().result()
                ready.append(thread.submit(draw, rng, device))
                yield item
        finally:
            for future in ready:
                future.cancel()


class Record:
    """What was done, for the model card; printed on the way and written after every part."""

    def __init__(self, path: Path, **numbers: int) -> None:
        self._path = path
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self._content = {"device": gpu, "torch": torch.__version__, **numbers, "parts": {}}
        self._rows: list[dict] = []
        self._started = 0.0
        self._name = ""

    def part(self, name: str) -> "Record":
        self._name, self._rows = name, []
        return self

    def row(self, row: dict) -> None:
        self._rows.append(row)
        print(self._name, f"{time.perf_counter() - self._started:.0f} s", row, flush=True)

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = round(time.perf_counter() - self._started, 1)
        self._content["parts"][self._name] = {"seconds": seconds, "rows": self._rows}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._content, indent=1), encoding="utf-8")
        print(f"{self._name}: {seconds} s", flush=True)


if __name__ == "__main__":
    main()
