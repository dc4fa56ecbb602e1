"""TeaCache (arXiv 2411.19108): skip a step's blocks while the model's modulated input hardly moves.

One `TeaCache` belongs to one guidance pass of one section. (The official code lets the positive and the
negative pass share one, so that each is compared with the other: a fault that is not reproduced.)
"""

import torch

from diffusers_helper.step_cache import Blocks, StepCache, relative_change

# Fitted to HunyuanVideo by TeaCache's authors: relative change of input → of output, highest power first.
POLYNOMIAL = (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)
LEAST = 0.0521  # just below the polynomial's least value for changes from 0 on, which is at 0.0314


class TeaCache(StepCache):
    """By the modulated input's relative change from step to step, summed since the last computed one."""

    THRESHOLD = 0.15

    def __init__(self, steps: int, threshold: float | None = None, order: int = 0) -> None:
        super().__init__(steps, threshold, order)
        self._accumulated = 0.0
        self._previous: torch.Tensor | None = None

    def observe(self, tokens: torch.Tensor, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens, blocks.modulated(tokens)

    def error(self, signal: torch.Tensor) -> float:
        """Reads the change from the device only where the decision depends on it."""
        if self._accumulated + LEAST >= self.threshold:
            return self._accumulated + LEAST
        self._accumulated += estimated_change(relative_change(signal, self._previous))
        return self._accumulated

    def note(self, signal: torch.Tensor, computed: bool) -> None:
        self._previous = signal
        if computed:
            self._accumulated = 0.0


def estimated_change(change: float) -> float:
    """TeaCache's polynomial at mean|Δ| / mean|previous|."""
    value = 0.0
    for coefficient in POLYNOMIAL:
        value = value * change + coefficient
    return value
