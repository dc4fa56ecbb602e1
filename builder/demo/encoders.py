"""The demo's text encoders, image encoder and tokenizers: the real classes, small, with random weights.

The image encoder stays random; reading.py teaches the text encoders. The tokenizers have merges for the
world's prompts and HunyuanVideo's template, and fall back to bytes.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from diffusers_helper.text import TEMPLATE, PromptEncoder, template_crop

TEXT_WIDTH, POOLED_WIDTH, IMAGE_WIDTH = 64, 48, 64
IMAGE_SIZE, PATCH_SIZE = 64, 16
VOCABULARY = 1024
LLAMA_SPECIALS = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<pad>")
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def write_encoders(folder: Path, prompts: Sequence[str], seed: int) -> None:
    """Write tokenizers and encoders below `folder`, in the hub's layout. The vocabulary covers `prompts`."""
    hunyuan, redux = folder / "hunyuan", folder / "redux"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vocabulary = write_llama_tokenizer(hunyuan / "tokenizer", prompts)
        clip_vocabulary = write_clip_tokenizer(hunyuan / "tokenizer_2", prompts)
        llama = LlamaModel(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=6,  # of which the worker takes the fourth's output
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=4096,
                initializer_range=TEXT_WIDTH**-0.5,  # so that a token's state tells of the tokens before it
            )
        )
        nn.init.normal_(llama.embed_tokens.weight)
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=clip_vocabulary,
                hidden_size=POOLED_WIDTH,
                intermediate_size=2 * POOLED_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        siglip = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=IMAGE_WIDTH,
                intermediate_size=2 * IMAGE_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=IMAGE_SIZE,
                patch_size=PATCH_SIZE,
            )
        )
    # as precise on disk as they are used
    llama.half().save_pretrained(hunyuan / "text_encoder")
    clip.half().save_pretrained(hunyuan / "text_encoder_2")
    siglip.half().save_pretrained(redux / "image_encoder")
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    SiglipImageProcessorPil(size=size).save_pretrained(redux / "feature_extractor")


def write_llama_tokenizer(folder: Path, prompts: Iterable[str]) -> int:
    """A byte-level BPE built as Llama 3's is; returns its vocabulary size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in LLAMA_SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*[TEMPLATE.format("")] * 100, *prompts], trainer)
    bos = LLAMA_SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=4096,
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def write_clip_tokenizer(folder: Path, prompts: Iterable[str]) -> int:
    """CLIP's kind of BPE, words ending in `</w>`; returns its vocabulary size."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([prompt.lower() for prompt in prompts], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    learnt = [token for token in model["vocab"] if token.removesuffix("</w>") not in alphabet]
    tokens = [*CLIP_SPECIALS, *alphabet, *(f"{byte}</w>" for byte in alphabet), *learnt]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    start, end = CLIP_SPECIALS
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return len(tokens)


class Encoders:
    """The frozen encoders, ready for batches; the results are those of `diffusers_helper`'s one by one."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        hunyuan, redux = folder / "hunyuan", folder / "redux"
        self.device = device
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(hunyuan / "tokenizer")
        self.tokenizer_2 = CLIPTokenizer.from_pretrained(hunyuan / "tokenizer_2")
        self.text_encoder = PromptEncoder.from_pretrained(hunyuan / "text_encoder", dtype=torch.float32)
        self.text_encoder_2 = CLIPTextModel.from_pretrained(hunyuan / "text_encoder_2", dtype=torch.float32)
        self.image_encoder = SiglipVisionModel.from_pretrained(redux / "image_encoder", dtype=torch.float32)
        self.feature_extractor = SiglipImageProcessorPil.from_pretrained(redux / "feature_extractor")
        for module in (self.text_encoder, self.text_encoder_2, self.image_encoder):
            module.to(device).eval().requires_grad_(False)
        self._crop = template_crop(self.tokenizer)

    @torch.no_grad()
    def text(self, prompts: Sequence[str], batch: int = 512) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each prompt its tokens' hidden states (n, D), n as it comes, and its pooled projection (P,)."""
        ids = [self.tokenizer(TEMPLATE.format(prompt)).input_ids for prompt in prompts]
        encoded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
        for _, group in groupby(order, key=lambda i: len(ids[i])):
            members = list(group)
            for first in range(0, len(members), batch):
                some = members[first : first + batch]
                tokens = torch.tensor([ids[i] for i in some], device=self.device)
                states = self.text_encoder(input_ids=tokens).last_hidden_state
                clip_ids = self.tokenizer_2(
                    [prompts[i] for i in some],
                    padding="max_length",
                    max_length=77,
                    truncation=True,
                    return_tensors="pt",
                ).input_ids
                pooled = self.text_encoder_2(clip_ids.to(self.device)).pooler_output
                hidden = states[:, self._crop :]
                encoded |= {i: (hidden[k], pooled[k]) for k, i in enumerate(some)}
        return [encoded[i] for i in range(len(prompts))]

    @torch.no_grad()
    def images(self, images: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 on the host → (B, patches, D)."""
        inputs = self.feature_extractor(images=[*images.numpy()], return_tensors="pt").pixel_values
        return self.image_encoder(inputs.to(self.device)).last_hidden_state
