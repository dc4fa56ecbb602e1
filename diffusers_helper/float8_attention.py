"""The blocks' attention in float8, by cuDNN's kernel for Hopper and later GPUs.

Queries, keys, values, the softmax's weights and the result are float8_e4m3fn, with one scale for each tensor;
the sums are float32. Queries and keys leave a normalisation with learned weights, so their largest value is
known without looking at them; values are looked at, and what comes out cannot be larger.

cuDNN is torch's own; the graph of its kernel is built by NVIDIA's `nvidia-cudnn-frontend`, once for each
length. On a CPU the same is computed step by step, to see what it costs in precision.
"""

import logging
import math
from functools import cache, lru_cache

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import library

from diffusers_helper.attention import kernels_for
from diffusers_helper.fp8 import FP8, LARGEST
from diffusers_helper.transformer import FramePackTransformer

log = logging.getLogger(__name__)

FLOAT8 = "fp8"  # among the names of kernels
CAPABILITY = 9, 0  # Hopper, the first that cuDNN has the kernel for
TRIED_TOKENS = 77  # no multiple of anything, as a section's are not


def attend_by(model: FramePackTransformer, asked: str, device: torch.device, dtype: torch.dtype) -> None:
    """Have `model` attend by the kernel `asked`, one of `core.settings.ATTENTION`, where it works here.

    Where not, by the first that does; `model.kernels` says which.
    """
    head_dim = model.config.attention_head_dim
    kernels = kernels_for("auto" if asked == FLOAT8 else asked, device, dtype, head_dim)
    if asked == FLOAT8 and works(device, head_dim):
        in_float8(model, device)
        kernels = FLOAT8, *kernels  # the refiner and whatever else is left to torch
    model.kernels = kernels


def in_float8(model: FramePackTransformer, device: torch.device) -> None:
    """Have the blocks of `model` attend in float8 on `device`."""
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.attn.set_processor(Float8AttnProcessor(block.attn, device))


@cache
def works(device: torch.device, head_dim: int) -> bool:
    """By trying it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    one = torch.ones(1, 1, 1, 1, device=device)
    x = torch.ones(1, TRIED_TOKENS, 1, head_dim, device=device).to(FP8)
    try:
        found = attend_in_float8(x, x, x, one, one, one, one)
        return bool((found.float() == 1).all())
    except Exception:  # without the frontend, or with a cuDNN or a GPU that it does not know
        log.warning("cuDNN's float8 attention does not work on this device", exc_info=True)
        return False


class Float8AttnProcessor:
    """A block's attention as the library's `HunyuanVideoAttnProcessor2_0` has it, but in float8.

    For blocks that attend to all tokens, image before text, with normalised queries and keys.
    """

    def __init__(self, attn: Attention, device: torch.device) -> None:
        """`device` is where it will run; the norms' weights may still be elsewhere, and are read."""
        self._query, self._key = (
            _Scale(largest_of([norm for norm in norms if norm is not None]), device)
            for norms in ((attn.norm_q, attn.norm_added_q), (attn.norm_k, attn.norm_added_k))
        )

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, n, D) and (B, m, D) → the same; the first are rotated, and there is no mask."""
        n = hidden_states.shape[1]
        shared = attn.add_q_proj is None  # a single block has one projection for both
        if shared:
            hidden_states = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        query, key, value = (
            project(hidden_states).unflatten(2, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            torch.cat([apply_rotary_emb(x[:, :n], image_rotary_emb, sequence_dim=1), x[:, n:]], dim=1)
            for x in (attn.norm_q(query), attn.norm_k(key))
        )
        if not shared:
            text = [
                project(encoder_hidden_states).unflatten(2, (attn.heads, -1))
                for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            ]
            query = torch.cat([query, attn.norm_added_q(text[0])], dim=1)
            key = torch.cat([key, attn.norm_added_k(text[1])], dim=1)
            value = torch.cat([value, text[2]], dim=1)

        attended = self._attend(query, key, value).flatten(2)
        image, text = attended[:, :n], attended[:, n:]
        if not shared:
            image, text = attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)
        return image, text

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(B, n, heads, d) each → the same, in the query's dtype."""
        largest = value.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny).view(1, 1, 1, 1)
        scale = LARGEST / largest
        attended = attend_in_float8(
            self._query.quantise(query),
            self._key.quantise(key),
            (value * scale).to(FP8),
            self._query.back,
            self._key.back,
            1 / scale,
            scale,
        )
        return (attended.float() / scale).to(query.dtype)


class _Scale:
    def __init__(self, largest: float, device: torch.device) -> None:
        self._scale = LARGEST / largest
        self.back = torch.full((1, 1, 1, 1), 1 / self._scale, device=device)

    def quantise(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() * self._scale).to(FP8)


def largest_of(norms: list[torch.nn.Module]) -> float:
    """The largest value that can come out of these root-mean-square norms (d,) and a rotation of pairs."""
    return max(math.sqrt(2 * norm.weight.numel()) * norm.weight.detach().abs().max().item() for norm in norms)


@library.custom_op("framepack::scaled_attention", mutates_args=(), device_types="cuda")
def attend_in_float8(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_back: torch.Tensor,
    key_back: torch.Tensor,
    value_back: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """softmax(Q Kᵀ / √d) V · `scale` of float8 tensors (B, n, heads, d), in float8.

    The others are (1, 1, 1, 1) float32; Q is what `query` holds times `query_back`, and so on.
    """
    plan = _plan(tuple(query.shape), query.device)
    return plan.run((query, key, value), (query_back, key_back, value_back), scale)


@attend_in_float8.register_fake
def _(query: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@attend_in_float8.register_kernel("cpu")
def _(*tensors: torch.Tensor) -> torch.Tensor:
    given, backs, scale = tensors[:3], tensors[3:6], tensors[6]
    q, k, v = ((x.float() * back).transpose(1, 2) for x, back in zip(given, backs, strict=True))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    total = weights.sum(dim=-1, keepdim=True)
    rounded = (weights * LARGEST).to(FP8).float() / LARGEST
    return ((rounded @ v / total) * scale).transpose(1, 2).to(FP8).contiguous()


class _Plan:
    """cuDNN's kernel for one shape, with what it needs beside the tensors."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device) -> None:
        import cudnn  # where it is wanted only: not everyone has it

        batch, n, heads, d = shape
        one = {"dim": (1, 1, 1, 1), "stride": (1, 1, 1, 1), "data_type": cudnn.data_type.FLOAT}
        all_heads = {"dim": (batch, heads, n, d), "stride": (n * heads * d, d, heads * d, 1)}
        in_float8 = {"data_type": cudnn.data_type.FP8_E4M3}
        graph = cudnn.pygraph(
            io_data_type=cudnn.data_type.FP8_E4M3,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )
        tensors = [graph.tensor(**all_heads, **in_float8) for _ in range(3)]
        scales = [graph.tensor(**one) for _ in range(6)]
        out, _, *peaks = graph.sdpa_fp8(
            *tensors, *scales, generate_stats=False, attn_scale=1 / math.sqrt(d), name="attend_in_float8"
        )
        out.set_output(True).set_dim(all_heads["dim"]).set_stride(all_heads["stride"])
        out.set_data_type(cudnn.data_type.FP8_E4M3)
        for peak in peaks:
            peak.set_output(True).set_dim(one["dim"]).set_stride(one["stride"]).set_data_type(
                one["data_type"]
            )
        with torch.cuda.device(device):
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            graph.check_support()
            graph.build_plans()
            self._handle = _handle(device)
        self._graph, self._tensors, self._scales, self._out, self._peaks = graph, tensors, scales, out, peaks
        # the softmax's weights are 1 at most
        self._weights = [torch.full((1, 1, 1, 1), s, device=device) for s in (1 / LARGEST, LARGEST)]
        self._unused = torch.zeros(2, 1, 1, 1, 1, device=device)
        self._workspace_size = graph.get_workspace_size()

    def run(
        self, given: tuple[torch.Tensor, ...], backs: tuple[torch.Tensor, ...], scale: torch.Tensor
    ) -> torch.Tensor:
        import cudnn

        given = [x.contiguous() for x in given]
        result = torch.empty_like(given[0])
        workspace = torch.empty(max(1, self._workspace_size), device=scale.device, dtype=torch.uint8)
        names = [*self._tensors, *self._scales, self._out, *self._peaks]
        values = [*given, *backs, *self._weights, scale, result, *self._unused]
        with torch.cuda.device(scale.device):
            cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
            self._graph.execute(dict(zip(names, values, strict=True)), workspace, handle=self._handle)
        return result


_plan = lru_cache(64)(_Plan)  # a length each


@cache
def _handle(device: torch.device) -> int:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()
