"""The demo VAE: the real class, narrow, trained to give clips of the world back.

What made it learn: small steps of the learning rate, resampling layers that begin as the identity, residual
branches that begin near zero, a term for colour, and a fixed noise on the latents in place of a KL term. The
noise is also what the posterior has at inference, so that the decoder knows it.
"""

import math
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    HunyuanVideoCausalConv3d,
    HunyuanVideoDownsampleCausal3D,
    HunyuanVideoResnetBlockCausal3D,
    HunyuanVideoUpsampleCausal3D,
)
from torch import nn

from builder.demo.course import Course
from builder.demo.optimizers import Optimizers
from diffusers_helper.vae import attend_framewise

CHANNELS = (24, 48, 96, 96)
RESIDUAL_START, PASSED_NOISE = 0.02, 0.02
LATENT_NOISE = 0.05
LATENT_PULL = 1e-4  # on the squared mean, so that latents do not grow without need
RATE, MATRIX_RATE = 1e-3, 2e-4
CHROMA_WEIGHT = 0.5
EDGE_WEIGHT = 0.5


def make_vae(channels: tuple[int, ...] = CHANNELS) -> AutoencoderKLHunyuanVideo:
    """An untrained VAE in the state that training begins well from."""
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=channels, layers_per_block=1, norm_num_groups=2, scaling_factor=1.0
    )
    attend_framewise(vae)
    _begin_as_mosaic(vae)
    set_posterior_noise(vae, LATENT_NOISE)
    return vae


def train_vae(
    vae: AutoencoderKLHunyuanVideo,
    clips: Iterator[torch.Tensor],
    course: Course,
    device: torch.device,
    report_every: int = 100,
) -> Iterator[dict]:
    """Train `vae`; yields `{"step", "loss", "psnr"}` now and then.

    `clips` gives batches (B, 3, T, H, W) in −1…1 on `device`, T = 4k + 1.
    """
    # channels last, as tensor cores want them
    vae.to(device, memory_format=torch.channels_last_3d).train()
    optimizers = Optimizers(vae, is_inside, MATRIX_RATE, RATE)
    encode, decode = vae.encoder, vae.decoder
    if device.type == "cuda":
        encode, decode = torch.compile(encode), torch.compile(decode)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    for step in course:
        pixels = next(clips).contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean = vae.quant_conv(encode(pixels))[:, : vae.config.latent_channels].float()
            latents = mean + LATENT_NOISE * torch.randn_like(mean)
            decoded = decode(vae.post_quant_conv(latents)).float()
        loss = reconstruction_loss(decoded, pixels) + LATENT_PULL * mean.square().mean()
        loss.backward()
        optimizers.step(course.done)
        if step % report_every == 0:
            yield {"step": step, "loss": round(loss.item(), 5), "psnr": round(mean_psnr(decoded, pixels), 2)}
    torch.backends.cudnn.benchmark = False
    vae.to(memory_format=torch.contiguous_format).eval()


def is_inside(name: str) -> bool:
    """Whether the parameter is a matrix within the encoder or the decoder, not at their ends."""
    return not any(end in name for end in ("conv_in", "conv_out", "quant_conv"))


@torch.no_grad()
def mean_psnr(decoded: torch.Tensor, pixels: torch.Tensor) -> float:
    """Of clips (B, …) in −1…1, in dB."""
    error = (decoded.clamp(-1, 1) - pixels).square().flatten(1).mean(dim=1)
    return (10 * (4 / error).log10()).mean().item()


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Mean absolute error, and that of the colour differences and of the edges, which the eye minds more."""
    error = decoded - pixels
    chroma = error - error.mean(dim=1, keepdim=True)
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + CHROMA_WEIGHT * chroma.abs().mean() + EDGE_WEIGHT * edges


@torch.no_grad()
def whiten_latents(vae: AutoencoderKLHunyuanVideo, mean: torch.Tensor, scale: torch.Tensor) -> None:
    """Fold each latent channel's `mean` and `scale` (16,) into the 1×1 convolutions around the latents.

    Latents then have mean 0 and spread 1 with a scaling factor of 1; pixels stay what they were.
    """
    channels = vae.config.latent_channels
    to_latent, from_latent = vae.quant_conv, vae.post_quant_conv
    to_latent.bias[:channels] -= mean
    to_latent.bias[:channels] /= scale
    to_latent.weight[:channels] /= scale.view(-1, 1, 1, 1, 1)
    to_latent.bias[channels:] -= 2 * scale.log()  # log of the posterior's variance
    from_latent.bias += from_latent.weight.flatten(1) @ mean
    from_latent.weight *= scale.view(1, -1, 1, 1, 1)


@torch.no_grad()
def set_posterior_noise(vae: AutoencoderKLHunyuanVideo, std: float) -> None:
    """The posterior's spread is `std` whatever the picture."""
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = 2 * math.log(std)


class _PaddedConv3d(HunyuanVideoCausalConv3d):
    """The library's; its padding's gradient adds slices up, where torch's adds pixel by pixel."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(_ReplicationPad.apply(hidden_states, self.time_causal_padding))


class _ReplicationPad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, padding: tuple[int, ...]) -> torch.Tensor:
        ctx.padding = padding
        return nn.functional.pad(x, padding, mode="replicate")

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        pairs = zip(ctx.padding[::2], ctx.padding[1::2], strict=True)
        for dim, (before, after) in zip((-1, -2, -3), pairs, strict=True):
            gradient = _edges_added(gradient, dim, before, after)
        return gradient, None


def _edges_added(gradient: torch.Tensor, dim: int, before: int, after: int) -> torch.Tensor:
    """What fell on the padding, added to the edges it repeats."""
    length = gradient.shape[dim] - before - after
    if length == 1:
        return gradient.sum(dim, keepdim=True)
    first = gradient.narrow(dim, 0, before + 1).sum(dim, keepdim=True)
    last = gradient.narrow(dim, before + length - 1, after + 1).sum(dim, keepdim=True)
    return torch.cat([first, gradient.narrow(dim, before + 1, length - 2), last], dim=dim)


@torch.no_grad()
def _begin_as_mosaic(vae: AutoencoderKLHunyuanVideo) -> None:
    """Channels 0, 1 and 2 carry each block's mean colour through; every residual branch begins near zero.

    Of the channels beside them half are constant, so that no normalisation of a whole clip takes its
    brightness and contrast away, and half look at the picture at random.
    """
    for module in vae.modules():
        if isinstance(module, HunyuanVideoCausalConv3d):
            module.__class__ = _PaddedConv3d
        if isinstance(module, HunyuanVideoUpsampleCausal3D | HunyuanVideoDownsampleCausal3D):
            _pass_on(module.conv.conv)
        elif isinstance(module, HunyuanVideoResnetBlockCausal3D):
            module.conv2.conv.weight *= RESIDUAL_START
            module.conv2.conv.bias.zero_()
            if module.conv_shortcut is not None:
                _pass_on(module.conv_shortcut.conv)
        elif isinstance(module, Attention):
            module.to_out[0].weight *= RESIDUAL_START
            module.to_out[0].bias.zero_()
    _pass_on(vae.encoder.conv_in.conv)
    _pass_on(vae.decoder.conv_in.conv)
    # twice, as SiLU's slope is a half where it begins
    _pass_on(vae.encoder.conv_out.conv, 2.0)
    _pass_on(vae.decoder.conv_out.conv, 2.0)
    _pass_on(vae.quant_conv)
    _pass_on(vae.post_quant_conv)


def _pass_on(conv: nn.Conv3d, gain: float = 1.0) -> None:
    """Output channels begin as the input channels of the same number, here and now; a stride takes means."""
    random = conv.weight.clone()
    conv.weight.mul_(PASSED_NOISE)
    same = range(min(conv.in_channels, conv.out_channels))
    taps = [  # the newest in time, the middle in space
        slice(size - stride, size) if causal else slice(size // 2, size // 2 + stride)
        for size, stride, causal in zip(conv.kernel_size, conv.stride, (True, False, False), strict=True)
    ]
    for channel in same:
        conv.weight[channel, channel, *taps] += gain / math.prod(conv.stride)
    conv.bias.zero_()
    for channel in range(len(same), conv.out_channels):
        if channel % 2:
            conv.bias[channel] = 1.0 if channel % 4 == 1 else -1.0
        else:
            conv.weight[channel] = random[channel]
