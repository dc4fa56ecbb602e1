"""Fetch the models: only the files needed, at their pinned revisions, resumed, sizes and hashes checked.

    python -m builder.fetch_models --to /models                                   in an image build
    HF_HOME=/runpod-volume/huggingface-cache python -m builder.fetch_models       on a network volume
    python -m builder.fetch_models --verify                                       compare what is there again

The environment names the models as it does for the worker, which downloads nothing that it finds there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants

from core.errors import ModelError, WorkerError
from core.settings import Settings
from core.weights.files import check_files
from core.weights.hub import GB, WORKERS, PlainFolder, Snapshot, damaged_files, fetch
from core.weights.profiles import Source, load_profile

DIRECTIONS = {"i2v": ("i2v",), "f1": ("f1",), "both": ("i2v", "f1")}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 when everything is there and whole, else 1 and one line that says what is not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", choices=DIRECTIONS, default="both", help="which transformer (both)")
    parser.add_argument("--to", type=Path, metavar="DIR", help="a folder to bake, instead of the hub cache")
    parser.add_argument("--verify", action="store_true", help="fetch nothing; remove what is damaged")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"files at a time ({WORKERS})")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    store_type = Snapshot if options.to is None else PlainFolder
    root = Path(constants.HF_HUB_CACHE) if options.to is None else options.to
    try:
        profile = load_profile(Settings.from_env())
        sources = [s for s in profile.sources(*DIRECTIONS[options.models]) if not s.is_folder]
        if options.verify:
            for source in sources:
                verify(source, store_type, root, options.workers)
        else:
            for store, files in fetch(sources, store_type, root, options.workers):
                size = sum(file.size for file in files) / GB
                done = f"files fetched: {len(files)} ({size:.1f} GB)" if files else "nothing to fetch"
                print(f"{store.source}: {done}; it is in {store.folder}")
    except WorkerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def verify(source: Source, store_type: type[Snapshot] | type[PlainFolder], root: Path, workers: int) -> None:
    """Compare every file with the hub's hash, remove what differs. Raises ModelError naming what is amiss."""
    store = store_type(source, root)
    damaged = damaged_files(store, workers) if store.folder.is_dir() else []
    for file in damaged:
        store.remove(file)
    if damaged:
        names = ", ".join(str(store.folder / file.path) for file in damaged)
        raise ModelError(f"Damaged, and removed: {names}; fetch again.")
    check_files(store.folder, source)
    print(f"{source}: every file in {store.folder} is as the hub has it")


if __name__ == "__main__":
    sys.exit(main())
