"""What a kernel's forward leaves for its backward."""

from typing import NamedTuple

from torch import Tensor


class Attended(NamedTuple):
    """q and out `B S H d`, k and v `B L H d`, lse `B H S`. out and lse may be those over more keys than k holds."""

    q_bshd: Tensor
    k_blhd: Tensor
    v_blhd: Tensor
    out_bshd: Tensor
    lse_bhs: Tensor
