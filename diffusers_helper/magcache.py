"""MagCache (arXiv 2506.09045): skip steps by how the residual's magnitude is known to change.

The ratio of a step's residual norm to the step's before hardly depends on prompt or seed, so it is measured
once for a model. Which steps are skipped is then known beforehand: nothing is read from the device.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

import torch

from diffusers_helper.schedule import shifted_sigmas
from diffusers_helper.step_cache import StepCache

# The authors' settings for FramePack (MagCache4FramePack in their repository, commit df81cb1).
THRESHOLD = 0.1  # of the summed error since the last computed step
MOST_SKIPPED = 3  # in a row
RETAINED = 0.2  # of all steps, the first, are never skipped
MOST_CHANGE = 0.06  # a step whose ratio is further from 1 is never skipped


@dataclass(frozen=True)
class MagnitudeCurve:
    """Measured: at noise level `sigmas[i]` (falling from 1) the residual's norm was `ratios[i]` times that at
    `sigmas[i − 1]`; `ratios[0]` is 1."""

    sigmas: tuple[float, ...]
    ratios: tuple[float, ...]

    def at(self, sigmas: list[float]) -> list[float]:
        """The ratios between other noise levels: log-norms are interpolated over σ.

        (The authors repeat or drop ratios. But the norm belongs to the noise level: half as many steps have
        between them the product of two ratios, and another shift has them at other levels.)
        """
        levels = list(reversed(self.sigmas))
        logs, total = [], 0.0
        for ratio in self.ratios:
            total += math.log(ratio)
            logs.append(total)
        logs.reverse()

        def log_norm(sigma: float) -> float:
            i = min(max(bisect_left(levels, sigma), 1), len(levels) - 1)
            (x0, x1), (y0, y1) = levels[i - 1 : i + 1], logs[i - 1 : i + 1]
            return y0 + (sigma - x0) / (x1 - x0) * (y1 - y0)

        norms = [log_norm(sigma) for sigma in sigmas]
        return [1.0] + [math.exp(now - before) for before, now in pairwise(norms)]


class MagCache(StepCache):
    """By the summed deviation from 1 of the norm's ratio to the last computed step's."""

    THRESHOLD = THRESHOLD

    def __init__(
        self, steps: int, threshold: float | None = None, order: int = 0, *, ratios: list[float]
    ) -> None:
        """`ratios` has one for each step."""
        super().__init__(steps, threshold, order)
        self._ratios = ratios
        self._ratio, self._error, self._skipped = 1.0, 0.0, 0

    def error(self, signal: None) -> float:
        ratio = self._ratios[self._step]
        self._ratio *= ratio
        self._error += abs(1 - self._ratio)
        forbidden = (
            self._step < int(RETAINED * self.steps)
            or self._skipped == MOST_SKIPPED
            or abs(1 - ratio) > MOST_CHANGE
        )
        return math.inf if forbidden else self._error

    def note(self, signal: None, computed: bool) -> None:
        self._skipped += 1
        if computed:
            self._ratio, self._error, self._skipped = 1.0, 0.0, 0


class MagnitudeRecorder(StepCache):
    """Computes every step and measures the ratios: mean over the tokens of |residual| / |the one before|."""

    THRESHOLD = 0.0

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self._previous: torch.Tensor | None = None
        self._ratios: list[torch.Tensor] = []

    def error(self, signal: None) -> float:
        return math.inf

    def note(self, signal: None, computed: bool) -> None:
        pass

    def store(self, tokens: torch.Tensor, output: torch.Tensor) -> None:
        norms = (output - tokens).float().norm(dim=-1)
        if self._previous is not None:
            self._ratios.append((norms / self._previous).mean())
        self._previous = norms

    @property
    def ratios(self) -> list[float]:
        return [1.0, *(round(ratio.item(), 5) for ratio in self._ratios)]


_MEASURED_AT = tuple(shifted_sigmas(25, math.log(7))[:-1].tolist())  # 640×608, window 9: the shift is 7

# The authors' measurements of FramePack and FramePack-F1, from the same source as the settings above.
PUBLISHED = {
    "i2v": MagnitudeCurve(
        _MEASURED_AT,
        (
            *(1.0, 1.26562, 1.23438, 1.03125, 1.02344, 1.03906, 1.01562, 1.03906, 1.05469, 1.02344),
            *(1.03906, 0.99609, 1.03125, 1.02344, 1.01562, 1.02344, 1.00781, 1.04688, 0.98828, 1.0),
            *(1.00781, 0.98828, 0.94141, 0.94141, 0.78906),
        ),
    ),
    "f1": MagnitudeCurve(
        _MEASURED_AT,
        (
            *(1.0, 1.25781, 1.08594, 1.02344, 1.00781, 1.02344, 1.00781, 1.02344, 1.05469, 0.99609),
            *(1.03906, 1.00781, 1.01562, 1.00781, 1.02344, 1.01562, 0.98047, 1.05469, 0.98047, 0.96875),
            *(1.03125, 0.97266, 0.9375, 0.96484, 0.78516),
        ),
    ),
}
