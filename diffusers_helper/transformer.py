"""The packed transformer: diffusers' class, with the output projection in float32 and a step cache."""

from dataclasses import dataclass

import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel

from diffusers_helper.attention import attending_by
from diffusers_helper.step_cache import StepCache


@dataclass(frozen=True)
class PackedHistory:
    """What a section sees besides its own latents: frames at full, half and quarter resolution.

    Latents are (1, 16, T, H/8, W/8); indices are (T,) positions on the section's time axis. There may be no
    half or no quarter resolution: then its latents are None.
    """

    indices_latents: torch.Tensor
    latents_clean: torch.Tensor
    indices_latents_clean: torch.Tensor
    latents_history_2x: torch.Tensor | None
    indices_latents_history_2x: torch.Tensor
    latents_history_4x: torch.Tensor | None
    indices_latents_history_4x: torch.Tensor


@dataclass(frozen=True)
class PreparedHistory:
    """A `PackedHistory` as the blocks read it: the same in every step of a section and in both passes."""

    tokens: torch.Tensor  # (B, n, D): 4× | 2× | clean
    rotary: tuple[torch.Tensor, torch.Tensor]  # cos and sin of these and the section's own tokens after them


@dataclass(frozen=True)
class PreparedCondition:
    """What one guidance pass is conditioned on, as far as no step changes it."""

    text: torch.Tensor  # (B, n, D_text): refined anew in every step
    text_mask: torch.Tensor | None
    real_tokens: int  # of `text`; padding follows
    image_tokens: torch.Tensor  # (B, patches, D)
    pooled_projections: torch.Tensor
    guidance: torch.Tensor


class FramePackTransformer(HunyuanVideoFramepackTransformer3DModel):
    """`HunyuanVideoFramepackTransformer3DModel` with the library's result from the library's weights.

    For one sample, or for several whose prompts have equally many tokens. Call `output_in_float32()` once
    after loading to project as the official code does for inference. A section's steps share
    `prepare_history` and `prepare_condition` and then call `velocity`; `forward` is all three. `kernels` are
    those it attends by, as `attention.kernels_for` names them; without any it is as torch has it.
    """

    kernels: tuple[str, ...] = ()

    def output_in_float32(self) -> None:
        self.proj_out.to(torch.float32)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        guidance: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        pooled_projections: torch.Tensor,
        image_embeds: torch.Tensor,
        history: PackedHistory,
        cache: StepCache | None = None,
    ) -> torch.Tensor:
        """Velocity (B, 16, T, h, w), in `proj_out`'s dtype, of latents `hidden_states` of that shape.

        `timestep` is (B,) in the model's dtype, sigma·1000; the others are described where they are prepared.
        """
        condition = self.prepare_condition(
            encoder_hidden_states, encoder_attention_mask, pooled_projections, image_embeds, guidance
        )
        return self.velocity(hidden_states, timestep, self.prepare_history(history), condition, cache)

    def prepare_history(self, history: PackedHistory) -> PreparedHistory:
        """Embed a section's history, and make the rotary tables of its whole sequence."""
        height, width = history.latents_clean.shape[-2:]
        device = history.latents_clean.device

        def rope(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.rope(frame_indices=indices, height=height, width=width, device=device)

        clean, history_2x, history_4x = self.clean_x_embedder(
            history.latents_clean, history.latents_history_2x, history.latents_history_4x
        )
        tokens, rotary = self._pack_history_states(
            clean[:, :0],  # the section's own tokens, which come with each step
            clean,
            history_2x,
            history_4x,
            rope(history.indices_latents),
            rope(history.indices_latents_clean),
            rope(history.indices_latents_history_2x),
            rope(history.indices_latents_history_4x),
            height // self.config.patch_size,
            width // self.config.patch_size,
        )
        return PreparedHistory(tokens, rotary)

    def prepare_condition(
        self,
        text: torch.Tensor,
        text_mask: torch.Tensor | None,
        pooled_projections: torch.Tensor,
        image_embeds: torch.Tensor,
        guidance: torch.Tensor,
    ) -> PreparedCondition:
        """Project the image, and count the prompt's real tokens: the last time that the host asks the GPU.

        Text is (1, 512, D) with its boolean mask (1, 512), or (B, n, D) without one, where all of it is
        real; `image_embeds` are (B, patches, D); `guidance` is (B,) in the model's dtype, distilled
        guidance·1000.
        """
        return PreparedCondition(
            text=text,
            text_mask=text_mask,
            real_tokens=text.shape[1] if text_mask is None else int(text_mask.sum()),
            image_tokens=self.image_projection(image_embeds),
            pooled_projections=pooled_projections,
            guidance=guidance,
        )

    def velocity(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        history: PreparedHistory,
        condition: PreparedCondition,
        cache: StepCache | None = None,
    ) -> torch.Tensor:
        """As `forward`, from what was prepared."""
        batch, _, frames, height, width = latents.shape
        tokens = torch.cat([history.tokens, self.x_embedder(latents)], dim=1)
        temb, _ = self.time_text_embed(timestep, condition.pooled_projections, condition.guidance)
        p = self.config.patch_size
        section_length = frames * (height // p) * (width // p)
        with attending_by(self.kernels):
            context = self._context(timestep, condition)
            blocks = _Blocks(self, context, temb, history.rotary, section_length)
            tokens = blocks.rest(tokens) if cache is None else cache.run(tokens, blocks)

        tokens = self.norm_out(blocks.of_section(tokens), temb)
        tokens = self.proj_out(tokens.to(self.proj_out.weight.dtype))
        return (
            tokens.reshape(batch, frames, height // p, width // p, -1, 1, p, p)
            .permute(0, 4, 1, 5, 2, 6, 3, 7)
            .reshape(batch, -1, frames, height, width)
        )

    def _context(self, timestep: torch.Tensor, condition: PreparedCondition) -> torch.Tensor:
        """Image tokens, then the prompt's real tokens; padding is dropped, so no attention mask is needed.

        The refiner sees the padding, under its mask: cut before it, the same text is rounded differently.
        """
        text = self.context_embedder(condition.text, timestep, condition.text_mask)
        return torch.cat([condition.image_tokens, text[:, : condition.real_tokens]], dim=1)


class _Blocks:
    """The transformer's blocks in one step (`diffusers_helper.step_cache.Blocks`)."""

    def __init__(
        self,
        model: FramePackTransformer,
        context: torch.Tensor,
        temb: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        section_length: int,
    ) -> None:
        self._waiting = [*model.transformer_blocks, *model.single_transformer_blocks]
        self._context = context  # each block renews it
        self._temb, self._rotary, self._section_length = temb, rotary, section_length

    def modulated(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._waiting[0].norm1(tokens, emb=self._temb)[0]

    def first(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._run(1, tokens)

    def rest(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._run(len(self._waiting), tokens)

    def of_section(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, -self._section_length :]

    def _run(self, count: int, tokens: torch.Tensor) -> torch.Tensor:
        running, self._waiting = self._waiting[:count], self._waiting[count:]
        for block in running:
            tokens, self._context = block(tokens, self._context, self._temb, None, self._rotary)
        return tokens
