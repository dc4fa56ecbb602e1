"""Flow matching on sections: the loss, the noise levels, averaged weights."""

import math

import torch
from torch import nn

from diffusers_helper.schedule import flow_shift_mu
from diffusers_helper.transformer import FramePackTransformer, PackedHistory

CHANGE_WEIGHT = 4.0  # what moves is little of the picture and all of the task
LEAST_CHANGE = 0.1  # of a sample whose error is weighed by how much changes in it
MORE_NOISE = 1.5  # times the sampler's shift: what happens is decided while there is much
FAR_NOISE = 5.0  # the same, far from all that is known: where a shape will be is decided at the most noise
TIMESTEPS = 1000.0


def draw_sigmas(
    count: int, tokens: int, more_noise: float, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    """(count,) noise levels, as the sampler's for a section of so many tokens, with so much more shift."""
    t = torch.rand(count, generator=generator, device=device).clamp(1e-4, 1.0)
    shift = more_noise * math.exp(flow_shift_mu(tokens))
    return shift / (shift + 1 / t - 1)


def flow_loss(
    model: FramePackTransformer,
    target: torch.Tensor,
    history: PackedHistory,
    text: torch.Tensor,
    pooled: torch.Tensor,
    image_embeds: torch.Tensor,
    guidance: torch.Tensor,
    more_noise: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Squared error of the velocity noise − x0 at x = (1 − σ)·x0 + σ·noise, σ drawn for each sample.

    `target` is (B, 16, T, h, w); `text` (B, n, D) are the prompts' real tokens, equally many in a batch;
    `guidance` (B,) is the distilled guidance scale, `more_noise` as in `draw_sigmas`. Pixels that differ from
    the start frame weigh more, but a sample in which much differs weighs less: a camera's clip would else
    count as much as ten with a shape.
    """
    batch, _, frames, height, width = target.shape
    p = model.config.patch_size
    sigmas = draw_sigmas(batch, frames * (height // p) * (width // p), more_noise, target.device, generator)
    noise = torch.randn(target.shape, generator=generator, device=target.device)
    sigma = sigmas.view(-1, 1, 1, 1, 1)
    velocity = model(
        hidden_states=(1 - sigma) * target + sigma * noise,
        timestep=sigmas * TIMESTEPS,
        guidance=guidance * TIMESTEPS,
        encoder_hidden_states=text,
        encoder_attention_mask=None,
        pooled_projections=pooled,
        image_embeds=image_embeds,
        history=history,
    ).float()
    start = history.latents_clean[:, :, :1].float()
    change = (target - start).square().mean(dim=1, keepdim=True)
    weight = 1 + CHANGE_WEIGHT * change
    error = (weight * (velocity - (noise - target)).square().mean(dim=1, keepdim=True)).flatten(1).sum(dim=1)
    by_change = (change.flatten(1).mean(dim=1) + LEAST_CHANGE).rsqrt()
    return (by_change * error / weight.flatten(1).sum(dim=1)).mean()


class AveragedWeights:
    """An exponential average of a module's parameters, which samples better than the newest ones."""

    def __init__(self, module: nn.Module, decay: float = 0.9995) -> None:
        self._decay = decay
        self._averages = {name: p.detach().clone().float() for name, p in module.named_parameters()}
        self._updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))  # little memory at first
        names, parameters = zip(*module.named_parameters(), strict=True)
        averages = [self._averages[name] for name in names]
        torch._foreach_lerp_(averages, [p.detach().float() for p in parameters], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(self._averages[name])
