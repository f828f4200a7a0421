"""`cuboid sample DIR` of a diffusers pipeline's directory: Wan 2.1, Wan 2.2 with two experts, text or image to video.

The directory says what the recipe of such a run would be: the transformer's configuration, the autoencoder in vae/, the
text encoder, the scheduler's shift. Its weights are read as safetensors; on a GPU they are held in bfloat16.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from framework.checkpoint.source import fill, grouped
from framework.data.config import BucketConfig, DataConfig
from framework.diffusion.config import FixedShiftConfig, FlowConfig, SamplerConfig, ShiftConfig
from framework.diffusion.first_frame import FirstFrame, encode_first_frame
from framework.diffusion.sampler import Experts
from framework.image.clip import ClipEncoder
from framework.models.config import ModelConfig
from framework.models.saved import SECOND, TRANSFORMER
from framework.models.weights import DiffusersSource
from framework.parallel.fragments import Fragment, ParameterShard
from framework.parallel.mesh import lone_mesh
from framework.parallel.zero.config import PrecisionConfig
from framework.programs import build
from framework.programs.generate import Generator
from framework.programs.local import LocalModel, empty_model
from framework.recipe import Recipe, bucket_tokens, choose_alternatives
from framework.shapes import ClipShape
from framework.text.config import HfConfig, TextConfig
from framework.tokenizer.config import TokenizerConfig, WanConfig

FPS: Final = 16.0  # of Wan's training videos
EULER: Final = "FlowMatchEulerDiscreteScheduler"
# What would make other levels or steps of that scheduler's.
UNUSUAL: Final = (
    *("use_dynamic_shifting", "shift_terminal", "invert_sigmas", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's directory. index: its model_index.json. scheduler: its scheduler's configuration."""

    path: Path
    index: dict[str, Any]
    scheduler: dict[str, Any]

    @property
    def boundary(self) -> float | None:
        """The noise level below which the second transformer takes over, None where there is one alone."""
        return self.index.get("boundary_ratio")

    @property
    def note(self) -> str:
        """What a person should know of how it is sampled."""
        name = self.scheduler.get("_class_name")
        return "" if name == EULER else f", by Euler's method instead of its {name}"

    def sampler(self, *, steps: int, guidance: float, negative: str) -> SamplerConfig:
        """Its scheduler as ours. Raises ValueError for one that isn't of flow matching."""
        name, shift = self.scheduler.get("_class_name"), self.scheduler.get("shift")
        if name == EULER:
            if unusual := [key for key in UNUSUAL if self.scheduler.get(key)]:
                raise ValueError(f"the scheduler of {self.path} sets {', '.join(unusual)}, which isn't done here")
            return SamplerConfig(steps=steps, guidance=guidance, negative=negative, shift=shift, levels="diffusers")
        if self.scheduler.get("prediction_type") != "flow_prediction":
            raise ValueError(f"the scheduler of {self.path}, {name}, isn't of flow matching")
        return SamplerConfig(steps=steps, guidance=guidance, negative=negative, shift=self.scheduler.get("flow_shift"))


def open_pipeline(path: Path) -> Pipeline:
    """Read what the directory says of itself. Raises ValueError with what is missing."""
    found = []
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        try:
            found.append(json.loads((path / name).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no directory of a diffusers pipeline: {name} can't be read: {error}") from None
    pipeline = Pipeline(path, *found)
    if pipeline.boundary is not None and not (path / SECOND).is_dir():
        raise ValueError(f"{path} has boundary_ratio={pipeline.boundary} but no {SECOND}: copy it anew")
    return pipeline


def pipeline_recipe(pipeline: Pipeline, clip: ClipShape, sampler: SamplerConfig) -> Recipe:
    """The recipe that a run of these models would have, as far as sampling goes. Raises ValueError for a shape of the
    clip that doesn't fit.
    """
    place = str(pipeline.path)
    recipe = Recipe(
        precision=PrecisionConfig("bfloat16" if torch.cuda.is_available() else "float32"),
        model=DiffusersSource(f"{place}:{TRANSFORMER}").config,
        tokenizer=TokenizerConfig("wan", wan=WanConfig(place)),
        text=TextConfig("hf", hf=HfConfig(place)),
        data=DataConfig(buckets=[BucketConfig(clip.frames, clip.height, clip.width, fps=FPS)]),
        flow=FlowConfig(shift=ShiftConfig("fixed", fixed=FixedShiftConfig(sampler.shift or 1.0))),
        sampler=sampler,
    )
    recipe = choose_alternatives(recipe, "")
    bucket_tokens(recipe, 0)
    return recipe


def load_experts(pipeline: Pipeline, recipe: Recipe, device: torch.device, *, low_guidance: float | None) -> Experts:
    """Its transformers. Raises ValueError where weights don't fit."""
    high = load_transformer(pipeline, TRANSFORMER, recipe, device)
    if pipeline.boundary is None:
        if low_guidance is not None:
            raise ValueError(f"{pipeline.path} has one model for all noise levels: leave out the low guidance")
        return Experts.lone(high)
    low = load_transformer(pipeline, SECOND, recipe, device)
    return Experts(high, low, pipeline.boundary, low_guidance)


@torch.no_grad()
def load_transformer(pipeline: Pipeline, folder: str, recipe: Recipe, device: torch.device) -> LocalModel:
    """One transformer in the recipe's precision, read tensor by tensor."""
    source = DiffusersSource(f"{pipeline.path}:{folder}")
    check_alike(source.config, recipe.model, source.name)
    model = empty_model(recipe)
    model.to_empty(device="cpu")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    fragments = [
        Fragment("model", ParameterShard.whole(name, shapes[name]), 0, parameter.data.view(-1))
        for name, parameter in model.named_parameters()
    ]
    report = fill(fragments, source, shapes)
    if report.missing or report.unused:
        raise ValueError(
            f"the weights in {source.name} aren't those of its config.json: missing are "
            f"{grouped(report.missing) or 'none'}, not used {grouped(report.unused) or 'none'}"
        )
    return LocalModel(model.to(device=device, dtype=getattr(torch, recipe.precision.parameters)).eval())


def check_alike(config: ModelConfig, first: ModelConfig, name: str) -> None:
    """Raises ValueError for a second expert of another size than the first."""
    if config != first:
        raise ValueError(f"{name} has another configuration than the first transformer: {config} and {first}")


def read_image(path: Path, clip: ClipShape) -> tuple[Image.Image, Tensor]:
    """A picture, and its pixels `3 H W` in [-1, 1] at the clip's size (Lanczos, as in diffusers' VideoProcessor)."""
    try:
        image = Image.open(path).convert("RGB")
    except OSError as error:
        raise ValueError(f"--image {path} can't be read: {error}") from error
    resized = np.asarray(image.resize((clip.width, clip.height), Image.Resampling.LANCZOS), dtype=np.float32)
    return image, rearrange(torch.from_numpy(resized / 255 * 2 - 1), "h w c -> c h w")


def first_frame(pipeline: Pipeline, generator: Generator, path: Path) -> FirstFrame:
    """The conditioning on a picture. Raises ValueError for a pipeline that does it in another way."""
    if pipeline.index.get("expand_timesteps"):
        raise ValueError(
            f"{pipeline.path} keeps the first frame clean (expand_timesteps), which isn't done here: leave out --image"
        )
    image, pixels = read_image(path, generator.clip)
    tokens = None
    if generator.recipe.model.image_dim is not None:
        tokens = ClipEncoder(pipeline.path, generator.device).encode(image)
    return encode_first_frame(pixels, generator.clip, generator.encoders.tokenizer, tokens)


def build_generator(pipeline: Pipeline, clip: ClipShape, sampler: SamplerConfig) -> Generator:
    """What samples it, without the transformers."""
    recipe, device = pipeline_recipe(pipeline, clip, sampler), build.this_device()
    return Generator(recipe, build.Encoders(recipe, device), clip, device, lone_mesh())
