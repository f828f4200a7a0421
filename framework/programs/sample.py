"""`cuboid sample`: a video from a run's newest checkpoint, in one process."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from framework.batch import Condition, Tokens
from framework.checkpoint.find import open_checkpoint
from framework.checkpoint.read import CheckpointReader
from framework.diffusion.video_file import write_contact_sheet, write_mp4
from framework.kernels.attention import build_attention
from framework.kernels.config import AttentionConfig
from framework.models.adapters import add_adapters
from framework.models.dit import DiT
from framework.parallel.fragments import Fragment, ParameterShard
from framework.parallel.mesh import lone_mesh
from framework.parallel.zero.engine import predict
from framework.programs import build
from framework.programs.generate import Generator
from framework.recipe import Recipe, resolve_auto
from framework.run import recipe_of_run


@dataclass(frozen=True)
class SampleRequest:
    """What to sample. weights: the average or the live ones. None takes the recipe's value."""

    prompt: str
    out: Path
    seed: int
    weights: Literal["ema", "raw"]
    steps: int | None
    guidance: float | None


class LocalModel:
    """The transformer with whole weights on one device."""

    def __init__(self, model: DiT) -> None:
        self._model = model
        self._dtype = next(model.parameters()).dtype

    def __call__(self, tokens: Tokens, condition: Condition) -> Tensor:
        return predict(self._model, tokens, condition, self._dtype)


def sample(path: Path, request: SampleRequest) -> str:
    """Sample and write an mp4 and, beside it, a contact sheet. Returns the line to print."""
    recipe = recipe_of_run(path)
    reader = CheckpointReader(*open_checkpoint(str(path)))
    recipe = replace(
        recipe,
        sampler=replace(
            recipe.sampler,
            steps=request.steps or recipe.sampler.steps,
            guidance=recipe.sampler.guidance if request.guidance is None else request.guidance,
        ),
    )
    device = build.this_device()
    model = load_model(recipe, reader, weights=request.weights, device=device)
    generator = Generator(recipe, build.Encoders(recipe), recipe.data.buckets[0].clip, device, lone_mesh())
    (video,) = generator(LocalModel(model), [request.prompt], seed=request.seed)
    request.out.parent.mkdir(parents=True, exist_ok=True)
    sheet = request.out.with_suffix(".png")
    write_mp4(request.out, video, generator.fps)
    write_contact_sheet(sheet, [(request.prompt or "(no prompt)", video)])
    step = reader.found.manifest.progress.step
    return f"{request.out} and {sheet}: {generator.clip} from step {step}, {request.weights} weights"


@torch.no_grad()
def load_model(
    recipe: Recipe, reader: CheckpointReader, *, weights: Literal["ema", "raw"], device: torch.device
) -> DiT:
    """The transformer in the recipe's precision. Reads one tensor's fp32 values at a time into their place."""
    # Not the run's kernel, which may need a GPU or a package that isn't here, but what this machine has.
    here = resolve_auto(replace(recipe, attention=AttentionConfig()))
    with torch.device("meta"):
        model = DiT(recipe.model, build_attention(here.attention))
    add_adapters(model, recipe.lora)
    model.to_empty(device="cpu")
    fragments = []
    for name, parameter in model.named_parameters():
        averaged = weights == "ema" and f"ema.{name}" in reader.tensors  # what isn't trained has no average
        shard = ParameterShard.whole(name, tuple(parameter.shape))
        fragments.append(Fragment("ema" if averaged else "model", shard, 0, parameter.data.view(-1)))
    reader.load(fragments)
    return model.to(device=device, dtype=getattr(torch, recipe.precision.parameters)).eval()
