"""Ours and the official code back to back on one machine, with the very same weights: one table.

    python -m benchmarks.full_size MODELS --official FRAMEPACK_CHECKOUT [--rows step job teacache forecast]
                                   [--precision fp8] [--compile on] [--attention fp8]

MODELS is a folder made by `benchmarks.full_size_models` (or one with the real weights in the same layout).
The official demo runs as `benchmarks.official` tells, its models sharing our weights' memory, but for a
transformer of its own beside ours in fp8. Jobs are of 5 seconds, 4 sections, unless told otherwise. Floors
are what `benchmarks.floors` tells, of the official model's FLOP and at the rate of our precision. Everything
runs on a CPU, too, where the times tell nothing.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks import floors
from benchmarks.floors import Rates, flop_of, measured_rates
from benchmarks.full_size_models import HEIGHT, PROMPT, WIDTH, profile_of, random_image, random_pixels
from benchmarks.official import OfficialDemo, twins
from benchmarks.timed_job import KeptVideo, TimedJob, run_ours
from core.pipeline import Models
from core.pipeline.compiling import warm_up
from core.pipeline.conditioning import encode_conditioning
from core.pipeline.encoding import Encoder
from core.pipeline.loading import load_transformer
from core.pipeline.models import MODULES
from core.pipeline.sampling import pack_history
from core.pipeline.sections import plan_sections
from core.request import parse_request
from core.settings import ATTENTION, COMPILE, PRECISIONS, Settings
from core.timing import JobTimer
from core.worker import Worker
from diffusers_helper.memory import GB, weight_bytes
from diffusers_helper.vae import decode_latents

ROWS = ("step", "job", "teacache", "forecast")
CACHED = {  # rows of jobs that skip steps → ours, beside the official TeaCache in each
    "teacache": ("TeaCache", {"use_teacache": True}),
    "forecast": ("ours forecasting", {"use_teacache": True, "cache_threshold": 0.25, "cache_order": 1}),
}
ENCODERS = ("text_encoder", "text_encoder_2", "image_encoder", "vae")


@dataclass(frozen=True)
class Row:
    """One thing measured of both; `unit` is s or GB."""

    name: str
    ours: float
    official: float | None = None
    floor: float | None = None
    unit: str = "s"

    def cells(self) -> str:
        def shown(value: float | None) -> str:
            return "—" if value is None else f"{value:.3f} {self.unit}"

        ratio = "—" if self.official is None else f"{self.ours / self.official:.3f}"
        above = "—" if not self.floor else f"{self.ours / self.floor:.2f}"
        values = [self.name, shown(self.floor), shown(self.ours), shown(self.official), ratio, above]
        return f"| {' | '.join(values)} |"


def table(rows: list[Row]) -> str:
    head = ["| | floor | ours | official | ours ÷ official | ours ÷ floor |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(row.cells() for row in rows)])


def one_evaluation(
    models: Models, official: torch.nn.Module | None, window: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """The transformer called as in an I2V job's section that has others before and after it, by name."""
    device, dtype, config = models.device, models.transformer_dtype, models.transformer.config
    generator = torch.Generator(device).manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    section = plan_sections(4 * window * 4 / 30, window, "i2v").sections[1]
    h, w = HEIGHT // 8, WIDTH // 8
    history = pack_history(
        section, randn(1, 16, 1, h, w).float().cpu(), randn(1, 16, 19, h, w).float().cpu(), False, models
    )
    mask = torch.zeros(1, 512, dtype=torch.bool, device=device)
    mask[:, :80] = True
    shared = {
        "hidden_states": randn(1, 16, window, h, w),
        "timestep": torch.tensor([700.0], device=device, dtype=dtype),
        "guidance": torch.tensor([10_000.0], device=device, dtype=dtype),
        "encoder_hidden_states": randn(1, 512, config.text_embed_dim),
        "encoder_attention_mask": mask,
        "pooled_projections": randn(1, config.pooled_projection_dim),
    }
    vision = models.image_encoder.config
    image = randn(1, (vision.image_size // vision.patch_size) ** 2, config.image_proj_dim)
    calls = {"ours": lambda: models.transformer(**shared, image_embeds=image, history=history)}
    if official is None:
        return calls
    names = {
        "indices_latents": "latent_indices",
        "latents_clean": "clean_latents",
        "indices_latents_clean": "clean_latent_indices",
        "latents_history_2x": "clean_latents_2x",
        "indices_latents_history_2x": "clean_latent_2x_indices",
        "latents_history_4x": "clean_latents_4x",
        "indices_latents_history_4x": "clean_latent_4x_indices",
    }

    def theirs(value: torch.Tensor) -> torch.Tensor:
        value = value[None] if value.ndim == 1 and not value.is_floating_point() else value
        return value.to(official.dtype) if value.is_floating_point() else value

    packed = {name: theirs(getattr(history, ours)) for ours, name in names.items()}
    inputs = {name: theirs(value) for name, value in shared.items()} | {"image_embeddings": theirs(image)}
    return calls | {"official": lambda: official(**inputs, **packed, return_dict=False)[0]}


def evaluation_row(
    calls: dict[str, Callable[[], torch.Tensor]], device: torch.device, rounds: int, floor: float
) -> Row:
    """In turn, `rounds` times; prints how far apart the outputs are."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        outputs = {name: call().float() for name, call in calls.items()}
        for _ in range(rounds):
            for name, call in calls.items():
                started = now()
                call()
                times[name].append(now() - started)
    if "official" in outputs:
        difference = (outputs["ours"] - outputs["official"]).norm() / outputs["official"].norm()
        print(f"relative difference of the model's outputs: {difference.item():.3g}", flush=True)
    official = median(times["official"]) if "official" in times else None
    return Row("the model, one evaluation", median(times["ours"]), official, floor)


@dataclass(frozen=True)
class JobFloors:
    """Seconds of a job's parts at the machine's measured rates."""

    encode: float
    evaluation: float
    decode: dict[int, float]  # by latent frames


def job_floors(models: Models, fields: dict, evaluation: float, image: np.ndarray, rates: Rates) -> JobFloors:
    request = parse_request(fields)
    plan = plan_sections(request.total_second_length, request.latent_window_size, models.direction)
    encoder = Encoder(models, JobTimer())
    encode = flop_of(lambda: encode_conditioning(models, image, plan, request, request.seed, encoder))

    def decode(frames: int) -> float:
        latents = torch.zeros(1, 16, frames, HEIGHT // 8, WIDTH // 8)
        return flop_of(lambda: decode_latents(latents, models.vae, models.device))

    vae = weight_bytes(models.vae)
    return JobFloors(
        encode=rates.floor(encode, sum(weight_bytes(getattr(models, name)) for name in ENCODERS)),
        evaluation=evaluation,
        decode={frames: rates.floor(decode(frames), vae) for frames in {*decoded_frames(fields)}},
    )


def decoded_frames(fields: dict) -> list[int]:
    """Latent frames that each section decodes: an I2V job's first one all it has."""
    window = fields["latent_window_size"]
    plan = plan_sections(fields["total_second_length"], window, "i2v")
    return [s.decode_frames or window + s.adds_start for s in plan.sections]


def stage_rows(
    ours: list[TimedJob], official: list[TimedJob], fields: dict, floor: JobFloors, mp4_floor: float
) -> list[Row]:
    """The stages of whole jobs without TeaCache: medians over jobs and sections."""

    def row(name: str, of: Callable[[TimedJob], float | Sequence[float]], least: float) -> Row:
        def middle(jobs: list[TimedJob]) -> float:
            values = [of(job) for job in jobs]
            return median(x for value in values for x in (value if isinstance(value, list) else [value]))

        return Row(name, middle(ours), middle(official) if official else None, least)

    frames = decoded_frames(fields)
    window, steps = fields["latent_window_size"], fields["steps"]

    def decode_row(latent_frames: int) -> Row:
        at = [i for i, number in enumerate(frames) if number == latent_frames]
        name = f"decode, {latent_frames} latent frames"
        return row(name, lambda job: [job.decode[i] for i in at], floor.decode[latent_frames])

    return [
        row("encode: text, VAE, CLIP vision", lambda job: job.encode, floor.encode),
        row("step", lambda job: job.step, floor.evaluation),
        row(f"section of {steps} steps, window {window}", lambda job: job.sample, steps * floor.evaluation),
        *(decode_row(number) for number in dict.fromkeys(frames)),
        row("MP4, the whole video", lambda job: job.mp4, mp4_floor),
    ]


def job_row(
    name: str, ours: list[TimedJob], official: list[TimedJob], fields: dict, floor: JobFloors, mp4: float
) -> Row:
    """Whole jobs; the floor is of the evaluations that ours computed."""
    decode = sum(floor.decode[number] for number in decoded_frames(fields))
    least = floor.encode + ours[0].computed * floor.evaluation + decode + mp4

    def total(jobs: list[TimedJob]) -> float:
        return median(job.total for job in jobs)

    computed = " and ".join(str(jobs[0].computed) for jobs in (ours, official) if jobs)
    return Row(f"{name} ({computed} evaluations)", total(ours), total(official) if official else None, least)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--official", type=Path, help="a checkout of the official code; without it only ours")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="what to measure (all)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a job's video (5)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--window", type=int, default=9)
    parser.add_argument("--crf", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8, help="pairs of evaluations (8)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="our transformer's (bf16)")
    parser.add_argument("--compile", choices=COMPILE, default="off", help="our transformer's blocks (off)")
    parser.add_argument("--attention", choices=ATTENTION, default="auto", help="our kernel (auto)")
    parser.add_argument("--jobs", type=int, default=1, help="pairs of jobs (1)")
    options = parser.parse_args(arguments)
    if options.compile == "on" and not options.official:
        parser.error("a compiled model's FLOP cannot be counted: --official is missing")
    rows = measured_rows(options, set(options.rows))
    print(f"\n{machine()}, {WIDTH}×{HEIGHT}, window {options.window}, {options.steps} steps")
    print(table(rows))


def measured_rows(options: argparse.Namespace, asked: set[str]) -> list[Row]:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    settings = Settings(
        encoding_cache_mb=0,
        precision=options.precision,
        compile=options.compile,
        attention=options.attention,
    )
    models = Models(profile_of(options.models), device, "resident", settings)
    plain, alone = None, 0
    if options.precision == "fp8" and options.official:
        plain = load_transformer(options.models / "framepack", models.transformer_dtype).to(device)
        alone = weight_bytes(plain)
    warm_up(models, None)
    print(f"ours is {models.precision}, compiled: {models.compiled}, and attends by {models.attention}")
    weights = sum(weight_bytes(getattr(models, name)) for name in MODULES) / GB
    rates = measured_rates(device, options.precision)
    print(f"{weights:.1f} GB of weights; {rates.flops / 1e12:.3g} TFLOP/s, {rates.bandwidth / 1e9:.4g} GB/s")
    fields = {
        "input_image": random_image(),
        "prompt": PROMPT,
        "seed": 31337,
        "total_second_length": options.seconds,
        "latent_window_size": options.window,
        "steps": options.steps,
        "mp4_crf": options.crf,
        "use_teacache": False,
    }
    image = random_pixels()

    with tempfile.TemporaryDirectory() as folder:
        demo = None
        if options.official:
            demo = OfficialDemo(options.official, twins(models, plain), Path(folder))
            print(f"the official code attends by {demo.attention}", flush=True)
        video = KeptVideo(Path(folder) / "ours.mp4")
        worker = Worker(lambda: models, deliver=video)
        calls = one_evaluation(models, demo and demo.transformer, options.window)
        with torch.inference_mode():
            flop = flop_of(calls.get("official", calls["ours"]))
        evaluation = rates.floor(flop, weight_bytes(models.transformer))
        rows = [evaluation_row(calls, device, options.rounds, evaluation)] if "step" in asked else []
        if not asked - {"step"}:
            return rows

        def run(**changed) -> TimedJob:
            ours = run_ours(worker, fields | changed)
            print("ours:", line(ours), flush=True)
            return ours

        def run_official(**changed) -> list[TimedJob]:
            """Of one job, or none without a checkout."""
            official = [demo.run(image, fields | changed)] if demo else []
            for job in official:
                print("official:", line(job), flush=True)
            return official

        print("warming up", flush=True)
        floor = job_floors(models, fields, evaluation, image, rates)
        run(steps=2)
        run_official(steps=2)
        seconds = f"job of {options.seconds:g} s"
        if "job" in asked:
            pairs = [(run(), run_official()) for _ in range(options.jobs)]
            ours, official = [one for one, _ in pairs], [job for _, jobs in pairs for job in jobs]
            mp4 = floors.ffmpeg_alone(video.path, WIDTH, HEIGHT, options.crf)
            rows += stage_rows(ours, official, fields, floor, mp4)
            rows.append(job_row(seconds, ours, official, fields, floor, mp4))
            if device.type == "cuda":
                # each without the transformer that is the other's alone
                peaks = [ours[0].peak_gb - alone / GB, official[0].peak_gb if official else None]
                if alone:
                    peaks[1] -= weight_bytes(models.transformer) / GB
                rows.append(Row("peak GPU memory", *peaks, floor=weights, unit="GB"))
        official = []
        for row in (row for row in CACHED if row in asked):
            name, choice = CACHED[row]
            ours = [run(**choice) for _ in range(options.jobs)]
            official = official or [job for _ in ours for job in run_official(use_teacache=True)]
            mp4 = floors.ffmpeg_alone(video.path, WIDTH, HEIGHT, options.crf)
            rows.append(job_row(f"{seconds}, {name}", ours, official, fields, floor, mp4))
        return rows


def line(job: TimedJob) -> str:
    """On one line, to the millisecond."""
    return json.dumps(json.loads(json.dumps(vars(job)), parse_float=lambda text: round(float(text), 3)))


def machine() -> str:
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "a CPU"
    return ", ".join([card, *(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))])


if __name__ == "__main__":
    main()
