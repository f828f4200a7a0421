"""Plain AdamW in one process, the oracle of the engines: no engine, no mesh, adapters as W + scale B A written out."""

from fnmatch import fnmatchcase

import engine_ranks
import numpy as np
import pytest
import ranks
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from framework.data.buckets import streams_of
from framework.kernels.reference import ReferenceAttention
from framework.keys import key
from framework.models.dit import DiT
from framework.models.initialise import init_tensor
from framework.models.patchify import patchify
from framework.parallel.mesh import lone_mesh
from framework.parallel.zero.engine import predict
from framework.programs import build
from framework.recipe import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")


class Merged(nn.Module):
    """A weight with its adapter merged, at each use."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.b @ self.a


def trained_parts(model: DiT, recipe: Recipe) -> dict[str, nn.Parameter]:
    """What is trained, by our names; everything else is frozen. Adapters get their initial values, B known ones."""
    lora, patterns = recipe.lora, recipe.train.trainable
    names = {n: p for n, p in model.named_parameters() if any(fnmatchcase(n, pattern) for pattern in patterns)}
    if not (lora.rank or patterns):
        return dict(model.named_parameters())
    model.requires_grad_(False)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)} if lora.rank else {}
    for name, linear in linears.items():
        if any(fnmatchcase(name, pattern) for pattern in lora.targets):
            a_name, b_name = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            generator = torch.Generator().manual_seed(key(recipe.seed, "init", uid=a_name))
            a = init_tensor(a_name, (lora.rank, linear.in_features), generator, recipe.model)
            b = ranks.projection((linear.out_features, lora.rank))
            scale = (lora.alpha or lora.rank) / lora.rank
            merged = Merged(a.to(linear.weight.dtype), b.to(linear.weight.dtype), scale)
            parametrize.register_parametrization(linear, "weight", merged)
            names |= {a_name: merged.a, b_name: merged.b}
    for parameter in names.values():
        parameter.requires_grad_()
    return names


def plain_updates(recipe: Recipe, dtype: torch.dtype, num_steps: int = 2) -> engine_ranks.Updates:
    """Plain AdamW in one process: no engine, no mesh, the samples' mean squared errors written out."""
    model = DiT(recipe.model, ReferenceAttention()).to(dtype)
    plain = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(key(recipe.seed, "init", uid=name))
        value = init_tensor(name, tuple(parameter.shape), generator, recipe.model)
        parameter.data.copy_(ranks.projection(tuple(parameter.shape)) if name == "proj_out.weight" else value)
    names = trained_parts(model, recipe)
    decays = {name: 0.1 if p.ndim >= 2 and "scale_shift_table" not in name else 0.0 for name, p in names.items()}
    groups = [{"params": [p], "weight_decay": decays[name]} for name, p in names.items()]
    config = recipe.optimizer
    adam = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, foreach=False)
    streams = streams_of(recipe)
    schedule = build.build_schedule(recipe, streams, [lone_mesh()])
    builder = build.build_builder(recipe, streams, build.Encoders(recipe), dropout=0.0)
    gradients, norms = [], []
    for step in range(num_steps):
        for micro in schedule[step].micro_batches:
            batch = builder.build(micro, step=step)
            tokens = patchify(build.build_flow(recipe).noise(batch, step=step), recipe.model.patch_size)
            assert tokens.target is not None
            error = predict(model, tokens, batch.condition, dtype) - tokens.target
            (error.square().flatten(1).mean(1).sum() / recipe.data.global_batch).backward()
        gradients.append({name: p.grad.numpy().copy() for name, p in names.items() if p.grad is not None})
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)))
        adam.step()
        adam.zero_grad()
    states = {"model": {name: p.detach().numpy() for name, p in (plain | names).items()}}
    states |= {state: {name: adam.state[p][state].numpy() for name, p in names.items()} for state in MOMENTS}
    return engine_ranks.Updates(gradients, states, norms, {})


def assert_same(got: engine_ranks.Updates, expected: engine_ranks.Updates, tolerance: float) -> None:
    assert got.norms == pytest.approx(expected.norms, rel=tolerance)
    pairs = [*zip(got.gradients, expected.gradients, strict=True)]
    pairs += [(got.states[state], expected.states[state]) for state in expected.states]
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        sizes = {name: max(np.abs(values).max(), np.finfo(np.float32).tiny) for name, values in theirs.items()}
        errors = {name: np.abs(ours[name] - theirs[name]).max() / size for name, size in sizes.items()}
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < tolerance, (worst, errors[worst])
