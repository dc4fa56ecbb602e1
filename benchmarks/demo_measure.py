"""How often the demo world's measures are right, on true clips as they are and degraded as videos are.

    python -m benchmarks.demo_measure [--clips 300]

For every kind of test scene: the share of clips that follow their own prompt, the share found to follow each
kind of wrong prompt, and the worst errors of the travel. Needs builder/demo/requirements.txt for the
photographs.
"""

import argparse
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F

from builder.demo.controls import CONTROLS, wrong_meanings
from builder.demo.measure import bystanders_stay, followed, travel_ratios
from builder.demo.motion import SECTION
from builder.demo.scene import TEST_KINDS, Scene, test_scenes
from builder.demo.tracks import Tracks
from builder.demo.world import render
from core.video import save_bcthw_as_mp4


def blurred(frames: np.ndarray, sigma: float = 1.5) -> np.ndarray:
    """A Gaussian, as a small VAE smears edges."""
    reach = math.ceil(3 * sigma)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    pixels = F.conv2d(F.pad(pixels, (reach, reach, 0, 0), "replicate"), weights, groups=3)
    pixels = F.conv2d(F.pad(pixels, (0, 0, reach, reach), "replicate"), weights.transpose(2, 3), groups=3)
    return pixels.round().byte().permute(0, 2, 3, 1).numpy()


def noisy(frames: np.ndarray, sigma: float = 6) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, sigma, frames.shape)
    return (frames + noise).round().clip(0, 255).astype(np.uint8)


def compressed(frames: np.ndarray, crf: int = 28) -> np.ndarray:
    """Through H.264 and back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        clip = torch.from_numpy(frames).permute(3, 0, 1, 2)[None]
        save_bcthw_as_mp4([clip], path, crf=crf)
        return read_video(path)


def read_video(path: Path) -> np.ndarray:
    """(T, H, W, 3) uint8."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["source_size"]
    return np.stack([np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader])


def all_three(frames: np.ndarray) -> np.ndarray:
    return compressed(noisy(blurred(frames)))


WRONG = (*CONTROLS, "still")
TRAVEL = ("travel error, median", "95 %", "worst")
DEGRADATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "true": lambda frames: frames,
    "blur σ 1.5": blurred,
    "noise σ 6": noisy,
    "H.264 crf 28": compressed,
    "all three": all_three,
}


@dataclass
class Tally:
    """One row of the table: what was found of the clips of one kind, degraded in one way."""

    clips: int = 0
    right: int = 0
    asked: Counter = field(default_factory=Counter)
    fooled: Counter = field(default_factory=Counter)
    errors: list[float] = field(default_factory=list)
    bystanders: list[bool] = field(default_factory=list)

    def judge(self, scene: Scene, frames: np.ndarray) -> None:
        tracks, meaning = Tracks(frames), scene.meaning
        self.clips += 1
        self.right += followed(tracks, meaning)
        self.errors += [abs(ratio - 1) for ratio in travel_ratios(tracks, meaning)]
        self.bystanders += bystanders_stay(tracks, meaning)
        for name, wrong in wrong_meanings(scene, random.Random(self.clips)).items():
            self.asked[name] += 1
            self.fooled[name] += followed(tracks, wrong)
        if any(event.action.verb != "stays" for event in meaning):
            self.asked["still"] += 1
            self.fooled["still"] += followed(np.repeat(frames[:1], len(frames), axis=0), meaning)

    def row(self) -> list[str]:
        wrong = [f"{self.fooled[name]}/{self.asked[name]}" for name in WRONG]
        errors = [f"{np.percentile(self.errors, q):.1%}" for q in (50, 95, 100)]
        return [
            f"{self.right}/{self.clips}",
            *wrong,
            *errors,
            f"{sum(self.bystanders)}/{len(self.bystanders)}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=300, help="of each kind")
    clips = parser.parse_args().clips
    heads = ("scenes", "degraded by", "right prompt", *WRONG, *TRAVEL, "bystanders stay")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for kind in TEST_KINDS:
        tallies = {name: Tally() for name in DEGRADATIONS}
        for scene in test_scenes(kind, clips):
            frames = render(scene, range(SECTION + 1))
            for name, degrade in DEGRADATIONS.items():
                tallies[name].judge(scene, degrade(frames))
        for name, tally in tallies.items():
            print(f"| {kind} | {name} | {' | '.join(tally.row())} |", flush=True)


if __name__ == "__main__":
    main()
