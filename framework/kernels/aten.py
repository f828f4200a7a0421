"""Attention by torch's own `scaled_dot_product_attention`, which picks a fused kernel for the device.

Shapes: `B` samples, `S` queries, `L` keys, `H` heads, `d` channels of a head.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def aten_attention(q_bshd: Tensor, k_blhd: Tensor, v_blhd: Tensor, mask_bl: Tensor | None, /) -> Tensor:
    """softmax(q k^T / sqrt(d)) v -> `B S H d`; see `attention.AttentionKernel`."""
    mask_b11l = None
    if mask_bl is not None:
        # Torch's backends don't promise the same for a row without any key. Such a sample attends to all of its keys
        # instead, and all of its values are zero: so are its output and its gradients, on every backend.
        empty_b1 = ~mask_bl.any(dim=1, keepdim=True)
        mask_b11l = rearrange(mask_bl | empty_b1, "b l -> b 1 1 l")
        v_blhd = v_blhd.masked_fill(rearrange(empty_b1, "b 1 -> b 1 1 1"), 0.0)
    q_bhsd, k_bhld, v_bhld = (rearrange(x, "b s h d -> b h s d") for x in (q_bshd, k_blhd, v_blhd))
    out_bhsd = F.scaled_dot_product_attention(q_bhsd, k_bhld, v_bhld, attn_mask=mask_b11l)
    return rearrange(out_bhsd, "b h s d -> b s h d")
