"""The VAE's convolutions with what comes before each as one operation: normalise, activate, repeat, pad.

The library does these one after the other, each over the whole clip, and has cuDNN turn the layout around for
each convolution and back. On a GPU `vae_kernels` does them at once, in the layout that tensor cores want.
Elsewhere torch does them one by one. Same functions; on a GPU other rounding, as nothing is rounded between.
"""

import logging
from functools import cache

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    HunyuanVideoCausalConv3d,
    HunyuanVideoDecoder3D,
    HunyuanVideoEncoder3D,
    HunyuanVideoResnetBlockCausal3D,
    HunyuanVideoUpsampleCausal3D,
)
from torch import nn

from diffusers_helper.vae import attend_framewise

try:
    from diffusers_helper import vae_kernels
except ImportError:  # torch brings Triton with its builds for CUDA on Linux
    vae_kernels = None

log = logging.getLogger(__name__)

ONCE = (1, 1, 1)


def fuse_convolutions(vae: AutoencoderKLHunyuanVideo) -> None:
    """Have `vae`, with the weights it has, compute as this module and `attend_framewise` say.

    For inference only: the kernels have no gradients.
    """
    attend_framewise(vae)
    for module in [*vae.encoder.modules(), *vae.decoder.modules()]:
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]


class FusedCausalConv3d(HunyuanVideoCausalConv3d):
    def forward(
        self,
        hidden_states: torch.Tensor,
        norm: nn.GroupNorm | None = None,
        factors: tuple[int, int, int] = ONCE,
    ) -> torch.Tensor:
        """Of (B, C, T, H, W), or of SiLU(`norm` of it), each frame, row and column repeated by `factors`."""
        if norm is not None or factors != ONCE or any(self.time_causal_padding):
            hidden_states = _prepared(hidden_states, norm, factors, self.time_causal_padding)
        return self.conv(hidden_states)


class FusedResnetBlock(HunyuanVideoResnetBlockCausal3D):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.conv1(hidden_states, self.norm1)
        hidden_states = self.conv2(hidden_states, self.norm2)
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(residual)
        return hidden_states.add_(residual)


class FusedUpsample(HunyuanVideoUpsampleCausal3D):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(hidden_states, factors=self.upsample_factor)


class FusedEncoder(HunyuanVideoEncoder3D):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(hidden_states)
        for block in [*self.down_blocks, self.mid_block]:
            hidden_states = block(hidden_states)
        return self.conv_out(hidden_states, self.conv_norm_out).contiguous()


class FusedDecoder(HunyuanVideoDecoder3D):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(hidden_states)
        for block in [self.mid_block, *self.up_blocks]:
            hidden_states = block(hidden_states)
        return self.conv_out(hidden_states, self.conv_norm_out).contiguous()


_FUSED = {
    HunyuanVideoCausalConv3d: FusedCausalConv3d,
    HunyuanVideoResnetBlockCausal3D: FusedResnetBlock,
    HunyuanVideoUpsampleCausal3D: FusedUpsample,
    HunyuanVideoEncoder3D: FusedEncoder,
    HunyuanVideoDecoder3D: FusedDecoder,
}


def _prepared(
    x: torch.Tensor, norm: nn.GroupNorm | None, factors: tuple[int, int, int], padding: tuple[int, ...]
) -> torch.Tensor:
    """A convolution's input: `x` normalised and activated, repeated, its edges repeated by `padding`."""
    if kernels_work(x.device):
        scales = None if norm is None else vae_kernels.scales_and_shifts(x, norm)
        return vae_kernels.spread(x, scales, factors, padding)
    return prepared_by_torch(x, norm, factors, padding)


def prepared_by_torch(
    x: torch.Tensor, norm: nn.GroupNorm | None, factors: tuple[int, int, int], padding: tuple[int, ...]
) -> torch.Tensor:
    """The same, one thing after the other."""
    if norm is not None:
        x = F.silu(norm(x))
    if factors != ONCE:
        x = _repeated(x, factors)
    return F.pad(x, padding, mode="replicate")


@cache
def kernels_work(device: torch.device) -> bool:
    """By trying them: Triton compiles for the device, with a C compiler of the system."""
    if vae_kernels is None or device.type != "cuda":
        return False
    try:
        x = torch.zeros(1, 16, 2, 2, 2, device=device, dtype=torch.half)
        norm = nn.GroupNorm(2, 16, device=device)
        vae_kernels.spread(x, vae_kernels.scales_and_shifts(x, norm), ONCE, (1, 1, 1, 1, 2, 0))
        torch.cuda.synchronize(device)
    except Exception:  # compilers fail in many ways, and the VAE can do without them
        log.warning("the VAE's kernels do not work on %s", torch.cuda.get_device_name(device), exc_info=True)
        return False
    return True


def _repeated(x: torch.Tensor, factors: tuple[int, int, int]) -> torch.Tensor:
    """In time the first frame stands for itself alone."""
    first, others = x[:, :, :1], x[:, :, 1:]
    first = F.interpolate(first, scale_factor=(1, *factors[1:]), mode="nearest")
    if others.shape[2] == 0:
        return first
    return torch.cat([first, F.interpolate(others, scale_factor=factors, mode="nearest")], dim=2)
