"""How good the demo models' videos are, and what each choice of speed costs, on scenes they never saw.

    python -m benchmarks.quality [--models models/demo] [--sets i2v,f1] [--processes 4] [--out FOLDER]

Scenes of the demo world go through the worker as a user's jobs do, a picture and a prompt in and an MP4 out;
its pixels are judged by builder/demo/measure.py and compared with the true clip. Every scene, prompt and seed
is fixed. Leaves quality.json, quality.md and quality.png in FOLDER (what they say: quality_report.py) and
prints the second. Needs builder/demo/requirements.txt.
"""

import argparse
import base64
import io
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks.demo_measure import read_video
from benchmarks.quality_report import EQUAL, write_report
from builder.demo.bank import encode_clips
from builder.demo.controls import CONTROLS, wrong_meanings
from builder.demo.measure import bystanders_stay, drift, followed, shapes_kept, travel_ratios
from builder.demo.motion import SECTION
from builder.demo.prompts import describe, plain_prompt, prompt_of
from builder.demo.scene import Event, Meaning, Scene, test_scenes
from builder.demo.similarity import first_frame_psnr, psnr, ssim
from builder.demo.tracks import Tracks
from builder.demo.world import render
from builder.measure_magnitudes import measure
from core.images import decode_image
from core.pipeline import Models, generate_video_sync, initialize_models
from core.pipeline.sections import FPS
from core.request import VideoRequest, parse_request
from core.settings import Settings
from core.timing import JobTimer
from core.weights.profiles import DEMO_MODELS, Direction
from diffusers_helper import float8_attention, fp8
from diffusers_helper.blending import to_uint8
from diffusers_helper.vae import decode_latents

WORLD = ("one", "two", "speed")
# The worker's 256-pixel tiles would each hold a whole frame of the demo's size. These are to such a frame
# about what those are to one at 640.
TILES = dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width"), 96) | dict.fromkeys(
    ("tile_sample_stride_height", "tile_sample_stride_width"), 72
)


@dataclass(frozen=True)
class HeldOut:
    """One set: how many scenes of each kind, and what is asked of the worker for each."""

    counts: dict[str, int]
    model: str = "i2v"
    sections: int = 1


_ONE_SECTION = dict.fromkeys((*WORLD, "aspect"), 25)
_FOUR_SECTIONS = dict.fromkeys((*WORLD, "combination"), 10)
_TEN_SECTIONS = dict.fromkeys((*WORLD, "combination"), 5)

SETS = {
    "vae": HeldOut(dict.fromkeys(WORLD, 10) | {"camera": 20}),  # encoded and decoded, no worker
    "i2v": HeldOut(_ONE_SECTION),
    "unseen": HeldOut({"combination": 100}),
    "f1": HeldOut(_ONE_SECTION, "f1"),
    "i2v-4": HeldOut(_FOUR_SECTIONS, "i2v", 4),
    "f1-4": HeldOut(_FOUR_SECTIONS, "f1", 4),
    "i2v-10": HeldOut(_TEN_SECTIONS, "i2v", 10),
    "f1-10": HeldOut(_TEN_SECTIONS, "f1", 10),
    "camera": HeldOut({"camera": 20}),
    "camera-f1": HeldOut({"camera": 20}, "f1"),
    "control": HeldOut(dict.fromkeys(_ONE_SECTION, 10)),  # asked for what is wrong
    "costs": HeldOut(dict.fromkeys((*WORLD, "camera"), 3)),  # once with each of `choices`
}


@dataclass(frozen=True)
class Sample:
    """One scene of one set; its seed and prompt are the same in every set that has the scene."""

    set: str
    kind: str
    index: int  # within its kind
    scene: Scene

    @property
    def rng(self) -> random.Random:
        return random.Random(f"quality {self.kind} {self.index}")

    @property
    def job(self) -> dict:
        """The fields of its request, but for the picture."""
        of, rng = SETS[self.set], self.rng
        return {
            "seed": rng.randrange(2**32),
            "prompt": prompt_of(self.scene, rng),
            "model": of.model,
            "total_second_length": of.sections * SECTION / FPS,
        }

    def true_clip(self) -> np.ndarray:
        """(T, H, W, 3) uint8, as long as the video."""
        return render(self.scene, range(SETS[self.set].sections * SECTION + 1))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=DEMO_MODELS, help="has hunyuan, redux and framepack")
    parser.add_argument("--sets", type=_names, default=[*SETS], help=f"of {','.join(SETS)}; default: all")
    parser.add_argument("--processes", type=int, default=1, help="which share the GPU, or the cores")
    parser.add_argument("--out", type=Path, default=Path("outputs/quality"))
    parser.add_argument("--count-scale", type=float, default=1.0, help="0.1: a tenth of each set, for a look")
    options = parser.parse_args(arguments)

    # numpy and torch read it when they are imported, which the processes are yet to do
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.processes))
    started = time.perf_counter()
    found = judge_all(draw_samples(options.sets, options.count_scale), options.models, options.processes)
    seconds = round(time.perf_counter() - started, 1)
    write_report(found, options.models, options.out, {"processes": options.processes, "seconds": seconds})


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SETS]:
        raise argparse.ArgumentTypeError(f"there is no set {unknown[0]!r}; there are {', '.join(SETS)}")
    return names


def draw_samples(sets: list[str], scale: float = 1.0) -> list[Sample]:
    """Of each set the first scenes of every kind, `scale` times as many as it has, and one at least."""
    return [
        Sample(name, kind, index, scene)
        for name in sets
        for kind, count in SETS[name].counts.items()
        for index, scene in enumerate(test_scenes(kind, max(1, round(scale * count))))
    ]


def judge_all(samples: list[Sample], folder: Path, processes: int) -> list[dict]:
    """What `judge` finds of every sample, in their order. Raises what the first that fails raises."""
    started = time.perf_counter()
    found: dict[Sample, dict] = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        longest_first = sorted(samples, key=_length, reverse=True)
        waiting = {pool.submit(_judge_with, folder, sample): sample for sample in longest_first}
        try:
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
                if len(found) % max(1, len(samples) // 20) == 0:
                    print(
                        f"{len(found)} of {len(samples)}, {time.perf_counter() - started:.0f} s", flush=True
                    )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[sample] for sample in samples]


def _length(sample: Sample) -> int:
    """About how many sections it takes."""
    return SETS[sample.set].sections * (50 if sample.set == "costs" else 1)


def _judge_with(folder: Path, sample: Sample) -> dict:
    return judge(loaded(folder), sample)


@cache
def loaded(folder: Path) -> Models:
    """The demo models of a folder, once in each process."""
    folder = folder.resolve()
    return initialize_models(
        Settings(
            model_profile="demo",
            memory_mode="resident",  # they are small, whoever else uses the GPU
            hunyuan_model=str(folder / "hunyuan"),
            redux_model=str(folder / "redux"),
            framepack_model=str(folder / "framepack"),
            framepack_f1_model=str(folder / "framepack"),
            allow_download=False,
        )
    )


def judge(models: Models, sample: Sample) -> dict:
    """One sample's figures, as JSON has them."""
    what = {"vae": reconstruct, "control": mislead, "costs": compare}.get(sample.set, animate)
    return {"set": sample.set, "kind": sample.kind, "index": sample.index} | what(models, sample)


def animate(models: Models, sample: Sample) -> dict:
    """The video of the scene's own prompt, beside the true clip."""
    truth = sample.true_clip()
    frames, timer = generate(models, truth[0], sample.job)
    return sample.job | measured(frames, truth, sample.scene.meaning) | {"sample_s": sampling_seconds(timer)}


def reconstruct(models: Models, sample: Sample) -> dict:
    """What the VAE alone loses: the posterior's mean, which the transformer is trained on, decoded."""
    clip = sample.true_clip()
    found = {"clip": decibels(through_vae(models, clip), clip)}
    if sample.kind == "camera":  # before photographs
        found["still"] = decibels(through_vae(models, clip[:1]), clip[:1])
    return found


def mislead(models: Models, sample: Sample) -> dict:
    """The video of a wrong prompt: does it show what was asked, or what the scene is made for?"""
    scene, rng = sample.scene, sample.rng
    wrong = wrong_meanings(scene, rng)
    turn = sample.index % len(CONTROLS)
    control = next(name for name in CONTROLS[turn:] + CONTROLS[:turn] if name in wrong)
    prompt = describe(wrong[control], rng)
    frames, _ = generate(models, sample.true_clip()[0], sample.job | {"prompt": prompt})
    tracks = Tracks(frames)
    return sample.job | {
        "prompt": prompt,
        "control": control,
        "true_followed": followed(tracks, scene.meaning),
        "wrong_followed": followed(tracks, wrong[control]) if _has(scene, wrong[control]) else None,
    }


def _has(scene: Scene, meaning: Meaning) -> bool:
    """Whether all that is named is there."""
    there = {(shape.colour, shape.kind) for shape in scene.shapes} | {(None, None)}
    return all((event.colour, event.kind) in there for event in meaning)


def compare(models: Models, sample: Sample) -> dict:
    """The same video with each of `choices`, the first of which is exact."""
    truth = sample.true_clip()
    wrong = wrong_meanings(sample.scene, sample.rng)["other verb"]
    # crf 0: at the worker's own the file loses as much as most choices do
    job = sample.job | {"n_prompt": describe(wrong, sample.rng), "cache": "none", "mp4_crf": 0}
    measure_magnitudes(models, job["model"])
    exact, found = None, []
    for choice in choices(models.device):
        with choice.made(models):
            generate(models, truth[0], job | choice.fields | {"steps": 2}, choice.tiled)  # warms the caches
            frames, timer = generate(models, truth[0], job | choice.fields, choice.tiled)
        exact = frames if exact is None else exact
        found.append(
            {
                "choice": choice.name,
                "to_exact": decibels(frames, exact),
                "psnr": decibels(frames, truth),
                "followed": followed(frames, sample.scene.meaning),
                "computed": steps_computed(timer),
                "sample_s": sampling_seconds(timer),
                "total_s": timer.total(),
            }
        )
    return {"prompt": job["prompt"], "seed": job["seed"], "choices": found}


def measure_magnitudes(models: Models, direction: Direction) -> None:
    """Give MagCache what it needs of models that have not been measured, from one scene that is always the
    same."""
    sample = draw_samples(["i2v"], 0.0)[0]
    models.use_direction(direction)
    if direction not in models.magnitudes:
        picture = sample.true_clip()[0]
        request = request_for(picture, sample.job | {"model": direction})
        models.magnitudes |= {direction: measure(models, picture, request)}


@dataclass(frozen=True)
class Choice:
    """One way to make a video: what is asked of the worker, and what is set inside it."""

    name: str
    fields: dict = field(default_factory=dict)
    tiled: bool = False
    transformer: torch.dtype | None = None  # None: the worker's own on this device
    vae: torch.dtype | None = None
    float8: tuple[str, ...] = ()  # of the transformer: its linear layers, its attention

    @contextmanager
    def made(self, models: Models) -> Iterator[None]:
        """Inside the block the worker works so."""
        usual = models.transformer_dtype, models.vae.dtype
        with mock.patch.multiple(models.vae, **TILES):
            try:
                _compute_in(models, self.transformer or usual[0], self.vae or usual[1])
                _put_into_float8(models, self.float8)
                yield
            finally:
                _compute_in(models, *usual, anew=bool(self.float8))


# kind and order of extrapolation (a + for each) → thresholds; the kind's default is among them
CACHES = {
    ("teacache", 0): (0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
    ("teacache", 1): (0.15, 0.2, 0.25, 0.3, 0.4),
    ("magcache", 0): (0.05, 0.1, 0.15, 0.25),
    ("magcache", 1): (0.1, 0.15, 0.25),
    ("firstblock", 0): (0.03, 0.06, 0.1, 0.15, 0.25),
    ("firstblock", 1): (0.06, 0.15, 0.25, 0.4),
}


def choices(device: torch.device) -> list[Choice]:
    """All that the request or the device offers; on a CPU everything is float32."""
    offered = [
        Choice("exact"),
        *(
            Choice(f"{kind}{'+' * order} {t:g}", {"cache": kind, "cache_threshold": t, "cache_order": order})
            for (kind, order), thresholds in CACHES.items()
            for t in thresholds
        ),
        *(Choice(f"steps {n}", {"steps": n}) for n in (20, 15, 10)),
        *(Choice(f"bh2 {n}", {"sampler": "unipc_bh2", "steps": n}) for n in (25, 15, 10)),
        *(Choice(f"euler {n}", {"sampler": "euler", "steps": n}) for n in (50, 25, 15)),
        *(Choice(f"shift {value:g}", {"shift": value}) for value in (1.0, 3.0, 5.0, 7.0)),
        Choice("cfg 2", {"cfg": 2.0}),
        Choice("tiled decode", tiled=True),
        *(Choice(f"crf {n}", {"mp4_crf": n}) for n in (16, 23, 28)),
    ]
    if device.type == "cuda":
        offered += [
            Choice("transformer float32", transformer=torch.float32),
            Choice("transformer float16", transformer=torch.float16),
            Choice("VAE float32", vae=torch.float32),
            Choice("fp8", float8=("linears",)),
            Choice("fp8 attention", float8=("attention",)),
            Choice("fp8 both", float8=("linears", "attention")),
        ]
    return offered


def _put_into_float8(models: Models, parts: tuple[str, ...]) -> None:
    if "linears" in parts:
        fp8.quantise_linears(models.transformer, models.device, models.device)
        fp8.multiply_in_fp8(models.transformer, True)
    if "attention" in parts:
        float8_attention.in_float8(models.transformer, models.device)


def _compute_in(models: Models, transformer: torch.dtype, vae: torch.dtype, anew: bool = False) -> None:
    if anew or transformer != models.transformer_dtype:
        models.drop_transformers()
        models.transformer_dtype = transformer
        models.use_direction(models.direction)  # loads it anew: a weight once rounded stays so
    # the demo's file has float16, so that nothing was rounded; diffusers' own `to` warns of modules it would
    # keep in float32, and there are none
    torch.nn.Module.to(models.vae, vae)


def generate(
    models: Models, picture: np.ndarray, job: dict, frugal: bool = False
) -> tuple[np.ndarray, JobTimer]:
    """The worker's video (T, H, W, 3) uint8 for a picture (H, W, 3) and the other fields of a request."""
    request = request_for(picture, job)
    models.use_direction(request.model)
    gpu = models.device.type == "cuda"
    timer = JobTimer(wait=torch.cuda.synchronize if gpu else lambda: None)
    with tempfile.TemporaryDirectory() as folder:
        video = generate_video_sync(
            models,
            decode_image(request.input_image),
            request,
            Path(folder) / "video.mp4",
            timer=timer,
            frugal=frugal,
        )
        return read_video(video.path), timer


def request_for(picture: np.ndarray, job: dict) -> VideoRequest:
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG")
    return parse_request({"input_image": base64.b64encode(png.getvalue()).decode()} | job)


def sampling_seconds(timer: JobTimer) -> float:
    return round(sum(section["sample"] for section in timer.sections), 4)


def steps_computed(timer: JobTimer) -> int:
    return sum(section["steps_computed"] for section in timer.sections)


def through_vae(models: Models, clip: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) uint8 → the same clip as the worker would decode it."""
    latents = encode_clips(models.vae, torch.from_numpy(clip.copy())[None].to(models.device))
    pixels = decode_latents(latents * models.vae.config.scaling_factor, models.vae, models.device)
    return to_uint8(pixels)[0].permute(1, 2, 3, 0).numpy()


def measured(frames: np.ndarray, truth: np.ndarray, meaning: Meaning) -> dict:
    """Of a video (T, H, W, 3): was the prompt followed, and how near does it come to the true clip.

    `gain` is the PSNR above that of the first frame as a still, None where the true clip is one.
    """
    tracks = Tracks(frames)
    near, still = decibels(frames, truth), decibels(np.broadcast_to(truth[:1], truth.shape), truth)
    found = {
        "followed": followed(tracks, meaning),
        "events": [_happened(tracks, event) for event in meaning],
        "bystanders": bystanders_stay(tracks, meaning),
        "kept": shapes_kept(tracks, meaning),
        "first_frame": min(first_frame_psnr(frames, truth[0]), EQUAL),
        "psnr": near,
        "ssim": ssim(frames, truth),
        "gain": None if still == EQUAL else near - still,
    }
    if len(frames) >= 2 * SECTION:
        found |= {"drift": asdict(drift(frames)), "true_drift": asdict(drift(truth))}
    return found


def _happened(tracks: Tracks, event: Event) -> dict:
    """`travel` is None for what stays."""
    ratios = [ratio if math.isfinite(ratio) else 0.0 for ratio in travel_ratios(tracks, (event,))]
    return {
        "event": plain_prompt((event,)),
        "followed": followed(tracks, (event,)),
        "travel": ratios[0] if ratios else None,
    }


def decibels(frames: np.ndarray, truth: np.ndarray) -> float:
    return min(psnr(frames, truth), EQUAL)


if __name__ == "__main__":
    main()
