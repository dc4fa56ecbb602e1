"""Skipping steps: the part that all step caches share.

Between two steps the blocks' output changes less than their input does, so a step may take the residual
(output − input) of an earlier step in place of its own. The caches differ in what tells them how far off that
would be: `observe` and `error`. How the residual is estimated is the same for all: as it was, or extrapolated
through the last ones (TaylorSeer, arXiv 2503.06923, on the residual of all blocks instead of every module's).

One cache belongs to one guidance pass of one section.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from typing import ClassVar, Protocol

import torch


class Blocks(Protocol):
    """The model's blocks in one step, with all that goes into them besides the tokens.

    Tokens are (B, n, D), the history's before the section's.
    """

    def modulated(self, tokens: torch.Tensor) -> torch.Tensor:
        """The first block's normalised and modulated input; runs no block."""

    def first(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the first block."""

    def rest(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the blocks that have not run in this step."""

    def of_section(self, tokens: torch.Tensor) -> torch.Tensor:
        """The section's own tokens, which alone become the velocity."""


class StepCache(ABC):
    """Decides step by step, and keeps what a skipped step adds."""

    THRESHOLD: ClassVar[float]  # the kind's default

    def __init__(self, steps: int, threshold: float | None = None, order: int = 0) -> None:
        """A step is skipped while the estimated error stays below `threshold`; at 0 none is.

        A skipped step takes the last computed residual (`order` 0) or the line or parabola through the last
        ones (1, 2), as far as there are so many.
        """
        self.steps = steps
        self.threshold = self.THRESHOLD if threshold is None else threshold
        self.computed: list[int] = []  # the steps, from 0, that ran the blocks
        self._step = -1
        self._residuals: deque[tuple[int, torch.Tensor]] = deque(maxlen=order + 1)

    def run(self, tokens: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        """The blocks' output for `tokens`, computed or estimated. Called once per step."""
        tokens, signal = self.observe(tokens, blocks)
        if not self.should_compute(signal):
            return self.apply(tokens)
        output = blocks.rest(tokens)
        self.store(tokens, output)
        return output

    def should_compute(self, signal: torch.Tensor | None) -> bool:
        """Whether this step runs the blocks. The first and the last step always do."""
        self._step += 1
        compute = self._step in (0, self.steps - 1) or not self.error(signal) < self.threshold
        if compute:
            self.computed.append(self._step)
        self.note(signal, compute)
        return compute

    def store(self, tokens: torch.Tensor, output: torch.Tensor) -> None:
        """Remember what the blocks added to `tokens`."""
        self._residuals.append((self._step, output - tokens))

    def apply(self, tokens: torch.Tensor) -> torch.Tensor:
        """The blocks' output as estimated from earlier steps."""
        steps = [step for step, _ in self._residuals]
        weights = extrapolation_weights(steps, self._step)
        for weight, (_, residual) in zip(weights, self._residuals, strict=True):
            tokens = tokens + (residual if weight == 1 else weight * residual)
        return tokens

    def observe(self, tokens: torch.Tensor, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where the part that may be skipped begins, and what `error` is to judge by."""
        return tokens, None

    @abstractmethod
    def error(self, signal: torch.Tensor | None) -> float:
        """How far off the result would be if this step were skipped, or a lower bound of it."""

    @abstractmethod
    def note(self, signal: torch.Tensor | None, computed: bool) -> None:
        """The step was decided: remember what the next decision needs."""


def extrapolation_weights(known: list[int], wanted: int) -> list[float]:
    """Of the values at steps `known`, for the value at step `wanted` of the polynomial through them."""
    return [
        math.prod((wanted - other) / (step - other) for other in known if other != step) for step in known
    ]


def relative_change(now: torch.Tensor, before: torch.Tensor) -> float:
    """mean|now − before| / mean|before|. Waits for the device: what runs next depends on it."""
    return ((now - before).abs().mean() / before.abs().mean()).item()
