"""The optimizer and its learning rate.

AdamW (arXiv 1711.05101). Only elementwise optimizers work under ZeRO: a rank holds flat ranges of tensors, never whole
matrices.
"""

import math

import torch
from torch import nn

from framework.config import OptimizerConfig, decays


def adamw(parameters: list[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over two groups, with and without weight decay; either may be empty."""
    decayed = [p for name, p in parameters if decays(name, len(getattr(p, "ds_shape", p.shape)))]
    plain = [p for name, p in parameters if not decays(name, len(getattr(p, "ds_shape", p.shape)))]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimizerConfig, *, step: int) -> float:
    """The rate of step `step` (from 0): linear warm-up, then constant, linear or cosine to lr * final at
    decay_steps.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    assert config.decay_steps != "auto", "resolved when the run starts"
    progress = min(1.0, (step - config.warmup) / max(1, config.decay_steps - config.warmup))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.final + (1 - config.final) * shape)
