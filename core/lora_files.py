"""Where a request's LoRA lies on this machine: in the worker's folder, or fetched into a bounded cache.

Nothing is believed of a file but its header, which says how long it must be; its tensors are not read here.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from core.errors import DownloadTooLargeError, LoraError, UrlRefusedError, WorkerError
from core.fetch import fetch_into
from core.guard import check_url
from core.request import LoraChoice
from core.settings import Settings

MB = 1_000_000
MAX_HEADER = 8 * MB  # 2,500 tensors and a trainer's notes take less than one
MAX_TENSORS = 20_000
SUFFIX = ".safetensors"


def locate_lora(
    choice: LoraChoice, settings: Settings, max_bytes: int, timeout_s: float, check: Callable[[], None]
) -> Path:
    """The file of `choice`, its header sound and its size at most `max_bytes`; fetched where it is a URL.

    Raises LoraError; for a URL also UrlRefusedError, DownloadError and what `check` raises.
    """
    if choice.url is None:
        path = _in_folder(choice.name, settings.lora_folder)
        check_file(path, shown_name(choice), max_bytes)
        return path
    if not settings.lora_hosts:
        raise UrlRefusedError("This worker takes no LoRAs from URLs; `name` one that it has.")
    check_url(choice.url, settings.lora_hosts)  # of a cached one as well
    return _cached(choice, settings, max_bytes, min(timeout_s, settings.lora_timeout_s), check)


def shown_name(choice: LoraChoice) -> str:
    """A URL's host alone: the rest may hold secrets."""
    name = choice.name or check_url(choice.url).host
    return "".join(c if c.isprintable() else "?" for c in name)


def check_file(path: Path, name: str, max_bytes: int) -> None:
    """Raise LoraError unless this is a whole safetensors file of a LoRA's size. Its tensors are not read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise LoraError(f"The LoRA {name} cannot be read.") from error
    header = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{" or header + 8 > size:
        raise LoraError(f"The LoRA {name} is not a whole safetensors file; other formats are not read.")
    if header > MAX_HEADER:
        raise LoraError(f"The LoRA {name} has a header of over {MAX_HEADER // MB} MB.")
    if size > max_bytes:
        raise LoraError(
            f"The LoRA {name} has {size / MB:.1f} MB; this worker takes {max_bytes / MB:.1f} MB more for one "
            "job (LORA_MAX_MB)."
        )
    try:
        with safe_open(path, framework="numpy") as file:
            count = len(file.keys())
    except (SafetensorError, OSError) as error:
        raise LoraError(f"The LoRA {name} is damaged or cut short.") from error
    if count > MAX_TENSORS:
        raise LoraError(f"The LoRA {name} has over {MAX_TENSORS} tensors.")


def _in_folder(name: str, folder: Path) -> Path:
    """The request has seen to it that `name` is a plain one; a link may still lead out of the folder."""
    missing = LoraError(f"This worker has no LoRA {name}.")
    try:
        path, root = (folder / name).resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # RuntimeError: links in a circle
        raise missing from None
    if not path.is_relative_to(root) or path.suffix != SUFFIX or not path.is_file():
        raise missing
    return path


def _cached(
    choice: LoraChoice, settings: Settings, max_bytes: int, timeout_s: float, check: Callable[[], None]
) -> Path:
    """The URL's file in the cache, fetched unless it is there. It gets its name once it is whole."""
    folder, name = settings.lora_cache, shown_name(choice)
    path = folder / f"{hashlib.sha256(choice.url.encode()).hexdigest()}{SUFFIX}"
    try:
        if path.is_file():
            os.utime(path)  # the cache drops what was used least lately
            check_file(path, name, max_bytes)
            return path
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(suffix=".part", dir=folder)
    except OSError as error:
        raise WorkerError("This worker's cache of LoRAs cannot be written to.") from error
    part = Path(part)
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            fetch_into(
                _writing(file.write),
                choice.url,
                max_bytes=max_bytes,
                timeout_s=timeout_s,
                allowed_hosts=settings.lora_hosts,
                check_cancelled=check,
            )
        check_file(part, name, max_bytes)
        _make_room(folder, int(settings.lora_cache_gb * 1000 * MB), keep=part)
        part.replace(path)
    except DownloadTooLargeError as error:
        raise DownloadTooLargeError(f"{str(error)[:-1]}, which this worker takes (LORA_MAX_MB).") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _writing(write: Callable[[bytes], object]) -> Callable[[bytes], None]:
    """A full disk is not the server's fault."""

    def guarded(chunk: bytes) -> None:
        try:
            write(chunk)
        except OSError as error:
            raise WorkerError("This worker's disk has no room for the LoRA.") from error

    return guarded


def _make_room(folder: Path, most: int, keep: Path) -> None:
    """Remove the files used least lately until all together have at most `most` bytes, `keep` included."""
    sizes = {}
    for path in folder.iterdir():
        if path.suffix in (SUFFIX, ".part"):
            status = path.stat()
            sizes[path] = status.st_size, status.st_mtime
    total = sum(size for size, _ in sizes.values())
    for path in sorted(sizes, key=lambda path: sizes[path][1]):
        if total > most and path != keep:
            path.unlink(missing_ok=True)
            total -= sizes[path][0]
