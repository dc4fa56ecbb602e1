"""What the machine can do at best, measured, and how long a piece of work would take at that rate.

A floor is the larger of FLOP ÷ the rate of a large matmul, bf16 or float8, and bytes that must move ÷ the
rate of a plain copy. FLOP are counted by torch as the work runs (matmuls, convolutions, attention); bytes are
the weights'.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import imageio_ffmpeg
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusers_helper import fp8

ROUNDS = 5


@dataclass(frozen=True)
class Rates:
    flops: float  # a second, of a square matmul
    bandwidth: float  # bytes a second read plus written, of a copy in the device's memory

    def floor(self, flop: float, weight_bytes: float) -> float:
        """Seconds that no implementation at these rates and in this precision can beat."""
        return max(flop / self.flops, weight_bytes / self.bandwidth)


def measured_rates(device: torch.device, precision: str = "bf16") -> Rates:
    """Of matmuls in this one of `core.settings.PRECISIONS`."""
    gpu = device.type == "cuda"
    side, size = (8192, 2**31) if gpu else (512, 2**26)
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    if precision == "fp8":
        (a, a_scale), (b, b_scale) = fp8.quantise(a), fp8.quantise(b)
        multiply = partial(
            torch._scaled_mm, a, b.t(), a_scale, b_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    else:
        multiply = partial(torch.mm, a.bfloat16(), b.bfloat16())
    source, target = (torch.zeros(size // 4, device=device) for _ in range(2))
    return Rates(
        flops=2 * side**3 / seconds(multiply, device, calls=20 if gpu else 2),
        bandwidth=2 * size / seconds(lambda: target.copy_(source), device, calls=20 if gpu else 2),
    )


def seconds(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Median time of one call, over rounds of so many calls, after a first one that does not count."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    times = []
    for _ in range(ROUNDS):
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        times.append((time.perf_counter() - started) / calls)
    return median(times)


def flop_of(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def evict(files: Iterable[Path]) -> int:
    """Have the system forget what it caches of these files, as after a restart; their size in bytes."""
    size = 0
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # only clean pages go
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size += os.fstat(file.fileno()).st_size
    return size


def disk_rate(path: Path) -> float:
    """Bytes a second of reading one evicted file from front to end."""
    size = evict([path])
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(2**24)
        while file.readinto(buffer):
            pass
    return size / (time.perf_counter() - started)


def ffmpeg_alone(video: Path, width: int, height: int, crf: int) -> float:
    """Seconds that ffmpeg takes for the frames of `video` by itself: raw frames from a file to an MP4."""
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
    with TemporaryDirectory() as folder:
        raw, again = Path(folder) / "frames.rgb", Path(folder) / "again.mp4"
        subprocess.run([*ffmpeg, "-i", video, "-f", "rawvideo", "-pix_fmt", "rgb24", raw], check=True)
        size = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "30", "-i", raw]
        encode = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(crf), again]
        started = time.perf_counter()
        subprocess.run([*ffmpeg, *size, *encode], check=True)
        return time.perf_counter() - started
