"""One evaluation of the transformer by every way to run it: seconds beside the official model's, and error.

    python -m benchmarks.evaluations [--official CHECKOUT] [--model FOLDER] [--window 9] [--rounds 8]
                                     [--attention flash]

At full size with random weights, unless FOLDER has others. All ways have the same weights and inputs and run
in turn; the error is relative to float32. A way that is compiled has its first call's seconds beside it.
Our ways attend by one kernel: compiled ones share their graphs, which call the one they were made with.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks.full_size import machine, one_evaluation
from benchmarks.full_size_models import SIGLIP_SO400M, framepack_transformer, with_random_weights
from benchmarks.official import official_transformer, sharing_weights, twin_transformer
from core.pipeline.loading import load_transformer
from core.settings import ATTENTION
from diffusers_helper import float8_attention, fp8
from diffusers_helper.compiled import compile_blocks
from diffusers_helper.float8_attention import attend_by
from diffusers_helper.transformer import FramePackTransformer, PackedHistory

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Way:
    """What was measured of one."""

    name: str
    first: float  # seconds, compiling included
    seconds: float  # median of the later ones
    error: float

    def cells(self, official: float | None) -> str:
        ratio = "—" if official is None else f"{self.seconds / official:.3f}"
        return (
            f"| {self.name} | {1e3 * self.seconds:.1f} ms | {ratio} | {self.error:.2e} | {self.first:.1f} s |"
        )


def ways(model: FramePackTransformer, official: type[nn.Module] | None, window: int) -> dict[str, Call]:
    """The calls by name; `model` is in its dtype and on its device."""
    quantised = copy.deepcopy(model)
    device = next(model.parameters()).device
    fp8.quantise_linears(quantised, device, device)
    fp8.multiply_in_fp8(quantised, device.type == "cpu" or fp8.can_multiply(device))
    models = {"ours": model, "ours, compiled": sharing_weights(model), "fp8": quantised}
    models["fp8, compiled"] = sharing_weights(quantised)
    if device.type == "cpu" or float8_attention.works(device, model.config.attention_head_dim):
        for name in ("fp8, attention too", "fp8, attention too, compiled"):
            models[name] = sharing_weights(quantised)
            float8_attention.in_float8(models[name], device)
    for name, variant in models.items():
        if name.endswith("compiled"):
            compile_blocks(variant)
    calls = {name: evaluation(variant, None, window)["ours"] for name, variant in models.items()}
    if official:
        theirs = twin_transformer(model, official)
        calls = {"official": evaluation(model, theirs, window)["official"]} | calls
    return calls


def evaluation(model: FramePackTransformer, official: nn.Module | None, window: int) -> dict[str, Call]:
    models = SimpleNamespace(
        transformer=model,
        transformer_dtype=model.x_embedder.proj.weight.dtype,
        device=next(model.parameters()).device,
        image_encoder=SimpleNamespace(config=SimpleNamespace(**SIGLIP_SO400M)),
    )
    return one_evaluation(models, official, window)


@contextmanager
def in_float32(model: FramePackTransformer) -> Iterator[None]:
    """Inside the block `model` computes in float32, from the weights and inputs that it has; one of its own
    blocks is that wide only while it runs, since all together would not fit beside the others."""
    dtype = model.x_embedder.proj.weight.dtype
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    inside = {id(module) for block in blocks for module in block.modules()}
    rest = {
        module: next(module.parameters(recurse=False)).dtype
        for module in model.modules()
        if id(module) not in inside and [*module.parameters(recurse=False)]
    }
    with ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(_widened_inputs, with_kwargs=True).remove)
        for block in blocks:
            undo.callback(block.register_forward_pre_hook(lambda block, _: block.float() and None).remove)
            undo.callback(block.register_forward_hook(lambda block, *_: block.to(dtype) and None).remove)
        for module, was in rest.items():
            module.float()
            undo.callback(module.to, was)
        yield


def _widened_inputs(_: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
    return arguments, {name: _widened(value) for name, value in named.items()}


def _widened(value):
    if isinstance(value, PackedHistory):
        return PackedHistory(**{name: _widened(each) for name, each in vars(value).items()})
    return value.float() if value.is_floating_point() else value


@torch.inference_mode()
def measure(
    model: FramePackTransformer, official: type[nn.Module] | None, window: int, rounds: int
) -> list[Way]:
    device = next(model.parameters()).device

    def timed(call: Call) -> tuple[float, torch.Tensor]:
        started = time.perf_counter()
        result = call().float()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started, result

    exact = evaluation(model, None, window)["ours"]
    with in_float32(model):
        expected = exact()
    first, errors, seconds = {}, {}, {}
    calls = ways(model, official, window)
    for name, call in calls.items():
        first[name], result = timed(call)
        errors[name] = ((result - expected).norm() / expected.norm()).item()
        print(f"{name}: {first[name]:.1f} s, error {errors[name]:.2e}", flush=True)
    for _ in range(rounds):
        for name, call in calls.items():
            seconds.setdefault(name, []).append(timed(call)[0])
    return [Way(name, first[name], median(seconds[name]), errors[name]) for name in calls]


def transformer_for(folder: Path | None) -> FramePackTransformer:
    """The folder's, or one of full size with random weights; on a GPU in bf16, on a CPU in float32."""
    gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
    if folder:
        model = load_transformer(folder, dtype).to(device)
    else:
        model = with_random_weights(framepack_transformer, dtype, device)
        model.__class__ = FramePackTransformer
    model.requires_grad_(False).eval().output_in_float32()
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a transformer's folder; without it random weights")
    parser.add_argument("--official", type=Path, help="a checkout of the official code")
    parser.add_argument("--window", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--attention", choices=ATTENTION, default="auto", help="our kernel (auto)")
    options = parser.parse_args(arguments)
    model = transformer_for(options.model)
    attend_by(model, options.attention, model.device, model.dtype)
    official = official_transformer(options.official) if options.official else None
    found = measure(model, official, options.window, options.rounds)
    beside = next((way.seconds for way in found if way.name == "official"), None)
    print(f"\n{machine()}, window {options.window}, ours by {model.kernels[0]}, medians of {options.rounds}")
    print("| | one evaluation | ÷ official | error to float32 | first call |\n|---|---|---|---|---|")
    print("\n".join(way.cells(beside) for way in found))


if __name__ == "__main__":
    main()
