"""`python -m tests.faulty_worker`: handler.py with quick models, in which a job's prompt asks for faults.

A prompt of words such as "oom-once slow-decode" has them happen while that job runs, and only then.
"""

import ctypes
import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

import core.job
import handler
import runpod_posts
from core.worker import Worker
from tests.test_endurance import quick_models

DECODER_CALL_S = 0.5
runpod_posts.PROGRESS_INTERVAL_S = 0.05
runpod_posts.RESULT_WAITS_S = (0.05, 0.05, 0.05)
runpod_posts.PROGRESS_PATIENCE_S = 0.5

FFMPEG = Path(__file__).parent / "ffmpeg"  # stand-ins that fail on purpose


def failing_generation(error: Callable[[], Exception], times: int) -> Callable:
    """`generate_video_sync` that fails so many times; then it works."""
    generate, left = core.job.generate_video_sync, [times]

    def fail_or_generate(*args, **options):
        if left[0]:
            left[0] -= 1
            raise error()
        return generate(*args, **options)

    return patch.object(core.job, "generate_video_sync", fail_or_generate)


@contextmanager
def slow_decoder() -> Iterator[None]:
    """Every call of the VAE's decoder takes half a second."""
    decoder = handler.worker._models.vae.decoder
    hook = decoder.register_forward_hook(lambda *_: time.sleep(DECODER_CALL_S))
    yield
    hook.remove()


def ffmpeg(name: str):
    return patch.dict(os.environ, IMAGEIO_FFMPEG_EXE=str(FFMPEG / name))


def out_of_memory() -> Exception:
    return torch.cuda.OutOfMemoryError("CUDA out of memory.")


def lost_context() -> Exception:
    return torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


FAULTS: dict[str, Callable] = {
    "oom-once": lambda: failing_generation(out_of_memory, 1),
    "oom-always": lambda: failing_generation(out_of_memory, 2),
    "gpu-lost": lambda: failing_generation(lost_context, 1),
    "bug": lambda: failing_generation(lambda: ZeroDivisionError("a bug"), 1),
    "slow-decode": slow_decoder,
    "no-ffmpeg": lambda: ffmpeg("missing"),
    "ffmpeg-killed-once": lambda: ffmpeg("killed_once"),
    "ffmpeg-killed": lambda: ffmpeg("killed"),
    "disk-full": lambda: ffmpeg("disk_full"),
    "disk-and-volume-full": lambda: ffmpeg("disk_full_everywhere"),
}


def run_job_with_faults(run_job: Callable) -> Callable:
    def run(data, *args, **options):
        words = str(data.get("prompt", "")).split() if isinstance(data, dict) else []
        if "report" in words:
            report()
        with ExitStack() as faults:
            for word in words:
                if word in FAULTS:
                    faults.enter_context(FAULTS[word]())
            return run_job(data, *args, **options)

    return run


def report() -> None:
    """Append what the process holds to the file REPORT, as a line of JSON."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": sorted(thread.name for thread in threading.enumerate()),
    }
    with Path(os.environ["REPORT"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(held) + "\n")


if __name__ == "__main__":
    core.job.run_job = run_job_with_faults(core.job.run_job)
    handler.worker = Worker(quick_models)
    handler.main()
