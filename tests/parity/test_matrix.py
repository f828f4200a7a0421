"""The model half of the parity matrix, in float64: a transformer on a mesh against the same one on one device.

Mesh axes meet token counts that divide, that don't, that are prime and that leave ranks with padding only; heads that
Ulysses doesn't divide (6 over 4 and 5, 3 over 2); a feed-forward width that tp doesn't divide (50 over 3 and 4);
recompute; accumulation; empty slots; buckets with their own degrees; image-to-video; adapters and frozen
weights; attention patterns over frames that ranks share, against a dense mask. The engine half is in
test_engine_matrix.py. At the end, mistakes put in on purpose: each must be seen.
"""

import itertools

import cells
import pytest
from cells import Cell, CellError
from masked import causal, window
from pool import run_ranks

from framework.parallel.config import MeshShape

LIMIT = 1e-12
# (dp, ring, ulysses, tp)
MESHES = [
    (1, 1, 1, 1),
    *[(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)],
    *[(1, 3, 1, 1), (1, 1, 3, 1), (1, 1, 1, 3), (3, 1, 1, 1)],
    *[(1, 4, 1, 1), (1, 1, 4, 1), (1, 2, 2, 1), (1, 2, 1, 2), (1, 1, 2, 2), (2, 1, 1, 2), (2, 2, 1, 1), (2, 1, 2, 1)],
    *[(1, 1, 5, 1), (1, 5, 1, 1)],
    *[(1, 1, 1, 6), (1, 1, 3, 2), (1, 3, 1, 2), (1, 1, 2, 3), (1, 3, 2, 1), (2, 1, 1, 3)],
    *[(1, 2, 2, 2), (2, 2, 1, 2), (2, 1, 2, 2), (2, 2, 2, 1), (1, 4, 1, 2), (1, 2, 4, 1), (4, 1, 1, 2)],
]
LATENTS = [(2, 2, 3), (1, 1, 7), (1, 1, 13), (1, 1, 2)]  # 12, 7, 13, and fewer tokens than most replicas have ranks
RECOMPUTE = ("none", "all", "keep_attention")


def model_cells() -> list[Cell]:
    """Every mesh with every token count; the other axes in turn, and buckets with their own degrees."""
    made = []
    for number, (mesh, latent) in enumerate(itertools.product(MESHES, LATENTS)):
        made.append(
            Cell(
                MeshShape(*mesh),
                latent,
                samples=(2, 3, 4)[number % 3],
                recompute=RECOMPUTE[(number // 2) % 3],  # type: ignore[arg-type]
                image=number % 5 == 0,
                micro=1 + number % 2,
            )
        )
    for mesh, split in [
        ((2, 1, 1, 1), (2, 1)),
        ((2, 1, 1, 1), (1, 2)),
        ((1, 2, 1, 2), (1, 1)),
        ((2, 2, 1, 1), (1, 4)),
        ((1, 2, 2, 1), (1, 1)),
        ((2, 2, 1, 2), (4, 1)),
    ]:
        made += [Cell(MeshShape(*mesh), latent, split=split, samples=3) for latent in LATENTS[:2]]
    for number, mesh in enumerate([(1, 1, 1, 2), (1, 1, 1, 3), (1, 1, 2, 1), (1, 2, 1, 1), (2, 1, 1, 1), (1, 2, 1, 2)]):
        recompute = RECOMPUTE[number % 3]
        axes = MeshShape(*mesh)
        made.append(Cell(axes, LATENTS[number % 3], recompute=recompute, image=number % 2 == 0, adapted=True))  # type: ignore[arg-type]
    for number, mesh in enumerate([(1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), (1, 2, 1, 2), (1, 2, 2, 1)]):
        for pattern in (causal(2), window(1, 1)):
            axes = MeshShape(*mesh)
            made.append(Cell(axes, (5, 1, 3), recompute=RECOMPUTE[number % 3], pattern=pattern))  # type: ignore[arg-type]
    for trainable in (("blocks.1.*",), ("*.to_k.weight", "*.norm_q.*")):
        made.append(Cell(MeshShape(1, 2, 1, 2), trainable=trainable))
        made.append(Cell(MeshShape(1, 1, 1, 2), adapted=True, trainable=trainable, recompute="all"))
    return made


CELLS = model_cells()


@pytest.fixture(scope="module")
def results() -> dict[Cell, CellError]:
    return cells.measured(CELLS)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_mesh_computes_what_one_device_does(results: dict[Cell, CellError], cell: Cell) -> None:
    error = results[cell]
    assert error.loss <= LIMIT and error.gradient <= LIMIT, error


def test_every_pair_of_axes_is_met() -> None:
    for a, b in itertools.combinations(("dp", "ring", "ulysses", "tp"), 2):
        both = [cell for cell in CELLS if getattr(cell.mesh, a) > 1 and getattr(cell.mesh, b) > 1]
        assert {cell.num_tokens for cell in both} >= {12, 7, 13, 2}, (a, b)
        assert {cell.recompute for cell in both} == set(RECOMPUTE), (a, b)
    assert len(set(CELLS)) == len(CELLS) >= 130


MUTANTS = {
    "norm_not_summed": Cell(MeshShape(1, 1, 1, 2)),
    "qk_weight_summed": Cell(MeshShape(1, 1, 1, 2)),
    "averaged_over_dp_only": Cell(MeshShape(1, 2, 1, 1)),
    "padding_in_the_loss": Cell(MeshShape(1, 2, 1, 1), (1, 1, 7)),
    "text_counted_cp_times": Cell(MeshShape(1, 1, 2, 1)),
    "bucket_weight_off_by_cp": Cell(MeshShape(2, 1, 1, 1), split=(2, 1)),
    "ring_gradients_stay": Cell(MeshShape(1, 2, 1, 1)),
    "own_lse_in_the_merge": Cell(MeshShape(1, 2, 1, 1)),
    "heads_in_another_order": Cell(MeshShape(1, 1, 2, 1)),
    "bias_on_every_rank": Cell(MeshShape(1, 1, 1, 2)),
    "column_adapter_not_summed": Cell(MeshShape(1, 1, 1, 2), adapted=True),
    "row_adapter_counted_twice": Cell(MeshShape(1, 1, 1, 2), adapted=True),
    "frames_counted_from_the_rank": Cell(MeshShape(1, 2, 1, 1), (5, 1, 3), pattern=window(1, 1)),
    "frozen_weights_are_trained": Cell(MeshShape(1, 1, 1, 2), trainable=("*.bias",)),
}


@pytest.mark.parametrize("mutation", MUTANTS)
def test_a_mistake_is_seen(mutation: str) -> None:
    cell = MUTANTS[mutation]
    right = run_ranks(cells.run_cells, cell.mesh.world_size, [cell])[0][0]
    wrong = run_ranks(cells.run_mutant, cell.mesh.world_size, cell, mutation)[0]
    assert right.loss <= LIMIT and right.gradient <= LIMIT, right
    assert max(wrong.loss, wrong.gradient) > 1e-4, wrong
