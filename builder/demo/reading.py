"""Teaches the demo's text encoders to read: what a prompt says can be told from their outputs by one matrix.

A random encoder tells prompts apart, but the transformer then has to learn from a few thousand clips which
words belong together. Here each token of the Llama's output is to know its clause's event as far as it has
been read, and the CLIP's pooled output all that the prompt names. Needs no video, only prompts, of which
there are as many as one likes. The combinations that no scene of training has are left out here too.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, LlamaModel, PreTrainedTokenizerFast

from builder.demo.colours import NAMES
from builder.demo.geometry import KINDS
from builder.demo.motion import CAMERA_VERBS, SHAPE_VERBS, SPEEDS
from builder.demo.optimizers import warm_cosine
from builder.demo.prompts import spoken
from builder.demo.scene import Event, draw_meaning
from diffusers_helper.text import CLIP_TOKENS, HIDDEN_LAYER, TEMPLATE, template_crop

RATE = 2e-3
BATCH = 256
CHECKED = 1024  # more prompts, for the shares that are reported

# what an event is made of; each token of a prompt is asked for one of each
ASPECTS = {
    "subject": ("camera", *NAMES),
    "kind": ("camera", *KINDS),
    "verb": (*SHAPE_VERBS, *CAMERA_VERBS),
    "speed": tuple(SPEEDS),
    "new colour": ("none", *NAMES),
}
SIZES = [len(values) for values in ASPECTS.values()]
IGNORED = -100  # a token that is asked for nothing


class Lessons(NamedTuple):
    """B prompts in tokens, and what is to be read in them."""

    tokens: Tensor  # (B, n) of the Llama, with the template, padded at the end
    mask: Tensor  # (B, n)
    aspects: Tensor  # (B, n, 5) the index of each aspect of the token's clause, or IGNORED
    last: Tensor  # (B, n) bool: the last token of each clause, which has read all of it
    clip_tokens: Tensor  # (B, 77)
    named: Tensor  # (B, all values of all aspects) 1 where any event has it

    def some(self, rows: Tensor) -> "Lessons":
        return Lessons(*(tensor[rows] for tensor in self))


def train_text_encoders(
    folder: Path, steps: int, prompts: int, device: torch.device, seed: int
) -> Iterator[dict]:
    """Train the text encoders below `folder` on so many prompts, and write them there.

    Yields `{"step", "loss", "clauses", "prompts"}` now and then: the latter two are the shares of clauses
    (Llama) and of prompts (CLIP) of which every aspect was read rightly, among CHECKED prompts besides.
    """
    hunyuan = folder / "hunyuan"
    llama = LlamaModel.from_pretrained(hunyuan / "text_encoder", dtype=torch.float32)
    clip = CLIPTextModel.from_pretrained(hunyuan / "text_encoder_2", dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = nn.ModuleDict(
            {
                "llama": nn.Linear(llama.config.hidden_size, sum(SIZES)),
                "clip": nn.Linear(clip.config.hidden_size, sum(SIZES)),
            }
        )
    readers = nn.ModuleDict({"llama": llama, "clip": clip, "heads": heads}).to(device).train()
    optimizer = torch.optim.AdamW(readers.parameters(), lr=RATE, weight_decay=0.01)
    lessons = draw_lessons(random.Random(f"reading {seed}"), prompts + CHECKED, hunyuan)
    lessons = Lessons(*(tensor.to(device) for tensor in lessons))
    check = lessons.some(torch.arange(prompts, prompts + CHECKED, device=device))
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * warm_cosine(step / steps)
        rows = torch.randint(prompts, (BATCH,), generator=generator).to(device)
        loss = _loss(readers, lessons.some(rows))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(readers.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // 5) == 0:
            yield {"step": step, "loss": round(loss.item(), 4)} | _shares(readers, check)
    llama.half().save_pretrained(hunyuan / "text_encoder")
    clip.half().save_pretrained(hunyuan / "text_encoder_2")


def draw_lessons(rng: random.Random, number: int, hunyuan: Path) -> Lessons:
    """Prompts of training, tokenized as the worker does it by the tokenizers below `hunyuan`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(hunyuan / "tokenizer")
    tokenizer_2 = CLIPTokenizer.from_pretrained(hunyuan / "tokenizer_2")
    said = [spoken(draw_meaning(rng), rng) for _ in range(number)]
    prompts = [prompt for prompt, _ in said]
    inputs = tokenizer(
        [TEMPLATE.format(prompt) for prompt in prompts],
        padding=True,
        return_offsets_mapping=True,
        return_tensors="np",
    )
    begins = inputs.offset_mapping[..., 0] - TEMPLATE.index("{}")  # each token's first character
    begins[inputs.attention_mask == 0] = -1
    begins[:, : template_crop(tokenizer)] = -1
    aspects = np.full((*begins.shape, len(ASPECTS)), IGNORED)
    last = np.zeros(begins.shape, bool)
    named = np.zeros((number, sum(SIZES)), np.float32)
    firsts = np.cumsum([0, *SIZES[:-1]])
    for row, (prompt, clauses) in enumerate(said):
        ends = [start for start, _ in clauses[1:]] + [len(prompt)]
        for (start, event), end in zip(clauses, ends, strict=True):
            values = _values(event)
            aspects[row, begins[row] >= start] = values  # the next clause's tokens are set again
            last[row, np.flatnonzero((begins[row] >= start) & (begins[row] < end))[-1]] = True
            named[row, firsts + values] = 1
    clip_tokens = tokenizer_2(
        prompts, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="np"
    ).input_ids
    arrays = inputs.input_ids, inputs.attention_mask, aspects, last, clip_tokens, named
    return Lessons(*map(torch.from_numpy, arrays))


def _values(event: Event) -> list[int]:
    """The index of each of ASPECTS."""
    said = (
        event.colour or "camera",
        event.kind or "camera",
        event.action.verb,
        event.action.speed,
        event.action.colour or "none",
    )
    return [values.index(value) for values, value in zip(ASPECTS.values(), said, strict=True)]


def _read(readers: nn.ModuleDict, lessons: Lessons) -> tuple[list[Tensor], Tensor]:
    """The logits of each aspect (B, n, values), and of all that is named (B, all values)."""
    states = readers["llama"](
        input_ids=lessons.tokens, attention_mask=lessons.mask, output_hidden_states=True
    ).hidden_states[HIDDEN_LAYER]
    pooled = readers["clip"](lessons.clip_tokens).pooler_output
    return list(readers["heads"]["llama"](states).split(SIZES, dim=-1)), readers["heads"]["clip"](pooled)


def _loss(readers: nn.ModuleDict, lessons: Lessons) -> Tensor:
    aspects, named = _read(readers, lessons)
    by_token = sum(
        F.cross_entropy(logits.flatten(0, 1), lessons.aspects[..., i].flatten(), ignore_index=IGNORED)
        for i, logits in enumerate(aspects)
    )
    return by_token + F.binary_cross_entropy_with_logits(named, lessons.named) * len(ASPECTS)


@torch.no_grad()
def _shares(readers: nn.ModuleDict, lessons: Lessons) -> dict[str, float]:
    aspects, named = _read(readers, lessons)
    right = torch.stack([logits.argmax(-1) == lessons.aspects[..., i] for i, logits in enumerate(aspects)])
    whole = ((named > 0) == lessons.named.bool()).all(dim=1)
    return {
        "clauses": round(right.all(dim=0)[lessons.last].float().mean().item(), 4),
        "prompts": round(whole.float().mean().item(), 4),
    }
