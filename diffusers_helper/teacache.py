"""TeaCache (arXiv 2411.19108): skip a step's blocks while the model's modulated input hardly moves.

One `TeaCache` belongs to one guidance pass of one section. (The official code lets the positive and the
negative pass share one, so that each is compared with the other: a fault that is not reproduced.)
"""

import torch

# Fitted to HunyuanVideo by TeaCache's authors: relative change of input → of output, highest power first.
POLYNOMIAL = (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)
THRESHOLD = 0.15


class TeaCache:
    """Decides step by step, and keeps what a skipped step adds: the residual of the last computed one."""

    def __init__(self, steps: int, threshold: float = THRESHOLD) -> None:
        self.steps = steps
        self.threshold = threshold
        self.computed = 0  # steps that ran the blocks
        self._step = 0
        self._accumulated = 0.0
        self._previous: torch.Tensor | None = None
        self._residual: torch.Tensor | None = None

    def should_compute(self, modulated: torch.Tensor) -> bool:
        """Called once per step with the first block's modulated input; the first and last step compute."""
        if self._step in (0, self.steps - 1):
            compute = True
        else:
            change = (modulated - self._previous).abs().mean() / self._previous.abs().mean()
            self._accumulated += estimated_change(change.item())
            compute = self._accumulated >= self.threshold
        if compute:
            self._accumulated = 0.0
            self.computed += 1
        self._previous = modulated
        self._step += 1
        return compute

    def store(self, hidden_states: torch.Tensor, output: torch.Tensor) -> None:
        """Remember what the blocks added to `hidden_states` (1, tokens, width)."""
        self._residual = output - hidden_states

    def apply(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The blocks' output as estimated from the last computed step."""
        return hidden_states + self._residual


def estimated_change(relative_change: float) -> float:
    """TeaCache's polynomial at mean|Δ| / mean|previous|."""
    value = 0.0
    for coefficient in POLYNOMIAL:
        value = value * relative_change + coefficient
    return value
