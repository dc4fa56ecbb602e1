"""What previews cost, and how soon a job ends: cancelled in a step or a decode, or with its time up.

    python -m benchmarks.operations MODELS [--steps 5]

MODELS is a folder made by `benchmarks.full_size_models` (or one with the real weights in the same layout).
Jobs go through `core.worker.Worker`; a cancel or a preview is asked for by what the progress says.
"""

import argparse
import base64
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.full_size_models import PROMPT, profile_of, random_image
from core.pipeline import Models
from core.progress import Progress
from core.settings import Settings
from core.worker import Worker

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()

    uncached = Settings(encoding_cache_mb=0)  # each job encodes, as the first one does
    models = Models(profile_of(options.models), torch.device("cuda", 0), "resident", uncached)
    worker = Worker(lambda: models)
    worker.start()
    numbers = iter(range(1000))

    def run(report: Callable[[Progress], None], cancelled: threading.Event | None = None, **fields) -> dict:
        data = {
            "input_image": random_image(),
            "prompt": PROMPT,
            "steps": options.steps,
            "use_teacache": False,
            "total_second_length": 2.4,
            "mp4_crf": 40,  # random weights make noise, which compresses badly
        }
        return worker.submit(f"job-{next(numbers)}", data | fields, report, cancelled).result()

    def step_ms(**fields) -> tuple[float, list[float], list[int]]:
        """Median step of one job that has every preview made, if it asks for previews."""
        made, sizes = [], []

        def report(progress: Progress) -> None:
            if progress.preview is not None:
                started = time.perf_counter()
                sizes.append(len(base64.b64decode(progress.preview())))
                made.append(1000 * (time.perf_counter() - started))

        reply = run(report, **fields)
        return 1000 * reply["timings"]["step"]["median"], made, sizes

    def seconds_to_end(stage: str, step: int) -> tuple[float, str]:
        """From the cancel, half a second into a stage, to the reply."""
        cancelled, asked = threading.Event(), []

        def cancel() -> None:
            asked.append(time.perf_counter())
            cancelled.set()

        def report(progress: Progress) -> None:
            if not asked and (progress.stage, progress.section, progress.step) == (stage, 2, step):
                asked.append(0.0)
                threading.Timer(0.5, cancel).start()

        reply = run(report, cancelled)
        return time.perf_counter() - asked[-1], reply.get("code", "a video")

    run(lambda progress: None, total_second_length=1)  # warm
    plain, with_previews = [], []
    for _ in range(ROUNDS):  # in turn
        plain.append(step_ms()[0])
        with_previews.append(step_ms(preview=True))
    steps = [step for step, _, _ in with_previews]
    made = [ms for _, times, _ in with_previews for ms in times]
    sizes = [size for _, _, jpegs in with_previews for size in jpegs]
    in_step = [seconds_to_end("sample", 2) for _ in range(ROUNDS)]
    in_decode = [seconds_to_end("decode", options.steps) for _ in range(ROUNDS)]

    def overtime(**fields) -> tuple[float, dict]:
        started = time.perf_counter()
        reply = run(lambda progress: None, **fields)
        return time.perf_counter() - started - fields["timeout_s"], reply

    section_s = options.steps * median(plain) / 1000 + 2
    times_up = [overtime(timeout_s=round(1.5 * section_s, 1), partial=True) for _ in range(ROUNDS)]

    print(f"\n{torch.cuda.get_device_name(0)}, torch {torch.__version__}, {options.steps} steps, 2 sections")
    print("| | median | all |")
    print("|---|---|---|")
    print(f"| step, no previews | {median(plain):.1f} ms | {[round(x, 1) for x in plain]} |")
    print(f"| step, every preview made | {median(steps):.1f} ms | {[round(x, 1) for x in steps]} |")
    print(f"| making a preview | {median(made):.1f} ms, {median(sizes) / 1000:.1f} kB | max {max(sizes)} B |")
    for name, ends in (("in a step", in_step), ("in a decode", in_decode)):
        seconds = [end for end, _ in ends]
        codes = {code for _, code in ends}
        print(f"| cancelled {name} | {median(seconds):.2f} s | {[round(s, 2) for s in seconds]}, {codes} |")
    over = [seconds for seconds, _ in times_up]
    parts = {(reply.get("partial"), reply.get("sections"), reply.get("frames")) for _, reply in times_up}
    print(f"| time up, over by | {median(over):.2f} s | {[round(s, 2) for s in over]}, {parts} |")


if __name__ == "__main__":
    main()
