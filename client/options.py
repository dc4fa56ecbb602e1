"""Command line and environment → one namespace, checked as far as can be before a job costs anything."""

import argparse
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from client.api import JOB_ID, RUNPOD_URL, is_loopback
from client.errors import UsageError
from client.files import FORMATS

EPILOG = """\
environment:
  RUNPOD_ENDPOINT_ID, RUNPOD_API_KEY   instead of --endpoint and --api-key (flags show in `ps`)
  RUNPOD_API_URL                       instead of --api-url

exit codes:
    0  the video is saved; with --detach, the job is queued
    1  the job failed: the worker's sentence and code are printed
    2  the command line, a file it names or the request is wrong
    3  the API key is refused (HTTP 401 or 403)
    4  the endpoint cannot be reached, or it or the job is unknown (HTTP 404)
    5  timed out: RunPod's execution time-out, or --wait, after which the job goes on
    6  the job is done, but its video or latents could not be fetched or saved
  130  cancelled by Ctrl-C, and the remote job with it; a second Ctrl-C quits at once

RunPod keeps a result for 30 minutes: after 3, 4, 5 and 6, `--resume ID` may still get it.
"""

# (flag, the request's field, type, metavar, help)
FIELD_FLAGS = (
    ("--seconds", "total_second_length", float, "S", "length of the video (5)"),
    ("--seed", "seed", int, "N", "same seed, same video (31337); -1 draws one"),
    ("--steps", "steps", int, "N", "sampling steps per section (25)"),
    ("--model", "model", str, "NAME", "i2v or f1 (the worker's)"),
    ("--cfg", "cfg", float, "X", "classifier-free guidance (1: none)"),
    ("--rescale", "rs", float, "X", "of the guidance, 0 to 1, where --cfg is above 1 (0)"),
    ("--gs", "gs", float, "X", "distilled guidance (10)"),
    ("--start", "start", str, "COLOUR", "begin with black, white, noise or #rrggbb, in place of IMAGE"),
    ("--resolution", "resolution", int, "N", "side of the square whose area the frame has (640)"),
    ("--width", "width", int, "N", "of the frame in pixels, a multiple of 16, with --height"),
    ("--height", "height", int, "N", "likewise"),
    ("--aspect-ratio", "aspect_ratio", str, "W:H", "of the frame, at --resolution; auto is the image's"),
    ("--window", "latent_window_size", int, "N", "latent frames sampled at once (9)"),
    ("--sampler", "sampler", str, "NAME", "unipc_bh1, unipc_bh2 or euler (unipc_bh1)"),
    ("--shift", "shift", float, "X", "of the noise schedule (0: by the frame's size)"),
    ("--cache", "cache", str, "NAME", "none, teacache, magcache or firstblock (teacache)"),
    ("--cache-threshold", "cache_threshold", float, "X", "higher skips more steps (the cache's own)"),
    ("--cache-order", "cache_order", int, "N", "extrapolate skipped steps: 1 by a line, 2 by a parabola (0)"),
    ("--blend", "blend_sections", int, "N", "sections over which one prompt becomes the next (0)"),
    ("--end-mode", "end_image_mode", str, "NAME", "history or embedding (history)"),
    ("--end-strength", "end_image_strength", float, "X", "of --end-image, 0 to 1 (1)"),
    ("--negative-prompt", "n_prompt", str, "TEXT", "what to avoid, where --cfg is above 1"),
    ("--crf", "mp4_crf", int, "N", "quality, 0 to 51; lower is better and larger (16)"),
    ("--format", "format", str, "NAME", "mp4, webm, gif or png_sequence (mp4)"),
    ("--codec", "codec", str, "NAME", "h264, h265, vp9 or av1 (the format's)"),
    ("--fps", "fps", int, "N", "frames per second that the file is played at (30)"),
    ("--outputs", "num_outputs", int, "N", "videos with consecutive seeds, 1 to 4 (1)"),
    ("--timeout", "timeout_s", float, "S", "the worker's own limit for the job"),
)
FIELDS = (
    *(field for _, field, *_ in FIELD_FLAGS),
    *("loras", "partial", "exact_length", "poster", "preview", "return_latents"),
)

EXECUTION_TIMEOUT_S = (5, 7 * 24 * 3600)  # RunPod's bounds
ENDPOINT_ID = re.compile(r"[\w-]{1,100}", re.ASCII)
KEY = re.compile(r"[!-~]+")  # what a header can carry


def parse_options(
    arguments: Sequence[str] | None = None, env: Mapping[str, str] = os.environ
) -> argparse.Namespace:
    """Flags over environment. As argparse: exits with status 2 and the usage on what it cannot read."""
    options = _parser().parse_intermixed_args(arguments)
    begins = options.input_video or options.start or options.resume_latents
    if begins and options.prompt is None:  # then a single one is no IMAGE
        options.image, options.prompt = None, options.image
    new = options.resume is None
    options.preview = True if options.preview_file and new else None
    options.return_latents = True if options.latents_file and new else None
    options.endpoint = (options.endpoint or env.get("RUNPOD_ENDPOINT_ID", "")).strip()
    options.api_key = (options.api_key or env.get("RUNPOD_API_KEY", "")).strip()
    options.api_url = (options.api_url or env.get("RUNPOD_API_URL") or RUNPOD_URL).rstrip("/")
    return options


def check_options(options: argparse.Namespace) -> None:
    """Raises UsageError for what does not go together or is no server, id or key."""
    if options.resume is not None:
        _check_resume(options)
    elif options.input_json is None and options.prompt is None:
        raise UsageError(
            "IMAGE and PROMPT are needed, or --start, --input-video, --resume-latents, --input-json "
            "or --resume."
        )
    elif sum(given is not None for given in (options.image, options.start, options.input_video)) > 1:
        raise UsageError("--start and --input-video stand in place of IMAGE; only one must be given.")
    if options.local is not None:
        if options.detach or options.resume or options.execution_timeout:
            raise UsageError("--local has no --detach, --resume or --execution-timeout.")
        _check_url("--local", options.local)
        return
    _check_url("--api-url", options.api_url)
    if not options.api_url.startswith("https://") and not is_loopback(options.api_url):
        raise UsageError("--api-url must be https: the API key is sent there.")
    if not ENDPOINT_ID.fullmatch(options.endpoint):
        raise UsageError("--endpoint or RUNPOD_ENDPOINT_ID must be the endpoint's id, letters and digits.")
    if not KEY.fullmatch(options.api_key):
        raise UsageError("--api-key or RUNPOD_API_KEY must be an API key, printable ASCII without spaces.")


def default_output(options: argparse.Namespace) -> Path:
    """Named after the job, the image, the video or the input file, else `video`, in the current folder.

    Its suffix is of the format that a flag asks for; the reply's content type has the last word.
    """
    if options.resume is not None:
        return Path(f"{options.resume}.mp4")
    suffix = FORMATS.get(options.format, ".mp4")
    source = options.image or options.input_video
    if source is None:
        return Path(f"{options.input_json.stem if options.input_json else 'video'}{suffix}")
    source = re.sub(r"[?#].*", "", source) if "://" in source else source
    extended = "" if options.image else "-extended"  # another name than the given video's
    return Path(f"{Path(source).stem or 'video'}{extended}{suffix}")


def _check_resume(options: argparse.Namespace) -> None:
    fields = any(getattr(options, field) is not None for field in FIELDS)
    if (
        options.image
        or options.end_image
        or options.input_video
        or options.resume_latents
        or options.input_json
        or options.sections
        or options.set
        or fields
        or options.execution_timeout
        or options.detach
    ):
        raise UsageError(
            "--resume takes a job as it was submitted: no IMAGE, no PROMPT, no field, no --detach."
        )
    if not JOB_ID.fullmatch(options.resume):
        raise UsageError("--resume takes a job's id.")


def _check_url(flag: str, url: str) -> None:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"{flag} must be an http or https URL (got {url}).")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m client",
        description="Have an image and a prompt made into a video by the worker, and save the MP4.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("image", metavar="IMAGE", nargs="?", help="PNG, JPEG or WebP file, or an https URL of one")
    add("prompt", metavar="PROMPT", nargs="?", help="what happens in the video")
    add("-o", "--output", type=Path, metavar="FILE", help="where the MP4 goes (IMAGE's name with .mp4, here)")
    add("--force", action="store_true", help="overwrite an existing file")

    add = parser.add_argument_group("server").add_argument
    add("--endpoint", metavar="ID", help="RunPod endpoint")
    add("--api-key", metavar="KEY", help="RunPod API key")
    add("--api-url", metavar="URL", help=f"RunPod's API ({RUNPOD_URL})")
    add("--local", metavar="URL", help="use `python handler.py --rp_serve_api` at http://localhost:8000, say")

    add = parser.add_argument_group("job").add_argument
    add("--detach", action="store_true", help="print the job's id and leave it to itself")
    add("--resume", metavar="ID", help="go on with a job submitted earlier: its progress, its video")
    add("--wait", type=_positive, metavar="S", help="give up waiting after so long; the job goes on")
    add("--execution-timeout", type=_execution_timeout, metavar="S", help="RunPod's limit for this job (600)")
    add("--poll-interval", type=_positive, default=1.0, metavar="S", help="between polls, at first (1)")

    add = parser.add_argument_group(
        "request", "A field that is not given is the worker's default."
    ).add_argument
    add("--input-json", type=Path, metavar="FILE", help="start from a file such as test_input.json")
    for flag, field, kind, metavar, text in FIELD_FLAGS:
        add(flag, dest=field, type=kind, metavar=metavar, help=text)
    add(
        "--input-video",
        metavar="FILE",
        help="a video to go on from, in place of IMAGE: a file or an https URL",
    )
    add("--end-image", metavar="FILE", help="what the video ends with: a file or an https URL, as IMAGE")
    add(
        "--resume-latents",
        metavar="FILE",
        help="go on from what --latents saved: a file, an https URL or a handle; IMAGE may be left out",
    )
    add(
        "--lora",
        dest="loras",
        action="append",
        type=_lora,
        metavar="NAME[=WEIGHT]",
        help="a file of the worker's, or an https URL; may be repeated (weight 1)",
    )
    add(
        "--sections",
        type=Path,
        metavar="FILE.json",
        help="prompts and images by time: a list of objects with start_s, end_s, prompt, image",
    )
    add("--exact-length", action="store_true", default=None, help="--seconds to the frame, no whole sections")
    add("--poster", action="store_true", default=None, help="save the first frame as a JPEG, too")
    add("--partial", action="store_true", default=None, help="at the limit, take what there is of the video")
    add("--set", action="append", default=[], metavar="NAME=JSON", help="any other field; may be repeated")

    add = parser.add_argument_group("display").add_argument
    add("--preview", dest="preview_file", type=Path, metavar="FILE.jpg", help="keep the newest preview here")
    add("--latents", dest="latents_file", type=Path, metavar="FILE", help="save the latents here, too")
    add("--json", action="store_true", help="print one JSON document on stdout: the reply without the video")
    add("--quiet", action="store_true", help="say nothing but errors")
    return parser


def _lora(text: str) -> dict[str, str | float]:
    where, sign, weight = text.rpartition("=")
    if not sign or weight.endswith(".safetensors"):  # its URL or name has the sign
        where, weight = text, "1"
    try:
        return {"url" if "://" in where else "name": where, "weight": float(weight)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"the weight must be a number (got {weight})") from None


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 (got {text})")
    return value


def _execution_timeout(text: str) -> float:
    value = float(text)
    low, high = EXECUTION_TIMEOUT_S
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be {low} to {high} seconds (got {text})")
    return value
