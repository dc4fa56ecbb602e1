"""The command line → what /run takes: `{"input": {…}, "policy": {…}}`. Bounds are the worker's matter."""

import argparse
import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.api import MAX_REQUEST_BYTES
from client.errors import UsageError
from client.options import FIELDS


@dataclass(frozen=True)
class Kind:
    """Of the files that a request holds."""

    name: str
    max_bytes: int  # the worker's limit
    start: re.Pattern[bytes]


IMAGE = Kind("a PNG, JPEG or WebP", 20_000_000, re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF"))
VIDEO = Kind(
    "an MP4, MOV, WebM, MKV or GIF",
    100_000_000,
    re.compile(rb".{4}(ftyp|moov|mdat|free|skip|wide)|\x1aE\xdf\xa3|GIF8", re.DOTALL),
)
LATENTS = Kind(
    "a safetensors file",
    4_000_000_000,  # of the longest video in the largest frame
    re.compile(rb".{8}\{", re.DOTALL),
)
HANDLE = re.compile(r"[\w.-]+-[0-9a-f]{16}", re.ASCII)  # of latents on the worker's volume


def build_request(options: argparse.Namespace) -> bytes:
    """The body of /run. Raises UsageError."""
    request = _from_file(options.input_json) if options.input_json else {"input": {}}
    fields = request["input"]
    if options.image is not None:
        fields["input_image"] = _inlined(options.image, "IMAGE", IMAGE)
    if options.input_video is not None:
        fields["input_video"] = _inlined(options.input_video, "--input-video", VIDEO)
    if options.end_image is not None:
        fields["end_image"] = _inlined(options.end_image, "--end-image", IMAGE)
    if options.resume_latents is not None:
        fields["resume_latents"] = _latents(options.resume_latents)
    if options.sections is not None:
        fields["sections"] = _sections(options.sections)
    flags = {name: getattr(options, name) for name in ("prompt", *FIELDS)}
    fields |= {name: value for name, value in flags.items() if value is not None}
    fields |= dict(_assignment(text) for text in options.set)
    if options.execution_timeout is not None:
        policy = _object(request.get("policy", {}), "`policy`")
        request["policy"] = policy | {"executionTimeout": round(1000 * options.execution_timeout)}
    try:
        body = json.dumps(request, allow_nan=False).encode()
    except ValueError:
        raise UsageError("The request holds a number that JSON does not know.") from None
    if len(body) > MAX_REQUEST_BYTES and options.local is None:
        raise UsageError(
            f"The request has {len(body) / 1e6:.1f} MB and RunPod takes {MAX_REQUEST_BYTES / 1e6:g} MB, "
            "which files of about 7 MB fill; give smaller ones, or https URLs in their place."
        )
    return body


def _inlined(source: str, what: str, kind: Kind) -> str:
    """base64 of a file; an https URL as it is, for the worker to fetch."""
    if source.lower().startswith("https://"):
        return source
    if "://" in source:
        raise UsageError(f"{what} must be a file or an https URL.")
    try:
        with Path(source).open("rb") as file:
            data = file.read(kind.max_bytes + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{source} cannot be read ({_reason(error)}).") from None
    if len(data) > kind.max_bytes:
        raise UsageError(f"{source} has over {kind.max_bytes / 1e6:g} MB, more than the worker takes.")
    if not kind.start.match(data):
        raise UsageError(f"{source} is not {kind.name}.")
    return base64.b64encode(data).decode()


def _latents(source: str) -> str:
    if HANDLE.fullmatch(source) and not Path(source).exists():
        return source
    return _inlined(source, "--resume-latents", LATENTS)


def _sections(path: Path) -> list[dict[str, Any]]:
    """What happens when, with each image a file, as seen from the list's folder, or an https URL."""
    content = _json(path)
    if not isinstance(content, list):
        raise UsageError(f"{path} must be a JSON list, of an object for each section.")
    entries = [_object(entry, f"Entry {place} of {path}") for place, entry in enumerate(content, 1)]
    return [
        entry | {"image": _inlined(_beside(path, image), f"`image` in {path}", IMAGE)}
        if isinstance(image := entry.get("image"), str)
        else entry
        for entry in entries
    ]


def _beside(path: Path, source: str) -> str:
    return source if "://" in source else str(path.parent / source)


def _from_file(path: Path) -> dict[str, Any]:
    """A file like test_input.json, or one with only what its `input` holds."""
    content = _object(_json(path), str(path))
    if "input" not in content:
        return {"input": content}
    return content | {"input": _object(content["input"], f"`input` in {path}")}


def _json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({_reason(error)}).") from None
    return _parsed(text, str(path))


def _assignment(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise UsageError(f"--set takes NAME=JSON (got {text}).")
    return name, _parsed(value, f"--set {text}", hint="; a text needs quotes, as in --set 'output=\"url\"'")


def _parsed(text: str, source: str, hint: str = "") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source} is not valid JSON ({error}){hint}.") from None


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{name} must be a JSON object.")
    return value


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
