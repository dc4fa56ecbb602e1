"""Put the demo models in place: a copy of builder/demo/weights, each file compared with its SHA-256.

    python -m builder.make_demo_models [FOLDER]       into models/demo, or FOLDER
    python -m builder.make_demo_models --take RUN     the other way: RUN becomes builder/demo/weights

RUN is what builder.demo.train wrote.
"""

import argparse
import hashlib
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from core.errors import ModelError

WEIGHTS = Path(__file__).parent / "demo" / "weights"
DEMO_MODELS = Path(__file__).parents[1] / "models" / "demo"
SUMS = "SHA256SUMS"
RECORD = "training.json"
PARTS = ("hunyuan", "redux", "framepack")
FORMER_PARTS = ("framepack_f1",)  # older sets had a transformer for each direction
RESTORE = "`git checkout -- builder/demo/weights` brings back the repository's files"
MIB = 1024**2
MOST_OF_A_FILE, MOST_OF_ALL = 16 * MIB, 45 * MIB  # they stay in the repository's history for good


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 and one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument("folder", type=Path, nargs="?", default=DEMO_MODELS)
    way.add_argument("--take", type=Path, metavar="RUN")
    options = parser.parse_args(arguments)
    try:
        if options.take:
            take(options.take, WEIGHTS)
            print(f"The models of {options.take} are in {WEIGHTS}")
        else:
            place(options.folder, WEIGHTS)
            print(f"The demo models are in {options.folder}")
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def place(folder: Path, weights: Path) -> None:
    """Have the models of `weights` in `folder`, and none of an older set's files beside them.

    Raises ModelError with one sentence, before anything is written, when one is not as SHA256SUMS has it.
    """
    sums = read_sums(weights)
    for name, digest in sums.items():
        if sha256(existing(weights / name)) != digest:
            size = (weights / name).stat().st_size
            raise ModelError(f"{weights / name} ({size} bytes) is not as {SUMS} has it; {RESTORE}.")
    mirror(weights, folder, sums)


def take(run: Path, weights: Path) -> None:
    """Have a training run's models and its record in `weights`, with their SHA256SUMS.

    Raises ModelError with one sentence, before anything is written, when they are not whole or too large.
    """
    from core.settings import Settings
    from core.weights.files import check_files
    from core.weights.profiles import load_profile  # these need torch, which `place` does not

    for source in load_profile(Settings(model_profile="demo")).sources("i2v"):
        check_files(run / Path(source.location).name, source)
    if not (run / RECORD).is_file():
        raise ModelError(f"{run / RECORD} is missing.")
    files = [path for part in PARTS for path in (run / part).rglob("*") if path.is_file()] + [run / RECORD]
    sizes = {path: path.stat().st_size for path in files}
    largest = max(files, key=sizes.__getitem__)
    for what, size, most in (
        (largest, sizes[largest], MOST_OF_A_FILE),
        (f"All of {run}", sum(sizes.values()), MOST_OF_ALL),
    ):
        if size > most:
            raise ModelError(f"{what} has {size / MIB:.1f} MiB, and {most / MIB:.0f} may be tracked.")
    sums = {path.relative_to(run).as_posix(): sha256(path) for path in sorted(files)}
    mirror(run, weights, sums)
    (weights / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def mirror(source: Path, target: Path, sums: dict[str, str]) -> None:
    """Copy what `target` has not yet, and remove all else in its models' folders."""
    for part in PARTS + FORMER_PARTS:
        for path in [*(target / part).rglob("*")]:
            if path.is_file() and path.relative_to(target).as_posix() not in sums:
                path.unlink()
    for name, digest in sums.items():
        copy = target / name
        if not copy.is_file() or sha256(copy) != digest:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, copy)


def read_sums(weights: Path) -> dict[str, str]:
    """SHA256SUMS, in sha256sum's format, as digests by file name."""
    path = existing(weights / SUMS)
    lines = [re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in path.read_text().splitlines()]
    if not lines or not all(lines):
        raise ModelError(f"{path} is damaged; {RESTORE}.")
    return {line[2]: line[1] for line in lines}


def existing(path: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"{path} is missing; {RESTORE}.")
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
