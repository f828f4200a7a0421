"""Seconds of what a rank computes: FLOPs and bytes of work.py over the rates of the hardware (hardware.py)."""

from dataclasses import dataclass

from framework.kernels.config import AttentionNeeds, resolve_attention
from framework.parallel.config import MeshShape
from framework.parallel.zero.config import SIZES
from framework.plan.hardware import Attention, Hardware, rate
from framework.plan.sent import Weights
from framework.plan.work import (
    ATTENTION_BACKWARD,
    BACKWARD_BYTES,
    FUSED,
    Work,
    gradient_bytes,
    micro_kernels,
    update_bytes,
)
from framework.recipe import Recipe


@dataclass(frozen=True)
class Compute:
    """Seconds of what a rank computes. forward, backward: what an exchange may hide behind. kernels: launched."""

    linears: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    recompute: float = 0.0
    forward: float = 0.0
    kernels: float = 0.0

    @property
    def backward(self) -> float:
        return self.total - self.forward

    @property
    def total(self) -> float:
        return self.linears + self.attention + self.elementwise + self.recompute

    def plus(self, other: "Compute", times: float) -> "Compute":
        """With `times` of another."""
        return Compute(
            self.linears + times * other.linears,
            self.attention + times * other.attention,
            self.elementwise + times * other.elementwise,
            self.recompute + times * other.recompute,
            self.forward + times * other.forward,
            self.kernels + times * other.kernels,
        )


def slowdown(shape: MeshShape, hardware: Hardware) -> float:
    """How much slower a rank is where more ranks than cores take turns on a machine."""
    shared = hardware.device.shared
    return 1.0 if shared is None else max(1.0, min(shape.world_size, hardware.network.domain) / shared)


def attention_rates(recipe: Recipe, hardware: Hardware) -> Attention:
    """The kernel's. `auto` stands for the first that needs no package, as what is installed there isn't known here. It
    is never faster than matrix products in the same dtype, which the table of kernels doesn't know.
    """
    device, dtype = hardware.device, recipe.precision.default.compute
    needs = AttentionNeeds(
        dtype=dtype,
        head_dim=recipe.model.attention_head_dim,
        deterministic=recipe.train.deterministic,
        has_gpu=device.kind == "gpu",
    )
    kernel = resolve_attention(recipe.attention, needs, ()).kernel
    if kernel not in device.attention:
        raise ValueError(
            f"device.attention.{kernel} isn't described for {hardware.name}, only {', '.join(device.attention)}: set "
            "attention.kernel to one of these, or add it to its file"
        )
    found, most = device.attention[kernel], rate(device.matmul, dtype, "device.matmul")
    return Attention(min(found.forward, most), min(found.backward, most))


def compute_of(recipe: Recipe, hardware: Hardware, work: Work, rates: Attention, weights: Weights) -> Compute:
    """Of a micro-batch, forward and backward."""
    device, layers = hardware.device, recipe.model.num_layers
    products = rate(device.matmul, recipe.precision.default.compute, "device.matmul")
    fused = FUSED if recipe.execution.compile else 1.0
    forward_linears = (layers * work.linears + work.outer_linears) / products
    forward_own, forward_cross = (layers * flops / rates.forward for flops in (work.attention, work.cross))
    backward_attention = layers * ATTENTION_BACKWARD * (work.attention + work.cross) / rates.backward
    moved = (layers * work.moved * fused + work.outer_moved) / device.bandwidth
    execution = recipe.execution
    again = layers * (work.linears / products + work.moved * fused / device.bandwidth) + forward_cross
    repeats = {"none": 0.0, "keep_attention": again, "all": again + forward_own}[execution.recompute]
    repeats *= sum(execution.recomputes(index, layers) for index in range(layers)) / layers
    if (
        execution.chunk_tokens
    ):  # in its backward a chunk of the feed-forward is computed again as far as its second linear
        repeats += layers * work.hidden / products
    return Compute(
        linears=forward_linears * (2 + weights.trained / weights.elements),
        attention=forward_own + forward_cross + backward_attention,
        elementwise=moved * (1 + BACKWARD_BYTES),
        recompute=repeats,
        forward=forward_linears + forward_own + forward_cross + moved,
        kernels=micro_kernels(recipe, weights.count),
    )


def optimizer_seconds(recipe: Recipe, shape: MeshShape, hardware: Hardware, weights: Weights, num_micro: int) -> float:
    """Update, EMA, and copies of gradients. With zero.offload the update is the host's, and gradients and weights cross
    to it and back. What else is moved to the host comes here too.
    """
    device, part = hardware.device, weights.trained / recipe.zero.partition_size(shape.dp * shape.cp)
    copies = num_micro * weights.trained * gradient_bytes(recipe) / device.update
    if recipe.zero.offload == "optimizer":
        crossing = (4 + SIZES[recipe.precision.default.compute]) * part / device.host_bandwidth
        return copies + crossing + part * update_bytes(recipe) / device.host_memory
    return copies + part * update_bytes(recipe) / device.update
