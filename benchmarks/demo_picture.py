"""The README's pictures of what `make demo` makes: the video as a WebP, and seven of its frames in a row.

    make demo && python -m benchmarks.demo_picture outputs/local_test.mp4 docs

Writes demo.webp and demo_strip.webp into the folder.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.demo_measure import read_video
from core.pipeline.sections import FPS

SHOWN = 7  # frames of the strip
EVERY = 2  # frames of the video for one of the WebP
QUALITY = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    frames = read_video(options.video)
    first, *others = [Image.fromarray(frame) for frame in frames[::EVERY]]
    first.save(
        options.folder / "demo.webp",
        save_all=True,
        append_images=others,
        duration=round(1000 * EVERY / FPS),
        loop=0,
        quality=QUALITY,
    )
    strip = np.concatenate(frames[np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)], axis=1)
    Image.fromarray(strip).save(options.folder / "demo_strip.webp", quality=QUALITY)


if __name__ == "__main__":
    main()
