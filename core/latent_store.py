"""Where latents lie between two jobs: on the network volume by a handle, at a URL, or in the request."""

import base64
import binascii
import logging
import re
import secrets
import shutil
from pathlib import Path

from core.errors import LatentsError, LatentsNotFoundError
from core.images import Fetch
from core.settings import Settings

log = logging.getLogger(__name__)

FOLDER = "framepack-latents"
MAX_HANDLE = 128  # characters; any file's base64 is longer
_HANDLE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_URL = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def keep_latents(path: Path, name: str, settings: Settings) -> str | None:
    """Copy the file to the volume, under `name` and a suffix that nobody can guess. Returns the handle.

    None where there is no volume, or no room on it.
    """
    if settings.volume is None:
        return None
    handle = f"{name[:100]}-{secrets.token_hex(8)}"
    kept = _path(handle, settings.volume)
    try:
        kept.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, kept)
    except OSError as error:
        log.warning("the latents could not be kept at %s: %s", kept, error)
        kept.unlink(missing_ok=True)
        return None
    return handle


def open_latents(text: str, settings: Settings, fetch: Fetch, max_bytes: int) -> bytes:
    """The file that `resume_latents` means: a URL, a handle or base64 (of at most `max_bytes`).

    Raises LatentsError or LatentsNotFoundError with one sentence, or what `fetch` raises.
    """
    text = text.strip()
    if _URL.match(text[:64]):
        return fetch(text, max_bytes)
    if len(text) <= MAX_HANDLE:
        return _kept(text, settings, max_bytes)
    if len(text) * 3 // 4 > max_bytes + 2:
        raise _too_large(max_bytes)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise LatentsError("`resume_latents` is no https URL, no handle and not valid base64.") from None


def _kept(handle: str, settings: Settings, max_bytes: int) -> bytes:
    """What is on the volume under a handle, which is a plain name and never a path."""
    if not _HANDLE.fullmatch(handle):
        raise LatentsError("`resume_latents` is no handle: letters, digits, `-`, `_` and `.`, and no path.")
    if settings.volume is None:
        raise LatentsNotFoundError("`resume_latents` is a handle, but the worker has no network volume.")
    path = _path(handle, settings.volume)
    try:
        if path.stat().st_size > max_bytes:
            raise _too_large(max_bytes)
        return path.read_bytes()
    except OSError:
        raise LatentsNotFoundError(
            "The volume has no latents under the handle in `resume_latents`."
        ) from None


def _path(handle: str, volume: Path) -> Path:
    return volume / FOLDER / f"{handle}.safetensors"


def _too_large(max_bytes: int) -> LatentsError:
    return LatentsError(
        f"The latents have over {max_bytes / 1e6:.1f} MB, more than this request's could have."
    )
