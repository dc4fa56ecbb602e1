"""The demo transformer: the real class, small, trained on sections of both directions and every padding."""

import copy
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch._inductor import config as inductor

from builder.demo.bank import ClipBank
from builder.demo.course import Course
from builder.demo.encoders import IMAGE_WIDTH, POOLED_WIDTH, TEXT_WIDTH
from builder.demo.flow_matching import FAR_NOISE, MORE_NOISE, AveragedWeights, flow_loss
from builder.demo.layouts import PART_SHARES, PARTS, Cut, cut_section
from builder.demo.optimizers import Optimizers
from diffusers_helper.attention import kernels_for
from diffusers_helper.transformer import FramePackTransformer

RATE, MATRIX_RATE = 6e-4, 1.2e-3
WEIGHT_DECAY = 0.1  # of the matrices: there are far fewer clips than samples of them
GUIDANCE = (1.0, 16.0)  # of the distilled scale; what is learnt is the same for all
HISTORY_NOISE = 0.3  # at most, in latents of spread 1: generated history is not as clean as the real one
MAX_SHARD = "14MB"


def make_transformer() -> FramePackTransformer:
    """An untrained transformer of 13.7 M parameters that begins by predicting nothing."""
    model = FramePackTransformer(
        num_attention_heads=4,
        attention_head_dim=64,
        num_layers=2,
        num_single_layers=6,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        rope_axes_dim=(16, 24, 24),
        has_image_proj=True,
        image_proj_dim=IMAGE_WIDTH,
        has_clean_x_embedder=True,
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_modulation(name):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def is_inside(name: str) -> bool:
    """Whether the parameter is a block's attention or feed-forward matrix."""
    return "transformer_blocks" in name and not is_modulation(name.rpartition(".")[0])


def is_modulation(name: str) -> bool:
    """Whether the linear layer of this name makes shifts, scales and gates of the timestep's embedding."""
    parent, _, leaf = name.rpartition(".")
    return leaf == "linear" and parent.rpartition(".")[2] in ("norm", "norm1", "norm1_context", "norm_out")


def train_transformer(
    model: FramePackTransformer,
    bank: ClipBank,
    course: Course,
    batch: int,
    device: torch.device,
    seed: int,
    report_every: int = 100,
    keep: Callable[[FramePackTransformer], None] = lambda _: None,
    keep_every: int = 1000,
) -> Iterator[dict]:
    """Train `model`, and leave it the averaged weights; yields `{"step", "loss"}` now and then.

    Every batch is one section of one direction, cut from clips of one size. `keep` is given a copy with the
    averages so far every `keep_every` steps, so that a run that is cut off leaves a model.
    """
    draw = random.Random(seed)
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model.to(device).train()
    optimizers = Optimizers(model, is_inside, MATRIX_RATE, RATE, WEIGHT_DECAY)
    averages = AveragedWeights(model)
    model.kernels = kernels_for("auto", device, dtype, model.config.attention_head_dim)
    model.rope.forward = cache(model.rope.forward)  # of few shapes: half of a step's launches
    if device.type == "cuda":
        # both fail on some of these shapes in torch 2.11
        inductor.triton.coalesce_tiling_analysis = False
        inductor.triton.mix_order_reduction = False
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            block.compile(dynamic=True)
    total = torch.zeros((), device=device)
    for step in course:
        (part,) = draw.choices(PARTS, PART_SHARES)
        samples = bank.draw(batch, part)
        noise = HISTORY_NOISE * torch.rand(batch, 1, 1, 1, 1, generator=generator, device=device)
        cut = Cut.draw(draw, part)
        target, history = cut_section(samples.latents, cut, dtype, noise)
        low, high = GUIDANCE
        guidance = low + (high - low) * torch.rand(batch, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = flow_loss(
                model,
                target,
                history,
                samples.text,
                samples.pooled,
                samples.image_embeds,
                guidance,
                FAR_NOISE if cut.is_far else MORE_NOISE,
                generator,
            )
        loss.backward()
        optimizers.step(course.done)
        averages.update(model)
        total += loss.detach()
        if step % report_every == 0:
            yield {"step": step, "loss": round((total / report_every).item(), 5)}
            total.zero_()
        if step % keep_every == 0:
            so_far = copy.deepcopy(model)
            averages.copy_to(so_far)
            keep(so_far)
    averages.copy_to(model)
    del model.rope.forward
    model.eval()


def save_transformer(model: FramePackTransformer, folder: Path) -> None:
    """float16, in files of at most 14 MB each."""
    model.half().save_pretrained(folder, max_shard_size=MAX_SHARD)
