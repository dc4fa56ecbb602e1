"""What reading weights ahead saves: importing the worker's libraries, then reading FOLDER's weights.

    python -m benchmarks.read_ahead FOLDER [--rounds 5]

With it and without in turn, each in a process of its own, the files out of the page cache before each.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.floors import evict

PROGRAM = """
import sys
from pathlib import Path
from core.settings import Settings
from core.weights import read_ahead as module

files = [Path(name) for name in sys.argv[2:]]
if sys.argv[1] == "ahead":
    module.weight_files = lambda settings: ((path, ()) for path in files)
    module.read_ahead(Settings())
import core.pipeline

scratch = bytearray(1 << 24)
for path in files:
    with path.open("rb", buffering=0) as file:
        while file.readinto(scratch):
            pass
"""


def seconds(way: str, files: list[Path]) -> float:
    evict(files)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", PROGRAM, way, *map(str, files)], check=True)
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    files = sorted(options.folder.rglob("*.safetensors"))
    size = evict(files) / 1e9
    found = {"plain": [], "ahead": []}
    for _ in range(options.rounds):
        for way, times in found.items():
            times.append(seconds(way, files))
            print(f"{way}: {times[-1]:.2f} s", flush=True)
    plain, ahead = (median(times) for times in found.values())
    print(f"{size:.1f} GB: {plain:.2f} s, read ahead {ahead:.2f} s, {ahead / plain:.3f}")


if __name__ == "__main__":
    main()
