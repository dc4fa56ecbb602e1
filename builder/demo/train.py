"""Train the demo models from nothing, on one GPU, into a folder in the hub's layout.

    pip install -r builder/demo/requirements.txt
    python -m builder.demo.train FOLDER [--seed 0] [--minutes 25]
    python -m builder.demo.train FOLDER --parts transformer    # with the encoders and the VAE that are there
    python -m builder.demo.train FOLDER --further              # another course for its transformer
    python -m builder.demo.train FOLDER --steps 4000 500 9000  # as many as an earlier run had

Writes hunyuan/, redux/ and framepack/ (one transformer for both directions), and training.json: what was
done, how long each part took, its steps and the losses on the way.
"""

import argparse
import json
import random
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from einops import rearrange

from builder.demo.autoencoder import make_vae, set_posterior_noise, train_vae, whiten_latents
from builder.demo.bank import ClipBank, latent_statistics
from builder.demo.course import Course
from builder.demo.devices import ahead
from builder.demo.encoders import Encoders, write_encoders
from builder.demo.layouts import CLIP_FRAMES, PART_SHARES, PARTS, SHORT_FRAMES
from builder.demo.motion import SECTION
from builder.demo.prompts import describe, prompt_of
from builder.demo.reading import train_text_encoders
from builder.demo.scene import FRAME_SIZES, draw_meaning, photograph_scene, train_scene
from builder.demo.transformer import make_transformer, save_transformer, train_transformer
from builder.demo.world import render_batch
from diffusers_helper.transformer import FramePackTransformer
from diffusers_helper.vae_fused import fuse_convolutions

TRAINED = ("encoders", "vae", "transformer")
MINUTES = 25.0  # with the encoders' one and a half and all that is written, 27 on one H100
VAE_FRAMES, VAE_CROP, VAE_BATCH = 17, 128, 8
VAE_PHOTOGRAPHS = 0.2  # of the VAE's clips, besides those of the world itself
VAE_LATEST_START, LATEST_START = 120, 300  # frames; cameras and shapes have come to rest by then
BANK_FRAMES, PARAPHRASES = 4 * CLIP_FRAMES, 3  # frames encoded at once
BATCH = 96
TOKENIZER_PROMPTS, READING_PROMPTS, READING_STEPS = 20_000, 40_000, 1500
INFERENCE_NOISE = 0.01  # the start latent is as good as the decoder allows


@dataclass(frozen=True)
class Courses:
    """How long the VAE is trained, how many batches of clips are encoded, how long the transformer is."""

    vae: Course
    clips: Course
    transformer: Course

    @classmethod
    def of_seconds(cls, seconds: float, parts: Collection[str]) -> "Courses":
        """Those of `parts` share the seconds."""
        shares = {"vae": 0.28, "clips": 0.12, "transformer": 0.6}
        whole = sum(share for name, share in shares.items() if name in parts or name == "clips")
        return cls(**{name: Course(seconds=seconds * share / whole) for name, share in shares.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=MINUTES, help="for all parts but the encoders")
    length.add_argument("--steps", type=int, nargs=3, metavar=("VAE", "CLIPS", "TRANSFORMER"))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--parts", type=_parts, default=TRAINED, help=f"of {','.join(TRAINED)}")
    which.add_argument("--further", action="store_true", help="the transformer alone, on from what it is")
    options = parser.parse_args()
    parts = ("transformer",) if options.further else options.parts
    if options.steps:
        courses = Courses(*(Course(steps=steps) for steps in options.steps))
    else:
        courses = Courses.of_seconds(60 * options.minutes, parts)
    train(options.folder, options.seed, courses, parts, further=options.further)


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in TRAINED]:
        raise argparse.ArgumentTypeError(f"there is no part {unknown[0]!r}")
    return names


def train(
    folder: Path,
    seed: int,
    courses: Courses,
    parts: Collection[str] = TRAINED,
    batch: int = BATCH,
    further: bool = False,
) -> None:
    """Train `parts`, the others being in `folder`.

    With `further` the transformer goes on from what is there, with new clips. The same seed and steps give
    the same models, within the noise of the GPU's sums.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    record = Record(folder / "training.json", seed)

    if "encoders" in parts:
        with record.part("encoders", steps=READING_STEPS):
            write_encoders(folder, draw_prompts(random.Random(f"prompts {seed}"), TOKENIZER_PROMPTS), seed)
            for row in train_text_encoders(folder, READING_STEPS, READING_PROMPTS, device, seed):
                record.row(row)

    if "vae" in parts:
        with record.part("vae") as numbers:
            vae = make_vae()
            for row in train_vae(vae, ahead(vae_batch, f"vae {seed}", device), courses.vae, device):
                record.row(row)
            numbers["steps"] = courses.vae.steps
            rng = random.Random(f"statistics {seed}")
            whiten_latents(vae, *latent_statistics(vae, lambda: vae_clips(rng, device), 20))
            set_posterior_noise(vae, INFERENCE_NOISE)
            vae.half().save_pretrained(folder / "hunyuan" / "vae")

    if "transformer" in parts:
        earlier = record.count("transformer") if further else 0
        nth = f" {earlier + 1}" if earlier else ""
        seed += earlier  # or it would all be drawn as before
        with record.part(f"clips{nth}") as numbers:
            half = torch.float16 if device.type == "cuda" else torch.float32
            vae = AutoencoderKLHunyuanVideo.from_pretrained(folder / "hunyuan" / "vae", torch_dtype=half)
            fuse_convolutions(vae)
            bank = ClipBank(vae.to(device).eval(), Encoders(folder, device), seed)
            drawn = ahead(bank_batch, f"clips {seed}", device)
            for _, batch_of_clips in zip(courses.clips, drawn, strict=False):
                bank.add(*batch_of_clips)
            bank.encode_prompts()
            numbers |= {"batches": courses.clips.steps, "clips": len(bank)}
        with record.part(f"transformer{nth}", batch=batch) as numbers:
            where = folder / "framepack"
            model = make_transformer()
            if further:
                model.load_state_dict(FramePackTransformer.from_pretrained(where).state_dict())
            save = partial(save_transformer, folder=where)
            for row in train_transformer(model, bank, courses.transformer, batch, device, seed, keep=save):
                record.row(row)
            numbers["steps"] = courses.transformer.steps
            save(model)


def draw_prompts(rng: random.Random, number: int) -> list[str]:
    return [describe(draw_meaning(rng), rng) for _ in range(number)]


def vae_batch(rng: random.Random, device: torch.device) -> torch.Tensor:
    """(B, 3, 17, 128, 128) in −1…1: crops of scenes at any time."""
    return rearrange(vae_clips(rng, device), "b t h w c -> b c t h w").float() / 127.5 - 1


def vae_clips(rng: random.Random, device: torch.device) -> torch.Tensor:
    """The same as (B, 17, 128, 128, 3) uint8."""
    size = rng.choice(FRAME_SIZES)
    scenes = [
        photograph_scene(rng, size) if rng.random() < VAE_PHOTOGRAPHS else train_scene(rng, size)
        for _ in range(VAE_BATCH)
    ]
    starts = [rng.uniform(0, VAE_LATEST_START) for _ in scenes]
    clips = render_batch(scenes, starts, VAE_FRAMES, device)
    top, left = rng.randrange(size[0] - VAE_CROP + 1), rng.randrange(size[1] - VAE_CROP + 1)
    return clips[:, :, top : top + VAE_CROP, left : left + VAE_CROP]


def bank_batch(
    rng: random.Random, device: torch.device
) -> tuple[torch.Tensor, list[list[str]], torch.Tensor, bool]:
    """Clips (B, T, H, W, 3) uint8 of one part, each with three ways to ask for it.

    Then the start images (B, H, W, 3) of their videos, on the host, and whether the clips are late ones, that
    do not begin with them.
    """
    size = rng.choice(FRAME_SIZES)
    (part,) = rng.choices(PARTS, PART_SHARES)
    frames = SHORT_FRAMES if part == "short" else CLIP_FRAMES
    scenes = [train_scene(rng, size, long=part == "whole") for _ in range(BANK_FRAMES // frames)]
    prompts = [[prompt_of(scene, rng) for _ in range(PARAPHRASES)] for scene in scenes]
    late = part == "late"
    begin = [rng.uniform(SECTION, LATEST_START) if late else 0.0 for _ in scenes]
    clips = render_batch(scenes, begin, frames, device)
    starts = render_batch(scenes, [0.0] * len(scenes), 1, device) if late else clips
    return clips, prompts, starts[:, 0].cpu(), late


class Record:
    """What was done, for the model card; printed on the way and written after every part.

    Parts that an earlier run did in the same folder stay in it.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self._path = path
        self._parts = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else {}
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self._where = {"device": gpu, "torch": torch.__version__, "seed": seed}
        self._rows: list[dict] = []
        self._name, self._started = "", 0.0

    def count(self, name: str) -> int:
        """How many courses there have been of this part: `name`, `name 2` and so on."""
        return sum(part.split()[0] == name for part in self._parts)

    @contextmanager
    def part(self, name: str, **numbers: int) -> Iterator[dict[str, int]]:
        """Times what is done within it; its numbers may be added to. A first course makes later ones void."""
        self._parts = {part: done for part, done in self._parts.items() if not part.startswith(f"{name} ")}
        self._name, self._rows, self._started = name, [], time.perf_counter()
        yield numbers
        seconds = round(time.perf_counter() - self._started, 1)
        self._parts[name] = self._where | numbers | {"seconds": seconds, "rows": self._rows}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"parts": self._parts}, indent=1), encoding="utf-8")
        print(f"{name}: {seconds} s", flush=True)

    def row(self, row: dict) -> None:
        self._rows.append(row)
        print(self._name, f"{time.perf_counter() - self._started:.0f} s", row, flush=True)


if __name__ == "__main__":
    main()
