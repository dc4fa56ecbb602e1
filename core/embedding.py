"""A request's parameters inside the file that was made from them, and out of it again.

MP4 and WebM have them as the tag `comment`, GIF and PNG as a comment, a zip of PNGs as `parameters.json`: one
JSON object with `parameters`, `profile` and `images`, which names each image by its field and the SHA-256 of
its file. Neither they nor a bucket's credentials are in it. Needs no torch.
"""

import json
import os
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import imageio_ffmpeg

from core.png_file import KEYWORD
from core.png_zip import PARAMETERS

MARK = "framepack_worker"  # and the version of what is beside it
MAX_BYTES = 4_000_000
READ_TIMEOUT_S = 60
PNG = b"\x89PNG\r\n\x1a\n"


class NoParametersError(Exception):
    """A file that holds no parameters of ours; one sentence."""


def embedded(parameters: dict, profile: str, images: dict[str, str]) -> str:
    """The text to embed; `parameters` are the reply's, without secrets; `images` are digests by field."""
    found = {
        MARK: 1,
        "profile": profile,
        "images": images,
        "parameters": parameters,
    }
    return json.dumps(found, ensure_ascii=False, allow_nan=False)


def as_ffmetadata(text: str) -> str:
    """ffmpeg's own format for tags, with `text` as the comment."""
    escaped = "".join(f"\\{c}" if c in "=;#\\\n" else c for c in text)
    return f";FFMETADATA1\ncomment={escaped}\n"


def append_to_gif(path: Path, text: str) -> None:
    """Put a comment in front of the GIF's last byte. Raises OSError."""
    data = text.encode()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x21\xfe")
        for start in range(0, len(data), 255):
            block = data[start : start + 255]
            file.write(bytes([len(block)]) + block)
        file.write(b"\0;")


def read_embedded(path: Path) -> dict[str, Any]:
    """What `embedded` put into the file. Raises NoParametersError."""
    try:
        with path.open("rb") as file:
            text = _text_of(path, file)
    except OSError as error:
        raise NoParametersError(f"{path} cannot be read ({error.strerror or 'damaged'}).") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not (
        isinstance(found, dict)
        and found.get(MARK) == 1
        and isinstance(found.get("parameters"), dict)
        and isinstance(found.get("images"), dict)
        and all(isinstance(digest, str) for digest in found["images"].values())
    ):
        raise NoParametersError(f"{path} holds no parameters of this worker's.")
    return found


def _text_of(path: Path, file: BinaryIO) -> bytes:
    magic = file.read(12)
    file.seek(0)
    if magic.startswith(b"GIF8"):
        return b"".join(_gif_comments(file))
    if magic.startswith(b"PK"):
        return _zipped(path, file)
    if magic[4:8] == b"ftyp":
        return _comment_tag(path, "mov")
    if magic.startswith(b"\x1aE\xdf\xa3"):
        return _comment_tag(path, "matroska")
    if magic.startswith(PNG):
        return _png_text(file)
    raise NoParametersError(f"{path} is not an MP4, a WebM, a GIF, a PNG or a zip of PNGs.")


def _zipped(path: Path, file: BinaryIO) -> bytes:
    try:
        with zipfile.ZipFile(file) as archive, archive.open(PARAMETERS) as member:
            return member.read(MAX_BYTES)
    except KeyError:
        raise NoParametersError(f"{path} has no {PARAMETERS}.") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        raise NoParametersError(f"{path} is a damaged zip.") from None


def _comment_tag(path: Path, demuxer: str) -> bytes:
    """By ffmpeg, of this file alone: a file that names others is not followed."""
    try:
        source = f"file:{path.absolute()}"  # whatever its name: a file's, and no protocol's
        options = ("-v", "error", "-protocol_whitelist", "file,pipe", "-f", demuxer)
        done = subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), *options, "-i", source, "-f", "ffmetadata", "pipe:1"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=READ_TIMEOUT_S,
        )
    except (subprocess.SubprocessError, RuntimeError):
        raise NoParametersError(f"{path} is damaged, or ffmpeg does not run.") from None
    for key, value in _tags(done.stdout[:MAX_BYTES].decode("utf-8", "replace")):
        if key.lower() == "comment":
            return value.encode()
    raise NoParametersError(f"{path} holds no parameters of this worker's.")


def _tags(ffmetadata: str) -> Iterator[tuple[str, str]]:
    """(key, value) of the file itself; a backslash takes away the next character's meaning."""
    part, parts, escaped = "", [], False
    for c in ffmetadata.partition("\n")[2] + "\n":
        if escaped or c not in "\\=\n":
            part, escaped = part + c, False
        elif c == "\\":
            escaped = True
        elif c == "=" and not parts:
            parts, part = [part], ""
        elif c == "\n":
            if part.startswith("[") and not parts:  # of a stream or a chapter from here on
                return
            if parts:
                yield parts[0], part
            part, parts = "", []
        else:
            part += c


def _gif_comments(file: BinaryIO) -> Iterator[bytes]:
    """The comments' bytes, in the file's order. Raises OSError for what is not a whole GIF."""
    header = _exactly(file, 13)
    _skip_palette(file, header[10])
    while (kind := _exactly(file, 1)) != b";":
        if kind == b"\x21":
            comment = _exactly(file, 1) == b"\xfe"
        elif kind == b",":
            _skip_palette(file, _exactly(file, 9)[8])
            _exactly(file, 1)
            comment = False
        else:
            raise OSError("damaged")
        while size := _exactly(file, 1)[0]:
            block = _exactly(file, size)
            if comment:
                yield block


def _png_text(file: BinaryIO) -> bytes:
    """Of the text chunk with our keyword. Raises OSError for what is not a whole PNG, or has none."""
    _exactly(file, len(PNG))
    while (head := _exactly(file, 8))[4:] != b"IEND":
        length = int.from_bytes(head[:4])
        # keyword, 0, not compressed, no language, no other keyword
        marked = f"{KEYWORD}\0\0\0\0\0".encode()
        if head[4:] == b"iTXt" and len(marked) <= length <= MAX_BYTES:
            data = _exactly(file, length)
            if data.startswith(marked):
                return data[len(marked) :]
            length = 0
        file.seek(length + 4, os.SEEK_CUR)  # and its checksum
    raise OSError("damaged")


def _skip_palette(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        _exactly(file, 3 << (1 + (flags & 7)))


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise OSError("cut short")
    return data
