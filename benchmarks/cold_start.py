"""A worker's start with its files out of the system's cache: to its models, its first step, two jobs.

    python -m benchmarks.cold_start MODELS [--transformer FOLDER] [--official FRAMEPACK_CHECKOUT]
                                    [--steps 25] [--rounds 1]

MODELS is a folder made by `benchmarks.full_size_models` (or one with the real weights in the same layout), of
which --transformer replaces the transformer: by what `builder.make_fp8` wrote, say. Ours starts as handler.py
does, with the environment's settings; the official demo loads its models as by itself. Each is a process of
its own, in turn, and the clock runs from its creation; of the official one, loading is also told alone,
without importing its libraries. The floor of our loading is reading our files, one after the other.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

COLUMNS = ("loaded", "first step", "first job", "second job")  # seconds; the jobs' are their own


def ours(started: float, steps: int) -> dict[str, float]:
    """This process becomes a worker; seconds since `started` on the system's clock."""
    import handler  # before all else, as RunPod's container does
    from benchmarks.timed_job import KeptVideo, run_ours
    from core.progress import Progress
    from core.settings import Settings

    handler.read_ahead(Settings.from_env())
    found: dict[str, float] = {}

    def report(progress: Progress) -> None:
        if progress.stage == "sample" and progress.step == 1:
            found.setdefault("first step", time.time() - started)

    with tempfile.TemporaryDirectory() as folder:
        worker = handler.worker
        worker.deliver = KeptVideo(Path(folder) / "video.mp4")
        worker.start()
        found["loaded"] = time.time() - started

        from benchmarks.full_size_models import PROMPT, random_image

        fields = {
            "input_image": random_image(),
            "prompt": PROMPT,
            "total_second_length": 1.0,
            "steps": steps,
            "use_teacache": False,
        }
        for seed, job in enumerate(("first job", "second job")):
            found[job] = run_ours(worker, fields | {"seed": seed}, report).total
    return found


def official(started: float, checkout: Path, models: Path) -> dict[str, float]:
    """This process becomes the official demo, up to where it waits for its first job."""
    import torch

    from benchmarks.official import OfficialDemo, from_disk

    with tempfile.TemporaryDirectory() as outputs:
        imported = time.time() - started
        OfficialDemo(checkout, from_disk(models), Path(outputs))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        loaded = time.time() - started
    return {"loaded": loaded, "loading alone": loaded - imported}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--transformer", type=Path, help="ours (MODELS/framepack)")
    parser.add_argument("--official", type=Path, help="a checkout of the official code; without it only ours")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--as", choices=("ours", "official"), dest="role", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.role == "ours":
        print(json.dumps(ours(options.started, options.steps)))
    elif options.role == "official":
        print(json.dumps(official(options.started, options.official, options.models)))
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    from benchmarks import floors
    from benchmarks.full_size import machine

    hunyuan, redux = options.models / "hunyuan", options.models / "redux"
    transformer = options.transformer or options.models / "framepack"
    environment = os.environ | {
        "HUNYUAN_MODEL": str(hunyuan),
        "REDUX_MODEL": str(redux),
        "FRAMEPACK_MODEL": str(transformer),
    }
    files = [path for folder in (hunyuan, redux, transformer) for path in folder.rglob("*.safetensors")]
    everything = {*files, *options.models.rglob("*.safetensors")}

    def started(role: str) -> dict[str, float]:
        floors.evict(everything)
        command = [sys.executable, "-m", "benchmarks.cold_start", str(options.models), "--as", role]
        command += ["--steps", str(options.steps), "--started", repr(time.time())]
        command += ["--official", str(options.official)] if role == "official" else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        print(role, {name: round(seconds, 2) for name, seconds in found.items()}, flush=True)
        return found

    roles = ("ours", "official") if options.official else ("ours",)
    rounds = [{role: started(role) for role in roles} for _ in range(options.rounds)]

    def middle(role: str, name: str) -> float:
        return median(round_[role][name] for round_ in rounds)

    size = sum(path.stat().st_size for path in files)
    floor = size / floors.disk_rate(max(files, key=lambda path: path.stat().st_size))
    print(f"\n{machine()}, {options.steps} steps, medians of {options.rounds}")
    print(f"\n| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    print(f"| floor: {size / 1e9:.1f} GB at the disk's rate | {floor:.2f} s | | | |")
    print("| ours |", " | ".join(f"{middle('ours', name):.2f} s" for name in COLUMNS), "|")
    if options.official:
        print(f"| official | {middle('official', 'loaded'):.2f} s | | | |")
        for name in ("loaded", "loading alone"):
            ratio = middle("ours", "first step") / middle("official", name)
            print(
                f"our first step ÷ the official code's {name}, {middle('official', name):.2f} s: {ratio:.3f}"
            )


if __name__ == "__main__":
    main()
