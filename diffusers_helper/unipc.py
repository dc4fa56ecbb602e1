"""Multistep UniPC (arXiv 2302.04867) for flow matching, on x0-predictions.

Along x_σ = (1 − σ)·x0 + σ·noise the exact solution between two noise levels, in λ = −ln σ, is
x_t = (σ_t/σ_s)·x_s + ∫ e^(λ − λ_t)·x0(λ) dλ. UniPC approximates x0(λ) through the predictions already made;
the predictor leaves out the newest one, the corrector uses it too and costs no further evaluation.

The coefficients are float32 scalars on the host, as the official sampler's are: with many steps h is small,
the φ functions cancel, and their rounding is part of its result (1e-4 in the latents after 10 steps).

This file knows no model: `denoise(x, sigma) -> x0` is any callable.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch

MAX_ORDER = 3

Variant = Literal["bh1", "bh2"]  # the paper's B(h): h, or e^h − 1

Denoise = Callable[[torch.Tensor, float], torch.Tensor]
Callback = Callable[[int, torch.Tensor], None]


def sample_unipc(
    denoise: Denoise,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    callback: Callback | None = None,
    variant: Variant = "bh1",
) -> torch.Tensor:
    """Denoise `noise` over `sigmas` with n evaluations of `denoise`.

    `sigmas` are n + 1 decreasing levels, the last 0: float32 on the CPU, shape (n + 1,).

    Returns the last x0-prediction, shape and dtype of `noise`, as the official sampler does: the step to
    σ = 0 would return just that. `callback(i, x0)` runs after evaluation i = 0 … n−1 and may raise to stop.
    The order is min(3, n − 1), and lower for the first steps, where fewer predictions exist.
    """
    steps = len(sigmas) - 1
    order = min(MAX_ORDER, steps - 1)
    lambdas = -sigmas.log()

    x = noise
    predictions: list[torch.Tensor] = []  # x0 at the latest levels, newest last
    for i in range(steps):
        if i > 0:
            x_s, m0 = x, predictions[-1]
            h = lambdas[i] - lambdas[i - 1]
            ratios = [((lambdas[i - 1 - k] - lambdas[i - 1]) / h).item() for k in range(1, min(order, i))]
            # D_k / r_k: divided differences of x0 against its newest prediction
            differences = [(m - m0) / r for m, r in zip(predictions[-2::-1], ratios, strict=False)]
            base = (sigmas[i] / sigmas[i - 1]).item() * x_s - torch.expm1(-h).item() * m0
            scale = -_b(h, variant).item()
            x = base + scale * _weighted(predictor_weights(ratios, h, variant), differences, m0)

        x0 = denoise(x, sigmas[i].item())
        if callback is not None:
            callback(i, x0)

        if i > 0:
            weights = corrector_weights(ratios, h, variant)
            x = base + scale * _weighted(weights, [*differences, x0 - m0], m0)
        predictions = [*predictions, x0][-MAX_ORDER:]
    return predictions[-1]


def predictor_weights(ratios: Sequence[float], h: torch.Tensor, variant: Variant = "bh1") -> list[float]:
    """ρ of the predictor of order len(ratios) + 1; `ratios` are earlier levels' (λ_k − λ_s)/h, all < 0."""
    if not ratios:
        return []
    if len(ratios) == 1:
        return [0.5]  # the simplified ρ of order 2, exact to that order
    return _solve(ratios, h, variant)


def corrector_weights(ratios: Sequence[float], h: torch.Tensor, variant: Variant = "bh1") -> list[float]:
    """ρ of the corrector, one more than the predictor's: the last belongs to the new prediction (ratio 1)."""
    if not ratios:
        return [0.5]
    return _solve([*ratios, 1.0], h, variant)


def _b(h: torch.Tensor, variant: Variant) -> torch.Tensor:
    """B at −h, in which data prediction runs the recurrence; the two agree to first order."""
    return torch.expm1(-h) if variant == "bh2" else -h


def _solve(ratios: Sequence[float], h: torch.Tensor, variant: Variant) -> list[float]:
    """Solve Σ_k ρ_k·r_k^(n−1) = n!·hh·φ_(n+1)(hh)/B(hh) for n = 1 … len(ratios), hh being −h."""
    hh, b = -h, _b(h, variant)
    phi = torch.expm1(hh) / hh - 1.0
    factorial = 1
    right = []
    for n in range(1, len(ratios) + 1):
        right.append(phi * factorial / b)
        factorial *= n + 1
        phi = phi / hh - 1.0 / factorial
    left = torch.stack([torch.tensor(ratios, dtype=h.dtype) ** n for n in range(len(ratios))])
    return torch.linalg.solve(left, torch.stack(right)).tolist()


def _weighted(
    weights: Sequence[float], differences: Sequence[torch.Tensor], like: torch.Tensor
) -> torch.Tensor:
    total = torch.zeros_like(like)
    for weight, difference in zip(weights, differences, strict=True):
        total = total + weight * difference
    return total
