"""`python -m core.reproduce FILE`: the request that a video was made from, as JSON, out of the video itself.

Images are not in the file. `input_image`, `end_image`, `input_video` and the `sections`' images name them by
their SHA-256; `--image PATH` puts that file in the place of the same one. Anything wrong is one line, and
exit status 1.
"""

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from core.embedding import NoParametersError, read_embedded
from core.extension import MAX_BYTES  # of a request's files the video's is the largest


def request_of(path: Path, images: Sequence[Path] = ()) -> dict:
    """`{"input": {…}}`, as a worker takes it. Raises NoParametersError."""
    found = read_embedded(path)
    names = {name: f"sha256:{digest}" for name, digest in found["images"].items()}
    request = names | found["parameters"]
    places = [(request, name) for name in names]
    places += [(section, "image") for section in request.get("sections", []) if section.get("image")]
    for image in images:
        data = _read(image)
        name = f"sha256:{hashlib.sha256(data).hexdigest()}"
        wanted = [(fields, field) for fields, field in places if fields[field] == name]
        if not wanted:
            raise NoParametersError(
                f"{image} is no image that the file was made from (its SHA-256 is {name[7:]})."
            )
        for fields, field in wanted:
            fields[field] = base64.b64encode(data).decode("ascii")
    return {"input": request}


def _read(image: Path) -> bytes:
    try:
        with image.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise NoParametersError(f"{image} cannot be read ({error.strerror}).") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m core.reproduce", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="an MP4, WebM, GIF, PNG or zip of PNGs of this worker's")
    parser.add_argument("--image", type=Path, action="append", default=[], help="one to be filled in")
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
