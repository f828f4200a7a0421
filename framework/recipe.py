"""The recipe: every number of a run, typed.

    defaults < base files (depth first) < the file < key=value

A recipe is YAML merged on the dataclasses below by OmegaConf. `base:` names files relative to the file itself. Dicts
merge,
lists replace. Unknown keys and wrong types are refused with the key and the file. An alternative is a `name` beside one
section for each choice: choosing another name drops the sections of the old one, setting a section that isn't chosen is
an error. Nothing here imports torch: every mistake that can be seen in a recipe is found before a process starts.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from framework.checkpoint.config import CheckpointConfig
from framework.data.config import DataConfig
from framework.diffusion.config import FlowConfig, LossConfig, SamplerConfig, SamplesConfig
from framework.evaluate.config import ValidationConfig
from framework.kernels.config import AttentionConfig, resolve_attention
from framework.models.config import ModelConfig
from framework.parallel.config import MeshConfig
from framework.parallel.zero.config import PrecisionConfig, ZeroConfig
from framework.shapes import TokenShape, latent_shape, token_shape
from framework.text.config import TextConfig, text_width
from framework.tokenizer.config import TokenizerConfig, tokenizer_channels, tokenizer_strides

Tree = dict[str, Any]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. clip: largest global gradient norm, 0 = off. warmup: steps. schedule: what follows the warm-up, down to
    lr * final at decay_steps (auto: the train.steps that the run starts with, so that raising them later changes
    nothing)."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    final: float = 0.0
    decay_steps: int | Literal["auto"] = "auto"


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average of the fp32 master weights with the decay min(decay, (1 + n) / (10 + n)) at step n."""

    decay: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay={self.decay} must lie in [0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """steps: optimizer steps. deterministic: only kernels with a fixed order of summation. collect_garbage_every:
    steps between
    Python's garbage collections, which are otherwise off. max_bad_steps: updates skipped in a row (norm not finite)
    before the
    run stops."""

    steps: int = 1000
    deterministic: bool = False
    collect_garbage_every: int = 100
    max_bad_steps: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "collect_garbage_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class LogConfig:
    """every: steps between printed lines. tensorboard: also write event files into the run directory."""

    every: int = 10
    tensorboard: bool = False


@dataclass(frozen=True)
class ResumeConfig:
    """allow: keys that may differ from the stored recipe although they change the data order, the loss or the model."""

    allow: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on. run: its directory. seed: where all randomness starts."""

    run: str = ""
    seed: int = 0
    mesh: MeshConfig = field(default_factory=MeshConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    log: LogConfig = field(default_factory=LogConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a recipe file, its bases and key=value overrides. Raises ValueError with the key, the value and the fix."""
    return build_recipe(apply_overrides(read_layers(path), overrides))


def build_recipe(tree: Tree) -> Recipe:
    """A checked Recipe from a plain tree of keys."""
    recipe = choose_alternatives(merge_typed(tree, "the recipe"), "")
    check_recipe(recipe)
    return recipe


def read_layers(path: Path, below: tuple[Path, ...] = ()) -> Tree:
    """A recipe file laid over its bases, as a plain tree."""
    path = path.resolve()
    if path in below:
        chain = " -> ".join(str(p) for p in (*below[below.index(path) :], path))
        raise ValueError(f"the bases of a recipe form a cycle: {chain}")
    if not path.is_file():
        folder = path.parent
        near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")]) if folder.is_dir() else []
        hint = f"; did you mean {folder / near[0]}?" if near else ""
        raise ValueError(f"no such recipe: {path}{hint}")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} isn't valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold keys and values, not a {type(tree).__name__}")
    bases = tree.pop("base", [])
    merge_typed(tree, str(path))
    merged: Tree = {}
    for base in [bases] if isinstance(bases, str) else bases:
        overlay(merged, read_layers(path.parent / base, (*below, path)))
    overlay(merged, tree)
    return merged


def overlay(tree: Tree, layer: Tree) -> None:
    """Lay `layer` over `tree` in place: dicts merge, all else replaces. Another `name` drops the old one's sections."""
    if "name" in layer and tree.get("name", layer["name"]) != layer["name"]:
        for key in [key for key, value in tree.items() if isinstance(value, dict)]:
            del tree[key]
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            overlay(tree[key], value)
        else:
            tree[key] = value


def apply_overrides(tree: Tree, overrides: list[str]) -> Tree:
    """Lay key=value words over a tree, in place. Values are YAML; a number in the key is an index into a list."""
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ValueError(f"{word!r} isn't of the form key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"the value of {word!r} isn't valid YAML") from None
        assign(tree, key.split("."), value, key)
    return tree


def assign(node: Any, path: list[str], value: object, key: str) -> None:
    """Set the leaf at `path` below a tree's node."""
    first, *rest = path
    if isinstance(node, list):
        if not first.isdecimal() or int(first) >= len(node):
            raise ValueError(f"{key}: {first!r} isn't an index into a list of {len(node)}")
        if rest:
            assign(node[int(first)], rest, value, key)
        else:
            node[int(first)] = value
    elif not isinstance(node, dict):
        raise ValueError(f"{key}: there is no {first!r} below the value {node!r}")
    elif rest:
        if node.get(first) is None:
            node[first] = {}
        assign(node[first], rest, value, key)
    else:
        overlay(node, {first: value})


def merge_typed(tree: Tree, source: str) -> Recipe:
    """Merge a plain tree on the dataclasses."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), tree)
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0].replace("$VALUE", "a value").replace(" of type 'a value_TYPE'", "")
        where = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{source}: {where}{message}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    assert isinstance(recipe, Recipe)
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
    for name in ("ring", "ulysses", "tp"):
        degree = getattr(recipe.mesh, name)
        if degree != 1:
            raise ValueError(f"mesh.{name}={degree}: not yet; this release is data parallel only, set mesh.{name}=1")
    for name, values in (("streams", recipe.data.streams), ("buckets", recipe.data.buckets)):
        if not values:
            raise ValueError(f"data.{name} is empty: name at least one of them")
    channels, model = tokenizer_channels(recipe.tokenizer), recipe.model
    if (model.in_channels, model.out_channels or model.in_channels) != (channels, channels):
        raise ValueError(
            f"the tokenizer {recipe.tokenizer.name!r} has {channels} latent channels but the model takes "
            f"{model.in_channels} and gives {model.out_channels}: set model.in_channels={channels} "
            f"model.out_channels={channels}"
        )
    width = text_width(recipe.text)
    if width is not None and model.text_dim != width:
        raise ValueError(
            f"the text encoder {recipe.text.name!r} is {width} wide, the model's text_dim {model.text_dim}: "
            f"set model.text_dim={width}"
        )
    for index in range(len(recipe.data.buckets)):
        bucket_tokens(recipe, index)


def bucket_tokens(recipe: Recipe, index: int) -> TokenShape:
    """The token grid of a bucket. Raises ValueError naming the bucket when tokenizer or patch size don't divide it."""
    clip = recipe.data.buckets[index].clip
    try:
        return token_shape(latent_shape(clip, tokenizer_strides(recipe.tokenizer)), recipe.model.patch_size)
    except ValueError as error:
        raise ValueError(f"data.buckets[{index}] ({clip}): {error}") from None


def resolve_auto(recipe: Recipe) -> Recipe:
    """Resolve every `auto` that a later attempt must not choose otherwise. mesh.dp alone stays auto."""
    optimizer = recipe.optimizer
    if optimizer.decay_steps == "auto":
        optimizer = dataclasses.replace(optimizer, decay_steps=recipe.train.steps)
    return dataclasses.replace(recipe, optimizer=optimizer, attention=resolve_attention(recipe.attention))


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every key, as YAML that `load_recipe` reads back to the same recipe."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


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
