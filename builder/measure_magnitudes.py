"""Measure the magnitude curves that MagCache needs, for models that are not FramePack's own.

    export FRAMEPACK_MODEL=FOLDER FRAMEPACK_F1_MODEL=FOLDER MODEL_PROFILE=demo
    python -m builder.measure_magnitudes [--job test_input.json]

Samples the job with every step computed, in both directions, and writes magnitudes.json into the folder of
each direction's transformer, from which the worker reads it. The worker's own environment says which models
and which device. One job is enough (arXiv 2506.09045), best with the steps that will be asked for.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np

from core.errors import WorkerError
from core.frame import resolution_of
from core.images import decode_image
from core.pipeline import Models, initialize_models
from core.pipeline.conditioning import encode_conditioning
from core.pipeline.encoding import Encoder
from core.pipeline.magnitudes import write
from core.pipeline.sampling import sample_sections
from core.pipeline.sections import plan_sections
from core.request import VideoRequest, parse_request
from core.settings import Settings
from core.timing import JobTimer
from core.weights.files import locate
from diffusers_helper.buckets import nearest_bucket, resize_and_center_crop
from diffusers_helper.magcache import MagnitudeCurve, MagnitudeRecorder

TEST_JOB = Path(__file__).parents[1] / "test_input.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 and one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--job", type=Path, default=TEST_JOB, help="as `handler.py` takes it")
    options = parser.parse_args(arguments)
    try:
        job = json.loads(options.job.read_text(encoding="utf-8"))
        request = parse_request(job.get("input", job))
        settings = Settings.from_env()
        models = initialize_models(settings)
        image = decode_image(request.input_image)
        found: dict[Path, dict[str, MagnitudeCurve]] = {}
        for direction, source in models.profile.transformers.items():
            models.use_direction(direction)
            curve = measure(models, image, request)
            found.setdefault(locate(source, settings), {})[direction] = curve
        for folder, curves in found.items():
            print(write(folder, curves))
    except (WorkerError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def measure(models: Models, image: np.ndarray, request: VideoRequest) -> MagnitudeCurve:
    """Of the models' present direction: the ratios' means over the sections of `request`.

    Raises ValueError where a ratio is not a positive number, so that no cache could go by it.
    """
    resolution = resolution_of(request, models.profile)
    image = resize_and_center_crop(image, *nearest_bucket(*image.shape[:2], resolution))
    plan = plan_sections(request.total_second_length, request.latent_window_size, models.direction)
    timer, seed = JobTimer(), request.seed or 0
    recorders: list[MagnitudeRecorder] = []
    levels: list[float] = []

    def record(sigmas: list[float]) -> MagnitudeRecorder:
        levels[:] = sigmas
        recorders.append(MagnitudeRecorder(len(sigmas)))
        return recorders[-1]

    for _ in sample_sections(
        models,
        plan,
        encode_conditioning(models, image, plan, request, seed, Encoder(models, timer)),
        request,
        seed,
        timer,
        on_step=lambda section, step, x0: None,
        preserved_gb=request.gpu_memory_preservation,
        new_cache=record,
    ):
        pass
    ran = [recorder.ratios for recorder in recorders if recorder.computed]  # without cfg one pass does not
    ratios = tuple(round(mean(of), 5) for of in zip(*ran, strict=True))
    if not all(0 < ratio < math.inf for ratio in ratios):
        raise ValueError(f"The model's residuals have no magnitudes to go by (ratios {ratios}).")
    return MagnitudeCurve(tuple(levels), ratios)


if __name__ == "__main__":
    sys.exit(main())
