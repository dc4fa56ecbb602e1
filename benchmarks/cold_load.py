"""Seconds from nothing to all models on the device, with their files out of the system's cache.

    python -m benchmarks.cold_load MODELS [--official FRAMEPACK_CHECKOUT]

Ours, or with --official the official demo's own loading. A process of its own for each, since what is loaded
stays. Libraries are imported and the GPU is awake before the clock starts. Prints the seconds, nothing else.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.floors import evict
from benchmarks.full_size_models import profile_of
from benchmarks.official import OfficialDemo, from_disk
from core.pipeline import Models


def cold_load(folder: Path, official: Path | None) -> float:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.zeros(1, device=device)
    evict(path for path in folder.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory() as outputs:
        started = time.perf_counter()
        if official:
            OfficialDemo(official, from_disk(folder), Path(outputs))
        else:
            Models(profile_of(folder), device, "resident")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--official", type=Path)
    options = parser.parse_args()
    print(cold_load(options.models, options.official))
