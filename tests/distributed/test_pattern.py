"""Attention patterns on meshes: exact, and no call of a kernel for what doesn't attend.

Rank boundaries lie in the middle of frames (35 tokens in frames of 5 over 2, 3 and 4 ranks), and one rank may hold
padding only.
"""

import pattern_ranks
import pytest
from masked import FULL, PATTERNS, causal, mask_of, window
from pattern_ranks import BATCH, HEAD_DIM, HEADS, Case, Found
from pool import run_ranks

from framework.kernels.pattern import TokenPattern, attended_pairs
from framework.parallel.config import MeshShape
from framework.plan.flops import attention_flops

LIMIT = 1e-12
# (dp, ring, ulysses, tp)
MESHES = [
    (1, 1, 1, 1),
    (1, 2, 1, 1),
    (1, 1, 2, 1),
    (1, 1, 1, 2),
    (1, 3, 1, 1),
    (1, 4, 1, 1),
    (1, 2, 2, 1),
    (1, 2, 1, 2),
]
CASES = [Case(MeshShape(*mesh), pattern, 7, 5) for mesh in MESHES for pattern in PATTERNS]
CASES += [
    Case(MeshShape(1, 4, 1, 1), pattern, 3, 1) for pattern in (FULL, causal(1), window(0, 1))
]  # the last rank has padding only


@pytest.fixture(scope="module")
def results() -> dict[Case, list[Found]]:
    """What every rank found, the ranks of each world size started once."""
    found: dict[Case, list[Found]] = {}
    for world_size in sorted({case.mesh.world_size for case in CASES}):
        batch = [case for case in CASES if case.mesh.world_size == world_size]
        every_rank = run_ranks(pattern_ranks.run_cases, world_size, batch)
        found |= {case: [rank[index] for rank in every_rank] for index, case in enumerate(batch)}
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mesh_computes_what_a_mask_does(results: dict[Case, list[Found]], case: Case) -> None:
    for rank in results[case]:
        assert set(rank.errors) == {"out", "dq", "dk", "dv"} and max(rank.errors.values()) <= LIMIT, rank.errors


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_does_not_attend_is_not_computed(results: dict[Case, list[Found]], case: Case) -> None:
    """The pairs of all kernel calls on all ranks are those of the mask, and the formula's."""
    attending = int(mask_of(case.pattern, case.frames, case.frame_tokens).sum())
    for called in zip(*(rank.pairs for rank in results[case]), strict=True):
        assert sum(called) == BATCH * HEADS * attending
    pairs = attended_pairs(TokenPattern(case.pattern, case.frame_tokens), case.frames * case.frame_tokens)
    assert attention_flops(pairs, HEADS * HEAD_DIM) == 2 * 2 * attending * HEADS * HEAD_DIM
