"""The flow-matching noise schedule: sigmas shifted by sequence length. Pure arithmetic on a few floats."""

import math

import torch

# Two points fix the line from sequence length (tokens) to shift (the one Flux and FramePack share).
SHORT_SEQUENCE, SHORT_MU = 256, 0.5
LONG_SEQUENCE, LONG_MU = 4096, 1.15
MAX_SHIFT = 7.0  # the line's e^mu is never larger


def flow_shift_mu(sequence_length: int) -> float:
    """mu for a section of `sequence_length` tokens (latent frames × height/2 × width/2), at most ln 7."""
    slope = (LONG_MU - SHORT_MU) / (LONG_SEQUENCE - SHORT_SEQUENCE)
    return min(SHORT_MU + (sequence_length - SHORT_SEQUENCE) * slope, math.log(MAX_SHIFT))


def shifted_sigmas(steps: int, mu: float) -> torch.Tensor:
    """Noise levels from 1 down to 0: float32, shape (steps + 1,).

    `linspace(1, 0)` warped by t → e^mu / (e^mu + 1/t − 1), as in the official FramePack schedule.
    """
    t = torch.linspace(1, 0, steps + 1)
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1))
