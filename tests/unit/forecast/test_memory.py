"""What a device holds beside what a step allocates, counted by hand and on a mesh that is there in name."""

from pathlib import Path

import pytest

from framework.forecast.memory import num_communicators, ranks_of
from framework.parallel.config import GROUP_AXES, MeshShape
from framework.parallel.mesh import group_ranks
from framework.plan.activations import activation_bytes
from framework.plan.traffic import MicroShape
from framework.recipe import load_recipe

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        (MeshShape(1, 1, 1, 1), 0),
        (MeshShape(8, 1, 1, 1), 1),  # dp, zero and world are one
        (MeshShape(1, 1, 8, 1), 1),  # ulysses, cp, replica, zero and world too
        (MeshShape(2, 2, 2, 2), 8),  # every name has ranks of its own
        (MeshShape(2, 1, 4, 2), 6),  # tp, ulysses = cp, replica, dp, zero, world
    ],
)
def test_groups_of_the_same_ranks_share_a_communicator(shape: MeshShape, count: int) -> None:
    assert num_communicators([shape]) == count
    sets = {next(ranks for ranks in group_ranks(shape, axes) if 0 in ranks) for axes in GROUP_AXES.values()}
    assert count == len([ranks for ranks in sets if len(ranks) > 1])


def test_a_buckets_own_degrees_bring_groups_of_their_own() -> None:
    """dp 4 x ulysses 2 cut again as dp 8: of these only dp's group is new, and it is zero's and the world's."""
    assert num_communicators([MeshShape(4, 1, 2, 1), MeshShape(8, 1, 1, 1)]) == num_communicators(
        [MeshShape(4, 1, 2, 1)]
    )
    assert ranks_of(MeshShape(4, 1, 2, 1), GROUP_AXES["zero"]) == ((1, 8),)
    assert ranks_of(MeshShape(4, 1, 2, 3), GROUP_AXES["dp"]) == ((6, 4),)


def test_a_noise_level_for_each_frame_keeps_scales_and_gates_of_every_token() -> None:
    """Wan 1.3B, 480p: of 32,760 tokens of 1536 in each of 30 blocks two scales and two gates in float32, and the
    modulation of 21 frames in the place of one; the head has a scale.
    """
    recipe = load_recipe(RECIPES / "wan2.1-1.3b.yaml", ["mesh.dp=1", "mesh.ulysses=1", "execution.recompute=none"])
    one, each = (activation_bytes(recipe, MeshShape(1, 1, 1, 1), MicroShape(0, 1, 512, timesteps=t)) for t in (1, 21))
    tokens = 4 * 32_760 * 1536
    assert each.blocks - one.blocks == 30 * (4 * tokens + 20 * 8 * 1536 * 4)
    assert each.head - one.head == tokens
    assert each.inputs - one.inputs == 20 * 16 * 1536 * 4
