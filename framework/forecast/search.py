"""Every layout of a recipe on a number of GPUs that can work, the fastest first.

A layout is the mesh (dp, ring, ulysses, tp), the engine, stage and partition of ZeRO, the samples of a forward, and
what is done to save memory. What saves memory costs time, so of the ways to do it, in the order of their cost, the
first that fits is taken (LADDER); of the rest every combination is looked at. tp and ulysses stay inside the link
domain, since their exchanges are waited for; a ring and ZeRO may leave it. With several buckets each has its own ring
and ulysses (data/splits.py).
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Final, Literal

from framework.data.splits import resolve_degrees
from framework.forecast.draws import Deal, deal_of, draws_of
from framework.forecast.encoders import resident_bytes
from framework.forecast.memory import Held, Memory, memory_of
from framework.forecast.step import mean_step
from framework.models.config import ExecutionConfig, check_execution
from framework.parallel.config import MeshConfig, MeshShape
from framework.parallel.zero.config import ZeroConfig, check_engine
from framework.plan.hardware import Hardware
from framework.plan.scale_mesh import ChooseMesh, Placement, choose_mesh
from framework.plan.sent import Weights, weights_of
from framework.plan.time import StepTime
from framework.recipe import Recipe
from framework.shapes import divisors
from framework.tokenizer.config import LatentsConfig, TokenizerConfig, tokenizer_channels, tokenizer_strides

MOST_RING: Final = 64
SIZES: Final = (1, 2, 4)  # samples of a forward: where a clip fills the device, more of them gain nothing
ENGINES: Final[tuple[tuple[Literal["deepspeed", "fsdp2"], int], ...]] = (
    ("deepspeed", 1),
    ("deepspeed", 2),
    ("deepspeed", 3),
    ("fsdp2", 2),
    ("fsdp2", 3),
)
# Ways to need less memory, each slower than the one before: recompute, of which share of the blocks, whether what is
# kept lies on the host, and whether the optimizer does.
LADDER: Final[tuple[tuple[Literal["none", "keep_attention", "all"], float, bool, bool], ...]] = (
    ("none", 1.0, False, False),
    ("keep_attention", 0.5, False, False),
    ("keep_attention", 1.0, False, False),
    ("all", 1.0, False, False),
    ("keep_attention", 1.0, True, False),
    ("all", 1.0, True, False),
    ("all", 1.0, False, True),
    ("all", 1.0, True, True),
)


@dataclass(frozen=True)
class Layout:
    """A way to run a recipe that fits. recipe: with its keys set. time: of a step, on average over the buckets. freed:
    the buckets whose own degrees it doesn't keep.
    """

    recipe: Recipe
    shape: MeshShape
    memory: Memory
    time: StepTime
    freed: tuple[int, ...]

    @property
    def words(self) -> list[str]:
        """What to set, as the command line takes it."""
        recipe, zero, execution = self.recipe, self.recipe.zero, self.recipe.execution
        blocks = "null" if execution.recompute_blocks is None else execution.recompute_blocks
        # Each key, those at their default too: the recipe that they are laid over may say otherwise.
        found = {f"mesh.{axis}": getattr(self.shape, axis) for axis in ("dp", "ring", "ulysses", "tp")}
        found |= {f"zero.{name}": getattr(zero, name) for name in ("engine", "stage", "partition", "offload")}
        found |= {"execution.recompute": execution.recompute, "execution.recompute_blocks": blocks}
        found |= {"execution.offload": str(execution.offload).lower(), "data.micro_batch": recipe.data.micro_batch}
        found |= {f"data.buckets.{index}.{axis}": "null" for index in self.freed for axis in ("ring", "ulysses")}
        found |= {"data.degrees": "auto"} if len(recipe.data.buckets) > 1 else {}
        return [f"{key}={value}" for key, value in found.items()]


def search(recipe: Recipe, hardware: Hardware, *, gpus: int) -> list[Layout]:
    """The layouts that fit, by the time of a step. Raises ValueError where there is none, with what is nearest."""
    tokenizer, encoders, recipe = recipe.tokenizer, resident_bytes(recipe), without_files(recipe)
    deal, found = deal_of(recipe), []
    rungs: dict[ZeroConfig, list[tuple[ZeroConfig, ExecutionConfig]]] = {}
    freed = tuple(index for index, b in enumerate(recipe.data.buckets) if b.ring is not None or b.ulysses is not None)
    weights = {tp: weights_of(recipe, tp) for tp in divisors(min(gpus, hardware.network.domain))}
    nearest: Memory | None = None
    for shape in meshes(recipe, hardware, deal, gpus=gpus):
        meshed = with_mesh(recipe, shape, deal)
        sized = [
            replace(meshed, data=replace(meshed.data, micro_batch=size)) for size in micro_batches(meshed, deal, shape)
        ]
        drawn = [(each, Held(shape, draws_of(each, shape, deal), encoders)) for each in sized]
        for (each, held), zero in product(drawn, zeros(recipe, hardware, shape)):
            if zero not in rungs:
                rungs[zero] = rungs_of(recipe, zero)
            fitting = first_that_fits(each, hardware, rungs[zero], held, weights[shape.tp])
            if isinstance(fitting, Layout):
                own = replace(fitting.recipe, tokenizer=tokenizer)
                found.append(replace(fitting, recipe=own, freed=freed))
            elif fitting is not None and (nearest is None or fitting.total < nearest.total):
                nearest = fitting
    if not found and nearest is None:
        raise ValueError(
            f"{gpus} GPUs make no mesh for this recipe: tp and ulysses must divide {recipe.model.num_attention_heads} "
            f"heads and fit a link domain of {hardware.network.domain}, and dp at most the {max(deal.batches.sizes)} "
            "samples of a step: take another number of GPUs, or raise data.global_batch"
        )
    if not found:
        assert nearest is not None
        least = f"; the least that any needs is {nearest.total / 1e9:.1f} GB a rank"
        raise ValueError(
            f"no layout of this recipe on {gpus} GPUs fits {hardware.device.memory / 1e9:.1f} GB ({hardware.name})"
            f"{least}: take more GPUs, smaller buckets, or a smaller data.micro_batch"
        )
    return sorted(found, key=lambda layout: layout.time.total)


def meshes(recipe: Recipe, hardware: Hardware, deal: Deal, *, gpus: int) -> Iterator[MeshShape]:
    """Those whose tp and ulysses divide heads and link domain, and whose replicas all have samples."""
    heads, domain = recipe.model.num_attention_heads, min(gpus, hardware.network.domain)
    for tp, ulysses in product(divisors(domain), repeat=2):
        if heads % tp or tp * ulysses > domain or domain % (tp * ulysses) or ulysses > heads // tp:
            continue
        for ring in divisors(gpus // (tp * ulysses)) if gpus % (tp * ulysses) == 0 else ():
            dp = gpus // (tp * ulysses * ring)
            if ring <= min(MOST_RING, max(deal.tokens)) and dp <= max(deal.batches.sizes):
                yield MeshShape(dp, ring, ulysses, tp)


def with_mesh(recipe: Recipe, shape: MeshShape, deal: Deal) -> Recipe:
    """The recipe on a mesh, with degrees for each bucket where there are several."""
    mesh = MeshConfig(shape.dp, shape.ring, shape.ulysses, shape.tp)
    buckets = [replace(bucket, ring=None, ulysses=None) for bucket in recipe.data.buckets]
    several = len(buckets) > 1
    data = replace(recipe.data, degrees="auto" if several else recipe.data.degrees, buckets=buckets)
    found = replace(recipe, mesh=mesh, data=data)
    return resolve_degrees(found, shape, sizes=deal.batches.sizes) if several else found


def micro_batches(recipe: Recipe, deal: Deal, shape: MeshShape) -> list[int]:
    """Samples of a forward, as far as a replica has so many; the recipe's own number is one to try."""
    rows = -(-min(deal.batches.sizes) // shape.dp)
    return sorted(size for size in {*SIZES, recipe.data.micro_batch} if size <= rows)


def zeros(recipe: Recipe, hardware: Hardware, shape: MeshShape) -> list[ZeroConfig]:
    """Engines and stages that can keep the recipe's precision."""
    ranks, found = shape.dp * shape.cp, []
    inside = hardware.network.domain // shape.tp
    sizes = {inside} if recipe.zero.partition == "all" else {inside, recipe.zero.partition}
    parts: list[int | Literal["all"]] = [
        "all",
        *sorted(size for size in sizes if 1 < size < ranks and ranks % size == 0),
    ]
    for (engine, stage), partition in product(ENGINES, parts):
        with suppress(ValueError):  # what the engine refuses isn't a layout
            zero = replace(recipe.zero, engine=engine, stage=stage, partition=partition, offload="none")
            check_engine(zero, recipe.precision)
            found.append(zero)
    return found


def rungs_of(recipe: Recipe, zero: ZeroConfig) -> list[tuple[ZeroConfig, ExecutionConfig]]:
    """The ladder for an engine and its stage, without what a recipe refuses."""
    model, precision, found = recipe.model, recipe.precision, []
    for recompute, share, activations, optimizer in LADDER:
        blocks = None if share == 1 else round(share * model.num_layers)
        with suppress(ValueError):  # what a recipe refuses isn't a layout
            own = replace(zero, offload="optimizer" if optimizer else "none")
            execution = replace(recipe.execution, recompute=recompute, recompute_blocks=blocks, offload=activations)
            check_engine(own, precision)
            check_execution(execution, model, zero=own, precision=precision)
            found.append((own, execution))
    return found


def first_that_fits(
    recipe: Recipe, hardware: Hardware, rungs: list[tuple[ZeroConfig, ExecutionConfig]], held: Held, weights: Weights
) -> Layout | Memory | None:
    """Up the ladder; else the least that is needed, None where no rung is allowed."""
    least: Memory | None = None
    for zero, execution in rungs:
        tried = replace(recipe, zero=zero, execution=execution)
        memory = memory_of(tried, hardware, held, weights)
        if memory.fits:
            return Layout(tried, held.shape, memory, mean_step(tried, held.shape, hardware, held.draws, weights), ())
        least = memory if least is None or memory.total < least.total else least
    return least


def without_files(recipe: Recipe) -> Recipe:
    """The recipe with the numbers of its tokenizer in the place of the files that say them, which a search would read
    thousands of times.
    """
    strides, channels = tokenizer_strides(recipe.tokenizer), tokenizer_channels(recipe.tokenizer)
    numbers = LatentsConfig(strides.time, strides.height, strides.width, strides.causal, channels)
    return replace(recipe, tokenizer=TokenizerConfig(name="latents", latents=numbers))


def fastest_placement(hardware: Hardware) -> ChooseMesh:
    """For `cuboid scale`: the mesh of the fastest layout that leaves the rest of a recipe as it is, and its recompute.
    Without a number of GPUs the simplest mesh that holds the clip (plan/scale_mesh.py). Meshes with more replicas than
    the new batch has samples are taken only where no other fits: the batch would have to grow with them.
    """

    def choose(old: Recipe, new: Recipe, gpus: int | None) -> Placement:
        if gpus is None:
            return choose_mesh(old, new, gpus)
        before = replace(new, data=replace(new.data, global_batch=old.data.global_batch))
        if next(meshes(before, hardware, deal_of(before), gpus=gpus), None) is None:
            raise ValueError(
                f"no mesh of {gpus:,} GPUs ({hardware.name}) has a sample of data.global_batch={old.data.global_batch} "
                f"for every replica, with a ring of at most {MOST_RING}: take fewer --gpus, or another number of them"
            )
        alike = [layout for layout in search(before, hardware, gpus=gpus) if keeps_the_rest(layout.recipe, new)]
        if not alike:
            raise ValueError(
                f"no mesh of {gpus} GPUs fits these clips with zero.engine={new.zero.engine}, zero.stage="
                f"{new.zero.stage} and data.micro_batch={new.data.micro_batch}: raise --gpus, or change those"
            )
        dealt = [layout for layout in alike if layout.shape.dp <= new.data.global_batch]
        best = (dealt or alike)[0]
        mesh = MeshConfig(best.shape.dp, best.shape.ring, best.shape.ulysses, best.shape.tp)
        return Placement(mesh, best.recipe.execution.recompute)

    return choose


def keeps_the_rest(found: Recipe, wanted: Recipe) -> bool:
    """Whether a layout differs in mesh and recompute alone."""

    def rest(recipe: Recipe) -> dict[str, object]:
        execution = {name: value for name, value in asdict(recipe.execution).items() if name != "recompute"}
        return {**execution, "zero": recipe.zero, "micro_batch": recipe.data.micro_batch}

    return rest(found) == rest(wanted)
