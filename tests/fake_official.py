"""A stand-in for a checkout of the official demo: the names that are used of it, and a small `worker`."""

from pathlib import Path

PACKED = """
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel


def norm(self, x):
    norm.calls += 1
    return torch.nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


norm.calls = 0
torch.nn.LayerNorm.forward = norm  # as the official package changes the library's classes


class HunyuanVideoTransformer3DModelPacked(HunyuanVideoFramepackTransformer3DModel):
    def forward(self, image_embeddings, latent_indices, clean_latents, clean_latent_indices, clean_latents_2x,
                clean_latent_2x_indices, clean_latents_4x, clean_latent_4x_indices, **shared):
        self.proj_out.to(clean_latents.dtype)
        return super().forward(
            image_embeds=image_embeddings, indices_latents=latent_indices[0], latents_clean=clean_latents,
            indices_latents_clean=clean_latent_indices[0], latents_history_2x=clean_latents_2x,
            indices_latents_history_2x=clean_latent_2x_indices[0], latents_history_4x=clean_latents_4x,
            indices_latents_history_4x=clean_latent_4x_indices[0], **shared)
"""

DEMO = """
import argparse
import os

import gradio as gr
import torch
from diffusers import AutoencoderKLHunyuanVideo
from transformers import (
    CLIPTextModel, CLIPTokenizer, LlamaModel, LlamaTokenizerFast, SiglipImageProcessor, SiglipVisionModel)

from diffusers_helper.memory import get_cuda_free_memory_gb, gpu
from diffusers_helper.models.hunyuan_video_packed import HunyuanVideoTransformer3DModelPacked

argparse.ArgumentParser().parse_args()
os.environ["HF_HOME"] = "elsewhere"
high_vram = get_cuda_free_memory_gb(gpu) > 60
text_encoder = LlamaModel.from_pretrained("a", subfolder="b").cpu()
text_encoder_2 = CLIPTextModel.from_pretrained("a", subfolder="b").cpu()
tokenizer = LlamaTokenizerFast.from_pretrained("a")
tokenizer_2 = CLIPTokenizer.from_pretrained("a")
vae = AutoencoderKLHunyuanVideo.from_pretrained("a").cpu()
feature_extractor = SiglipImageProcessor.from_pretrained("a")
image_encoder = SiglipVisionModel.from_pretrained("a").cpu()
transformer = HunyuanVideoTransformer3DModelPacked.from_pretrained("a").cpu()
transformer.to(dtype=torch.bfloat16)
outputs_folder = "./outputs/"


class AsyncStream:
    pass


def encode_prompt_conds(prompt):
    return text_encoder(tokenizer(prompt, return_tensors="pt").input_ids)


def vae_encode(image):
    return vae.encode(image)


def hf_clip_vision_encode(image):
    return image_encoder(feature_extractor.preprocess(images=image, return_tensors="pt").pixel_values)


def sample_hunyuan(transformer, steps, callback):
    for i in range(steps):
        half, latent = {"dtype": transformer.dtype}, torch.zeros(1, 16, 1, 8, 8, dtype=transformer.dtype)
        config = transformer.config
        transformer(
            hidden_states=latent, timestep=torch.zeros(1, **half), guidance=torch.zeros(1, **half),
            encoder_hidden_states=torch.zeros(1, 8, config.text_embed_dim, **half),
            encoder_attention_mask=torch.ones(1, 8, dtype=torch.bool),
            pooled_projections=torch.zeros(1, config.pooled_projection_dim, **half),
            image_embeddings=torch.zeros(1, 4, config.image_proj_dim, **half),
            latent_indices=torch.tensor([[1]]), clean_latent_indices=torch.tensor([[0, 2]]),
            clean_latent_2x_indices=torch.tensor([[3, 4]]), clean_latent_4x_indices=torch.arange(5, 21)[None],
            clean_latents=latent.repeat(1, 1, 2, 1, 1), clean_latents_2x=latent.repeat(1, 1, 2, 1, 1),
            clean_latents_4x=latent.repeat(1, 1, 16, 1, 1), return_dict=False)
        callback({"i": i})
    return latent


def vae_decode(latents):
    return torch.zeros(1, 3, 4, 8, 8)


def soft_append_bcthw(current, history, overlap):
    return torch.cat([current, history], dim=2)


def save_bcthw_as_mp4(pixels, filename):
    open(filename, "w").close()


def worker(input_image, prompt, n_prompt, seed, total_second_length, latent_window_size, steps, cfg, gs, rs,
           gpu_memory_preservation, use_teacache, mp4_crf):
    try:
        assert seed != 666, "This seed is refused."
        encode_prompt_conds(prompt)
        vae_encode(torch.from_numpy(input_image.copy()).permute(2, 0, 1)[None, :, None] / 255.0)
        hf_clip_vision_encode(input_image)
        pixels = None
        for section in range(max(1, round(total_second_length * 30 / (latent_window_size * 4)))):
            latents = sample_hunyuan(transformer=transformer, steps=steps, callback=lambda state: None)
            decoded = vae_decode(latents)
            pixels = decoded if pixels is None else soft_append_bcthw(decoded, pixels, 0)
            save_bcthw_as_mp4(pixels, os.path.join(outputs_folder, f"{section}.mp4"))
    except Exception:
        import traceback
        traceback.print_exc()


with gr.Blocks() as block:
    gr.Button().click(fn=worker)
block.launch()
"""


def write_fake_official(folder: Path) -> Path:
    """The checkout, in `folder`."""
    models = folder / "diffusers_helper" / "models"
    models.mkdir(parents=True)
    (folder / "diffusers_helper" / "__init__.py").touch()
    (models / "__init__.py").touch()
    (models / "hunyuan_video_packed.py").write_text(PACKED)
    (folder / "demo_gradio.py").write_text(DEMO)
    return folder
