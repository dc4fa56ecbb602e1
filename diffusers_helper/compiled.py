"""Compiled transformer blocks: one graph for each kind, for prompts, sizes and windows of any length."""

from collections.abc import Iterator

import torch
from torch import nn

from diffusers_helper.transformer import FramePackTransformer

BACKEND = "inductor"
# the analysis fails on some shapes of these blocks in torch 2.11
OPTIONS = {"triton.coalesce_tiling_analysis": False}


def compile_blocks(model: FramePackTransformer) -> None:
    """Have torch.compile take each block when it first runs; those of one kind share it, also other models'.

    With sizes left open from the start, since a graph for fixed ones would be made anew in front of a user.
    """
    options = OPTIONS if BACKEND == "inductor" else None
    for block in _blocks(model):
        block.compile(backend=BACKEND, dynamic=True, options=options)


def uncompile_blocks(model: FramePackTransformer) -> None:
    for block in _blocks(model):
        block._compiled_call_impl = None


def is_compiled(model: FramePackTransformer) -> bool:
    return all(block._compiled_call_impl is not None for block in _blocks(model))


def graphs_made() -> int:
    """How many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _blocks(model: FramePackTransformer) -> Iterator[nn.Module]:
    yield from model.transformer_blocks
    yield from model.single_transformer_blocks
