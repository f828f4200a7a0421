"""`cuboid sample`: a video from a run's newest checkpoint or a diffusers pipeline, in one process."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from framework.checkpoint.find import open_checkpoint
from framework.checkpoint.read import CheckpointReader
from framework.checkpoint.stage import trained_recipe
from framework.diffusion.config import SamplerConfig
from framework.diffusion.sampler import Experts
from framework.diffusion.video_file import write_contact_sheet, write_mp4
from framework.models.adapters import add_adapters
from framework.models.dit import DiT
from framework.parallel.fragments import Fragment, ParameterShard
from framework.parallel.mesh import lone_mesh
from framework.programs import build
from framework.programs.generate import Generator
from framework.programs.local import LocalModel, empty_model
from framework.programs.pipeline import Pipeline, build_generator, first_frame, load_experts
from framework.recipe import Recipe, sample_bucket
from framework.run import recipe_of_run
from framework.shapes import ClipShape


@dataclass(frozen=True)
class SampleRequest:
    """What to sample. weights: the average or the live ones. None takes the recipe's value."""

    prompt: str
    out: Path
    seed: int
    weights: Literal["ema", "raw"]
    steps: int | None
    guidance: float | None


def sample(path: Path, request: SampleRequest) -> str:
    """Sample and write an mp4 and, beside it, a contact sheet. Returns the line to print."""
    reader = CheckpointReader(*open_checkpoint(str(path)))
    progress = reader.found.manifest.progress
    recipe = trained_recipe(recipe_of_run(path), progress)
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
    encoders = build.Encoders(recipe, device)
    generator = Generator(recipe, encoders, sample_bucket(recipe).clip, device, lone_mesh())
    (video,) = generator(Experts.lone(LocalModel(model)), [request.prompt], seed=request.seed)
    averaged = any(name.startswith("ema.") for name in reader.tensors)
    weights = f"{request.weights} weights" if averaged or request.weights == "raw" else "raw weights (no average)"
    written = write(request.out, request.prompt, video, generator.fps)
    return f"{written}: {generator.clip} from step {progress.step}, {weights}"


@dataclass(frozen=True)
class PipelineRequest:
    """What to sample from a diffusers pipeline. image: the first frame, for a model that takes one. low_guidance: of
    the second of two experts, None takes `guidance`.
    """

    prompt: str
    out: Path
    seed: int
    clip: ClipShape
    sampler: SamplerConfig
    low_guidance: float | None
    image: Path | None


def sample_pipeline(pipeline: Pipeline, request: PipelineRequest) -> str:
    """Like `sample`, of a diffusers pipeline's directory."""
    generator = build_generator(pipeline, request.clip, request.sampler)
    first = None if request.image is None else first_frame(pipeline, generator, request.image)
    generator.check_first(first)  # before 14B parameters are read
    experts = load_experts(pipeline, generator.recipe, generator.device, low_guidance=request.low_guidance)
    (video,) = generator(experts, [request.prompt], seed=request.seed, first=first)
    written = write(request.out, request.prompt, video, generator.fps)
    return f"{written}: {generator.clip} from {pipeline.path}{pipeline.note}"


def write(out: Path, prompt: str, video_thwc: Tensor, fps: float) -> str:
    """Write an mp4 and a contact sheet; their names."""
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet = out.with_suffix(".png")
    write_mp4(out, video_thwc, fps)
    write_contact_sheet(sheet, [(prompt or "(no prompt)", video_thwc)])
    return f"{out} and {sheet}"


@torch.no_grad()
def load_model(
    recipe: Recipe, reader: CheckpointReader, *, weights: Literal["ema", "raw"], device: torch.device
) -> DiT:
    """The transformer in the recipe's precision. Reads one tensor's fp32 values at a time into their place."""
    model = empty_model(recipe)
    add_adapters(model, recipe.lora)
    model.to_empty(device="cpu")
    fragments = []
    for name, parameter in model.named_parameters():
        averaged = weights == "ema" and f"ema.{name}" in reader.tensors  # what isn't trained has no average
        shard = ParameterShard.whole(name, tuple(parameter.shape))
        fragments.append(Fragment("ema" if averaged else "model", shard, 0, parameter.data.view(-1)))
    reader.load(fragments)
    return model.to(device=device, dtype=getattr(torch, recipe.precision.parameters)).eval()
