"""What moves the weights: Muon for the matrices inside, AdamW for all else, and one schedule for both.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; torch's) makes every update of a matrix
equally strong in all its directions. A convolution's weights are a matrix too: output channels by all else.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

WARM_SHARE, LAST_RATE = 0.03, 0.01


class Optimizers:
    """Both optimizers over a module's parameters; `step` also clips the gradient and moves the schedule.

    `inside(name)` says of a parameter with two or more dimensions whether it is Muon's. Muon's rate is
    scaled to the size of AdamW's updates (Liu et al. 2025, arXiv 2502.16982).
    """

    def __init__(
        self,
        module: nn.Module,
        inside: Callable[[str], bool],
        steps: int,
        matrix_rate: float,
        rate: float,
        weight_decay: float = 0.0,
    ) -> None:
        matrices, rest = [], []
        for name, parameter in module.named_parameters():
            (matrices if parameter.ndim > 1 and inside(name) else rest).append(parameter)
        self._parameters = [*matrices, *rest]
        # of the same storage, as torch's Muon takes nothing but two dimensions
        self._flat = [(p, nn.Parameter(p.detach().view(len(p), -1))) for p in matrices]
        fused = self._parameters[0].is_cuda
        self._optimizers = [
            torch.optim.Muon(
                [flat for _, flat in self._flat],
                lr=matrix_rate,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=fused),
        ]
        self._schedules = [warm_cosine(optimizer, steps) for optimizer in self._optimizers]

    def step(self) -> None:
        """One step by the parameters' gradients, which are gone after it."""
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for parameter, flat in self._flat:
            flat.grad = parameter.grad.reshape(flat.shape)
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
        for parameter in self._parameters:
            parameter.grad = None


def warm_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate over `steps`: up from zero in the first 3 %, then a cosine down to a hundredth."""
    warm = max(1, round(WARM_SHARE * steps))

    def factor(step: int) -> float:
        cosine = (1 + math.cos(math.pi * min(1.0, step / steps))) / 2
        return min(1.0, (step + 1) / warm) * (LAST_RATE + (1 - LAST_RATE) * cosine)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
