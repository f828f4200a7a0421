"""Mistakes of parallel training, to be put into a rank on purpose: each must fail a cell of the parity matrix.

They patch the product in the rank's own process, which ends with the test.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from framework.diffusion import flow
from framework.models import dit, parallelize
from framework.parallel import fragments, tensor_parallel
from framework.parallel.context_parallel import attention, ring


def put_in(mutation: str) -> None:
    """Patch the product."""
    globals()[mutation]()


def norm_not_summed() -> None:
    """No sum over tp for a replicated norm's gradient."""
    parallelize.ON_TOKENS_IN_BLOCK = ("",)  # type: ignore[misc]


def qk_weight_summed() -> None:
    """The QK weight's gradient is summed over tp, although its columns are this rank's alone."""
    right = tensor_parallel.NormAcross.backward

    def wrong(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dx, dw, *rest = right(ctx, *grads)
        return dx, tensor_parallel.summed(dw, ctx.group, "wrong"), *rest

    tensor_parallel.NormAcross.backward = staticmethod(wrong)  # type: ignore[assignment]


def averaged_over_dp_only() -> None:
    """Gradients are divided by dp x cp but reduced over dp only."""
    right = dist.all_reduce

    def wrong(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dim() > 0:  # a gradient; the loss is a scalar
            return None
        return right(tensor, *args, **kwargs)

    dist.all_reduce = wrong


def padding_in_the_loss() -> None:
    """Padded tokens count: their target is zero and their prediction is not."""
    import cells

    def wrong(prediction: Tensor, tokens: Any, first: int) -> Tensor:
        error = (prediction - tokens.target).square().sum(dim=(1, 2))
        return error * tokens.weights / (sum(tokens.layout.valid) * prediction.shape[2])

    cells.sample_losses = wrong


def text_counted_cp_times() -> None:
    """The gradient through the replicated text is summed over cp, and then over zero again."""
    right = dit.DiT.forward

    def wrong(self: dit.DiT, *args: Any, **kwargs: Any) -> Tensor:
        patches, positions, frames, timesteps, text = args
        layout = kwargs["layout"]
        self.condition_embedder.text_embedder.forward = hooked(layout.mesh.cp.size)  # type: ignore[union-attr,method-assign]
        return right(self, patches, positions, frames, timesteps, text, **kwargs)

    def hooked(times: int) -> Any:
        def forward(text: Tensor) -> Tensor:
            embedder = hooked.embedder  # type: ignore[attr-defined]
            out = type(embedder).forward(embedder, text)
            out.register_hook(lambda gradient: gradient * times)
            return out

        return forward

    def remember(self: dit.DiT, *args: Any, **kwargs: Any) -> Tensor:
        hooked.embedder = self.condition_embedder.text_embedder  # type: ignore[attr-defined]
        return wrong(self, *args, **kwargs)

    dit.DiT.forward = remember  # type: ignore[method-assign]


def bucket_weight_off_by_cp() -> None:
    """A bucket with its own degrees is weighed by its cp."""
    import cells

    right = cells.sample_losses

    def wrong(prediction: Tensor, tokens: Any, first: int) -> Tensor:
        return right(prediction, tokens, first) * tokens.layout.mesh.cp.size

    cells.sample_losses = wrong


def ring_gradients_stay() -> None:
    """The gradient of keys and values isn't sent home."""
    right = ring.ring_exchange

    def wrong(tensor: Tensor, group: Any, purpose: str) -> Any:
        receive = right(tensor, group, purpose)
        if purpose != "ring_gradients":
            return receive
        receive()
        return lambda: tensor

    ring.ring_exchange = wrong


def own_lse_in_the_merge() -> None:
    """Blocks are averaged without their log-sum-exp."""

    def wrong(a: Any, b: Any, dtype: torch.dtype) -> Any:
        return (a[0].to(dtype) + b[0].to(dtype)) / 2, torch.logaddexp(a[1], b[1])

    ring.merge = wrong


def frames_counted_from_the_rank() -> None:
    """The pattern takes a rank's first token for the clip's."""
    right = ring.reaches

    def wrong(pattern: Any, num_tokens: int, queries: tuple[int, int]) -> Any:
        first, last = queries
        found = right(pattern, num_tokens, (0, last - first))
        return [replace(reach, queries=(reach.queries[0] + first, reach.queries[1] + first)) for reach in found]

    ring.reaches = wrong


def heads_in_another_order() -> None:
    """Heads come back from the exchange in another order than they left in."""
    right = attention.scatter_tokens_gather_heads

    def wrong(tensors: tuple[Tensor, ...], num_heads: int, group: Any) -> tuple[Tensor, ...]:
        return tuple(x.flip(2) for x in right(tensors, num_heads, group))

    attention.scatter_tokens_gather_heads = wrong


def bias_on_every_rank() -> None:
    """Every tp rank adds the bias of a row linear before the sum."""
    right = tensor_parallel.RowLinear.__init__

    def wrong(self: tensor_parallel.RowLinear, *args: Any) -> None:
        right(self, *args)
        self.share = 1.0

    tensor_parallel.RowLinear.__init__ = wrong  # type: ignore[method-assign]


def noise_keyed_by_rank() -> None:
    """Ranks of one sample draw their own noise."""
    right = flow.keyed_noise
    flow.keyed_noise = lambda key, shape: right(key + dist.get_rank(), shape)


def no_tensor_parallel_flag() -> None:
    """Split parameters aren't marked: the engine counts one tp rank's squares only."""
    fragments.mark_split = parallelize.mark_split = lambda parameter: None


def engine_reduces_over_dp_only() -> None:
    """The engine's gradients are divided by dp x cp, but with a dp of 1 no rank's is added to another's."""
    dist.reduce = lambda tensor, *args, **kwargs: None


def engine_padding_in_the_loss() -> None:
    """Padded tokens count."""

    def wrong(self: flow.Flow, tokens: Any) -> Any:
        def score(prediction: Tensor, first: int) -> Tensor:
            sums = (prediction - tokens.target).square().sum(dim=(1, 2)) * tokens.weights
            return sums / (sum(tokens.layout.valid) * prediction.shape[2])

        return score

    flow.Flow.score = wrong  # type: ignore[method-assign]


def engine_bucket_weight_off_by_cp() -> None:
    """A bucket's loss is weighed by its cp."""
    right = flow.Flow.score

    def wrong(self: flow.Flow, tokens: Any) -> Any:
        return lambda *given: right(self, tokens)(*given) * tokens.layout.mesh.cp.size

    flow.Flow.score = wrong  # type: ignore[method-assign]


def column_adapter_not_summed() -> None:
    """The whole matrix of a column linear's adapter keeps the gradient of this rank's columns."""
    right = parallelize.split_column

    def wrong(module: Any, tp: Any) -> Any:
        part, places = right(module, tp)
        if hasattr(part, "lora_A"):
            object.__setattr__(part.lora_A, "on_tokens", lambda x: x)
        return part, places

    parallelize.split_column = wrong


def row_adapter_counted_twice() -> None:
    """A row linear's adapter is summed over tp, and its input is summed before that too."""
    right = parallelize.AdaptedRowLinear.product

    def wrong(self: Any, input: Tensor) -> Tensor:
        out = right(self, input)
        return out + (out - tensor_parallel.RowLinear.product(self, input))

    parallelize.AdaptedRowLinear.product = wrong  # type: ignore[method-assign]


def frozen_weights_are_trained() -> None:
    """What matches no pattern is trained too."""
    parallelize.is_trained = lambda *_: True
