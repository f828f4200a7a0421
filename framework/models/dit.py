"""The diffusion transformer: the Wan architecture, for one device.

With patches x, timesteps tau and text y (Wan, arXiv 2503.20314, section 4.2; adaptive norm: DiT, arXiv 2212.09748):

    x = W_patch x                                       e = time(tau),  m = W_time silu(e),  y = text(y)
    for each block, with (shift, scale, gate) twice = table + m:
        x = x + gate  * self_attention(norm(x) * (1 + scale) + shift)          rotary positions in q and k
        x = x + cross_attention(affine_norm(x), y)
        x = x + gate' * feed_forward(norm(x) * (1 + scale') + shift')
    prediction = W_out (norm(x) * (1 + scale'') + shift''),  (shift'', scale'') = table'' + e

Positions, frame index and timesteps are inputs, so a rank can hold any part of the tokens. A sample has one timestep
per frame of tokens: equal ones are ordinary diffusion, unequal ones diffusion forcing (arXiv 2407.01392).

Parameter names and shapes are diffusers' `WanTransformer3DModel`'s, and so are the results (tests/unit/models).

Shapes: `B` samples, `S` tokens, `P` numbers of an input patch, `P_out` of a predicted one (`patchify.py`), `D` width,
`t` timesteps of a sample (one per frame of tokens, or 1 for all), `L` text tokens, `N` image tokens, `k` rotary pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from framework.batch import Score, TokenLayout
from framework.kernels.attention import AttentionKernel
from framework.models.config import NO_SCALING, ModelConfig, RopeConfig
from framework.models.embedders import ConditionEmbedder
from framework.models.layers import (
    CrossAttention,
    FeedForward,
    Gated,
    LayerNorm,
    Modulated,
    PatchEmbedding,
    RoundedLayerNorm,
    Seam,
    SelfAttention,
    TokenLinear,
    again,
    as_it_is,
    compute_dtype,
    cut_tokens,
    frame_rows,
    in_chunks,
)
from framework.models.rope import build_rotation


class Context(NamedTuple):
    """What all tokens look at. A tuple, since engines look for tensors in a module's arguments and see into tuples."""

    text_bld: Tensor
    text_lengths_b: Tensor | None
    image_bnd: Tensor | None


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward: `B S D` -> `B S D`."""

    on_tokens: Seam = staticmethod(as_it_is)
    chunk_tokens: int = 0

    def __init__(self, config: ModelConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        heads, head_dim, width, eps = config.num_attention_heads, config.attention_head_dim, config.width, config.eps
        self.norm1 = LayerNorm(width, eps, elementwise_affine=False)
        self.attn1 = SelfAttention(heads, head_dim, eps, kernel)
        self.norm2 = RoundedLayerNorm(width, eps) if config.cross_attn_norm else nn.Identity()
        self.attn2 = CrossAttention(heads, head_dim, eps, config.added_kv_proj_dim is not None, kernel)
        self.norm3 = LayerNorm(width, eps, elementwise_affine=False)
        self.ffn = FeedForward((width, config.ffn_dim, width), approximate="tanh")
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, width))

    def forward(
        self,
        x_bsd: Tensor,
        modulation_bt6d: Tensor,
        rows_bs: Tensor | None,
        rotation_bs1k: Tensor,
        context: Context,
        layout: TokenLayout | None,
    ) -> Tensor:
        """`rows_bs` is each token's row in the modulation (`layers.frame_rows`)."""
        table = self.on_tokens(self.scale_shift_table) + modulation_bt6d
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(2)

        size = self.chunk_tokens
        normed_bsd = in_chunks(size, Modulated(self.norm1, shift, 1 + scale), x_bsd, rows_bs)
        update_bsd = self.attn1(normed_bsd, rotation_bs1k, layout)
        x_bsd = in_chunks(size, Gated(gate), x_bsd, update_bsd, rows_bs)

        x_bsd = x_bsd + self.attn2(self.norm2(x_bsd), *context)

        normed_bsd = in_chunks(size, Modulated(self.norm3, ffn_shift, 1 + ffn_scale), x_bsd, rows_bs)
        return in_chunks(size, Gated(ffn_gate), x_bsd, self.ffn(normed_bsd), rows_bs)


def call(block: nn.Module, *inputs: object) -> Tensor:
    """Run a block."""
    out: Tensor = block(*inputs)
    return out


class DiT(nn.Module):
    """The whole model. Its parameters hold nothing of use until `initialise.py` or `weights.py` fills them."""

    on_tokens: Seam = staticmethod(as_it_is)
    run_block: Callable[..., Tensor] = staticmethod(call)
    score_tokens: int = 0

    def __init__(self, config: ModelConfig, attention: AttentionKernel, *, rope: RopeConfig = NO_SCALING) -> None:
        super().__init__()
        self.config, self.rope = config, rope
        self.patch_embedding = PatchEmbedding(config.in_channels, config.width, config.patch_size)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.num_layers))
        self.norm_out = LayerNorm(config.width, config.eps, elementwise_affine=False)
        self.proj_out = TokenLinear(config.width, config.out_patch_dim)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, config.width))

    def forward(
        self,
        patches_bsp: Tensor,
        positions_bs3: Tensor,
        frame_index_bs: Tensor,
        timesteps_bt: Tensor,
        text_bld: Tensor,
        *,
        layout: TokenLayout | None = None,
        text_mask_bl: Tensor | None = None,
        image_bnd: Tensor | None = None,
        score: Score | None = None,
    ) -> Tensor:
        """The prediction `B S P_out` in output order, in the parameters' dtype; or with `score` what that makes of it,
        summed over the parts of `score_tokens` tokens in which it is given to it (0 = whole).

        patches_bsp: in input order. positions_bs3: int64, counted in patches, of all tokens that attention sees here.
        timesteps_bt: 0 (clean) to 1000 (noise), at least float32. frame_index_bs: int64, each token's column in
        timesteps_bt; without effect where t is 1. layout: which of the sample's tokens these are and which of them
        attend to each other, None = all. text_bld: `B L text_dim`. text_mask_bl: boolean, True = attend, the padding
        at the tail; None attends to all, as Wan does with its zero padding. image_bnd: `B N image_dim`, if and only if
        the model has `image_dim`; first and last frame make one N.
        """
        x_bsd = self.patch_embedding(patches_bsp)
        dtype, precise = x_bsd.dtype, compute_dtype(x_bsd.dtype)
        image_bnd = None if image_bnd is None else image_bnd.to(dtype)
        temb_btd, modulation_bt6d, text_bld, image_bnd = self.condition_embedder(
            timesteps_bt, text_bld.to(dtype), image_bnd, precise
        )
        temb_btd, modulation_bt6d, text_bld = (self.on_tokens(x) for x in (temb_btd, modulation_bt6d, text_bld))
        image_bnd = None if image_bnd is None else self.on_tokens(image_bnd)
        rows_bs = frame_rows(frame_index_bs, timesteps_bt.shape[1])
        rotation_bs1k = build_rotation(
            positions_bs3,
            self.config.attention_head_dim,
            precise,
            self.rope,
            patch_frames=self.config.patch_size[0],
        )
        context = Context(text_bld, None if text_mask_bl is None else text_mask_bl.sum(1), image_bnd)
        for block in self.blocks:
            x_bsd = self.run_block(block, x_bsd, modulation_bt6d, rows_bs, rotation_bs1k, context, layout)

        shift, scale = (self.on_tokens(self.scale_shift_table) + temb_btd.unsqueeze(2)).unbind(2)
        modulated = Modulated(self.norm_out, shift, 1 + scale)
        if score is None or not self.score_tokens:
            prediction_bsp: Tensor = self.proj_out(modulated(x_bsd, rows_bs))
            return prediction_bsp if score is None else score(prediction_bsp, 0)

        def scored(linear: Seam, x_bsd: Tensor) -> Tensor:
            def part(x_bcd: Tensor, rows_bc: Tensor | None, first: int) -> Tensor:
                return score(linear(modulated(x_bcd, rows_bc)), first)

            parts = enumerate(cut_tokens(self.score_tokens, x_bsd, rows_bs))
            return torch.stack([again(part, *own, number * self.score_tokens) for number, own in parts]).sum(0)

        summed: Tensor = self.proj_out(x_bsd, use=scored)
        return summed
