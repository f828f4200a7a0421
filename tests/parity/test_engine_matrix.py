"""The engine half of the parity matrix: whole steps on a mesh against the same steps on one rank, in float32.

Every cell is what `cuboid verify` observes: samples and noise by digest, loss, gradient, norm, and where a cell takes
steps, losses and weights after them. The one rank itself is compared with plain autograd in
tests/distributed/test_data_parallel.py, the model on meshes with one device in float64 in test_matrix.py.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import ranks
from pool import run_ranks
from tiny import write_latents, write_recipe

from framework.evaluate.agreement import LIMITS, Observation, compare
from framework.shapes import ClipShape

CLIPS = {"8": ClipShape(5, 32, 32), "7": ClipShape(25, 16, 16), "13": ClipShape(49, 16, 16)}  # tokens -> clip
ENGINES = ("stage=1", "stage=2", "stage=3", "fsdp2")
FSDP2 = ["zero.engine=fsdp2"]
WORDS = {
    **{engine: [f"zero.{engine}"] for engine in ENGINES[:3]},
    "fsdp2": [*FSDP2, "zero.stage=3"],
    "fsdp2-2": [*FSDP2, "zero.stage=2"],
    "hybrid": [*FSDP2, "zero.stage=3", "zero.partition=2"],
    "offload": ["zero.stage=2", "zero.offload=optimizer"],
}
PARTIAL = {
    "all": [],
    "lora": ["lora.rank=3", "lora.alpha=5", "lora.targets=['*.attn?.to_*', '*.ffn.net.*', '*.text_embedder.*']"],
    "patterns": ["train.trainable=['blocks.1.attn1.*', '*.norm2.*', proj_out.bias]"],
}
MEMORY = {
    "plain": [],
    "chunks": ["execution.chunk_tokens=3", "execution.loss_chunk_tokens=1"],
    "host": ["execution.chunk_tokens=1", "execution.recompute_blocks=1", "execution.offload=true"],
}


@dataclass(frozen=True)
class Cell:
    """mesh: dp, ring, ulysses, tp. data: tokens of the buckets, each with its own ring x ulysses after a colon."""

    mesh: tuple[int, int, int, int]
    engine: str
    data: str = "8"
    batch: int = 4
    micro: int = 2
    recompute: str = "none"
    steps: int = 0
    partial: str = "all"
    memory: str = "plain"

    @property
    def world_size(self) -> int:
        dp, ring, ulysses, tp = self.mesh
        return dp * ring * ulysses * tp

    def overrides(self, folder: Path) -> list[str]:
        axes = zip(("dp", "ring", "ulysses", "tp"), self.mesh, strict=True)
        buckets = []
        for bucket in self.data.split("+"):
            tokens, _, degrees = bucket.partition(":")
            clip = CLIPS[tokens]
            own = ""
            if degrees:
                ring, ulysses = degrees.split("x")
                own = f", ring: {ring}, ulysses: {ulysses}"
            buckets.append(f"{{frames: {clip.frames}, height: {clip.height}, width: {clip.width}{own}}}")
        streams = [f"{{path: {folder / bucket.partition(':')[0]}}}" for bucket in self.data.split("+")]
        return [
            *(f"mesh.{name}={degree}" for name, degree in axes),
            *WORDS[self.engine],
            "zero.persistence=0",
            f"data.buckets=[{', '.join(buckets)}]",
            f"data.streams=[{', '.join(streams)}]",
            f"data.global_batch={self.batch}",
            f"data.rounds={2 if len(buckets) > 1 and self.batch % 2 == 0 else 1}",
            f"data.micro_batch={self.micro}",
            f"execution.recompute={self.recompute}",
            *PARTIAL[self.partial],
            *MEMORY[self.memory],
        ]

    def __str__(self) -> str:
        dp, ring, ulysses, tp = self.mesh
        words = [f"dp{dp}r{ring}u{ulysses}tp{tp}", self.engine, self.data, f"batch{self.batch}x{self.micro}"]
        rest = [word for word in (self.partial, self.memory) if word not in ("all", "plain")]
        return "-".join([*words, self.recompute, f"steps{self.steps}", *rest])


MESHES = [
    (2, 1, 1, 1),
    (1, 2, 1, 1),
    (1, 1, 2, 1),
    (1, 1, 1, 2),
    (3, 1, 1, 1),
    (1, 1, 1, 3),
    (1, 3, 1, 1),
    (2, 1, 1, 2),
    (1, 2, 1, 2),
    (1, 1, 2, 2),
    (1, 2, 2, 1),
    (2, 2, 1, 1),
    (2, 1, 2, 1),
    (1, 1, 4, 1),
    (1, 2, 2, 2),
    (2, 2, 1, 2),
    (2, 1, 2, 2),
    (2, 2, 2, 1),
]
VARIATIONS = [
    {},
    {"data": "7", "recompute": "all"},
    {"data": "13", "batch": 3, "micro": 1},
    {"data": "7", "batch": 3, "recompute": "keep_attention"},
]


def cells() -> list[Cell]:
    """Every mesh with every engine, the variations in turn; steps on some; buckets with their own degrees."""
    made = [
        Cell(mesh, engine, **VARIATIONS[(i + j) % len(VARIATIONS)])  # type: ignore[arg-type]
        for i, mesh in enumerate(MESHES)
        for j, engine in enumerate(ENGINES)
    ]
    splits = ["8:1x1+7:2x1", "8:1x2+7:1x1", "8:2x1+7:1x2"]
    made += [
        Cell(mesh, engine, data=splits[(i + j) % 3], micro=1)
        for i, mesh in enumerate([(2, 1, 1, 1), (1, 2, 1, 2), (2, 2, 1, 1)])
        for j, engine in enumerate(ENGINES)
    ]
    made += [Cell(mesh, engine, data="8+7", steps=8) for mesh in [(1, 2, 1, 2), (2, 1, 2, 1)] for engine in ENGINES]
    made += [
        Cell(mesh, engine, data="8+7", steps=2)
        for mesh in [(2, 2, 1, 1), (2, 1, 1, 2), (1, 1, 2, 2)]
        for engine in ("fsdp2-2", "hybrid", "offload")
    ]
    for number, mesh in enumerate([(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)]):
        engines = ENGINES if mesh[0] == 2 else (ENGINES[number], ENGINES[(number + 2) % 4])
        made += [Cell(mesh, engine, steps=2, partial="lora") for engine in engines]
        made.append(Cell(mesh, ENGINES[(number + 1) % 4], steps=2, partial="patterns"))
    for number, mesh in enumerate([(2, 1, 1, 1), (1, 2, 1, 2)]):
        for i, engine in enumerate(ENGINES):
            if (number + i) % 2:
                partial = "lora" if i % 4 == 0 else "all"
                made.append(Cell(mesh, engine, steps=2, partial=partial, memory="chunks"))
            else:
                recompute = ("all", "keep_attention")[number]
                made.append(Cell(mesh, engine, steps=2, recompute=recompute, memory="host"))
    return made


def alone(cell: Cell) -> Cell:
    """The same computation on one rank."""
    tokens = "+".join(bucket.partition(":")[0] for bucket in cell.data.split("+"))
    return Cell((1, 1, 1, 1), "stage=2", tokens, cell.batch, 4, steps=cell.steps, partial=cell.partial)


CELLS = cells()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six heads, a feed-forward that 3 doesn't divide, and latents of every clip beside it."""
    folder = tmp_path_factory.mktemp("engines")
    for tokens, clip in CLIPS.items():
        write_latents(folder / tokens, clip=clip, prefix=f"clip{tokens}")
    model = ["num_attention_heads=6", "attention_head_dim=6", "ffn_dim=50", "num_layers=2"]
    return write_recipe(folder, folder / "8", [f"model.{word}" for word in model])


@pytest.fixture(scope="module")
def observations(recipe: Path) -> dict[Cell, Observation]:
    """All cells, the ranks of each world size started once."""
    references = {alone(cell) for cell in (*CELLS, *MUTANTS.values())}
    found: dict[Cell, Observation] = {}
    everything = [*references, *CELLS]
    for world_size in sorted({cell.world_size for cell in everything}):
        batch = [cell for cell in everything if cell.world_size == world_size]
        words = [(cell.overrides(recipe.parent), cell.steps) for cell in batch]
        first = run_ranks(ranks.observe, world_size, recipe, words, timeout=600)[0]
        found |= dict(zip(batch, first, strict=True))
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_it_is_the_same_computation(observations: dict[Cell, Observation], cell: Cell) -> None:
    errors = compare(observations[cell], observations[alone(cell)])
    assert errors.within(LIMITS["float32"]), errors


def test_there_are_enough_cells() -> None:
    assert len(set(CELLS)) == len(CELLS) >= 80


# A mistake -> the cell that sees it. What no engine takes part in is in test_matrix.py.
MUTANTS = {
    "norm_not_summed": Cell((1, 1, 1, 2), "stage=2"),
    "qk_weight_summed": Cell((1, 1, 1, 2), "stage=3"),
    "engine_reduces_over_dp_only": Cell((1, 2, 1, 1), "stage=2"),
    "noise_keyed_by_rank": Cell((1, 1, 1, 2), "fsdp2"),
    "engine_padding_in_the_loss": Cell((1, 2, 1, 1), "fsdp2", data="7"),
    "text_counted_cp_times": Cell((1, 1, 2, 1), "fsdp2"),
    "no_tensor_parallel_flag": Cell((1, 1, 1, 2), "stage=1"),
    "engine_bucket_weight_off_by_cp": Cell((2, 1, 1, 1), "stage=2", data="8:1x1+7:2x1", micro=1),
    "ring_gradients_stay": Cell((1, 2, 1, 1), "stage=3"),
}


@pytest.mark.parametrize("mutation", MUTANTS)
def test_a_mistake_is_seen(observations: dict[Cell, Observation], recipe: Path, mutation: str) -> None:
    cell = MUTANTS[mutation]
    words = (cell.overrides(recipe.parent), cell.steps)
    wrong = run_ranks(ranks.observe_mutant, cell.world_size, recipe, words, mutation)[0]
    right = run_ranks(ranks.observe, cell.world_size, recipe, [words])[0][0]
    assert compare(right, observations[alone(cell)]).within(LIMITS["float32"])
    assert not compare(wrong, observations[alone(cell)]).within(LIMITS["float32"])
