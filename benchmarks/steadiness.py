"""Does a worker keep its pace: jobs of changing sizes, windows and prompts, and videos of growing length.

    python -m benchmarks.steadiness MODELS [--steps 25] [--long 10 30 60 120] [--long-steps 4]

MODELS is a folder made by `benchmarks.full_size_models` (or one with the real weights in the same layout).
The worker's settings are the environment's. A step's seconds are those between two reports of progress, so
that whatever stands before a step (a kernel compiled, a decode waited for) counts. Memory is the process's on
the host, at its highest above what it had before the job; ffmpeg is a process of its own.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from benchmarks.full_size import machine
from benchmarks.full_size_models import PROMPT, profile_of, random_image
from benchmarks.timed_job import KeptVideo, run_ours
from core.pipeline import Models
from core.progress import Progress
from core.settings import Settings
from core.worker import Worker

ONE_SECTION = 1.2  # seconds
VARIED = {  # after a plain job that warms up
    "a short prompt": {"prompt": "She waves."},
    "a long prompt": {"prompt": " ".join([PROMPT] * 8)},
    "a wide frame": {"width": 960, "height": 416},
    "a window of 5": {"latent_window_size": 5, "total_second_length": 1},
    "a tall frame, a window of 12, another prompt": {
        "width": 480,
        "height": 832,
        "latent_window_size": 12,
        "total_second_length": 1.6,
        "prompt": " ".join([PROMPT] * 3),
    },
}
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Pace:
    """When each step of one job ended, by section; give it to a worker as `report`."""

    ended: list[list[float]] = field(default_factory=list)  # of each section, the start first

    def __call__(self, progress: Progress) -> None:
        if progress.stage != "sample":
            return
        now = time.perf_counter()
        if progress.section > len(self.ended):
            self.ended.append([self.ended[-1][-1] if self.ended else now])
        if progress.step:
            self.ended[-1].append(now)

    @property
    def steps(self) -> list[float]:
        return [after - before for section in self.ended for before, after in pairwise(section)]

    @property
    def sections(self) -> list[float]:
        return [section[-1] - section[0] for section in self.ended]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--long", type=float, nargs="*", default=[10, 30, 60, 120], help="seconds of video")
    parser.add_argument("--long-steps", type=int, default=4)
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    settings = Settings.from_env()
    models = Models(profile_of(options.models), device, settings.memory_mode, settings)
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(lambda: models, deliver=KeptVideo(Path(folder) / "video.mp4"))
        run_job(worker, options.steps)
        varied = {name: run_job(worker, options.steps, **fields) for name, fields in VARIED.items()}
        long = {}
        for seconds in options.long:
            before = host_memory("VmRSS")
            CLEAR_REFS.write_text("5")  # its highest is counted anew from here
            pace = run_job(worker, options.long_steps, total_second_length=seconds)
            long[seconds] = pace, host_memory("VmHWM") - before
    kinds = f"{models.precision}, {'compiled' if models.compiled else 'not compiled'}, {models.attention}"
    print(f"\n{machine()}, {kinds}, {models.memory_mode}\n\n{varied_table(varied)}\n\n{long_table(long)}")


def run_job(worker: Worker, steps: int, **fields) -> Pace:
    pace = Pace()
    plain = {
        "input_image": random_image(),
        "prompt": PROMPT,
        "seed": 31337,
        "total_second_length": ONE_SECTION,
        "steps": steps,
        "cache": "none",
        "mp4_crf": 40,  # random weights make noise, which compresses badly
    }
    run_ours(worker, plain | fields, pace)
    print(f"{fields}: {len(pace.steps)} steps, median {median(pace.steps):.3f} s", flush=True)
    return pace


def host_memory(which: str) -> int:
    """Bytes of this process in memory: now (`VmRSS`), or at its highest (`VmHWM`)."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return 1024 * int(lines[which].split()[0])


def varied_table(jobs: dict[str, Pace]) -> str:
    lines = ["| job | median step | slowest | ÷ median | which |", "|---|---|---|---|---|"]
    for name, pace in jobs.items():
        usual, slowest = median(pace.steps), max(pace.steps)
        which = pace.steps.index(slowest) + 1
        lines.append(f"| {name} | {usual:.3f} s | {slowest:.3f} s | {slowest / usual:.2f} | {which} |")
    return "\n".join(lines)


def long_table(jobs: dict[float, tuple[Pace, int]]) -> str:
    """The first section is apart: beside each of the others the one before it is decoded."""
    lines = [
        "| video | sections | first | others, median | last | furthest from the median | host memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for seconds, (pace, memory) in jobs.items():
        first, *others = pace.sections
        usual = median(others)
        off = max(abs(section / usual - 1) for section in others)
        lines.append(
            f"| {seconds:g} s | {1 + len(others)} | {first:.2f} s | {usual:.2f} s | {others[-1]:.2f} s "
            f"| {off:.1%} | {memory / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
