"""What moves the weights: Muon for the matrices inside, AdamW for all else, and one schedule for both."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn

WARM_SHARE, LAST_RATE = 0.03, 0.01
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # Muon's quintic: singular values to about 1 in five rounds
ROUNDS = 5


class Optimizers:
    """Both optimizers over a module's parameters; `step` also clips the gradient and sets the rates.

    `inside(name)` says of a parameter with two or more dimensions whether it is Muon's; only those decay.
    """

    def __init__(
        self,
        module: nn.Module,
        inside: Callable[[str], bool],
        matrix_rate: float,
        rate: float,
        weight_decay: float = 0.0,
    ) -> None:
        matrices, rest = [], []
        for name, parameter in module.named_parameters():
            (matrices if parameter.ndim > 1 and inside(name) else rest).append(parameter)
        self._parameters = [*matrices, *rest]
        self._muon = Muon(matrices, weight_decay)
        fused = self._parameters[0].is_cuda
        self._adamw = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
        self._rates = matrix_rate, rate

    def step(self, done: float) -> None:
        """One step by the parameters' gradients, which are gone after it; `done` is as in `warm_cosine`."""
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        factor = warm_cosine(done)
        matrix_rate, rate = (factor * rate for rate in self._rates)
        self._muon.step(matrix_rate)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        for parameter in self._parameters:
            parameter.grad = None


class Muon:
    """Updates equally strong in all directions (https://kellerjordan.github.io/posts/muon/, 2024).

    A convolution's weights are a matrix too, output channels by all else. The rate is scaled to the size of
    AdamW's updates (Liu et al. 2025, arXiv 2502.16982). torch's own takes one matrix after the other and only
    real ones; here those of one shape go together, as there are many and they are small.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float) -> None:
        self._weight_decay = weight_decay
        self._groups = defaultdict(list)
        for parameter in parameters:
            self._groups[len(parameter), parameter.numel() // len(parameter)].append(parameter)
        self._momenta = {
            shape: torch.zeros(len(group), *shape, device=group[0].device)
            for shape, group in self._groups.items()
        }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, group in self._groups.items():
            gradient = torch.stack([parameter.grad.reshape(shape) for parameter in group])
            momentum = self._momenta[shape].lerp_(gradient, 1 - MOMENTUM)
            update = orthogonalized(gradient.lerp(momentum, MOMENTUM))
            update *= -rate * 0.2 * math.sqrt(max(shape))
            if self._weight_decay:
                torch._foreach_mul_(group, 1 - rate * self._weight_decay)
            torch._foreach_add_(group, [u.view_as(p) for u, p in zip(update, group, strict=True)])


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """(N, rows, columns) with every singular value brought to about 1, in bf16 as Muon does."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).float()


def warm_cosine(done: float) -> float:
    """Share of the full learning rate when so much of the training, 0…1, is done.

    Up in the first 3 %, then a cosine down to a hundredth.
    """
    cosine = (1 + math.cos(math.pi * done)) / 2
    return min(1.0, done / WARM_SHARE) * (LAST_RATE + (1 - LAST_RATE) * cosine)
