"""The transformer's large linear layers in float8: half their memory, and the GPU's fastest matrix products.

Row-wise: a weight has a scale for each output, an activation one for each token, so that
y = (x / s_x) · (W / s_W)ᵀ · s_x · s_W + b, with both factors rounded to float8_e4m3fn (3 bits of mantissa,
448 at most) and the product in bfloat16. Scales are numbers that bfloat16 has, so that multiplying by them
rounds once. Weights are quantised once, in float32, to the same bits on every device.

Everything that is small beside the blocks, or that a rounding harms most, stays as it is: embedders and text
refiner, norms and their modulation, the output projection.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from diffusers_helper.transformer import FramePackTransformer

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
MULTIPLE = 16  # of inputs and outputs, for `torch._scaled_mm`
CAPABILITY = 8, 9  # Ada, the first with float8 products
FEWEST = 16  # rows; for one, or two, cuBLAS has no product of some sizes on some GPUs


class Fp8Linear(nn.Linear):
    """`nn.Linear` with `weight` (outputs, inputs) in float8 and its `scale` (outputs, 1) in float32.

    Where `multiplies` is set the input, of FEWEST rows or more, is quantised too and the product is
    `torch._scaled_mm`'s; otherwise the weight is taken to the input's dtype for each product. A low-rank
    term beside it, up · down · x with up (outputs, r) and down (r, inputs), is in the input's dtype.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """In `linear`'s place, with its bias; the weight and its scale are yet to come."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.dtype = linear.weight.dtype  # of what is computed beside the product
        self.multiplies = False
        self.bias = linear.bias
        # parameters, not buffers: diffusers' group offloading leaves a module's buffers on the GPU
        self.weight = _frozen(torch.empty(linear.weight.shape, dtype=FP8, device="meta"))
        self.scale = _frozen(torch.empty(linear.out_features, 1, dtype=torch.float32, device="meta"))
        self.register_parameter("up", None)
        self.register_parameter("down", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, inputs) → (…, outputs), in x's dtype."""
        rows = x.numel() // self.in_features
        if self.multiplies and rows >= FEWEST:
            y = self._product(x)
        else:
            y = F.linear(x, self.dequantised(x.dtype), self.bias)
        return y if self.up is None else y + F.linear(F.linear(x, self.down), self.up)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype) * self.scale.to(dtype)

    def add_low_rank(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Have the term up · down · x beside the product, until `remove_low_rank`."""
        self.up, self.down = (_frozen(matrix.to(self.weight.device, self.dtype)) for matrix in (up, down))

    def remove_low_rank(self) -> None:
        self.up = self.down = None

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        rows, scale = quantise(x.reshape(-1, self.in_features))
        # Fast accumulation keeps fewer bits of the sums, at about twice the speed on Hopper; the rounding of
        # the factors is far larger (tests/test_gpu.py). Elsewhere it changes nothing.
        y = torch._scaled_mm(
            rows.contiguous(),
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale.t(),
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return y.view(*x.shape[:-1], self.out_features)


def quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, k) in float8, and the scales (n, 1) in float32 to multiply it with; computed in the rows' dtype."""
    peak = torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True)
    scale = (peak / LARGEST).to(torch.bfloat16).clamp(min=torch.finfo(torch.bfloat16).tiny)
    # a scale that was rounded down gives 449 at most, which rounds to 448
    return (rows / scale.to(rows.dtype)).to(FP8), scale.float()


def is_fp8_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a transformer's tensor, by its name in the checkpoint, is one of those that become float8."""
    *module, kind = name.split(".")
    modulation = any(part.startswith("norm") for part in module)
    matrix = len(shape) == 2 and not any(size % MULTIPLE for size in shape)
    return name.startswith(BLOCKS) and kind == "weight" and matrix and not modulation


def is_fp8(model: nn.Module) -> bool:
    return next(_fp8_layers(model), None) is not None


def multiplies(model: nn.Module) -> bool:
    """Whether the products of a float8 model are float8's too."""
    return all(layer.multiplies for layer in _fp8_layers(model))


def saved_bytes(model: nn.Module) -> int:
    """How much smaller `quantise_linears` makes the weights of `model`."""
    return sum(
        linear.weight.nbytes - linear.weight.numel() - 4 * linear.out_features
        for _, linear in _wanted_linears(model)
    )


@torch.no_grad()
def quantise_linears(model: nn.Module, device: torch.device, home: torch.device) -> None:
    """Put the weights of the blocks' linear layers into float8, computing on `device`, to be kept on `home`.

    One at a time, and from wherever they are: what is mapped from a file is read here.
    """
    for name, linear in _wanted_linears(model):
        layer = Fp8Linear(linear)
        # in float32 whatever the dtype: so a checkpoint can be quantised anywhere
        weight, scale = quantise(linear.weight.to(device).float())
        layer.weight, layer.scale = _frozen(weight.to(home)), _frozen(scale.to(home))
        model.set_submodule(name, layer)


def multiply_in_fp8(model: nn.Module, multiplies: bool) -> None:
    """Whether the layers' products are float8's too, or their weights alone are."""
    for layer in _fp8_layers(model):
        layer.multiplies = multiplies


def can_multiply(device: torch.device) -> bool:
    """Whether this device has row-wise float8 products: by its generation, and by trying one."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    try:
        rows, scale = quantise(torch.ones(MULTIPLE, MULTIPLE, dtype=torch.bfloat16, device=device))
        torch._scaled_mm(
            rows,
            rows.t(),
            scale_a=scale,
            scale_b=scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        torch.cuda.synchronize(device)
    except RuntimeError:  # a build of PyTorch without these kernels
        return False
    return True


class Fp8FramePackTransformer(FramePackTransformer):
    """`FramePackTransformer` as it is loaded from a checkpoint whose weights are in float8 already."""

    @functools.wraps(FramePackTransformer.__init__)  # the library reads the parameters off it
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for name, linear in _wanted_linears(self):
            self.set_submodule(name, Fp8Linear(linear))


def _wanted_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and is_fp8_weight(f"{name}.weight", module.weight.shape)
    ]


def _fp8_layers(model: nn.Module) -> Iterator[Fp8Linear]:
    return (module for module in model.modules() if isinstance(module, Fp8Linear))


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
