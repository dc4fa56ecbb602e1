"""The samplers by name. All of them take `(denoise, noise, sigmas, callback)` and return x0."""

from collections.abc import Callable
from functools import partial

import torch

from diffusers_helper.euler import sample_euler
from diffusers_helper.unipc import sample_unipc

SAMPLERS: dict[str, Callable[..., torch.Tensor]] = {
    "unipc_bh1": sample_unipc,
    "unipc_bh2": partial(sample_unipc, variant="bh2"),
    "euler": sample_euler,
}
