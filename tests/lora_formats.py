"""LoRAs of the tiny transformer in every format that trainers write, all made from the same deltas."""

import json

import torch

WIDTH, MLP = 32, 128  # of tests/golden/tiny/framepack
RANK = 2

# original names, inputs and outputs; each with the diffusers modules that its outputs are, in order
FUSED = {
    "double_blocks.0.img_attn_qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "double_blocks.0.txt_attn_qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": [
        f"context_embedder.token_refiner.refiner_blocks.0.attn.to_{x}" for x in "qkv"
    ],
    "single_blocks.1.linear1": [
        *(f"single_transformer_blocks.1.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.1.proj_mlp",
    ],
}
PLAIN = {
    "double_blocks.0.img_mod.linear": "transformer_blocks.0.norm1.linear",
    "double_blocks.0.txt_mod.linear": "transformer_blocks.0.norm1_context.linear",
    "double_blocks.0.img_attn_proj": "transformer_blocks.0.attn.to_out.0",
    "double_blocks.0.txt_attn_proj": "transformer_blocks.0.attn.to_add_out",
    "double_blocks.0.img_mlp.fc1": "transformer_blocks.0.ff.net.0.proj",
    "double_blocks.0.img_mlp.fc2": "transformer_blocks.0.ff.net.2",
    "double_blocks.0.txt_mlp.fc1": "transformer_blocks.0.ff_context.net.0.proj",
    "double_blocks.0.txt_mlp.fc2": "transformer_blocks.0.ff_context.net.2",
    "single_blocks.0.linear2": "single_transformer_blocks.0.proj_out",
    "single_blocks.0.modulation.linear": "single_transformer_blocks.0.norm.linear",
    "txt_in.individual_token_refiner.blocks.0.self_attn_proj": (
        "context_embedder.token_refiner.refiner_blocks.0.attn.to_out.0"
    ),
    "txt_in.individual_token_refiner.blocks.0.mlp.fc1": (
        "context_embedder.token_refiner.refiner_blocks.0.ff.net.0.proj"
    ),
    "txt_in.individual_token_refiner.blocks.0.mlp.fc2": (
        "context_embedder.token_refiner.refiner_blocks.0.ff.net.2"
    ),
    "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1": (
        "context_embedder.token_refiner.refiner_blocks.0.norm_out.linear"
    ),
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "final_layer.linear": "proj_out",
}
LAST = "final_layer.adaLN_modulation.1"  # its halves are the other way round in norm_out.linear
COMFYUI = {
    "img_attn_qkv": "img_attn.qkv",
    "txt_attn_qkv": "txt_attn.qkv",
    "img_attn_proj": "img_attn.proj",
    "txt_attn_proj": "txt_attn.proj",
    "img_mlp.fc1": "img_mlp.0",
    "img_mlp.fc2": "img_mlp.2",
    "txt_mlp.fc1": "txt_mlp.0",
    "txt_mlp.fc2": "txt_mlp.2",
    "img_mod.linear": "img_mod.lin",
    "txt_mod.linear": "txt_mod.lin",
    "modulation.linear": "modulation.lin",
}

Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]  # name: down, up


def originals(model: torch.nn.Module, seed: int = 0) -> Matrices:
    """Small whole numbers, whose products and sums are exact in float32."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float() / 16

    def shape(module: str) -> torch.Size:
        return model.get_submodule(module).weight.shape

    made = {}
    modules_of = FUSED | {name: [module] for name, module in PLAIN.items()} | {LAST: ["norm_out.linear"]}
    for name, modules in modules_of.items():
        outputs = sum(shape(module)[0] for module in modules)
        inputs = shape(modules[0])[1:]
        made[name] = matrix(RANK, *inputs), matrix(outputs, RANK, *[1] * (len(inputs) - 1))
    return made


def in_diffusers_names(matrices: Matrices) -> Matrices:
    """Each original module's outputs handed out to diffusers' modules."""
    result = {}
    for name, (down, up) in matrices.items():
        if name == LAST:
            shift, scale = up.chunk(2)
            result["norm_out.linear"] = down, torch.cat([scale, shift])
        elif name in FUSED:
            sizes = [WIDTH, WIDTH, WIDTH, MLP][: len(FUSED[name])]
            for module, rows in zip(FUSED[name], up.split(sizes), strict=True):
                result[module] = down, rows
        else:
            result[PLAIN[name]] = down, up
    return result


def added(model: torch.nn.Module, matrices: Matrices, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """The weights of `model` with factor · up · down added, by diffusers' names."""
    weights = {}
    for module, (down, up) in in_diffusers_names(matrices).items():
        weight = model.get_submodule(module).weight.data.float()
        weights[module] = weight + factor * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return weights


def peft(prefix: str, matrices: Matrices) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{name}.lora_{part}.weight": matrix
        for name, pair in matrices.items()
        for part, matrix in zip("AB", pair, strict=True)
    }


def kohya(
    matrices: Matrices, alpha: float | None = RANK, prefix: str = "lora_unet_"
) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (down, up) in matrices.items():
        flat = prefix + name.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(float(alpha))
    return tensors


def comfyui(matrices: Matrices) -> Matrices:
    renamed = {}
    for name, pair in matrices.items():
        for ours, theirs in COMFYUI.items():
            name = name.replace(ours, theirs)
        renamed[name] = pair
    return renamed


def _dotted(tensors: dict[str, torch.Tensor], down: str, up: str) -> dict[str, torch.Tensor]:
    return {key.replace("lora_A", down).replace("lora_B", up): value for key, value in tensors.items()}


FORMATS = {
    "diffusers": lambda m: peft("transformer.", in_diffusers_names(m)),
    "PEFT": lambda m: peft("base_model.model.", in_diffusers_names(m)),
    "PEFT with the adapter's name": lambda m: _dotted(
        peft("", in_diffusers_names(m)), "lora_A.default", "lora_B.default"
    ),
    "diffusers, before PEFT": lambda m: _dotted(
        peft("transformer.", in_diffusers_names(m)), "lora.down", "lora.up"
    ),
    "original": lambda m: peft("", m),
    "original in transformer": lambda m: peft("transformer.", m),
    "original in diffusion_model": lambda m: peft("diffusion_model.", m),
    "ComfyUI": lambda m: peft("diffusion_model.", comfyui(m)),
    "kohya, original names": kohya,
    "kohya, FramePack's names": lambda m: kohya(in_diffusers_names(m)),
    "kohya without alpha": lambda m: kohya(m, None),
    "kohya, dots kept": lambda m: _dotted(peft("diffusion_model.", m), "lora_down", "lora_up"),
    "OneTrainer": lambda m: kohya(in_diffusers_names(m), prefix="lora_transformer_"),
}


def adapter(**config) -> dict[str, str]:
    """What diffusers writes into a file's metadata."""
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": v for key, v in config.items()})}
