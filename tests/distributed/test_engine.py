"""The engines against plain AdamW in one process, and our fragments against DeepSpeed's own view of its state."""

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import engine_ranks
import numpy as np
import pytest
import ranks
import torch
from plain import assert_same, plain_updates
from pool import run_ranks
from tiny import write_recipe

from framework.keys import key
from framework.launch.check import check_start
from framework.models.initialise import init_tensor
from framework.parallel.zero.config import ZeroConfig
from framework.recipe import load_recipe

CELLS = [
    (dp, stage, precision)
    for dp, stage in ((1, 2), (2, 1), (2, 2), (2, 3), (3, 3), (4, 1), (4, 2), (4, 3))
    for precision in (("float32", "bfloat16") if dp == 2 else ("float32",))
]


@pytest.mark.parametrize(("dp", "stage", "precision"), CELLS, ids=str)
def test_fragments_are_deepspeeds_state(tmp_path: Path, tiny_shards: Path, dp: int, stage: int, precision: str) -> None:
    """Initial weights from each tensor's key, the same on every mesh; moments land where DeepSpeed finds them."""
    words = [f"zero.stage={stage}", f"precision.parameters={precision}", "mesh.dp=auto"]
    recipe_path = write_recipe(tmp_path, tiny_shards, words)
    states = run_ranks(ranks.engine_state, dp, recipe_path, [])
    recipe, first = load_recipe(recipe_path, []), states[0]
    for name, values in first.full["model"].items():
        generator = torch.Generator().manual_seed(key(recipe.seed, "init", uid=name))
        expected = init_tensor(name, values.shape, generator, recipe.model)
        np.testing.assert_array_equal(values, expected.numpy(), err_msg=name)
        low = expected.to(getattr(torch, precision)).float().numpy()
        np.testing.assert_array_equal(first.low[name], low, err_msg=name)
        for state in first.full.keys() - {"model"}:
            np.testing.assert_array_equal(first.full[state][name], ranks.moments(state, values.shape).numpy())

    for state in ("model", "exp_avg", "exp_avg_sq"):
        for name, values in first.full["model"].items():
            pieces = sorted(rank.ranges[f"{state}.{name}"] for rank in states if f"{state}.{name}" in rank.ranges)
            ends = [0, *(start + count for start, count in pieces)]
            assert [start for start, _ in pieces] == ends[:-1], "each element is held once"
            assert ends[-1] == values.size


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("engine", "stage"), [("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("fsdp2", 3)])
def test_an_update_that_is_no_number_is_skipped(
    tmp_path: Path, tiny_shards: Path, engine: str, stage: int, precision: str
) -> None:
    words = [f"zero.engine={engine}", f"zero.stage={stage}", f"precision.parameters={precision}", "mesh.dp=2"]
    recipe_path = write_recipe(tmp_path, tiny_shards, words)
    assert run_ranks(ranks.bad_step, 2, recipe_path, []) == [(True, True, True, True)] * 2


FSDP2 = [(1, 2, "all"), (2, 3, "all"), (3, 2, "all"), (4, 3, 2), (4, 2, 1)]  # (dp, stage, partition)
STEPS = [
    "data.global_batch=8",
    "data.micro_batch=1",
    "mesh.dp=auto",
    "zero.persistence=0",
    "optimizer.lr=1e-2",
    # Adam divides by the gradient's own size: a large eps keeps rounding from being blown up, and the clip cuts.
    "optimizer.eps=1e-4",
    "optimizer.clip=0.5",
    "optimizer.weight_decay=0.1",
]


def fsdp2_words(stage: int, partition: int | str, dtype: str = "float32") -> list[str]:
    return [
        "zero.engine=fsdp2",
        f"zero.stage={stage}",
        f"zero.partition={partition}",
        f"precision.parameters={dtype}",
    ]


@pytest.fixture(scope="module")
def steps_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("steps"), tiny_shards, STEPS)


@pytest.fixture(scope="module")
def plain(steps_recipe: Path) -> dict[str, engine_ranks.Updates]:
    recipe = load_recipe(steps_recipe, [])
    return {dtype: plain_updates(recipe, getattr(torch, dtype)) for dtype in ("float32", "float64")}


@pytest.mark.parametrize(("dp", "stage", "partition"), FSDP2)
def test_fsdp2_in_float64_is_plain_adamw(
    steps_recipe: Path, plain: dict[str, engine_ranks.Updates], dp: int, stage: int, partition: int | str
) -> None:
    """Two clipped updates over several micro-batches. Rounding alone differs, so a wrong factor can't hide."""
    every = run_ranks(engine_ranks.updates, dp, steps_recipe, fsdp2_words(stage, partition, "float64"))
    assert plain["float64"].norms[0] > 0.5, "the clip is at work"
    assert_same(every[0], plain["float64"], 1e-11)
    size = dp if partition == "all" else int(partition)
    for index, rank in enumerate(every):
        assert {owner for *_, owner in rank.ranges.values()} == {index < size}, "the first replica writes"
    held = sum(count for *_, count, _ in (r for rank in every[:size] for r in rank.ranges.values()))
    assert held == 3 * sum(values.size for values in plain["float64"].gradients[0].values()), "nothing is held twice"


@pytest.mark.parametrize(
    "words",
    [
        ["zero.stage=1"],
        ["zero.stage=2"],
        ["zero.stage=3"],
        ["zero.stage=1", "zero.offload=optimizer"],
        ["zero.stage=2", "zero.offload=optimizer"],
        ["zero.stage=3", "zero.offload=optimizer"],
        fsdp2_words(3, "all"),
        pytest.param(
            [*fsdp2_words(3, "all"), "execution.compile=true"],
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
        ),
    ],
    ids=" ".join,
)
def test_two_updates_in_float32_are_plain_adamw(
    steps_recipe: Path, plain: dict[str, engine_ranks.Updates], words: list[str]
) -> None:
    assert_same(run_ranks(engine_ranks.updates, 2, steps_recipe, words)[0], plain["float32"], 3e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_deepspeeds(steps_recipe: Path, stage: int, dtype: str) -> None:
    words = [f"zero.stage={stage}", f"precision.parameters={dtype}"]
    ours, theirs = run_ranks(engine_ranks.both_gradients, 3, steps_recipe, words)[0]
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert all(np.abs(values).max() > 0 for values in ours.values())


def test_both_engines_agree_in_bfloat16(steps_recipe: Path, plain: dict[str, engine_ranks.Updates]) -> None:
    """Master weights and reduced gradients are float32 in both.

    Two things differ, by a rounding to bfloat16: the blocks' gradients of the text are summed in another order, and
    FSDP2 leaves the tables' gradients in the float32 of their modulation.
    """
    words = ["precision.parameters=bfloat16", "zero.stage=2"]
    ours = run_ranks(engine_ranks.updates, 2, steps_recipe, fsdp2_words(2, "all", "bfloat16"), 1)[0].gradients[0]
    theirs = run_ranks(engine_ranks.updates, 2, steps_recipe, words, 1)[0].gradients[0]
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        rounded = "text_embedder" in name or "scale_shift_table" in name
        error = np.abs(ours[name] - values).max() / np.abs(values).max()
        assert error < (2**-6 if rounded else 1e-5), (name, error)
    first = plain["float32"].gradients[0]
    assert max(np.abs(ours[name] - first[name]).max() for name in first) > 1e-4, "it computes in bfloat16"


@pytest.mark.parametrize(("dp", "stage", "partition"), FSDP2)
def test_fsdp2_holds_what_is_written(steps_recipe: Path, dp: int, stage: int, partition: int | str) -> None:
    """Through fragments, after a forward whose gathered weights go stale; the next forward uses what was written."""
    every = run_ranks(engine_ranks.written, dp, steps_recipe, fsdp2_words(stage, partition))
    for state, held in every[0][0].items():
        for name, values in held.items():
            np.testing.assert_array_equal(values, (ranks.moments(state, values.shape) * 0.1).numpy(), err_msg=name)
    assert not np.array_equal(every[0][1], every[0][2])
    alone = run_ranks(engine_ranks.written, 1, steps_recipe, [])[0]
    for _, before, after in every:
        np.testing.assert_allclose(before, alone[1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(after, alone[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("partition", [1, 2])
def test_the_norm_counts_what_tp_splits_and_what_it_repeats(partition: int) -> None:
    """12 elements of 1 and 12 of 2 over tp, and 3 of 1 that both hold: 12 + 48 + 3 = 63."""
    for norm, _ in (results := run_ranks(engine_ranks.norm_over_tp, 4, partition)):
        assert norm == pytest.approx(63**0.5, rel=1e-6)
    assert results[0][1] == pytest.approx(63**-0.5, rel=1e-5), "the clip divides by the same norm on every rank"


WAN = "{pattern: '*norm*', compute: float32}, {pattern: '*scale_shift_table', compute: float32}"


def test_fsdp2_keeps_the_precision_table(steps_recipe: Path) -> None:
    table = f"precision.table=[{WAN}, {{pattern: '*.attn2.to_k.*', compute: float32}}]"
    words = [*fsdp2_words(3, "all", "bfloat16"), table]
    seen, update = run_ranks(engine_ranks.seen_dtypes, 2, steps_recipe, words)[0]
    assert len(seen) == len(update.gradients[0])
    for name, dtype in seen.items():
        precise = any(part in name for part in ("norm", "scale_shift_table", ".attn2.to_k."))
        assert dtype == ("float32" if precise else "bfloat16"), name


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["zero.engine=fsdp2", "zero.stage=1"], ["zero.stage=1", "zero.stage=2", "zero.engine=deepspeed"]),
        (["zero.engine=fsdp2", "zero.offload=optimizer"], ["zero.offload=optimizer", "zero.engine=deepspeed"]),
        (["zero.partition=2"], ["zero.partition=2", "zero.engine=fsdp2"]),
        (["precision.parameters=float64"], ["float32", "zero.engine=fsdp2"]),
        ([f"precision.table=[{WAN}]", "precision.parameters=bfloat16"], ["'*norm*'", "compute=float32"]),
        (["precision.table=[{pattern: '*ffn*', reduce: bfloat16}]"], ["'*ffn*'", "reduce=bfloat16", "'*'"]),
        (["precision.table=[{pattern: a, parameter: bfloat16}]"], ["'a'", "parameter=float32 compute=bfloat16"]),
        (["zero.offload=optimizer", "zero.stage=1", "precision.parameters=bfloat16"], ["zero.stage=2"]),
    ],
)
def test_what_an_engine_cannot_do_is_refused(steps_recipe: Path, words: list[str], told: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe(steps_recipe, words)
    assert all(part in str(error.value) for part in told), str(error.value)


def test_a_partition_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="8 % 3 == 2; the nearest that do are 2 and 4"):
        ZeroConfig(engine="fsdp2", partition=3).partition_size(8)


@pytest.mark.parametrize("default", ["bfloat16", "float32"])
def test_every_kind_of_linear_may_have_its_own_dtype(
    steps_recipe: Path, plain: dict[str, engine_ranks.Updates], default: str
) -> None:
    """Two of each kind, as what is gathered together isn't cast together; the gradient stays that of float32."""
    other = {"bfloat16": "float32", "float32": "bfloat16"}[default]
    kinds = ["*.ffn.*", "*.to_out.*", "*.attn1.to_?.*", "proj_out.*", "patch_embedding.*", "*.text_embedder.*"]
    table = ", ".join(f"{{pattern: '{kind}', compute: {other}}}" for kind in kinds)
    words = [*fsdp2_words(3, "all", default), f"precision.table=[{table}]"]
    seen, update = run_ranks(engine_ranks.seen_dtypes, 2, steps_recipe, words)[0]
    for name, dtype in seen.items():
        assert dtype == (other if any(fnmatchcase(name, kind) for kind in kinds) else default), name
    assert update.norms[0] == pytest.approx(plain["float32"].norms[0], rel=2e-2)
    for name, values in plain["float32"].gradients[0].items():
        assert np.abs(update.gradients[0][name] - values).max() < 0.1 * np.abs(values).max(), name


REFUSED_AT_THE_START = [
    (["zero.engine=fsdp2", "zero.partition=3"], "4 % 3 == 1; the nearest that do are 2 and 4"),
    (["zero.engine=fsdp2", "precision.table=[{pattern: '*.to_q.bias', compute: bfloat16}]"], "two rows"),
    (["zero.engine=fsdp2", "precision.table=[{pattern: '*.norm9.*', compute: bfloat16}]"], "matches no parameter"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED_AT_THE_START)
def test_what_fits_no_mesh_or_model_is_refused_before_a_rank_starts(
    steps_recipe: Path, words: list[str], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        check_start(load_recipe(steps_recipe, words), num_ranks=4, num_gpus=0)
