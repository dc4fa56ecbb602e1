"""The plain flow-matching step: Euler's, first order, on x0-predictions.

Along x_σ = (1 − σ)·x0 + σ·noise the velocity is (x − x0)/σ; a step goes along it from one noise level to the
next. Same seam as UniPC's (unipc.py): `denoise(x, sigma) -> x0` is any callable.
"""

from itertools import pairwise

import torch

from diffusers_helper.unipc import Callback, Denoise


def sample_euler(
    denoise: Denoise,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Denoise `noise` over `sigmas` with n evaluations of `denoise`.

    `sigmas` are n + 1 decreasing levels, the last 0: float32 on the CPU, shape (n + 1,).

    Returns x at σ = 0, shape and dtype of `noise`; the last step takes all of the noise away, so that is the
    last x0-prediction. `callback(i, x0)` runs after evaluation i = 0 … n−1 and may raise to stop.
    """
    x, levels = noise, sigmas.tolist()
    for i, (sigma, following) in enumerate(pairwise(levels)):
        x0 = denoise(x, sigma)
        if callback is not None:
            callback(i, x0)
        x = x0 + (following / sigma) * (x - x0)
    return x0
