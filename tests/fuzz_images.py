"""Fuzzing of the image decoding with coverage as the guide, by atheris; it is not among the requirements.

    pip install atheris    # Linux only
    python -m tests.fuzz_images -max_total_time=300

The options are libFuzzer's. It starts from the good files of `tests/damaged_images.py` and goes by the lines
of `core/images.py` and PIL that it reaches; the C libraries below PIL are fuzzed as well, but unseen. A file
that does what it must not is left as `crash-…`; `python -m tests.fuzz_images crash-…` tries it again.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["PIL", "core.images"]):
    from PIL import ImageOps, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

    from tests.damaged_images import check_image, samples, with_checksums

MAX_BYTES = 8192


def mutated(data: bytes, max_bytes: int, seed: int) -> bytes:
    """libFuzzer's changes; mostly with a PNG's checksums put right, as nothing is read past a wrong one."""
    data = atheris.Mutate(data, max_bytes)
    return with_checksums(data)[:max_bytes] if seed % 4 else data


def main() -> None:
    options = [*sys.argv, "-timeout=20", f"-max_len={MAX_BYTES}"]
    with tempfile.TemporaryDirectory() as folder:
        if all(option.startswith("-") for option in sys.argv[1:]):  # no images of the caller's
            options.append(folder)
            for format, files in samples().items():
                for number, data in enumerate(files):
                    (Path(folder) / f"{number}.{format.lower()}").write_bytes(data)
        atheris.Setup(options, check_image, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
