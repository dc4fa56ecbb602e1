"""Make the demo models: the real classes at toy size, random weights from a fixed seed, in the hub's layout.

    python -m builder.make_demo_models models/demo

They run the whole pipeline in seconds on a CPU. Their weights are random, so the video shows noise.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SEED = 0
LLAMA_SPECIALS = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<pad>")
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")

TEXT_WIDTH, POOLED_WIDTH, IMAGE_WIDTH = 32, 16, 24


def make_demo_models(folder: Path, seed: int = SEED) -> None:
    """Write `hunyuan/`, `redux/`, `framepack/` and `framepack_f1/` below `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hunyuan = folder / "hunyuan"
        llama_vocabulary = make_llama_tokenizer(hunyuan / "tokenizer")
        clip_vocabulary = make_clip_tokenizer(hunyuan / "tokenizer_2")
        llama(llama_vocabulary).save_pretrained(hunyuan / "text_encoder")
        clip(clip_vocabulary).save_pretrained(hunyuan / "text_encoder_2")
        vae().save_pretrained(hunyuan / "vae")
        siglip().save_pretrained(folder / "redux" / "image_encoder")
        SiglipImageProcessorPil(size={"height": 56, "width": 56}).save_pretrained(
            folder / "redux" / "feature_extractor"
        )
        transformer().save_pretrained(folder / "framepack")
        transformer().save_pretrained(folder / "framepack_f1")


def make_llama_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer without merges, built as Llama 3's is; returns its vocabulary size."""
    vocabulary = {token: i for i, token in enumerate(LLAMA_SPECIALS)}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in LLAMA_SPECIALS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos = LLAMA_SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=4096,
    ).save_pretrained(folder)
    return len(vocabulary)


def make_clip_tokenizer(folder: Path) -> int:
    """CLIP's byte-level vocabulary without merges; returns its size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*CLIP_SPECIALS, *alphabet, *(f"{byte}</w>" for byte in alphabet)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    start, end = CLIP_SPECIALS
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return len(tokens)


def llama(vocabulary: int) -> LlamaModel:
    return LlamaModel(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
        )
    )


def clip(vocabulary: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=POOLED_WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def siglip() -> SiglipVisionModel:
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=IMAGE_WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        )
    )


def vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)


def transformer() -> HunyuanVideoFramepackTransformer3DModel:
    return HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=IMAGE_WIDTH,
        has_clean_x_embedder=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    make_demo_models(folder)
    print(f"Demo models written to {folder}")
