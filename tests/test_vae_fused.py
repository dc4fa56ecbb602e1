"""The fused VAE is the library's: on a CPU bit for bit, with every layer taken over."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as library

from diffusers_helper.vae import attend_framewise
from diffusers_helper.vae_fused import fuse_convolutions


@pytest.fixture(scope="module")
def vaes():
    """The library's, but for the middle block, and the same one fused."""
    torch.manual_seed(0)
    theirs = AutoencoderKLHunyuanVideo(block_out_channels=(8, 16, 16, 16), norm_num_groups=4).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    ours = copy.deepcopy(theirs)
    attend_framewise(theirs)
    fuse_convolutions(ours)
    return theirs, ours


@pytest.mark.parametrize(
    ("coder", "shape"),
    [
        *(("encoder", (2, 3, frames, 24, 40)) for frames in (1, 5, 17)),
        *(("decoder", (2, 16, frames, 3, 5)) for frames in (1, 2, 5)),
    ],
)
@torch.no_grad()
def test_computes_as_the_library(vaes, coder, shape):
    theirs, ours = (getattr(vae, coder) for vae in vaes)
    x = torch.randn(shape)
    assert torch.equal(ours(x), theirs(x))


def test_no_layer_is_left_as_it_was(vaes):
    plain = {
        library.HunyuanVideoCausalConv3d,
        library.HunyuanVideoResnetBlockCausal3D,
        library.HunyuanVideoUpsampleCausal3D,
        library.HunyuanVideoMidBlock3D,
        library.HunyuanVideoEncoder3D,
        library.HunyuanVideoDecoder3D,
    }
    assert not plain & {type(module) for module in vaes[1].modules()}
