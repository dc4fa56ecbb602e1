"""First-block cache (ParaAttention): run the first block always, the others when its residual has changed.

diffusers' `FirstBlockCacheConfig` decides the same way, but is of no use here: its state hangs on the model's
modules instead of on a guidance pass of a section, a skipped block's hook would still stream its weights to
the GPU in swap mode, and it measures the history's tokens as well, which hardly change and hide what does.
"""

import torch

from diffusers_helper.step_cache import Blocks, StepCache, relative_change


class FirstBlockCache(StepCache):
    """By the relative change of the first block's residual on the section's tokens since the last computed
    step. What is skipped, and has its residual kept, are the blocks after the first."""

    THRESHOLD = 0.06  # ParaAttention's for HunyuanVideo

    def __init__(self, steps: int, threshold: float | None = None, order: int = 0) -> None:
        super().__init__(steps, threshold, order)
        self._reference: torch.Tensor | None = None

    def observe(self, tokens: torch.Tensor, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
        output = blocks.first(tokens)
        return output, blocks.of_section(output) - blocks.of_section(tokens)

    def error(self, signal: torch.Tensor) -> float:
        return relative_change(signal, self._reference)

    def note(self, signal: torch.Tensor, computed: bool) -> None:
        if computed:
            self._reference = signal
