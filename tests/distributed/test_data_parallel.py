"""Mesh invariance over dp 1 to 4: samples, noise, timesteps, loss and gradients of one process without an engine."""

import json
from pathlib import Path

import pytest
import ranks
import torch
from pool import run_ranks
from tiny import write_latents, write_recipe
from torch import Tensor

from framework.batch import Tokens
from framework.data.buckets import streams_of
from framework.kernels.reference import ReferenceAttention
from framework.keys import key
from framework.models.dit import DiT
from framework.models.initialise import init_tensor
from framework.models.patchify import patchify
from framework.parallel.mesh import lone_mesh
from framework.programs import build
from framework.recipe import Recipe, load_recipe
from framework.shapes import ClipShape

MESHES = [(1, 1), (1, 2), (2, 2), (3, 2), (2, 3), (3, 3), (4, 2), (4, 1)]  # (dp, ZeRO stage)


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two buckets in a step, batches of them that dp 3 doesn't divide, micro-batches of 2."""
    folder = tmp_path_factory.mktemp("parity")
    write_latents(folder / "short")
    write_latents(folder / "long", clip=ClipShape(9, 16, 32), prefix="long")
    words = [
        f"data.streams=[{{path: {folder / 'short'}}}, {{path: {folder / 'long'}}}]",
        "data.buckets=[{frames: 5, height: 16, width: 16}, {frames: 9, height: 16, width: 32, weight: 0.6}]",
        "data.global_batch=20",
        "data.rounds=5",
        "data.micro_batch=2",
        "mesh.dp=auto",
        "train.steps=20",
    ]
    return write_recipe(folder, folder / "short", words)


def serial_gradients(recipe: Recipe) -> tuple[float, dict[str, Tensor]]:
    """One process, plain autograd, the mean of the samples' mean squared errors; no engine, no mesh.

    In float32, as the time embedding's sinusoids of 1000 sigma alone put float64 1.4e-5 away from every float32 run.
    """
    model = DiT(recipe.model, ReferenceAttention())
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(key(recipe.seed, "init", uid=name))
        value = init_tensor(name, tuple(parameter.shape), generator, recipe.model)
        parameter.data.copy_(ranks.projection(tuple(parameter.shape)) if name == "proj_out.weight" else value)
    streams = streams_of(recipe)
    schedule = build.build_schedule(recipe, streams, [lone_mesh()] * 2)
    builder = build.build_builder(recipe, streams, build.Encoders(recipe), dropout=recipe.text.dropout)
    flow, total = build.build_flow(recipe), torch.zeros(())
    for micro in schedule[0].micro_batches:
        batch = builder.build(micro, step=0)
        noised = flow.noise(batch, step=0)
        tokens = patchify(noised, recipe.model.patch_size)
        prediction = predict(model, tokens, batch.condition.text, batch.condition.text_mask)
        assert tokens.target is not None
        total = total + (prediction - tokens.target).square().flatten(1).mean(1).sum() / schedule[0].num_samples
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def predict(model: DiT, tokens: Tokens, text: Tensor, mask: Tensor | None) -> Tensor:
    positions, frames, timesteps = tokens.positions, tokens.frame_index, tokens.timesteps
    return model(tokens.patches, positions, frames, timesteps, text, text_mask_bl=mask)


@pytest.fixture(scope="module")
def serial(recipe_path: Path) -> tuple[float, dict[str, Tensor]]:
    return serial_gradients(load_recipe(recipe_path, []))


@pytest.fixture(scope="module")
def first_steps(recipe_path: Path) -> dict[tuple[int, int], list[ranks.FirstStep]]:
    return {
        (dp, stage): run_ranks(ranks.first_step, dp, recipe_path, [f"zero.stage={stage}", "zero.persistence=0"])
        for dp, stage in MESHES
    }


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_same_samples_noise_and_timesteps(
    first_steps: dict[tuple[int, int], list[ranks.FirstStep]], mesh: tuple[int, int]
) -> None:
    seen = [sample for rank in first_steps[mesh] for sample in rank.samples.items()]
    assert len(seen) == len(dict(seen)), "no sample is taken twice"
    assert {draw.split("#")[1] for draw, _ in seen} == {"5x16x16", "9x16x32"}
    assert dict(seen) == first_steps[1, 1][0].samples


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_step_zero_equals_a_serial_run(
    first_steps: dict[tuple[int, int], list[ranks.FirstStep]],
    serial: tuple[float, dict[str, Tensor]],
    mesh: tuple[int, int],
) -> None:
    loss, gradients = serial
    got = first_steps[mesh][0]
    assert got.loss == pytest.approx(loss, rel=1e-6)
    assert got.gradients.keys() == gradients.keys()
    errors = {
        name: float((torch.from_numpy(got.gradients[name]) - reference).abs().max() / reference.abs().max())
        for name, reference in gradients.items()
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 5e-6, (worst, errors[worst])
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert got.grad_norm == pytest.approx(float(norm), rel=1e-5)


def test_twenty_steps_agree(recipe_path: Path, tmp_path: Path) -> None:
    curves = {}
    for dp in (1, 2, 3, 4):
        run = tmp_path / f"dp{dp}"
        run_ranks(ranks.train, dp, recipe_path, [f"run={run}", "validation.every=0"])
        curves[dp] = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(curves[1]) == 20
    for dp in (2, 3, 4):
        assert curves[dp] == pytest.approx(curves[1], abs=1e-4)
