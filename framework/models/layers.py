"""The parts of a block: norms, linears, feed-forward, self- and cross-attention.

Arithmetic follows one rule: what a norm, a modulation or the time embedding computes is in the *compute dtype*,
`promote_types(dtype, float32)`: float32 in a bf16 or float32 model, float64 in a float64 model. All else runs in the
model's own dtype. Norms return the compute dtype, and whoever uses the result rounds it once.

Every parameter is used in the forward of the module that holds it, as ZeRO-3 gathers parameters module by module.
A module with `upcasts` takes inputs of any dtype, whatever its weight's. Parameter names are diffusers'
(`models/transformers/transformer_wan.py`).

Three seams let `parallelize.py` place tokens and weights on several ranks. On one device they do nothing:

    on_tokens    what a weight passes through before it meets tokens: other ranks may use it on other tokens
    enter        tokens on their way into linears: other ranks may hold more of them
    attention    self-attention: tokens may lie anywhere

Modules with `chunk_tokens` above 0 run over so many tokens at a time (`in_chunks`).

Shapes: `B` samples, `S` tokens, `L` text tokens, `N` image tokens, `D` width, `H` heads, `d` channels of a head,
`t` timesteps of a sample.
"""

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from framework.batch import TokenLayout
from framework.kernels.attention import AttentionKernel, attend, attend_within
from framework.kernels.pattern import EVERY_TOKEN
from framework.models.rope import rotate

Seam = Callable[[Tensor], Tensor]
Use = Callable[[Seam, Tensor], Tensor]
# (q_bshd, k_bshd, v_bshd, layout) -> `B S H d`
TokenAttention = Callable[[Tensor, Tensor, Tensor, TokenLayout | None], Tensor]


def as_it_is(x: Tensor) -> Tensor:
    """The seam of one device."""
    return x


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and modulation in a model of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def again(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """A function whose backward computes again what it would keep, all but its inputs."""
    out: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out


def in_chunks(
    size: int, function: Callable[..., Tensor], x_bs: Tensor, *others: Tensor | None, enter: Seam = as_it_is
) -> Tensor:
    """function(x, *others) -> `B S ...` of tensors `B S ...` or None, for `size` tokens at a time and again in the
    backward; at once where size is 0.

    enter: x's way into the function. Exchanges between ranks belong there, as that isn't gone again.
    """
    if not size:
        return function(enter(x_bs), *others)
    done = [again(function, enter(part), *rest) for part, *rest in cut_tokens(size, x_bs, *others)]
    return done[0] if len(done) == 1 else torch.cat(done, dim=1)


def cut_tokens(size: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Tensors `B S ...` by parts of `size` tokens; None goes with each part.

    Not by slices: the gradient of each of these would be as long as the whole.
    """
    return zip(*(repeat(None) if x is None else x.split(size, dim=1) for x in tensors), strict=False)


class LayerNorm(nn.LayerNorm):
    """Mean 0, variance 1 over `D`; in and out `... D`, returned in the compute dtype."""

    upcasts = True

    on_tokens: Seam = staticmethod(as_it_is)

    def forward(self, x: Tensor) -> Tensor:
        return self.prepared(compute_dtype(x.dtype))(x)

    def prepared(self, dtype: torch.dtype) -> Seam:
        """The norm as a function, computed and returned in `dtype`."""
        affine = (None, None) if self.weight is None else (self.weight, self.bias)
        weight, bias = (None if w is None else self.on_tokens(w).to(dtype) for w in affine)
        return lambda x: F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


class RoundedLayerNorm(LayerNorm):
    """The same, returned in x's dtype."""

    chunk_tokens: int = 0

    def forward(self, x: Tensor) -> Tensor:
        # The weights go to the tokens once, not with every chunk.
        normed = self.prepared(compute_dtype(x.dtype))
        return in_chunks(self.chunk_tokens, lambda part: normed(part).to(part.dtype), x)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over all heads at once (`D`, before the split into heads), in x's dtype."""

    upcasts = True

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x.dtype)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)


class PreciseLinear(nn.Linear):
    """A linear in the compute dtype, whatever the dtype of its weight: for the time embedding."""

    upcasts = True

    def forward(self, input: Tensor) -> Tensor:
        dtype = compute_dtype(self.weight.dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class PatchEmbedding(nn.Module):
    """A conv3d whose stride is its kernel, applied to patches as a linear: `B S P` -> `B S D`, P = (c pt ph pw)."""

    on_tokens: Seam = staticmethod(as_it_is)

    def __init__(self, in_channels: int, width: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, in_channels, *patch_size))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, patches_bsp: Tensor) -> Tensor:
        weight, bias = self.on_tokens(self.weight), self.on_tokens(self.bias)
        return F.linear(patches_bsp.to(weight.dtype), weight.flatten(1), bias)


class TokenLinear(nn.Linear):
    """A linear on tokens, wherever they are: the head.

    use: given the linear as a function, and the input, makes the result: for one that has more to do than the linear
    with each part of the tokens. The weights go to the tokens once all the same.
    """

    on_tokens: Seam = staticmethod(as_it_is)

    def forward(self, input: Tensor, use: Use | None = None) -> Tensor:
        weight, bias = self.on_tokens(self.weight), self.on_tokens(self.bias)
        if use is None:
            return F.linear(input, weight, bias)
        return use(lambda x: F.linear(x, weight, bias), input)


class GeluLinear(nn.Module):
    """gelu(x W + b), exact or by its tanh approximation."""

    def __init__(self, in_dim: int, out_dim: int, approximate: Literal["none", "tanh"]) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, out_dim)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """Two linears with a gelu between: `... in` -> `... out`.

    Where it runs by chunks, a chunk's backward computes again up to the second linear's input. The exchange after that
    linear is behind all that is kept, so it isn't made again.
    """

    enter: Seam = staticmethod(as_it_is)
    chunk_tokens: int = 0

    def __init__(self, dims: tuple[int, int, int], approximate: Literal["none", "tanh"]) -> None:
        super().__init__()
        in_dim, hidden_dim, out_dim = dims
        # Index 1 is a dropout in diffusers' numbering, and Wan has none.
        self.net = nn.Sequential(
            GeluLinear(in_dim, hidden_dim, approximate), nn.Identity(), nn.Linear(hidden_dim, out_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return in_chunks(self.chunk_tokens, self.net, x, enter=self.enter)


class SelfAttention(nn.Module):
    """Tokens attend to tokens, all to all unless their layout has another pattern: `B S D` -> `B S D`."""

    enter: Seam = staticmethod(as_it_is)

    def __init__(self, num_heads: int, head_dim: int, eps: float, kernel: AttentionKernel) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.head_dim = head_dim
        self.kernel = kernel
        self.attention: TokenAttention = LocalAttention(kernel)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q: nn.Module = RMSNorm(width, eps)
        self.norm_k: nn.Module = RMSNorm(width, eps)

    def forward(self, x_bsd: Tensor, rotation_bs1k: Tensor, layout: TokenLayout | None) -> Tensor:
        x_bsd = self.enter(x_bsd)
        q_bshd = rotate(split_heads(self.norm_q(self.to_q(x_bsd)), self.head_dim), rotation_bs1k)
        k_bshd = rotate(split_heads(self.norm_k(self.to_k(x_bsd)), self.head_dim), rotation_bs1k)
        v_bshd = split_heads(self.to_v(x_bsd), self.head_dim)
        out: Tensor = self.to_out[0](merge_heads(self.attention(q_bshd, k_bshd, v_bshd, layout)))
        return out


class LocalAttention:
    """Attention among tokens that are all here, none of them padding; without a layout, of all to all."""

    def __init__(self, kernel: AttentionKernel) -> None:
        self.kernel = kernel

    def __call__(self, q_bshd: Tensor, k_bshd: Tensor, v_bshd: Tensor, layout: TokenLayout | None) -> Tensor:
        pattern = EVERY_TOKEN if layout is None else layout.pattern
        if pattern.config.name == "full":
            return attend(self.kernel, q_bshd, k_bshd, v_bshd, None)
        return attend_within(self.kernel, q_bshd, k_bshd, v_bshd, pattern)


class CrossAttention(nn.Module):
    """Tokens attend to text, and apart from that to image tokens where the model has them; the two are added.

    `B S D` over text `B L D` (its first `lengths_b` tokens, None = all) and image `B N D` or None -> `B S D`.
    """

    enter: Seam = staticmethod(as_it_is)

    def __init__(self, num_heads: int, head_dim: int, eps: float, image_tokens: bool, kernel: AttentionKernel) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.head_dim = head_dim
        self.kernel = kernel
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q: nn.Module = RMSNorm(width, eps)
        self.norm_k: nn.Module = RMSNorm(width, eps)
        if image_tokens:
            self.add_k_proj = nn.Linear(width, width)
            self.add_v_proj = nn.Linear(width, width)
            self.norm_added_k: nn.Module = RMSNorm(width, eps)

    def forward(self, x_bsd: Tensor, text_bld: Tensor, lengths_b: Tensor | None, image_bnd: Tensor | None) -> Tensor:
        q_bshd = split_heads(self.norm_q(self.to_q(self.enter(x_bsd))), self.head_dim)
        k_blhd = split_heads(self.norm_k(self.to_k(text_bld)), self.head_dim)
        v_blhd = split_heads(self.to_v(text_bld), self.head_dim)
        seen_bshd = attend(self.kernel, q_bshd, k_blhd, v_blhd, lengths_b)
        if image_bnd is not None:
            k_bnhd = split_heads(self.norm_added_k(self.add_k_proj(image_bnd)), self.head_dim)
            v_bnhd = split_heads(self.add_v_proj(image_bnd), self.head_dim)
            seen_bshd = seen_bshd + attend(self.kernel, q_bshd, k_bnhd, v_bnhd, None)
        out: Tensor = self.to_out[0](merge_heads(seen_bshd))
        return out


def split_heads(x_bsd: Tensor, head_dim: int) -> Tensor:
    """`B S (H d)` -> `B S H d`; the number of heads is what the tensor holds."""
    return rearrange(x_bsd, "b s (h d) -> b s h d", d=head_dim)


def merge_heads(x_bshd: Tensor) -> Tensor:
    """`B S H d` -> `B S (H d)`."""
    return rearrange(x_bshd, "b s h d -> b s (h d)")


class Modulated:
    """norm(x) modulated by its frame's shift and scale (`B t D`, the latter as 1 + scale): x `B S D`, each token's row
    `B S` or None -> `B S D` in x's dtype.
    """

    def __init__(self, norm: nn.Module, shift_btd: Tensor, scale_btd: Tensor) -> None:
        self.norm, self.shift_btd, self.scale_btd = norm, shift_btd, scale_btd

    def __call__(self, x_bsd: Tensor, rows_bs: Tensor | None) -> Tensor:
        # Spread from frames to tokens at each use: together, shifts, scales and gates would be six times x.
        shift_bsd, scale_bsd = (frames_to_tokens(x, rows_bs) for x in (self.shift_btd, self.scale_btd))
        return modulate(self.norm(x_bsd), shift_bsd, scale_bsd).to(x_bsd.dtype)


class Gated:
    """x + update * its frame's gate (`B t D`), all tokens `B S D`."""

    def __init__(self, gate_btd: Tensor) -> None:
        self.gate_btd = gate_btd

    def __call__(self, x_bsd: Tensor, update_bsd: Tensor, rows_bs: Tensor | None) -> Tensor:
        return add_gated(x_bsd, update_bsd, frames_to_tokens(self.gate_btd, rows_bs))


def modulate(normed_bsd: Tensor, shift_bsd: Tensor, scale_bsd: Tensor) -> Tensor:
    """normed * (1 + scale) + shift (adaptive layer norm, DiT, arXiv 2212.09748), where `scale_bsd` is 1 + scale."""
    return torch.addcmul(shift_bsd, normed_bsd, scale_bsd)


def add_gated(x_bsd: Tensor, update_bsd: Tensor, gate_bsd: Tensor) -> Tensor:
    """x + update * gate, in the gate's dtype, rounded once to x's."""
    dtype = gate_bsd.dtype
    return torch.addcmul(x_bsd.to(dtype), update_bsd.to(dtype), gate_bsd).to(x_bsd.dtype)


def frame_rows(frame_index_bs: Tensor, num_timesteps: int) -> Tensor | None:
    """Each token's row in the flattened table `(B t) ...`; None if a sample has one timestep, which broadcasts.

    The lookup also checks that no index reaches into the next sample's rows.
    """
    if num_timesteps == 1:
        return None
    batch = frame_index_bs.shape[0]
    rows_bt = torch.arange(batch * num_timesteps, device=frame_index_bs.device).view(batch, num_timesteps)
    return rows_bt.gather(1, frame_index_bs)


def frames_to_tokens(values_btd: Tensor, rows_bs: Tensor | None) -> Tensor:
    """Every token gets the value of its frame: `B t D` -> `B S D`, or `B 1 D` where it broadcasts.

    An embedding lookup: forward and backward take 0.18 ms for 1500 tokens x 256 on one CPU core, `gather` 1.4 ms,
    indexing 0.43 ms.
    """
    if rows_bs is None:
        return values_btd
    return F.embedding(rows_bs, values_btd.flatten(0, 1))
