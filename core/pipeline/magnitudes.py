"""The magnitude curves MagCache needs of a transformer: the published ones, or those measured for it.

A transformer other than FramePack's has them in `magnitudes.json` in its folder, written by
`python -m builder.measure_magnitudes`: {"i2v": {"sigmas": […], "ratios": […]}, "f1": …}.
"""

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from core.errors import ModelError, RequestError
from core.weights.profiles import Direction
from diffusers_helper.magcache import PUBLISHED, MagnitudeCurve

FILE = "magnitudes.json"
FRAMEPACK = {
    "num_layers": 20,
    "num_single_layers": 40,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
}

Curves = dict[Direction, MagnitudeCurve]


def curves_of(folder: Path, config: Mapping[str, Any]) -> Curves:
    """The curves of the transformer in `folder`, by direction. None for a model that nobody has measured.

    Fine-tuned weights of FramePack's size have FramePack's. Raises ModelError where the file is damaged.
    """
    path = folder / FILE
    if path.is_file():
        return _read(path)
    known = all(config[name] == value for name, value in FRAMEPACK.items())
    return dict(PUBLISHED) if known else {}


def curve_for(curves: Curves, direction: Direction) -> MagnitudeCurve:
    """Raises RequestError where there is none."""
    if direction not in curves:
        raise RequestError(
            f"`cache` cannot be magcache: this worker's {direction} model has no measured magnitudes; use "
            "teacache or firstblock."
        )
    return curves[direction]


def write(folder: Path, curves: Curves) -> Path:
    path = folder / FILE
    data = {
        direction: {"sigmas": [*curve.sigmas], "ratios": [*curve.ratios]}
        for direction, curve in curves.items()
    }
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _read(path: Path) -> Curves:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        curves = {
            direction: MagnitudeCurve(tuple(map(float, of["sigmas"])), tuple(map(float, of["ratios"])))
            for direction, of in data.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(f"The model file {path} is damaged: it is no list of magnitudes.") from None
    for direction, curve in curves.items():
        if direction not in PUBLISHED or not _is_sound(curve):
            raise ModelError(f"The model file {path} is damaged: its {direction} is no magnitude curve.")
    return curves


def _is_sound(curve: MagnitudeCurve) -> bool:
    falls = all(after < before for before, after in pairwise(curve.sigmas))
    finite = all(0 < value < math.inf for value in [*curve.sigmas, *curve.ratios])
    return falls and finite and len(curve.sigmas) == len(curve.ratios) > 1
