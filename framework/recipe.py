"""The recipe: every number of a run, typed.

    defaults < base files (depth first) < the file < key=value

Files are laid over each other as plain trees (layers.py), then merged on the dataclasses below by OmegaConf, which
refuses unknown keys and wrong types. An alternative is a `name` beside one section for each choice; a section that
isn't chosen must not be set. Nothing here imports torch: every mistake that can be seen in a recipe is found before a
process starts.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from framework.checkpoint.config import CheckpointConfig
from framework.config import EmaConfig, GuardConfig, LogConfig, OptimizerConfig, ResumeConfig, TrainConfig
from framework.data.config import BucketConfig, DataConfig
from framework.diffusion.config import FlowConfig, LossConfig, SamplerConfig, SamplesConfig
from framework.environment import gpu_capability, visible_gpus
from framework.evaluate.config import ValidationConfig
from framework.kernels.config import (
    AttentionConfig,
    AttentionNeeds,
    check_attention,
    installed_flash,
    resolve_attention,
)
from framework.launch.config import ClusterConfig
from framework.layers import Tree, apply_overrides, foreign_keys, merge_typed, read_layers
from framework.models.config import (
    ExecutionConfig,
    LoraConfig,
    ModelConfig,
    RopeConfig,
    check_execution,
    check_rope,
)
from framework.parallel.config import MeshConfig
from framework.parallel.zero.config import PrecisionConfig, ZeroConfig, check_engine
from framework.plan.config import HardwareConfig
from framework.plan.parameters import check_patterns
from framework.programs.config import WatchConfig
from framework.shapes import TokenShape, divisors, latent_shape, token_shape
from framework.stages.merge import check_entries, check_stages
from framework.text.config import TextConfig, text_width
from framework.tokenizer.config import TokenizerConfig, tokenizer_channels, tokenizer_strides


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on. run: its directory. seed: where all randomness starts. init_from: weights to begin
    with: a run, a checkpoint, or a directory saved by diffusers (DIR:transformer_2 for a part of a pipeline); of a run
    or checkpoint those that init_weights names. stages: overrides, one after another (stages/merge.py).
    """

    run: str = ""
    seed: int = 0
    init_from: str = ""
    init_weights: Literal["ema", "raw"] = "ema"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    log: LogConfig = field(default_factory=LogConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    stages: list[dict[str, Any]] = field(default_factory=list)


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a recipe file, its bases and key=value overrides. Raises ValueError with the key, the value and the fix."""
    return build_recipe(apply_overrides(read_recipe_layers(path), overrides))


def read_recipe_layers(path: Path) -> Tree:
    """A recipe file over its bases, each checked for names and types by itself, as a plain tree."""
    return read_layers(path, check=check_layer)


def check_layer(tree: Tree, file: Path) -> None:
    """Raises ValueError for a recipe file with keys that a recipe doesn't have, or values of another type."""
    if foreign := foreign_keys(tree, Recipe, ClusterConfig):
        raise ValueError(
            f"{file} describes a cluster ({', '.join(foreign[:3])}), where a recipe is wanted: give it as "
            f"--cluster {file}, and a recipe (recipes/) in its place"
        )
    check_entries(tree, str(file))
    merge_typed(Recipe, tree, str(file))


def build_recipe(tree: Tree) -> Recipe:
    """A checked Recipe from a plain tree of keys."""
    check_entries(tree, "the recipe")
    try:
        plain = OmegaConf.to_object(merge_typed(Recipe, tree, "the recipe"))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    recipe: Recipe = choose_alternatives(plain, "")
    check_recipe(recipe)
    if recipe.stages:
        steps = check_stages(recipe.stages, tree, flatten(recipe), build=lambda own: flatten(build_recipe(own)))
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=steps))
    return recipe


def choose_alternatives(node: Any, key: str) -> Any:
    """Fill in the defaults of every chosen alternative, refuse those that aren't chosen."""
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        inner = f"{key}.{item.name}".lstrip(".")
        if is_alternative(node, item):
            if item.name == node.name and value is None:
                changes[item.name] = section_type(item)()
            elif item.name != node.name and value is not None:
                raise ValueError(
                    f"{inner} is set but {key}.name is {node.name!r}: set {key}.name={item.name} or leave {inner} out"
                )
        elif dataclasses.is_dataclass(value):
            changes[item.name] = choose_alternatives(value, inner)
    return dataclasses.replace(node, **changes)


def is_alternative(node: Any, item: dataclasses.Field[Any]) -> bool:
    """Whether a field is the section of one choice of its node's `name`."""
    names = {f.name: f.type for f in dataclasses.fields(node)}
    return "name" in names and item.name in getattr(names["name"], "__args__", ())


def section_type(item: dataclasses.Field[Any]) -> type:
    """The dataclass of a field annotated `Section | None`."""
    return next(t for t in item.type.__args__ if t is not type(None))  # type: ignore[union-attr]


def check_recipe(recipe: Recipe) -> None:
    """Everything that can be seen from the recipe alone, across its sections. Raises ValueError."""
    for name, values in (("streams", recipe.data.streams), ("buckets", recipe.data.buckets)):
        if not values:
            raise ValueError(f"data.{name} is empty: name at least one of them")
    channels, model = tokenizer_channels(recipe.tokenizer), recipe.model
    with_image = 2 * channels + tokenizer_strides(recipe.tokenizer).time  # image to video, diffusion/first_frame.py
    if model.out_channels != channels or model.in_channels not in (channels, with_image):
        raise ValueError(
            f"the tokenizer {recipe.tokenizer.name!r} has {channels} latent channels but the model takes "
            f"{model.in_channels} and gives {model.out_channels}: set model.in_channels={channels} "
            f"model.out_channels={channels}, or model.in_channels={with_image} for image to video"
        )
    width = text_width(recipe.text)
    if width is not None and model.text_dim != width:
        raise ValueError(
            f"the text encoder {recipe.text.name!r} is {width} wide, the model's text_dim {model.text_dim}: "
            f"set model.text_dim={width}"
        )
    check_engine(recipe.zero, recipe.precision)
    check_rope(recipe.rope, model)
    check_execution(recipe.execution, model, zero=recipe.zero, precision=recipe.precision)
    check_patterns(model, recipe.lora, recipe.train.trainable)
    check_degrees(recipe)


def check_trained(recipe: Recipe) -> None:
    """Raises ValueError for a model that can be planned, stored and sampled, but not trained."""
    model = recipe.model
    if model.in_channels != model.out_channels or model.image_dim is not None:
        raise ValueError(
            f"model.in_channels={model.in_channels} model.image_dim={model.image_dim}: this model makes videos of an "
            "image, and no batch carries one: it can be sampled but not trained; set "
            f"model.in_channels={model.out_channels} model.image_dim=null to train text to video"
        )


def check_degrees(recipe: Recipe) -> None:
    """Whether heads and tokens can be split as the mesh and the buckets say. Raises ValueError."""
    heads, tp = recipe.model.num_attention_heads, recipe.mesh.tp
    if heads % tp:
        fits = ", ".join(map(str, divisors(heads)))
        raise ValueError(f"mesh.tp={tp} must divide the model's {heads} heads, a head isn't split: use one of {fits}")
    for index, bucket in enumerate(recipe.data.buckets):
        tokens = bucket_tokens(recipe, index).num_tokens
        ring, ulysses = bucket_degrees(recipe, index)
        where = f"data.buckets[{index}] ({bucket.name})"
        if ulysses > heads // tp:
            raise ValueError(
                f"{where}: ulysses={ulysses} needs a head for each of its ranks, but heads / tp = {heads} / {tp} = "
                f"{heads // tp}: lower ulysses to at most {heads // tp} and raise ring instead"
            )
        if ring > tokens:
            raise ValueError(
                f"{where}: ring={ring} is longer than the {tokens} tokens of a clip: set its ring to at most {tokens}"
            )


def bucket_degrees(recipe: Recipe, index: int) -> tuple[int, int]:
    """(ring, ulysses) of a bucket: its own, or the mesh's."""
    bucket, mesh = recipe.data.buckets[index], recipe.mesh
    if bucket.ring is None and bucket.ulysses is None:
        return mesh.ring, mesh.ulysses
    return bucket.ring or 1, bucket.ulysses or 1


def sample_bucket(recipe: Recipe) -> BucketConfig:
    """The bucket whose shape is sampled: the first of more than one frame, else the first."""
    return next((bucket for bucket in recipe.data.buckets if bucket.frames > 1), recipe.data.buckets[0])


def bucket_tokens(recipe: Recipe, index: int) -> TokenShape:
    """The token grid of a bucket. Raises ValueError naming the bucket when tokenizer or patch size don't divide it."""
    clip = recipe.data.buckets[index].clip
    try:
        return token_shape(latent_shape(clip, tokenizer_strides(recipe.tokenizer)), recipe.model.patch_size)
    except ValueError as error:
        raise ValueError(f"data.buckets[{index}] ({clip}): {error}") from None


def bucket_timesteps(recipe: Recipe, index: int) -> int:
    """Timesteps of a bucket's clip in training."""
    return bucket_tokens(recipe, index).frames if recipe.flow.timesteps.per_frame else 1


def resolve_auto(recipe: Recipe) -> Recipe:
    """Resolve, for this machine, every `auto` that a later attempt must not choose otherwise. mesh.dp stays auto."""
    optimizer = recipe.optimizer
    if optimizer.decay_steps == "auto":
        optimizer = dataclasses.replace(optimizer, decay_steps=recipe.train.steps)
    needs = attention_needs(recipe, num_gpus=visible_gpus())
    attention = resolve_attention(recipe.attention, needs, installed_flash())
    return dataclasses.replace(recipe, optimizer=optimizer, attention=attention)


def attention_needs(recipe: Recipe, *, num_gpus: int) -> AttentionNeeds:
    """What the recipe asks of its attention kernel. num_gpus: that are visible where it runs."""
    return AttentionNeeds(
        dtype=recipe.precision.default.compute,
        head_dim=recipe.model.attention_head_dim,
        deterministic=recipe.train.deterministic,
        has_gpu=num_gpus > 0,
        capability=gpu_capability() if num_gpus and installed_flash() else None,
    )


def check_kernel(recipe: Recipe, *, num_gpus: int) -> None:
    """Whether the attention kernel can do here what the recipe needs. Raises ValueError."""
    check_attention(recipe.attention, attention_needs(recipe, num_gpus=num_gpus), installed_flash())


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every key, as YAML that `load_recipe` reads back to the same recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(to_tree(recipe)))


def to_tree(recipe: Recipe) -> Tree:
    """The recipe with every key that can stand in a file, as plain values."""
    tree: Any = OmegaConf.to_container(OmegaConf.structured(recipe))
    if recipe.stages:
        del tree["train"]["steps"]
    return dict(tree)


def flatten(recipe: Recipe) -> dict[str, object]:
    """Every leaf by its dotted key; lists are leaves."""
    leaves: dict[str, object] = {}

    def visit(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(inner, f"{key}.{name}".lstrip("."))
        else:
            leaves[key] = value

    visit(dataclasses.asdict(recipe), "")
    return leaves
