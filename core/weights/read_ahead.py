"""Has the system read the weights from the disk while Python still imports the libraries that load them."""

import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path

from core.errors import ModelError
from core.settings import Settings
from core.weights.files import checkpoint_files, find
from core.weights.profiles import Part, load_profile
from diffusers_helper.host_memory import free_host_memory

THREADS = 4  # files at once: one stream is far from what a network volume gives
CHUNK = 8 * 1024**2
MEMORY_SHARE = 0.8  # of what is free: what does not fit would be dropped before it is used

Bytes = tuple[Path, range]


def read_ahead(settings: Settings) -> list[threading.Thread]:
    """Begin; returns the threads that see to it, which nobody need wait for.

    Reads into the page cache whatever is on this machine of what a worker loads at start, in that order, as
    far as it fits into memory. Raises nothing: loading will tell what is wrong. (`posix_fadvise` would spare
    the copy, but Linux takes only a megabyte or so of what one call asks for.)
    """
    chunks, lock = _chunks(settings), threading.Lock()

    def work() -> None:
        scratch = memoryview(bytearray(CHUNK))
        with suppress(StopIteration, ModelError, OSError, ValueError, LookupError, TypeError):
            while True:
                with lock:
                    path, where = next(chunks)
                with path.open("rb", buffering=0) as file:
                    file.seek(where.start)
                    file.readinto(scratch[: len(where)])

    threads = [threading.Thread(target=work, name=f"read-ahead {n}", daemon=True) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    return threads


def _chunks(settings: Settings) -> Iterator[Bytes]:
    left = MEMORY_SHARE * free_host_memory()
    files = [[(path, where) for where in _loaded(path, unused)] for path, unused in weight_files(settings)]
    together = (files[at : at + THREADS] for at in range(0, len(files), THREADS))
    for path, where in chain.from_iterable(_in_turn(begun) for begun in together):
        left -= len(where)
        if left < 0:
            return
        yield path, where


def _in_turn(files: list[list[Bytes]]) -> Iterator[Bytes]:
    """A chunk of each, over and over."""
    cut = (
        [(path, where[at : at + CHUNK]) for path, where in spans for at in range(0, len(where), CHUNK)]
        for spans in files
    )
    return (chunk for row in zip_longest(*cut) for chunk in row if chunk)


def weight_files(settings: Settings) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Of the models that a worker loads at start, as far as they are on this machine.

    With the beginnings of the names of those tensors that are not loaded.
    """
    profile = load_profile(settings)
    for source in profile.sources(profile.direction):
        folder = find(source, settings)
        for part in source.parts if folder else ():
            if part.checkpoint is not None:
                unused = _unused(folder / part.folder, part)
                for name in checkpoint_files(folder / part.folder, part.checkpoint):
                    yield folder / part.folder / name, unused


def _unused(folder: Path, part: Part) -> tuple[str, ...]:
    if not part.unused_layers:
        return ()
    layers = json.loads((folder / "config.json").read_text("utf-8"))["num_hidden_layers"]
    return tuple(f"layers.{number}." for number in range(layers - part.unused_layers, layers))


def _loaded(path: Path, unused: tuple[str, ...]) -> list[range]:
    """The file's bytes but for the tensors whose names begin so, by its header (safetensors' format)."""
    size = path.stat().st_size
    if not unused:
        return [range(size)]
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        tensors = json.loads(file.read(min(length, size)))
    begin = 8 + length
    left_out = sorted(it["data_offsets"] for name, it in tensors.items() if name.startswith(unused))
    ends = [0, *chain.from_iterable((begin + first, begin + last) for first, last in left_out), size]
    spans = (range(first, last) for first, last in zip(ends[::2], ends[1::2], strict=True))
    return [span for span in spans if span]
