"""Is this machine fit for jobs? Asked before the first one is taken.

Each check passes in silence or raises FitnessError with one sentence for the worker's log. Weights are not
checked here: the worker loads them before it takes a job. Torch is imported where a check needs it, because a
handler must be importable without.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from core import ffmpeg
from core.errors import FitnessError, VideoEncodingError
from core.settings import Settings

GB = 1_000_000_000
MIN_COMPUTE_CAPABILITY = (8, 0)  # Ampere, the first with bfloat16
MIN_GPU_GIB = 11.0  # in swap mode a job of 640×608 peaks at 10.9 (docs/benchmarks.md)


def run_checks(settings: Settings) -> None:
    """All checks, the cheapest first. Raises FitnessError for the first that fails."""
    check_disk(settings)
    check_ffmpeg()
    check_gpu(settings)


def check_disk(settings: Settings) -> None:
    """The temporary folder, where every job writes its video, takes files and has room."""
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile(buffering=0) as file:
            file.write(bytes(1_000_000))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise FitnessError(f"The temporary folder cannot be written to: {_first_line(error)}.") from error
    if free < settings.min_free_disk_gb * GB:
        raise FitnessError(
            f"The temporary folder {folder} has {free / GB:.1f} GB free, and "
            f"{settings.min_free_disk_gb:g} GB are needed (MIN_FREE_DISK_GB)."
        )


def check_ffmpeg() -> None:
    """The ffmpeg that jobs use runs, has libx264 and writes a whole MP4."""
    import torch

    from core.video import save_bcthw_as_mp4

    try:
        executable = ffmpeg.executable()
    except FileNotFoundError:
        raise FitnessError(
            "There is no ffmpeg: imageio-ffmpeg's is missing and IMAGEIO_FFMPEG_EXE is not set."
        ) from None
    try:
        encoders = ffmpeg.encoders(executable)
    except (OSError, subprocess.SubprocessError) as error:
        raise FitnessError(f"ffmpeg does not run: {_first_line(error)}.") from error
    if ffmpeg.CHECKED_AT_START not in encoders:
        raise FitnessError(f"The ffmpeg at {executable} has no {ffmpeg.CHECKED_AT_START}.")
    try:
        with tempfile.TemporaryDirectory(prefix="framepack-") as folder:
            grey = torch.full((1, 3, 3, 64, 64), 128, dtype=torch.uint8)
            save_bcthw_as_mp4([grey], Path(folder) / "check.mp4")
    except (OSError, VideoEncodingError) as error:
        raise FitnessError(f"ffmpeg cannot write a video: {_first_line(error)}.") from error


def check_gpu(settings: Settings) -> None:
    """There is a GPU that PyTorch can use, new and large enough, and it computes correctly.

    The demo profile needs none.
    """
    if settings.model_profile == "demo":
        return
    import torch

    try:
        torch.cuda.init()
        device = torch.device("cuda", torch.cuda.current_device())
        gpu = torch.cuda.get_device_properties(device)
        free, _ = torch.cuda.mem_get_info(device)
    except (RuntimeError, AssertionError) as error:  # no GPU, a driver too old; a PyTorch for the CPU
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        reason = _first_line(error).split(". ")[0]
        raise FitnessError(f"No GPU can be used: {reason} (PyTorch is built for {built}).") from error
    if (gpu.major, gpu.minor) < MIN_COMPUTE_CAPABILITY:
        raise FitnessError(
            f"The GPU {gpu.name} has compute capability {gpu.major}.{gpu.minor}, and bfloat16 needs "
            f"{MIN_COMPUTE_CAPABILITY[0]}.{MIN_COMPUTE_CAPABILITY[1]}."
        )
    # models this worker has loaded already are no fault
    usable = (free + torch.cuda.memory_reserved(device)) / 1024**3
    if usable < MIN_GPU_GIB:
        raise FitnessError(
            f"The GPU {gpu.name} has {usable:.1f} GiB of memory to use, and {MIN_GPU_GIB:g} are needed."
        )
    try:
        correct = _multiplies(device)
    except RuntimeError as error:
        raise FitnessError(f"The GPU {gpu.name} cannot compute: {_first_line(error)}.") from error
    if not correct:
        raise FitnessError(f"The GPU {gpu.name} computes wrong results.")


def _multiplies(device) -> bool:
    """A product of matrices of −1, 0 and 1, whose sums are exact in bfloat16 in any order."""
    import torch

    left, right = torch.randint(-1, 2, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    product = left.to(device, torch.bfloat16) @ right.to(device, torch.bfloat16)
    return torch.equal(product.cpu().long(), left @ right)


def _first_line(error: BaseException) -> str:
    """Without the command or the advice that follow in some; an empty message gives the error's kind."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
