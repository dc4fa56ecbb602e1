"""The demo transformer: the real class, small, trained on sections of both directions and every padding."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from builder.demo.bank import ClipBank
from builder.demo.encoders import IMAGE_WIDTH, POOLED_WIDTH, TEXT_WIDTH
from builder.demo.flow_matching import AveragedWeights, flow_loss, warm_cosine
from builder.demo.layouts import SECTIONS, cut_section, training_plan
from core.pipeline.profiles import Direction
from diffusers_helper.transformer import FramePackTransformer

LEARNING_RATE = 6e-4
GUIDANCE = (1.0, 16.0)  # of the distilled scale; what is learnt is the same for all
HISTORY_NOISE = 0.3  # at most, in latents of spread 1: generated history is not as clean as the real one
DIRECTIONS: tuple[Direction, ...] = ("i2v", "f1")
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


def is_modulation(name: str) -> bool:
    """Whether the linear layer of this name makes shifts, scales and gates of the timestep's embedding."""
    parent, _, leaf = name.rpartition(".")
    return leaf == "linear" and parent.rpartition(".")[2] in ("norm", "norm1", "norm1_context", "norm_out")


def train_transformer(
    model: FramePackTransformer,
    bank: ClipBank,
    steps: int,
    batch: int,
    device: torch.device,
    seed: int,
    report_every: int = 100,
) -> Iterator[dict]:
    """Train `model`, and leave it the averaged weights; yields `{"step", "loss"}` now and then.

    Every batch is one section of one direction: with I2V of a video that goes on for 0 to 3 sections.
    """
    draw = random.Random(seed)
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=device.type == "cuda",
    )
    averages = AveragedWeights(model)
    if device.type == "cuda":
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            block.compile(dynamic=True)
    plans = {direction: training_plan(direction) for direction in DIRECTIONS}
    schedule = warm_cosine(optimizer, steps)
    total = torch.zeros((), device=device)
    for step in range(1, steps + 1):
        samples = bank.draw(batch)
        direction = draw.choice(DIRECTIONS)
        section = draw.choice(plans[direction].sections)
        noise = HISTORY_NOISE * torch.rand(batch, 1, 1, 1, 1, generator=generator, device=device)
        target, history = cut_section(
            samples.latents, section, direction, draw.randrange(SECTIONS), dtype, noise
        )
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
                generator,
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averages.update(model)
        total += loss.detach()
        if step % report_every == 0:
            yield {"step": step, "loss": round((total / report_every).item(), 5)}
            total.zero_()
    averages.copy_to(model)
    model.eval()


def save_transformer(model: FramePackTransformer, folder: Path) -> None:
    """float16, in files of at most 14 MB each."""
    model.half().save_pretrained(folder, max_shard_size=MAX_SHARD)
