"""Attention in float8, as a CPU computes it: what the kernel is given, and what it costs in precision."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.fp8_error import relative_error
from core.pipeline.compiling import run_blocks
from diffusers_helper.float8_attention import Float8AttnProcessor, in_float8, largest_of
from diffusers_helper.fp8 import LARGEST


@pytest.fixture
def blocks(tiny_models):
    """The tiny transformer's double and single block; their processors are put back."""
    model = tiny_models.transformer
    attentions = [block.attn for block in [*model.transformer_blocks, *model.single_transformer_blocks]]
    before = [attn.processor for attn in attentions]
    yield model.transformer_blocks[0].attn, model.single_transformer_blocks[0].attn
    for attn, processor in zip(attentions, before, strict=True):
        attn.set_processor(processor)


def inputs(attn, n: int = 60, m: int = 7) -> dict:
    generator = torch.Generator().manual_seed(0)
    width, d = attn.to_q.in_features, attn.to_q.out_features // attn.heads
    angles = torch.rand(n, d // 2, generator=generator).repeat_interleave(2, dim=1) * 6
    return {
        "hidden_states": torch.randn(2, n, width, generator=generator),
        "encoder_hidden_states": torch.randn(2, m, width, generator=generator),
        "attention_mask": None,
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


@pytest.mark.parametrize("block", [0, 1], ids=["double", "single"])
@torch.no_grad()
def test_attends_as_the_library_but_for_rounding(blocks, block):
    attn = blocks[block]
    given = inputs(attn)
    expected = attn(**given)
    attn.set_processor(Float8AttnProcessor(attn, torch.device("cpu")))
    for found, exact in zip(attn(**given), expected, strict=True):
        assert found.shape == exact.shape and found.dtype == exact.dtype
        assert 1e-3 < relative_error(found, exact) < 0.06  # and it is in float8


@pytest.mark.parametrize("block", [0, 1], ids=["double", "single"])
@torch.no_grad()
def test_without_its_roundings_it_is_the_librarys(blocks, block, monkeypatch):
    attn = blocks[block]
    given = inputs(attn)
    expected = attn(**given)

    def exactly(_, query, key, value):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    monkeypatch.setattr(Float8AttnProcessor, "_attend", exactly)
    attn.set_processor(Float8AttnProcessor(attn, torch.device("cpu")))
    for found, exact in zip(attn(**given), expected, strict=True):
        assert relative_error(found, exact) < 1e-5


@torch.no_grad()
def test_nothing_that_a_norm_gives_is_too_large(blocks):
    """A query all of whose length lies in one pair of channels, rotated into one of the two."""
    for attn in blocks:
        width = attn.norm_q.weight.numel()
        largest = largest_of([attn.norm_q])
        channel = attn.norm_q.weight.abs().argmax()
        x = torch.zeros(width)
        x[channel] = 1e4
        assert attn.norm_q(x).abs().max() * 2**0.5 <= largest * (1 + 1e-6)
        assert torch.tensor(LARGEST * (1 + 2**-8)).to(torch.float8_e4m3fn).float() == LARGEST


def test_a_step_is_about_the_same(tiny_models, blocks):
    def velocity() -> torch.Tensor:
        found = []
        hook = tiny_models.transformer.proj_out.register_forward_hook(lambda *args: found.append(args[2]))
        run_blocks(tiny_models)
        hook.remove()
        return found[0]

    expected = velocity()
    in_float8(tiny_models.transformer, torch.device("cpu"))
    found = velocity()
    assert 1e-5 < relative_error(found, expected) < 0.05


@torch.no_grad()
def test_its_graph_needs_no_break(blocks):
    attn = blocks[0]
    given = inputs(attn)
    attn.set_processor(Float8AttnProcessor(attn, torch.device("cpu")))
    expected = attn(**given)
    torch._dynamo.reset()
    compiled = torch.compile(attn, backend="aot_eager", fullgraph=True, dynamic=True)
    for found, eager in zip(compiled(**given), expected, strict=True):
        assert relative_error(found, eager) < 1e-5
