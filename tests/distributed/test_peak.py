"""The most bytes of a step, counted storage by storage, against the formula (framework/plan/peak.py)."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peak_ranks
import pytest
from peak_ranks import Counted
from pool import run_ranks
from tiny import write_latents, write_recipe

from framework.plan.memory import state_bytes
from framework.plan.peak import step_peak
from framework.recipe import load_recipe
from framework.shapes import ClipShape

CLIP = ClipShape(5, 256, 256)
# 744,992 parameters and 512 tokens: activations are most of it.
MODEL = ["num_attention_heads=4", "attention_head_dim=24", "ffn_dim=384", "num_layers=4"]
TP, RING, ULYSSES = (f"mesh.{axis}=2" for axis in ("tp", "ring", "ulysses"))
STAGE = {
    "f2": ["zero.engine=fsdp2", "zero.stage=2"],
    "f3": ["zero.engine=fsdp2", "zero.stage=3"],
    **{f"d{stage}": [f"zero.stage={stage}"] for stage in (1, 2, 3)},
}
BF16, OFFLOAD = "precision.parameters=bfloat16", "execution.offload=true"
ALL, KEEP = (f"execution.recompute={policy}" for policy in ("all", "keep_attention"))
TWO, CHUNKS, LOSS = "execution.recompute_blocks=2", "execution.chunk_tokens=64", "execution.loss_chunk_tokens=64"
PER_FRAME = "flow.timesteps.per_frame=true"
CELLS: list[tuple[str, list[str]]] = [
    ("f2", []),
    ("f3", [ALL]),
    ("f3", [KEEP, BF16]),
    ("f3", [TP, BF16, PER_FRAME]),
    ("f3", [TP, ALL]),
    ("f3", [RING, BF16]),
    ("f3", [ULYSSES, KEEP]),
    ("f2", [ALL, TWO]),
    ("f3", [CHUNKS, LOSS, ALL, BF16]),
    ("f3", [ALL, OFFLOAD, BF16]),
    ("f2", [KEEP, OFFLOAD, TWO]),
    ("f3", [TP, CHUNKS, BF16]),
    ("d1", [ALL]),
    ("d2", [KEEP]),
    ("d2", [RING, ALL]),
    ("d3", [BF16]),
    ("d3", [ULYSSES, ALL]),
    ("d3", [KEEP, OFFLOAD, CHUNKS, LOSS, BF16]),
    ("d2", [CHUNKS, LOSS]),
    ("d3", [TP, ALL, TWO, BF16]),
]


def words_of(cell: tuple[str, list[str]]) -> list[str]:
    batch = 2 if RING in cell[1] or ULYSSES in cell[1] else 4  # two micro-batches for dp 1 and dp 2
    return [*STAGE[cell[0]], *cell[1], f"data.global_batch={batch}"]


def ranks_of(cell: tuple[str, list[str]]) -> int:
    return 4 if TP in cell[1] else 2


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peak")
    write_latents(folder / "latents", clip=CLIP)
    words = [
        f"data.buckets=[{{frames: {CLIP.frames}, height: {CLIP.height}, width: {CLIP.width}}}]",
        "data.micro_batch=1",
        "mesh.dp=auto",
        "zero.persistence=0",
        "zero.bucket_size=1000",
    ]
    return write_recipe(folder, folder / "latents", [*words, *(f"model.{word}" for word in MODEL)])


@pytest.fixture(scope="module")
def counted(recipe: Path) -> list[Counted]:
    cells = [(words_of(cell), ranks_of(cell)) for cell in CELLS]

    def count(first: int) -> list[Counted]:
        return run_ranks(peak_ranks.count_cells, 1, recipe, cells[first::2], timeout=500)[0]

    with ThreadPoolExecutor(2) as pool:  # a process each: every cell is a computation of one core
        halves = list(pool.map(count, range(2)))
    return [halves[number % 2][number // 2] for number in range(len(cells))]


def test_there_are_enough_cells() -> None:
    assert len(CELLS) >= 20


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(len(CELLS)), ids=lambda number: "-".join(words_of(CELLS[number])))
def test_a_step_takes_what_the_formula_says(recipe: Path, counted: list[Counted], number: int) -> None:
    loaded, found = load_recipe(recipe, words_of(CELLS[number])), counted[number]
    said = step_peak(loaded, found.shape, found.micros)
    ranks = found.shape.dp * found.shape.cp
    even = state_bytes(found.num_parameters, ranks, zero=loaded.zero, precision=loaded.precision)
    # Of FSDP2's ranks the first has the five modulation tables whole, whose one row isn't shared: 6 x 96 in each block.
    rows = (4 * 6 + 2) * 96 * (1 - 1 / ranks) if loaded.zero.engine == "fsdp2" else 0
    assert said.states.masters == pytest.approx(even.masters + 4 * rows)
    assert found.states == pytest.approx(said.states.total - said.states.gradients, rel=5e-3)
    assert found.peak == pytest.approx(said.total, rel=0.1)
    assert found.step <= found.peak, "the update takes less than the backward"
    assert found.host == said.host, "what waits on the host"
