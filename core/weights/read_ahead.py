"""Has the system read the weights from the disk while Python still imports the libraries that load them."""

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from core.errors import ModelError
from core.settings import Settings
from core.weights.files import checkpoint_files, find
from core.weights.profiles import load_profile
from diffusers_helper.host_memory import free_host_memory

THREADS = 4  # files at once: one stream is far from what a network volume gives
CHUNK = 8 * 1024**2
MEMORY_SHARE = 0.8  # of what is free: what does not fit would be dropped before it is used


def read_ahead(settings: Settings) -> list[threading.Thread]:
    """Begin; returns the threads that see to it, which nobody need wait for.

    Reads into the page cache whatever is on this machine of what a worker loads at start, in that order, as
    far as it fits into memory. Raises nothing: loading will tell what is wrong. (`posix_fadvise` would spare
    the copy, but Linux takes only a megabyte or so of what one call asks for.)
    """
    chunks, lock = _chunks(settings), threading.Lock()

    def work() -> None:
        scratch = bytearray(CHUNK)
        with suppress(StopIteration, ModelError, OSError):
            while True:
                with lock:
                    path, start = next(chunks)
                with path.open("rb", buffering=0) as file:
                    file.seek(start)
                    file.readinto(scratch)

    threads = [threading.Thread(target=work, name=f"read-ahead {n}", daemon=True) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    return threads


def _chunks(settings: Settings) -> Iterator[tuple[Path, int]]:
    """Files and offsets."""
    left = MEMORY_SHARE * free_host_memory()
    files = [[path, path.stat().st_size] for path in weight_files(settings)]
    for begun in (files[at : at + THREADS] for at in range(0, len(files), THREADS)):
        for start in range(0, max(size for _, size in begun), CHUNK):
            for path, size in begun:
                if start < size:
                    left -= min(CHUNK, size - start)
                    if left < 0:
                        return
                    yield path, start


def weight_files(settings: Settings) -> Iterator[Path]:
    """Of the models that a worker loads at start, as far as they are on this machine."""
    profile = load_profile(settings)
    for source in profile.sources(profile.direction):
        folder = find(source, settings)
        for part in source.parts if folder else ():
            if part.checkpoint is not None:
                names = checkpoint_files(folder / part.folder, part.checkpoint)
                yield from (folder / part.folder / name for name in names)
