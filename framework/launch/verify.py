"""`cuboid verify` from outside: a run of ranks for each mesh, then a table. Imports no torch.

    --mesh tp=2,ulysses=2,stage=3,engine=fsdp2

names degrees (those left out are 1) and what else may differ: the engine, its stage and partition, recompute, the
kernel, the micro-batch. The first mesh is what the others are compared with.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from framework import log
from framework.environment import visible_gpus
from framework.evaluate.agreement import LIMITS, Errors, Observation, bfloat16_limits, compare
from framework.launch.check import check_machine, check_start
from framework.launch.local import run_local
from framework.launch.stages import pick_stage
from framework.recipe import Recipe, bucket_degrees, load_recipe, to_yaml

Dtype = Literal["float64", "float32", "bfloat16"]

KEYS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "dp": "mesh.dp",
        "ring": "mesh.ring",
        "ulysses": "mesh.ulysses",
        "tp": "mesh.tp",
        "stage": "zero.stage",
        "engine": "zero.engine",
        "partition": "zero.partition",
        "recompute": "execution.recompute",
        "kernel": "attention.kernel",
        "micro_batch": "data.micro_batch",
    }
)
DEGREES: Final = ("dp", "ring", "ulysses", "tp")


@dataclass(frozen=True)
class Variant:
    """One run to compare. words: as on the command line. notes: what isn't done as they say."""

    words: str
    recipe: Recipe
    notes: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        mesh = self.recipe.mesh
        assert mesh.dp != "auto"
        return mesh.dp * mesh.ring * mesh.ulysses * mesh.tp


@dataclass(frozen=True)
class Row:
    """A mesh against the first. errors: None of the first itself."""

    words: str
    errors: Errors | None
    agrees: bool


def parse_mesh(words: str) -> list[str]:
    """`tp=2,stage=3` as recipe overrides, all degrees included. Raises ValueError naming the word."""
    values = {KEYS[name]: "1" for name in DEGREES}
    for word in filter(None, words.split(",")):
        name, equals, value = word.partition("=")
        if not equals or name not in KEYS:
            raise ValueError(f"--mesh {words}: {word!r} is none of {', '.join(f'{key}=' for key in KEYS)}")
        if name in DEGREES and not (value.isdecimal() and int(value)):
            raise ValueError(f"--mesh {words}: {word!r} must be a whole number from 1 on")
        values[KEYS[name]] = value
    return [f"{key}={value}" for key, value in values.items()]


def names_fsdp2(words: str) -> bool:
    """Whether a mesh is FSDP2's by its words."""
    return "engine=fsdp2" in words.split(",")


def build_variant(path: Path, overrides: Sequence[str], words: str, dtype: Dtype) -> Variant:
    """The recipe on a mesh, in a precision. Two things may not be as the words say, and are noted: in float64 FSDP2
    stands in for DeepSpeed, and buckets whose own degrees the mesh hasn't the ranks for take the mesh's.
    """
    extra, notes = [f"precision.parameters={dtype}"], []
    if dtype == "float64" and not names_fsdp2(words):
        extra += ["zero.engine=fsdp2", "zero.stage=3", "zero.offload=none"]
        notes.append(f"{words}: fsdp2 stands in for DeepSpeed, whose masters are float32")
    recipe = load_recipe(path, [*overrides, *parse_mesh(words), *extra])
    assert recipe.mesh.dp != "auto"
    ranks = recipe.mesh.dp * recipe.mesh.ring * recipe.mesh.ulysses
    buckets = list(recipe.data.buckets)
    for index, bucket in enumerate(buckets):
        ring, ulysses = bucket_degrees(recipe, index)
        if ranks % (ring * ulysses):
            buckets[index] = replace(bucket, ring=None, ulysses=None)
            notes.append(f"{words}: {bucket.name} takes the mesh's degrees, as {ranks} ranks aren't {ring} x {ulysses}")
    return Variant(words, replace(recipe, data=replace(recipe.data, buckets=buckets)), tuple(notes))


def stage_file(path: Path, overrides: list[str], name: str | None, folder: Path) -> tuple[Path, list[str], list[str]]:
    """Recipe, overrides, and notes; a stage becomes a file of its own in `folder`, over which a mesh's words can lie. A
    recipe without stages stays as it is. name: of the stage; None takes the first. Raises ValueError.
    """
    recipe, picked, notes = pick_stage(load_recipe(path, overrides), name)
    if not picked:
        return path, overrides, []
    out = folder / "stage.yaml"
    out.write_text(to_yaml(recipe))
    return out, [], notes


def build_variants(path: Path, overrides: Sequence[str], meshes: Sequence[str], dtype: Dtype) -> list[Variant]:
    """The runs to make, the reference first. bfloat16 is judged by float32, so that comes before all."""
    if not meshes:
        raise ValueError("name the meshes to compare: --mesh dp=1 --mesh tp=2,stage=3")
    variants = [build_variant(path, overrides, words, dtype) for words in meshes]
    return [build_variant(path, overrides, meshes[0], "float32"), *variants] if dtype == "bfloat16" else variants


def run_here(variants: Sequence[Variant], folder: Path, *, steps: int) -> list[Observation]:
    """Run each variant on ranks of this machine. Raises ValueError before any where one of them can't be."""
    num_gpus = visible_gpus()
    for variant in variants:
        shape = check_start(variant.recipe, num_ranks=variant.world_size, num_gpus=num_gpus)
        check_machine(shape, num_gpus=num_gpus)
    found = []
    for index, variant in enumerate(variants):
        recipe, out = folder / f"mesh-{index}.yaml", folder / f"mesh-{index}.npz"
        recipe.write_text(to_yaml(variant.recipe))
        arguments = ["observe", str(recipe), "--out", str(out), "--steps", str(steps)]
        if status := run_local(arguments, world_size=variant.world_size):
            raise SystemExit(status)
        found.append(Observation.load(out))
    return found


def judge(meshes: Sequence[str], found: Sequence[Observation], dtype: Dtype) -> list[Row]:
    """The table's rows. `found` as `build_variants` orders it."""
    reference, *others = found
    if dtype == "bfloat16":
        own = compare(others[0], reference)
        limits, errors = bfloat16_limits(own), [compare(other, reference) for other in others]
        return [Row(words, error, error.within(limits)) for words, error in zip(meshes, errors, strict=True)]
    rows = [compare(other, reference) for other in others]
    judged = [Row(words, error, error.within(LIMITS[dtype])) for words, error in zip(meshes[1:], rows, strict=True)]
    return [Row(meshes[0], None, True), *judged]


def report(rows: Sequence[Row], reference: Observation, notes: Sequence[str], *, dtype: Dtype, as_json: bool) -> None:
    """Print the table, or one JSON object."""
    if as_json:
        log.line(json.dumps({"dtype": dtype, "notes": list(notes), "rows": [asdict(row) for row in rows]}))
        return
    for note in notes:
        log.line(note)
    width = max(len(row.words) for row in rows)
    steps = len(reference.losses)
    log.line(f"{dtype}, {len(reference.samples)} samples, {steps} step{'s' if steps > 1 else ''}; relative errors:")
    log.line(f"{'mesh':{width}}  samples     loss  gradient      norm    losses   weights")
    for row in rows:
        log.line(row_text(row, width))


def row_text(row: Row, width: int) -> str:
    """A line of the table, and below it the worst tensors where the mesh doesn't agree."""
    if row.errors is None:
        return f"{row.words:{width}}  the others are compared with this one"
    e = row.errors
    numbers = "  ".join(f"{error:8.1e}" for error in (e.loss, e.gradient, e.norm, e.curve, e.weight))
    verdict = "agrees" if row.agrees else "DIFFERS"
    text = f"{row.words:{width}}  {'same' if e.same_samples else 'OTHER':7}  {numbers}  {verdict}"
    return text + f"; worst gradient {e.gradient_name}, weight {e.weight_name}"
