"""Prompt → Llama hidden states and CLIP pooled projection, the way HunyuanVideo was trained."""

import copy
from dataclasses import dataclass, replace

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

TEMPLATE = DEFAULT_PROMPT_TEMPLATE["template"]
TEMPLATE_CROP = DEFAULT_PROMPT_TEMPLATE["crop_start"]  # 95 tokens with Llama 3's tokenizer
LLAMA3_VOCABULARY = 128_000

PROMPT_TOKENS = 256  # of the prompt, after the template's prefix
MODEL_TOKENS = 512  # what the transformer is given, padded
CLIP_TOKENS = 77
HIDDEN_LAYER = -3  # of the whole Llama model
UNUSED_LAYERS = 2  # so these, the last ones, never contribute, nor does the final norm


@dataclass(frozen=True)
class PromptEmbeds:
    """One prompt as the transformer takes it."""

    encoder_hidden_states: torch.Tensor  # (1, 512, D)
    encoder_attention_mask: torch.Tensor  # (1, 512) bool
    pooled_projections: torch.Tensor  # (1, P)
    truncated: bool = False  # the prompt had more than 256 tokens

    def to(self, device: torch.device, dtype: torch.dtype) -> "PromptEmbeds":
        return replace(
            self,
            encoder_hidden_states=self.encoder_hidden_states.to(device, dtype),
            encoder_attention_mask=self.encoder_attention_mask.to(device),
            pooled_projections=self.pooled_projections.to(device, dtype),
        )

    def zeros_like(self) -> "PromptEmbeds":
        """The negative prompt of an unguided job: all zeros, same number of real tokens."""
        return replace(
            self,
            encoder_hidden_states=torch.zeros_like(self.encoder_hidden_states),
            pooled_projections=torch.zeros_like(self.pooled_projections),
            truncated=False,
        )


class PromptEncoder(LlamaModel):
    """The Llama model without what never contributes: its result is the whole model's `hidden_states[-3]`.

    Loaded from the whole model's files, of which the last two layers and the final norm are not read. Raises
    ValueError for a config with fewer layers than that.
    """

    def __init__(self, config: LlamaConfig) -> None:
        config = copy.deepcopy(config)
        whole = config.num_hidden_layers
        if whole < UNUSED_LAYERS:
            raise ValueError(f"its config says {whole} layers, and {UNUSED_LAYERS} are left out")
        config.num_hidden_layers = whole - UNUSED_LAYERS
        super().__init__(config)
        self.norm = nn.Identity()
        unused = "|".join(str(layer) for layer in range(config.num_hidden_layers, whole))
        ignored = self._keys_to_ignore_on_load_unexpected or ()
        self._keys_to_ignore_on_load_unexpected = {*ignored, rf"^layers\.({unused})\.", r"^norm\."}


def template_crop(tokenizer: PreTrainedTokenizerFast) -> int:
    """Number of tokens the template puts before the prompt: 95 with the real tokenizer.

    Raises ValueError when a Llama 3 tokenizer gives anything else: it was loaded by rules other than its
    own `tokenizer.json`, and every prompt would be cut at the wrong place.
    """
    prefix = TEMPLATE[: TEMPLATE.index("{}")]
    crop = len(tokenizer(prefix).input_ids)
    if len(tokenizer) >= LLAMA3_VOCABULARY and crop != TEMPLATE_CROP:
        raise ValueError(f"the prompt template takes {crop} tokens instead of {TEMPLATE_CROP}")
    return crop


@torch.no_grad()
def encode_prompt(
    prompt: str,
    *,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: PromptEncoder,
    tokenizer_2: CLIPTokenizer,
    text_encoder_2: CLIPTextModel,
    device: torch.device,
) -> PromptEmbeds:
    """Encode one prompt with both text encoders, which must be ready to run on `device`."""
    crop = template_crop(tokenizer)
    text = TEMPLATE.format(prompt)
    inputs = tokenizer(
        text,
        padding="max_length",
        max_length=PROMPT_TOKENS + crop,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    tokens = int(inputs.attention_mask.sum())
    output = text_encoder(
        input_ids=inputs.input_ids.to(device), attention_mask=inputs.attention_mask.to(device)
    )
    hidden_states, mask = _pad(output.last_hidden_state[:, crop:tokens], MODEL_TOKENS)

    clip_ids = tokenizer_2(
        prompt, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    pooled = text_encoder_2(clip_ids.to(device)).pooler_output
    return PromptEmbeds(
        encoder_hidden_states=hidden_states,
        encoder_attention_mask=mask,
        pooled_projections=pooled,
        truncated=tokens == PROMPT_TOKENS + crop and len(tokenizer(text).input_ids) > tokens,
    )


def _pad(hidden_states: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, n, D) → (1, length, D) zero-padded or cropped, with its (1, length) boolean mask."""
    batch, tokens, width = hidden_states.shape
    padded = hidden_states.new_zeros(batch, length, width)
    mask = torch.zeros(batch, length, dtype=torch.bool, device=hidden_states.device)
    kept = min(tokens, length)
    padded[:, :kept] = hidden_states[:, :kept]
    mask[:, :kept] = True
    return padded, mask
