"""Where ranks stand and what crosses, against numbers worked out by hand.

One layer of 32 heads of 128 at 720p and 81 frames in bfloat16: 21 x 45 x 80 = 75,600 tokens; D = 4096.
"""

from itertools import permutations
from pathlib import Path

import pytest
from tiny import write_recipe

from framework.launch.config import LinkConfig
from framework.launch.placement import Places, check_placement, order_hosts, tp_fits, usable_nodes
from framework.parallel.config import MeshConfig, MeshShape
from framework.recipe import Recipe, load_recipe

VIDEO = [
    "model.num_layers=1",
    "model.num_attention_heads=32",
    "model.attention_head_dim=128",
    "model.ffn_dim=13824",
    "data.buckets=[{frames: 81, height: 720, width: 1280}]",
    "data.global_batch=1",
    "precision.parameters=bfloat16",
]


def recipe_of(folder: Path, shape: MeshShape, *words: str) -> Recipe:
    degrees = [f"mesh.dp=auto mesh.ring={shape.ring} mesh.ulysses={shape.ulysses} mesh.tp={shape.tp}"]
    return load_recipe(write_recipe(folder, folder / "absent", [*VIDEO, *degrees[0].split(), *words]), [])


def warnings(folder: Path, shape: MeshShape, links: LinkConfig, *words: str, ranks_per_node: int = 8) -> list[str]:
    return check_placement(shape, ranks_per_node, links, recipe_of(folder, shape, *words))


@pytest.mark.parametrize(
    ("ranks_per_node", "domain", "tp", "world", "fits"),
    [
        (8, 8, 8, 16, True),
        (8, 8, 16, 16, False),
        (8, 8, 3, 24, False),  # ranks 6, 7 | 8
        (8, 8, 3, 6, True),  # but not two groups on one node
        (8, 0, 8, 16, True),
        (8, 0, 16, 16, False),
        (8, 4, 4, 16, True),
        (8, 4, 8, 16, False),
        (6, 4, 4, 12, False),  # a node is 0-3 | 4, 5
        (4, 72, 8, 144, True),
        (4, 72, 72, 144, True),
        (4, 72, 16, 144, False),  # ranks 64-71 | 72-79
        (4, 72, 16, 64, True),
        (8, 72, 72, 144, True),
    ],
)
def test_tp_stays_inside_a_link_domain(ranks_per_node: int, domain: int, tp: int, world: int, fits: bool) -> None:
    assert tp_fits(MeshShape(world // tp, 1, 1, tp), Places(ranks_per_node, LinkConfig(domain=domain))) is fits


def test_tp_across_domains_is_refused_with_its_cost(tmp_path: Path) -> None:
    """12 gathers and scatters of 15/16 of 75,600 x 4096 x 2 bytes are 6.967 GB; the norms of q and k 0.003 more."""
    with pytest.raises(ValueError) as caught:
        warnings(tmp_path, MeshShape(1, 1, 1, 16), LinkConfig(domain=8))
    message = str(caught.value)
    assert "mesh.tp=16 crosses the edge of a link domain, which has 8 ranks" in message
    assert "6.97 GB a rank and step of data.buckets[0]" in message
    assert "0.139 s at 50 GB/s and not 0.0155 s at 450 GB/s" in message
    assert message.endswith(
        "dp=2 ring=1 ulysses=1 tp=8; dp=1 ring=1 ulysses=2 tp=8; dp=1 ring=2 ulysses=1 tp=8",
    )


def test_ulysses_across_domains_costs_what_peers_outside_get(tmp_path: Path) -> None:
    """15/16 of 8 x 4,725 tokens x 4096 x 2 bytes are 0.2903 GB, of which 8 of 15 peers are outside: 0.1548 GB."""
    (warning,) = warnings(tmp_path, MeshShape(1, 1, 16, 1), LinkConfig(domain=8))
    assert warning.startswith("ulysses=16 with tp=1 crosses the edge of a link domain (8 ranks): ")
    assert "0.155 GB of the 0.29 GB that a rank sends in a step of data.buckets[0]" in warning
    assert "take 0.0031 s at 50 GB/s; inside a domain all of it takes 0.000645 s at 450 GB/s" in warning
    assert warning.endswith("ring=2 ulysses=8")


def test_a_step_is_all_its_micro_batches(tmp_path: Path) -> None:
    """Eight samples for one replica: eight times the bytes, 1.239 of 2.322 GB; for two replicas half."""
    (one,) = warnings(tmp_path, MeshShape(1, 1, 16, 1), LinkConfig(domain=8), "data.global_batch=8")
    (two,) = warnings(tmp_path, MeshShape(2, 1, 16, 1), LinkConfig(domain=8), "data.global_batch=8")
    assert "1.24 GB of the 2.32 GB" in one and "0.619 GB of the 1.16 GB" in two


def test_tp_takes_its_part_of_the_domain(tmp_path: Path) -> None:
    """Ulysses of 4 with tp of 4 is two domains of 8: two of three peers are outside."""
    (warning,) = warnings(tmp_path, MeshShape(1, 1, 4, 4), LinkConfig(domain=8))
    assert warning.startswith("ulysses=4 with tp=4") and warning.endswith("ring=2 ulysses=2")


@pytest.mark.parametrize(
    ("shape", "links", "ranks_per_node"),
    [
        (MeshShape(4, 2, 4, 2), LinkConfig(domain=8), 8),
        (MeshShape(1, 1, 16, 1), LinkConfig(domain=16), 8),
        (MeshShape(1, 1, 16, 2), LinkConfig(domain=72), 4),  # NVL72: 8 nodes of one rack
        (MeshShape(1, 4, 8, 1), LinkConfig(domain=8), 8),  # a ring across nodes is as it should be
        (MeshShape(1, 4, 8, 1), LinkConfig(domain=8, switch=4), 8),
        (MeshShape(2, 2, 8, 1), LinkConfig(domain=8, switch=3), 8),  # hosts are ordered so that two nodes are under one
        (MeshShape(8, 1, 1, 1), LinkConfig(domain=8, switch=1), 1),
    ],
)
def test_what_fits_warns_of_nothing(tmp_path: Path, shape: MeshShape, links: LinkConfig, ranks_per_node: int) -> None:
    assert warnings(tmp_path, shape, links, ranks_per_node=ranks_per_node) == []


@pytest.mark.parametrize(
    ("spine", "speed"), [(0.0, ", and more where"), (25.0, "0.0139 s at 25 GB/s, against 0.00697")]
)
def test_a_ring_of_several_switches_costs_its_keys_and_values(tmp_path: Path, spine: float, speed: str) -> None:
    """Four nodes, two a switch: 0 1 | 2 3. 3 x 6 x 8 ranks x 2,363 tokens x 4 heads x 128 x 2 bytes: 0.3484 GB."""
    links = LinkConfig(domain=8, switch=2, spine=spine)
    (warning,) = warnings(tmp_path, MeshShape(1, 4, 8, 1), links)
    assert "a replica is 4 nodes, a leaf switch has 2, so 2 of its 4 neighbours are under another" in warning
    assert "0.348 GB a rank and step of data.buckets[0]" in warning and speed in warning
    assert "0.00697 s at 50 GB/s" in warning


def test_buckets_of_their_own_degrees_are_looked_at(tmp_path: Path) -> None:
    buckets = (
        "data.buckets=[{frames: 81, height: 720, width: 1280}, "
        "{frames: 1, height: 720, width: 1280, ring: 1, ulysses: 16}]"
    )
    (warning,) = warnings(tmp_path, MeshShape(2, 1, 8, 1), LinkConfig(domain=8), buckets)
    assert warning.startswith("ulysses=16 with tp=1") and "data.buckets[1]" in warning


def test_hosts_of_a_switch_are_neighbours_and_the_largest_comes_first() -> None:
    addresses = {
        "node1": "core.s0.node1",
        "node10": "core.s1.node10",
        "node2": "core.s1.node2",
        "node9": "core.s1.node9",
        "node0": "core.s0.node0",
        "far": "",
        "away": "away",
    }
    ordered = ["node2", "node9", "node10", "node0", "node1", "away", "far"]
    assert order_hosts(addresses) == ordered
    for order in list(permutations(addresses))[::500]:
        assert order_hosts({node: addresses[node] for node in order}) == ordered


def test_switches_of_one_parent_are_neighbours() -> None:
    """Of equal switches the first by name; b's two leaves together have more than a's."""
    leaves = {"core.a.s9": 1, "core.b.s1": 2, "core.a.s10": 1, "core.b.s2": 1}
    addresses = {
        f"n{i}-{leaf[-2:]}": f"{leaf}.n{i}-{leaf[-2:]}" for leaf, count in leaves.items() for i in range(count)
    }
    assert order_hosts(addresses) == ["n0-s1", "n1-s1", "n0-s2", "n0-s9", "n0-10"]


def switched(*counts: int) -> dict[str, str]:
    """Nodes under as many leaf switches: s0 has a0, a1, ...; s1 b0, ..."""
    return {f"{chr(97 + s)}{i}": f"core.s{s}.{chr(97 + s)}{i}" for s, count in enumerate(counts) for i in range(count)}


def test_a_replica_stays_under_a_switch_where_it_can() -> None:
    """Five and three nodes, replicas of two: the fifth of one goes with the third of the other."""
    assert order_hosts(switched(5, 3), nodes_per_replica=2) == ["a0", "a1", "a2", "a3", "b0", "b1", "a4", "b2"]
    assert order_hosts(switched(3, 3, 3), nodes_per_replica=3) == [f"{s}{i}" for s in "abc" for i in range(3)]


def test_rests_meet_under_their_parent() -> None:
    """Replicas of four: each pod's two leaves of two make one, and the pods' rests nothing more."""
    addresses = {f"{p}{leaf}{i}": f"core.{p}.{leaf}.{p}{leaf}{i}" for p in "xy" for leaf in "st" for i in range(2)}
    addresses["ys2"] = "core.y.s.ys2"
    ordered = order_hosts(addresses, nodes_per_replica=4)
    assert {node[0] for node in ordered[:4]} == {"y"} and {node[0] for node in ordered[4:8]} == {"x"}
    assert len(ordered) == 9


def test_a_node_may_have_dots_in_its_name() -> None:
    addresses = {"a.site.org": "a.site.org", "b.site.org": "core.s0.b.site.org"}
    assert order_hosts(addresses) == ["b.site.org", "a.site.org"]


@pytest.mark.parametrize(
    ("available", "ranks_per_node", "mesh", "wanted", "nodes"),
    [
        (4, 8, MeshConfig(), range(1, 5), 4),
        (3, 8, MeshConfig(), range(1, 5), 3),
        (7, 8, MeshConfig(ring=2, ulysses=8), range(2, 9), 6),  # replicas of two nodes
        (9, 4, MeshConfig(tp=3), range(1, 10), 9),  # of three ranks: multiples of three nodes
        (8, 4, MeshConfig(tp=3), range(1, 10), 6),
        (5, 2, MeshConfig(dp=2, ulysses=2), range(1, 6), 2),
    ],
)
def test_nodes_are_used_in_whole_replicas(
    available: int, ranks_per_node: int, mesh: MeshConfig, wanted: range, nodes: int
) -> None:
    assert usable_nodes(available, ranks_per_node, mesh, wanted) == nodes


def test_a_buckets_own_degrees_divide_too() -> None:
    """Of 7 nodes of 8 ranks 6 are used when a bucket's clip takes 16."""
    assert usable_nodes(7, 8, MeshConfig(), range(1, 9), splits=[(2, 8)]) == 6
    assert usable_nodes(7, 8, MeshConfig(), range(1, 9), splits=[(1, 3)]) == 6


@pytest.mark.parametrize(
    ("available", "mesh", "wanted", "parts"),
    [
        (3, MeshConfig(ring=4, ulysses=8), range(1, 4), ["auto * 4 * 8 * 1", "1-3 nodes of 8", "4, 8, 12 nodes"]),
        (1, MeshConfig(ulysses=8), range(2, 5), ["of which 1 are there", "2, 3, 4 nodes"]),
        (4, MeshConfig(dp=8, ulysses=8), range(4, 5), ["4 nodes of 8", "8 nodes would do, or mesh.dp=auto"]),
        (4, MeshConfig(dp=3, tp=4), range(1, 5), ["no number of nodes", "mesh.dp=auto"]),
    ],
)
def test_too_few_nodes_are_refused_with_the_numbers_that_do(
    available: int, mesh: MeshConfig, wanted: range, parts: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        usable_nodes(available, 8, mesh, wanted)
    assert [part for part in parts if part not in str(caught.value)] == []
