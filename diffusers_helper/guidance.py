"""Classifier-free guidance (arXiv 2207.12598) with standard-deviation rescale (arXiv 2305.08891)."""

import torch


def guided_velocity(
    positive: torch.Tensor, negative: torch.Tensor, cfg: float, rescale: float
) -> torch.Tensor:
    """Mix two velocity predictions of the same shape: v = v_neg + cfg·(v_pos − v_neg).

    `rescale` in 0…1 mixes in v scaled back to v_pos's spread (per sample, over all other dimensions).
    """
    velocity = negative + cfg * (positive - negative)
    if rescale == 0:
        return velocity
    dims = list(range(1, velocity.ndim))
    rescaled = velocity * (positive.std(dim=dims, keepdim=True) / velocity.std(dim=dims, keepdim=True))
    return rescale * rescaled + (1.0 - rescale) * velocity
