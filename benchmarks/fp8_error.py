"""What float8 costs in precision, beside bfloat16: relative errors against float32.

    python -m benchmarks.fp8_error [TRANSFORMER_FOLDER …]

One layer of each of FramePack's sizes on normal random numbers, then one forward of each model given: its
float32 weights in bf16, attending in fp8, with fp8 weights, with fp8 products, and with all of it. On a GPU
if there is one; what it cannot do is left out, and on a CPU it is a reference. Inputs are numbers that bf16
has.
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from core.pipeline.loading import load_transformer
from diffusers_helper import float8_attention, fp8
from diffusers_helper.transformer import FramePackTransformer, PackedHistory

SIZES = {"q, k, v, attention's out": (3072, 3072), "MLP, in": (3072, 12288), "MLP, out": (12288, 3072)}
SIZES["single block, out"] = (15360, 3072)
TOKENS = 1024


def variants(model: nn.Module, device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    """`model`, in float32 on the CPU, in each precision; its layers must be named as the transformer's."""
    half = copy.deepcopy(model).bfloat16()
    yield "bf16", half.to(device)
    attends = isinstance(model, FramePackTransformer) and (
        device.type == "cpu" or float8_attention.works(device, model.config.attention_head_dim)
    )
    if attends:
        attending = copy.deepcopy(half)
        float8_attention.in_float8(attending, device)
        yield "fp8 attention", attending
    fp8.quantise_linears(half, device, device)
    yield "fp8 weights", half
    if device.type == "cpu" or fp8.can_multiply(device):
        fp8.multiply_in_fp8(half, True)
        yield "fp8", half
        if attends:
            float8_attention.in_float8(half, device)
            yield "both", half


def layer_errors(inputs: int, outputs: int, device: torch.device) -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, inputs).bfloat16().float()
    linear = nn.Linear(inputs, outputs).requires_grad_(False)
    expected = linear(x)
    model = nn.ModuleDict({"transformer_blocks": nn.ModuleList([linear])})
    return {
        name: relative_error(variant["transformer_blocks"][0](x.to(device, torch.bfloat16)), expected)
        for name, variant in variants(model, device)
    }


def forward_errors(model: FramePackTransformer, device: torch.device, side: int = 16) -> dict[str, float]:
    """With square latents of so many pixels."""
    inputs = random_inputs(model.config, side)

    def forward(model: FramePackTransformer, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        def there(value):
            if isinstance(value, PackedHistory):
                return PackedHistory(**{name: there(each) for name, each in vars(value).items()})
            return value.to(device, dtype) if value.is_floating_point() else value.to(device)

        return model(**{name: there(value) for name, value in inputs.items()})

    expected = forward(model, torch.device("cpu"), torch.float32)
    return {
        name: relative_error(forward(variant, device, torch.bfloat16), expected)
        for name, variant in variants(model, device)
    }


def random_inputs(config, side: int) -> dict[str, torch.Tensor | PackedHistory]:
    """A section of nine latent frames after nineteen of history, with twenty tokens of text."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().float()

    return {
        "hidden_states": randn(1, 16, 9, side, side),
        "timestep": torch.tensor([600.0]),
        "guidance": torch.tensor([9984.0]),
        "encoder_hidden_states": randn(1, 20, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, 20, dtype=torch.bool),
        "pooled_projections": randn(1, config.pooled_projection_dim),
        "image_embeds": randn(1, 16, config.image_proj_dim),
        "history": PackedHistory(
            torch.arange(1, 10),
            randn(1, 16, 2, side, side),
            torch.tensor([0, 10]),
            randn(1, 16, 2, side, side),
            torch.tensor([11, 12]),
            randn(1, 16, 16, side, side),
            torch.arange(13, 29),
        ),
    }


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """On whichever device either is."""
    expected = expected.float().cpu()
    return ((result.float().cpu() - expected).norm() / expected.norm()).item()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows = {f"{name}: {size[0]} → {size[1]}": layer_errors(*size, device) for name, size in SIZES.items()}
    for folder in options.folders:
        rows[str(folder)] = forward_errors(load_transformer(folder, torch.float32), device)
    for name, errors in rows.items():
        print(f"{name:40}", *(f"{kind} {error:.2e}" for kind, error in errors.items()), sep="  ")


if __name__ == "__main__":
    main()
