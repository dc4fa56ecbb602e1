"""`python -m core.reproduce FILE`: the request that a video was made from, as JSON, out of the video itself.

The image is not in the file. `input_image` names it by its SHA-256; `--image PATH` puts that file in its
place when it is the same one. Anything wrong is one line, and exit status 1.
"""

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from core.embedding import NoParametersError, read_embedded
from core.images import MAX_BYTES


def request_of(path: Path, image: Path | None = None) -> dict:
    """`{"input": {…}}`, as a worker takes it. Raises NoParametersError."""
    found = read_embedded(path)
    sha256 = found["input_image_sha256"]
    filled = f"sha256:{sha256}" if image is None else _base64(image, sha256)
    return {"input": {"input_image": filled} | found["parameters"]}


def _base64(image: Path, sha256: str) -> str:
    try:
        with image.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise NoParametersError(f"{image} cannot be read ({error.strerror}).") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise NoParametersError(f"{image} is not the image that the file was made from (SHA-256 {sha256}).")
    return base64.b64encode(data).decode("ascii")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m core.reproduce", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="an MP4, WebM, GIF or zip of PNGs of this worker's")
    parser.add_argument("--image", type=Path, help="the image it was made from, to be filled in")
    options = parser.parse_args(arguments)
    try:
        request = request_of(options.file, options.image)
    except NoParametersError as error:
        sys.stderr.write("".join(c if c.isprintable() else " " for c in str(error)) + "\n")
        return 1
    json.dump(request, sys.stdout, ensure_ascii=True, indent=2)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
