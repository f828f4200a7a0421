"""Keys of which a sample attends to its first `lengths_b` only.

For kernels that take packed sequences: a sample's padding becomes a segment of its own, which no query attends to,

    queries   0 . S . S . 2S . 2S ...        keys   0 . n_0 . L . L + n_1 . 2L ...

so that nothing is packed and the host never learns the lengths. The segments of padding cost nothing but the zeros of
their gradients.

Shapes: `B` samples, `S` queries, `L` keys, `H` heads, `d` channels of a head.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from framework.kernels.attended import Attended


@dataclass(frozen=True)
class Segments:
    """Where the segments of packed queries and keys begin and end: int32, `2B + 1` each; and the longest of both."""

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int


def padding_apart(lengths_b: Tensor, num_queries: int, num_keys: int) -> Segments:
    """Two segments for each sample: all its queries with the keys it attends to, no query with its padding."""
    samples = torch.arange(lengths_b.shape[0], device=lengths_b.device)
    query_ends = (samples + 1) * num_queries
    key_ends = torch.stack([samples * num_keys + lengths_b, (samples + 1) * num_keys], dim=1)
    zero = torch.zeros(1, dtype=torch.int64, device=lengths_b.device)
    queries = torch.cat([zero, query_ends.repeat_interleave(2, output_size=2 * lengths_b.shape[0])])
    keys = torch.cat([zero, key_ends.flatten()])
    return Segments(queries.to(torch.int32), keys.to(torch.int32), num_queries, num_keys)


def pack(x_bshd: Tensor) -> Tensor:
    """`B S H d` -> `(B S) H d`."""
    return rearrange(x_bshd, "b s h d -> (b s) h d")


def unpack(x: Tensor, batch: int) -> Tensor:
    """`(B S) H d` -> `B S H d`."""
    return rearrange(x, "(b s) h d -> b s h d", b=batch)


def clear_empty(out_bshd: Tensor, lse_bhs: Tensor, lengths_b: Tensor | None) -> tuple[Tensor, Tensor]:
    """A forward's result, with 0 and -inf where a sample has no key: flash-attn 2, for one, says +inf there."""
    if lengths_b is None:
        return out_bshd, lse_bhs
    empty_b111 = rearrange(lengths_b == 0, "b -> b 1 1 1")
    return out_bshd.masked_fill(empty_b111, 0.0), lse_bhs.masked_fill(empty_b111[..., 0], -torch.inf)


def mute_empty(dout_bshd: Tensor, attended: Attended, lengths_b: Tensor | None) -> tuple[Tensor, Attended]:
    """A backward's input that gives zeros where a sample has no key: exp(s - inf) = 0."""
    if lengths_b is None:
        return dout_bshd, attended
    empty_b111 = rearrange(lengths_b == 0, "b -> b 1 1 1")
    lse_bhs = attended.lse_bhs.masked_fill(empty_b111[..., 0], torch.inf)
    return dout_bshd.masked_fill(empty_b111, 0.0), attended._replace(lse_bhs=lse_bhs)


def length_mask(lengths_b: Tensor | None, num_keys: int, dtype: torch.dtype, *, multiple: int = 1) -> Tensor | None:
    """What is added to the scores: `B 1 1 L`. A sample without a key attends to all; its result is thrown away.

    multiple: of elements, that a sample's row takes in memory.
    """
    if lengths_b is None:
        return None
    room = -(-num_keys // multiple) * multiple
    hidden_bl = torch.arange(room, device=lengths_b.device) >= lengths_b[:, None]
    hidden_bl &= (lengths_b > 0)[:, None]
    mask_bl = torch.zeros(hidden_bl.shape, dtype=dtype, device=lengths_b.device).masked_fill(hidden_bl, -torch.inf)
    return rearrange(mask_bl[:, :num_keys], "b l -> b 1 1 l")
