"""The sample photographs inside scikit-image and scikit-learn: seen in training, or held out for tests.

The files are read where the packages lie; nothing is imported or downloaded. builder/demo/requirements.txt
names the packages, which only training and the benchmark need.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

SEEN = {
    "astronaut": "skimage/data/astronaut.png",
    "brick": "skimage/data/brick.png",
    "camera": "skimage/data/camera.png",
    "flower": "sklearn/datasets/images/flower.jpg",
    "grass": "skimage/data/grass.png",
    "hubble": "skimage/data/hubble_deep_field.jpg",
    "ihc": "skimage/data/ihc.png",
    "moon": "skimage/data/moon.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
}
HELD_OUT = {
    "chelsea": "skimage/data/chelsea.png",
    "china": "sklearn/datasets/images/china.jpg",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "gravel": "skimage/data/gravel.png",
}


@cache
def load_photograph(name: str) -> np.ndarray:
    """(H, W, 3) uint8. FileNotFoundError when its package is not installed."""
    package, _, path = (SEEN | HELD_OUT)[name].partition("/")
    spec = find_spec(package)  # finds a top-level package without running it
    if spec is None:
        raise FileNotFoundError(
            f"{name} comes inside {package}: pip install -r builder/demo/requirements.txt"
        )
    return np.asarray(Image.open(Path(spec.origin).parent / path).convert("RGB"))
