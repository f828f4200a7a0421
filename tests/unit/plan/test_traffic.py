"""The formulas of traffic against numbers worked out by hand; what is sent is in tests/distributed/test_traffic.py."""

from fractions import Fraction
from pathlib import Path

import pytest
from tiny import write_recipe

from framework.parallel.config import MeshShape
from framework.plan.parameters import parameter_shapes
from framework.plan.traffic import Ledger, MicroShape, own_ledger
from framework.plan.zero_traffic import engine_traffic
from framework.recipe import Recipe, load_recipe

# One layer of Wan's 14B at 720p and 81 frames in bfloat16: 21 x 45 x 80 = 75,600 tokens, 40 heads of 128.
WAN = [
    "model.num_layers=1",
    "model.num_attention_heads=40",
    "model.attention_head_dim=128",
    "model.ffn_dim=13824",
    "data.buckets=[{frames: 81, height: 720, width: 1280}]",
    "precision.parameters=bfloat16",
]
S, D, B = 75_600, 5120, 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def recipe_of(folder: Path, words: list[str]) -> Recipe:
    return load_recipe(write_recipe(folder, folder / "absent", words), [])


def ledger(folder: Path, shape: MeshShape, words: tuple[str, ...] = (), rank: int = 0) -> Ledger:
    degrees = [f"mesh.ring={shape.ring}", f"mesh.ulysses={shape.ulysses}", f"mesh.tp={shape.tp}"]
    return own_ledger(recipe_of(folder, [*WAN, *degrees, *words]), shape, rank, [MicroShape(0, 1, text=512)])


def context_bytes(found: Ledger) -> Fraction:
    return sum((sent for (group, _), (_, sent) in found.items() if group in ("ulysses", "ring")), Fraction())


@pytest.mark.parametrize(
    ("ulysses", "ring", "forward"),
    [(8, 1, 338.7), (4, 2, 483.8), (2, 4, 774.1), (1, 8, 1354.8), (8, 2, 266.1), (8, 4, 229.8)],
)
def test_a_forward_is_what_the_published_formula_says(folder: Path, ulysses: int, ring: int, forward: float) -> None:
    """Megabytes a layer and rank, [4 S h / (u r) (u-1)/u + 2 (S h / u) (r-1)/r] b (USP, arXiv 2405.07719): what
    recompute adds is one more forward.
    """
    shape = MeshShape(1, ring, ulysses, 1)
    once, again = (context_bytes(ledger(folder, shape, words)) for words in ((), ("execution.recompute=all",)))
    assert float(again - once) / 1e6 == pytest.approx(forward, rel=1e-3)
    u, r = Fraction(ulysses), Fraction(ring)
    # Backward: Ulysses the same again; the ring's keys and values once more and their gradients once.
    padded = -(-S // (ulysses * ring)) * ulysses * ring
    assert once == B * padded * D * (8 / (u * r) * (u - 1) / u + 6 / u * (r - 1) / r)


@pytest.mark.parametrize("recompute", ["none", "keep_attention"])
def test_ulysses_has_four_collectives_a_layer(folder: Path, recompute: str) -> None:
    found = ledger(folder, MeshShape(1, 1, 8, 1), (f"execution.recompute={recompute}",))
    assert sum(calls for (group, _), (calls, _) in found.items() if group == "ulysses") == 4


def test_tokens_are_padded_and_heads_need_not_divide(folder: Path) -> None:
    """7 ranks of 75,600 / 7 = 10,800 tokens; 40 heads over 7: the first five ranks have 6, the others 5."""
    first, last = (ledger(folder, MeshShape(1, 1, 7, 1), rank=rank) for rank in (0, 6))
    key = ("ulysses", "scatter_tokens_gather_heads")
    one = Fraction(6, 7) * 4 * S * 128 * B
    assert first[key] == (2, 6 * one) and last[key] == (2, 5 * one)
    padded = ledger(folder, MeshShape(1, 11, 1, 1))  # 75,600 = 11 x 6,873 - 3
    assert padded["ring", "ring_gradients"] == (10, Fraction(10 * 2 * 6873 * D * B))


def test_tensor_parallelism_moves_six_times_the_tokens(folder: Path) -> None:
    """Three gathers and three scatters, and their transposes: 2 x 6 (n-1)/n S D b; norms: 2 x 4 sums of 4 bytes."""
    found = ledger(folder, MeshShape(1, 1, 1, 4))
    half = Fraction(3, 4)
    assert found["tp", "gather_tokens"] == found["tp", "scatter_tokens"] == (6, 6 * half * S * D * B)
    assert found["tp", "qk_norm"] == (8, 2 * 2 * half * 4 * (3 * S + 512))


def test_a_group_of_one_sends_nothing(folder: Path) -> None:
    assert ledger(folder, MeshShape(1, 1, 1, 1)) == {}


ZERO = {  # of 1000 bytes of weights and as many of gradients, 8 ranks, 3 micro-batches: (N-1)/N x
    ("deepspeed", 1): 1 + 1,
    ("deepspeed", 2): 1 + 3,
    ("deepspeed", 3): 2 * 3 + 3,
    ("fsdp2", 2): 1 + 3,
    ("fsdp2", 3): 2 * 3 + 3,
}


@pytest.mark.parametrize(("engine", "stage"), ZERO)
def test_the_minimum_is_zeros_formula(folder: Path, engine: str, stage: int) -> None:
    words = [f"zero.engine={engine}", f"zero.stage={stage}", "zero.persistence=0", "zero.reuse_distance=0"]
    recipe = recipe_of(folder, words)
    found = engine_traffic(recipe, MeshShape(8, 1, 1, 1), 0, num_micro=3)
    psi = 4 * sum(p.num_elements for p in parameter_shapes(recipe.model))
    assert found.minimum == Fraction(7, 8) * psi * ZERO[engine, stage]
    assert 1 < found.ratio < (1.01 if engine == "deepspeed" else 1.3)


def test_replicas_add_an_all_reduce_of_their_part(folder: Path) -> None:
    recipe = recipe_of(folder, ["zero.engine=fsdp2", "zero.stage=2", "zero.partition=2"])
    whole = recipe_of(folder, ["zero.engine=fsdp2", "zero.stage=2"])
    parts = engine_traffic(recipe, MeshShape(8, 1, 1, 1), 0, num_micro=1).minimum
    psi = engine_traffic(whole, MeshShape(8, 1, 1, 1), 0, num_micro=1).minimum * Fraction(8, 7) / 2
    assert parts == psi * (Fraction(1, 2) * 2 + Fraction(2 * 3, 4) / 2)


def test_bfloat16_in_stage_1_all_reduces_its_gradients(folder: Path) -> None:
    """What DeepSpeed sends beyond the minimum: (2 + 2 x 4) / (2 + 4)."""
    recipe = recipe_of(folder, ["zero.stage=1", "precision.parameters=bfloat16"])
    assert engine_traffic(recipe, MeshShape(8, 1, 1, 1), 0, num_micro=1).ratio == pytest.approx(10 / 6, rel=1e-3)
