"""By which of torch's kernels a model attends, where it leaves that to `F.scaled_dot_product_attention`."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,  # on a CPU torch's own of that kind
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TORCHS_ORDER = ("flash", "efficient", "math")
CUDNN_CAPABILITY = (9, 0)  # from Hopper on: on an H100 it takes 7.0 ms for what takes flash 11.8
TRIED_TOKENS = 77  # no multiple of anything, as a section's are not


def kernels_for(asked: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """The kernels' names, the preferred one first: the first one works on this device.

    It is `asked`, unless that is `auto` or does not work here. What it cannot do in some call (flash takes no
    mask) is for the next one; the last is always `math`, which can do everything.
    """
    order = TORCHS_ORDER
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= CUDNN_CAPABILITY:
        order = ("cudnn", *order)
    if asked != "auto":
        order = (asked, *(name for name in order if name != asked))
    order = order[: order.index("math") + 1]
    x = torch.ones(1, 1, TRIED_TOKENS, head_dim, dtype=dtype, device=device)
    # torch settles an order of its own in the first call: made under another, it would replace that one, and
    # be gone with it
    F.scaled_dot_product_attention(x, x, x)
    while order[0] != "math" and not _works(order[0], x):
        order = order[1:]
    return order


@contextmanager
def attending_by(kernels: Sequence[str]) -> Iterator[None]:
    """Inside the block attention takes the first of these that can do it, also while a graph is made of it.

    Without any it is as torch has it. Names of what is not left to torch are passed over.
    """
    if not kernels:
        yield
        return
    with sdpa_kernel([KERNELS[name] for name in kernels if name in KERNELS], set_priority=True):
        yield


def _works(name: str, x: torch.Tensor) -> bool:
    """By trying it on `x`, (B, heads, n, head_dim)."""
    try:
        with warnings.catch_warnings(), attending_by([name]):
            warnings.simplefilter("ignore")  # by which torch tells why not
            F.scaled_dot_product_attention(x, x, x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
    except RuntimeError:
        return False
    return True
