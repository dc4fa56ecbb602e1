"""What LoRA files call the transformer's modules: diffusers' names, HunyuanVideo's original ones, ComfyUI's.

An original module may be several of diffusers' side by side: its outputs are theirs, one after the other.
diffusers' converter of these names is not used: it takes 3072 for the width of every model, cuts the down
matrices of the refiner's `self_attn_qkv` and of the last modulation as if they were up matrices, and knows
neither `alpha` nor names whose dots became underscores.
"""

from typing import NamedTuple

from torch import nn


class Piece(NamedTuple):
    """The outputs `weight[start:stop]` of a module."""

    module: str
    start: int
    stop: int


Modules = tuple[str, ...]

DOUBLE_BLOCK: dict[str, Modules] = {
    "img_mod.linear": ("norm1.linear",),
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp.fc1": ("ff.net.0.proj",),
    "img_mlp.fc2": ("ff.net.2",),
    "txt_mod.linear": ("norm1_context.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp.fc1": ("ff_context.net.0.proj",),
    "txt_mlp.fc2": ("ff_context.net.2",),
}
SINGLE_BLOCK: dict[str, Modules] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.linear": ("norm.linear",),
}
REFINER_BLOCK: dict[str, Modules] = {
    "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "self_attn_proj": ("attn.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm_out.linear",),
}
OUTSIDE_BLOCKS: dict[str, Modules] = {
    "img_in.proj": ("x_embedder.proj",),
    "time_in.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.mlp.0": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.mlp.2": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    "txt_in.t_embedder.mlp.0": ("context_embedder.time_text_embed.timestep_embedder.linear_1",),
    "txt_in.t_embedder.mlp.2": ("context_embedder.time_text_embed.timestep_embedder.linear_2",),
    "txt_in.c_embedder.linear_1": ("context_embedder.time_text_embed.text_embedder.linear_1",),
    "txt_in.c_embedder.linear_2": ("context_embedder.time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
BLOCKS = (  # original list, diffusers' list, names inside
    ("double_blocks", "transformer_blocks", DOUBLE_BLOCK),
    ("single_blocks", "single_transformer_blocks", SINGLE_BLOCK),
    (
        "txt_in.individual_token_refiner.blocks",
        "context_embedder.token_refiner.refiner_blocks",
        REFINER_BLOCK,
    ),
)
LAST_MODULATION = "final_layer.adaLN_modulation.1"  # shift and scale; diffusers' has scale and shift
COMFYUI = (
    ("_mod.linear", "_mod.lin"),
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("modulation.linear", "modulation.lin"),
)


def module_names(model: nn.Module) -> dict[str, tuple[Piece, ...]]:
    """Of each name that a LoRA file may have for a linear or convolution of `model`, where it is."""
    outputs = {
        name: module.weight.shape[0]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv3d)
    }
    names = {name: (Piece(name, 0, count),) for name, count in outputs.items()}
    for original, modules in _originals(model):
        if all(module in outputs for module in modules):
            names[original] = tuple(Piece(module, 0, outputs[module]) for module in modules)
    if half := outputs.get("norm_out.linear", 0) // 2:
        last = "norm_out.linear"
        names[LAST_MODULATION] = (Piece(last, half, 2 * half), Piece(last, 0, half))
    for name, pieces in [*names.items()]:
        comfyui = name
        for theirs, ours in COMFYUI:
            comfyui = comfyui.replace(theirs, ours)
        names[comfyui] = pieces
    return names | {name.replace(".", "_"): pieces for name, pieces in names.items()}


def _originals(model: nn.Module) -> list[tuple[str, Modules]]:
    found = [*OUTSIDE_BLOCKS.items()]
    for theirs, ours, inside in BLOCKS:
        for number in range(len(model.get_submodule(ours))):
            found += [
                (f"{theirs}.{number}.{name}", tuple(f"{ours}.{number}.{module}" for module in modules))
                for name, modules in inside.items()
            ]
    return found
