"""What saves memory changes no number: chunks, offload and recompute of some blocks against one device, in float64."""

import cells
import pytest
from cells import Cell, CellError

from framework.parallel.config import MeshShape

LIMIT = 1e-12
LATENTS = [(2, 2, 3), (1, 1, 7), (1, 1, 13)]
RECOMPUTE = ("none", "all", "keep_attention")
# Of `execution`, for each of RECOMPUTE. Chunks that divide a rank's tokens, that don't, and that are longer.
CHUNKS = (("chunk_tokens", 2), ("loss_chunk_tokens", 3))
MEMORY = (
    (CHUNKS, (("offload", 1),), (("offload", 1), *CHUNKS)),
    ((("chunk_tokens", 100),), (("recompute_blocks", 1), *CHUNKS), (("recompute_blocks", 1), ("offload", 1))),
)
MESHES = [(1, 1, 1, 1), (1, 1, 1, 2), (1, 2, 1, 2), (1, 1, 2, 2), (2, 2, 1, 1), (1, 1, 1, 3)]


def memory_cells() -> list[Cell]:
    made = []
    for number, mesh in enumerate(MESHES):
        axes = MeshShape(*mesh)
        made += [
            Cell(axes, latent, recompute=recompute, memory=memory, image=number % 2 == 0)  # type: ignore[arg-type]
            for latent, recompute, memory in zip(LATENTS, RECOMPUTE, MEMORY[number % 2], strict=True)
        ]
        made.append(Cell(axes, adapted=True, recompute=RECOMPUTE[number % 3], memory=CHUNKS))  # type: ignore[arg-type]
        made.append(Cell(axes, trainable=("blocks.1.*",), micro=2, memory=CHUNKS))
    return made


CELLS = memory_cells()


@pytest.fixture(scope="module")
def results() -> dict[Cell, CellError]:
    return cells.measured(CELLS)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_memory_is_saved_and_no_number_changes(results: dict[Cell, CellError], cell: Cell) -> None:
    error = results[cell]
    assert error.loss <= LIMIT and error.gradient <= LIMIT, error
