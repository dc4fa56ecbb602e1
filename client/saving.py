"""A job's videos and latents, base64 or URL → files that are whole, or no file at all."""

import base64
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from client.api import CONNECT_S, MAX_BACKOFF_S, Note, is_loopback
from client.errors import SaveError, UsageError
from client.files import check_latents, check_whole

ANSWER_S = 60.0  # from one byte to the next
ATTEMPTS = 6  # in a row that bring no byte
RETRIED = (408, 429)

Received = Callable[[str, int, int | None], None]
"""Called with what is downloaded, the bytes so far and, where it is known, of how many."""


def check_destination(path: Path, overwrite: bool) -> None:
    """Whether a file could be put there, before a job is paid for. Raises UsageError."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder.")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; --force overwrites it.")
    try:
        _part(path).touch(exist_ok=False)
        _part(path).unlink()
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}).") from None


def places(path: Path, count: int) -> list[Path]:
    """Where so many videos go: to `path`, or beside it with their numbers where there are several."""
    return [path.with_stem(f"{path.stem}-{number + 1}") for number in range(count)] if count > 1 else [path]


def videos_of(output: Any, path: Path) -> list[tuple[dict, Path]]:
    """A finished job's reply → what it says of each video, and where that goes."""
    reply = output if isinstance(output, dict) else {}
    outputs = reply.get("outputs")
    if not isinstance(outputs, list) or not outputs:
        return [(reply, path)]
    entries = [entry if isinstance(entry, dict) else {} for entry in outputs]
    # as the job was asked for, that the names do not depend on how many there came to be
    return [*zip(entries, places(path, max(2, len(entries))), strict=False)]


def save_video(reply: dict, content_type: Any, path: Path, overwrite: bool, download: "Download") -> None:
    """Write one video of a finished job's reply. Raises SaveError; then there is no file."""
    inline, url = reply.get("video_base64"), reply.get("video_url")
    with _whole_file(path, overwrite) as file:
        if isinstance(inline, str):
            file.write(_decoded(inline, "The video"))
        elif isinstance(url, str):
            download(url, file)
        else:
            raise SaveError(
                "The job is done, but its reply holds no video; RunPod drops what is too large for it."
            )
        check_whole(file, content_type)


def save_latents(reply: dict, path: Path, overwrite: bool, download: "Download") -> bool:
    """Write the latents that a job returned; False if there are none. Raises SaveError."""
    inline, url = reply.get("latents_base64"), reply.get("latents_url")
    if not isinstance(inline, str) and not isinstance(url, str):
        return False
    with _whole_file(path, overwrite) as file:
        if isinstance(inline, str):
            file.write(_decoded(inline, "The file of latents"))
        else:
            download(url, file)
        check_latents(file)
    return True


def save_jpeg(jpeg_base64: str, path: Path, what: str, overwrite: bool) -> None:
    """Write a preview or a poster. Raises SaveError."""
    jpeg = _decoded(jpeg_base64, what)
    if not jpeg.startswith(b"\xff\xd8\xff"):
        raise SaveError(f"{what} is not a JPEG.")
    with _whole_file(path, overwrite) as file:
        file.write(jpeg)


class Download:
    """URL → file, streamed; a dropped connection is taken up where it broke. Knows nothing of the API key."""

    def __init__(self, what: str, pause: float, note: Note, received: Received, allow_http: bool) -> None:
        self._what = what
        self._pause = pause
        self._note = note
        self._received = received
        self._allow_http = allow_http

    def __call__(self, url: str, file: BinaryIO) -> None:
        """Raises SaveError."""
        failures = 0
        try:
            with self._client(url) as http:
                while True:
                    before = file.tell()
                    try:
                        return self._fetch_rest(http, url, file)
                    except (httpx.RequestError, _AgainError) as error:
                        failures = 1 if file.tell() > before else failures + 1
                        if failures == ATTEMPTS:
                            raise SaveError(
                                f"The download of the {self._what} failed {ATTEMPTS} times."
                            ) from None
                        trouble = str(error) if isinstance(error, _AgainError) else "The download broke off."
                    self._note(f"{trouble} Going on with it.")
                    time.sleep(min(self._pause * 2 ** (failures - 1), MAX_BACKOFF_S))
        except httpx.InvalidURL:
            raise SaveError(f"The URL of the {self._what} is not valid.") from None

    def _client(self, url: str) -> httpx.Client:
        return httpx.Client(
            headers={"Accept-Encoding": "identity"},  # a range counts the bytes as they are sent
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            follow_redirects=True,
            event_hooks={"request": [self._check_scheme]},
            trust_env=not is_loopback(url),
        )

    def _check_scheme(self, request: httpx.Request) -> None:
        """Of every address on the way."""
        http = self._allow_http or is_loopback(str(request.url))
        if request.url.scheme != "https" and not (http and request.url.scheme == "http"):
            raise SaveError(f"The URL of the {self._what} is not https; it is not fetched.")

    def _fetch_rest(self, http: httpx.Client, url: str, file: BinaryIO) -> None:
        start = file.tell()
        with http.stream("GET", url, headers={"Range": f"bytes={start}-"} if start else {}) as response:
            status = response.status_code
            if status in RETRIED or status >= 500:
                raise _AgainError(f"{response.url.host} answered HTTP {status}.")
            if status not in (200, 206, 416):
                raise SaveError(
                    f"{response.url.host} answered HTTP {status}: "
                    f"the URL of the {self._what} may have expired."
                )
            if not (
                status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            ):
                start = file.seek(0)  # from the first byte, then
                file.truncate()
                if status != 200:
                    raise _AgainError(f"{response.url.host} did not send the rest of the {self._what}.")
            length = response.headers.get("Content-Length", "")
            total = start + int(length) if length.isdecimal() else None
            for chunk in response.iter_raw():
                file.write(chunk)
                self._received(self._what, file.tell(), total)


class _AgainError(Exception):
    """The server may do better next time."""


@contextmanager
def _whole_file(path: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """A file that takes its name only when the block ends well. Raises SaveError."""
    part = _part(path)
    try:
        with part.open("w+b") as file:
            yield file
        if path.exists() and not overwrite:
            raise SaveError(f"{path} has come to exist meanwhile; --force overwrites it.")
        part.replace(path)
    except OSError as error:
        raise SaveError(f"{path} cannot be written ({error.strerror}).") from None
    finally:
        with suppress(OSError):
            part.unlink()


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _decoded(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise SaveError(f"{what} is not valid base64.") from None
