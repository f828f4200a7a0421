"""The rank grid and the groups, written out by hand."""

import pytest

from framework.parallel.config import MeshConfig, MeshShape, nearest_shapes, resolve_mesh
from framework.parallel.mesh import GROUP_AXES, group_ranks

SIXTEEN = MeshShape(dp=2, ring=2, ulysses=2, tp=2)
BY_HAND = {
    "tp": [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15)],
    "ulysses": [(0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 14), (13, 15)],
    "ring": [(0, 4), (1, 5), (2, 6), (3, 7), (8, 12), (9, 13), (10, 14), (11, 15)],
    "cp": [(0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15)],
    "replica": [(0, 1, 2, 3, 4, 5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15)],
    "dp": [(0, 8), (1, 9), (2, 10), (3, 11), (4, 12), (5, 13), (6, 14), (7, 15)],
    "zero": [(0, 2, 4, 6, 8, 10, 12, 14), (1, 3, 5, 7, 9, 11, 13, 15)],
    "world": [tuple(range(16))],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_groups_of_sixteen_ranks(name: str) -> None:
    assert sorted(group_ranks(SIXTEEN, GROUP_AXES[name])) == BY_HAND[name]


def test_every_group_has_a_row_here() -> None:
    assert set(GROUP_AXES) == set(BY_HAND)


@pytest.mark.parametrize("shape", [MeshShape(3, 2, 4, 2), MeshShape(1, 3, 1, 5), MeshShape(4, 1, 1, 1)])
@pytest.mark.parametrize("name", BY_HAND)
def test_members_differ_in_the_groups_axes_alone(name: str, shape: MeshShape) -> None:
    """By the formula of the docstring, with division: every rank in one group, in rank order."""

    def place(rank: int) -> dict[str, int]:
        rest, tp = divmod(rank, shape.tp)
        rest, ulysses = divmod(rest, shape.ulysses)
        dp, ring = divmod(rest, shape.ring)
        return {"dp": dp, "ring": ring, "ulysses": ulysses, "tp": tp}

    groups = group_ranks(shape, GROUP_AXES[name])
    assert sorted(rank for ranks in groups for rank in ranks) == list(range(shape.world_size))
    for ranks in groups:
        fixed = {tuple(v for axis, v in place(r).items() if axis not in GROUP_AXES[name]) for r in ranks}
        assert len(fixed) == 1 and list(ranks) == sorted(ranks)
    assert len({len(ranks) for ranks in groups}) == 1


def test_degrees_by_hand() -> None:
    assert (SIXTEEN.world_size, SIXTEEN.cp, SIXTEEN.replica) == (16, 4, 8)
    assert str(SIXTEEN) == "dp=2 ring=2 ulysses=2 tp=2"


@pytest.mark.parametrize(
    ("config", "num_ranks", "num_gpus", "dp"),
    [
        (MeshConfig(), 6, 0, 6),
        (MeshConfig(ring=2, tp=2), 16, 0, 4),
        (MeshConfig(dp=2), 2, 8, 2),
        (MeshConfig(), None, 0, 1),
        (MeshConfig(), None, 8, 8),
        (MeshConfig(ulysses=2, tp=2), None, 8, 2),
        (MeshConfig(ulysses=4, tp=4), None, 8, 1),  # one replica at least: its ranks are then started here
        (MeshConfig(dp=3), None, 8, 3),
    ],
)
def test_dp_takes_what_is_there(config: MeshConfig, num_ranks: int | None, num_gpus: int, dp: int) -> None:
    assert resolve_mesh(config, num_ranks=num_ranks, num_gpus=num_gpus).dp == dp


@pytest.mark.parametrize(
    ("config", "num_ranks", "message"),
    [
        (MeshConfig(dp=2), 3, r"2 \* 1 \* 1 \* 1 against 3 ranks; mesh.dp=3 uses 3 of the ranks"),
        (MeshConfig(ring=2, ulysses=2), 6, r"auto \* 2 \* 2 \* 1 against 6 ranks; mesh.dp=1 uses 4 of the ranks"),
        (MeshConfig(tp=8), 4, r"against 4 ranks; one replica alone needs 8 ranks"),
    ],
)
def test_a_mesh_that_cannot_be_says_what_can(config: MeshConfig, num_ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"dp \* ring \* ulysses \* tp == world_size doesn't hold: .*{message}"):
        resolve_mesh(config, num_ranks=num_ranks)


@pytest.mark.parametrize(
    ("config", "num_ranks", "first"),
    [
        (MeshConfig(tp=3), 8, MeshShape(2, 1, 1, 4)),  # 4 is 1.33 times away, 2 is 1.5 times
        (MeshConfig(dp=2, ring=2, ulysses=2, tp=2), 32, MeshShape(4, 2, 2, 2)),
        (MeshConfig(ulysses=8), 12, MeshShape(2, 1, 6, 1)),
        (MeshConfig(ring=5), 7, MeshShape(1, 7, 1, 1)),
    ],
)
def test_the_nearest_meshes_fill_the_ranks(config: MeshConfig, num_ranks: int, first: MeshShape) -> None:
    with pytest.raises(ValueError, match=f"the nearest meshes of {num_ranks} ranks: ") as error:
        resolve_mesh(config, num_ranks=num_ranks)
    assert str(first) in str(error.value)
    assert first in (nearest := nearest_shapes(config, num_ranks))
    assert {shape.world_size for shape in nearest} == {num_ranks}


def test_the_nearest_meshes_split_the_heads() -> None:
    """Ulysses 8 x tp 2, the nearest of 48 ranks, would need 16 heads; ulysses 16 too, and tp 8 cuts through a head."""
    wanted = MeshConfig(dp=2, ulysses=8)
    assert nearest_shapes(wanted, 48)[0] == MeshShape(3, 1, 8, 2)
    with pytest.raises(ValueError, match="the nearest meshes of 48 ranks: dp=4 ring=1 ulysses=12 tp=1; dp=3 ring=2 ul"):
        resolve_mesh(wanted, num_ranks=48, heads=12)
    every = nearest_shapes(wanted, 48, heads=12, count=1000)
    assert {(mesh.ulysses, mesh.tp) for mesh in every} == {
        *((ulysses, 1) for ulysses in (1, 2, 3, 4, 6, 8, 12)),
        *((ulysses, 2) for ulysses in (1, 2, 3, 4, 6)),
        *((ulysses, 3) for ulysses in (1, 2, 4)),
        *((ulysses, 4) for ulysses in (1, 2, 3)),
        *((ulysses, 6) for ulysses in (1, 2)),
        (1, 12),
    }


@pytest.mark.parametrize("axis", ["dp", "ring", "ulysses", "tp"])
def test_degrees_start_at_one(axis: str) -> None:
    with pytest.raises(ValueError, match=rf"mesh.{axis}=0 must be at least 1"):
        MeshConfig(**{axis: 0})
