"""Aspect-ratio buckets and the crop that fills them."""

import math

import numpy as np
from PIL import Image

STEP = 32  # sides are multiples: 8 (VAE) × 2 (patch) × 2 (the 2× history kernel)


def buckets(resolution: int) -> list[tuple[int, int]]:
    """(height, width) pairs of about `resolution`² pixels, ordered by height.

    The official table exists for 640 only. It holds, for every short side from 0.65·640 on, the longest
    other side that keeps the area within 0.975·640²; the same rule serves every other multiple of 32.
    """
    area = resolution * resolution * 39 // 40
    pairs = set()
    short = -(-resolution * 13 // (20 * STEP)) * STEP  # 0.65·resolution, rounded up to the step
    while (long := area // (short * STEP) * STEP) >= short:
        pairs |= {(short, long), (long, short)}
        short += STEP
    return sorted(pairs)


def nearest_bucket(height: int, width: int, resolution: int) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest, by |h·bucket_w − w·bucket_h|; ties go to the taller one."""
    return min(
        buckets(resolution),
        key=lambda bucket: (abs(height * bucket[1] - width * bucket[0]), -bucket[0]),
    )


def sides_of_ratio(down: int, across: int, resolution: int) -> tuple[int, int]:
    """(height, width) of that ratio and about `resolution`² pixels, each rounded to the buckets' step.

    Nearer to the ratio than a bucket, of which a small resolution has few: 1:1 is a square.
    """
    height = resolution * math.sqrt(down / across)
    width = resolution * math.sqrt(across / down)
    return STEP * round(height / STEP), STEP * round(width / STEP)


def covering_size(original_height: int, original_width: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) of a picture that is enlarged or reduced until it just covers height × width."""
    scale = max(width / original_width, height / original_height)
    return round(original_height * scale), round(original_width * scale)


def resize_and_center_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 → (height, width, 3) uint8: Lanczos to the size that covers, then the centre."""
    if image.shape[:2] == (height, width):
        return image
    resized_height, resized_width = covering_size(*image.shape[:2], height, width)
    resized = Image.fromarray(image).resize((resized_width, resized_height), Image.Resampling.LANCZOS)
    # PIL rounds half to even here, which the official crop relies on
    left, top = (resized_width - width) / 2, (resized_height - height) / 2
    return np.asarray(resized.crop((left, top, left + width, top + height)))
