"""What is sent against the formulas of framework/plan, to the byte: on real meshes, and on fake ones of up to 16,384
ranks, of which one process is the first.
"""

import json
from pathlib import Path

import pytest
import ranks
import traffic_ranks
from pool import run_ranks
from tiny import write_latents, write_recipe

from framework.parallel.config import resolve_mesh
from framework.plan.traffic import MicroShape, own_ledger
from framework.recipe import load_recipe
from framework.shapes import ClipShape

# Heads that two ranks of Ulysses don't share evenly over tp 2, a feed-forward that 3 doesn't divide.
MODEL = ["num_attention_heads=6", "attention_head_dim=6", "ffn_dim=50", "num_layers=2"]
SHORT, LONG = "frames: 5, height: 32, width: 32", "frames: 25, height: 16, width: 16"
TWO_BUCKETS = f"data.buckets=[{{{SHORT}, ring: 1, ulysses: 1}}, {{{LONG}}}]"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Buckets of 8 and of 7 tokens: the second divides nothing."""
    folder = tmp_path_factory.mktemp("traffic")
    write_latents(folder / "8", clip=ClipShape(5, 32, 32), prefix="a")
    write_latents(folder / "7", clip=ClipShape(25, 16, 16), prefix="b")
    words = [
        f"data.streams=[{{path: {folder / '8'}}}, {{path: {folder / '7'}}}]",
        f"data.buckets=[{{{SHORT}}}, {{{LONG}}}]",
        "data.global_batch=8",
        "data.rounds=4",
        "data.micro_batch=2",
        "mesh.dp=auto",
        "zero.persistence=0",
        "train.steps=6",
        "log.every=100",
    ]
    return write_recipe(folder, folder / "8", [*words, *(f"model.{word}" for word in MODEL)])


def mesh(ring: int, ulysses: int, tp: int) -> list[str]:
    return [f"mesh.ring={ring}", f"mesh.ulysses={ulysses}", f"mesh.tp={tp}"]


LORA = ["lora.rank=3"]
WIDE = [*LORA, "lora.targets=['*.attn?.*', '*.ffn.net.*', '*.text_embedder.*', proj_out]"]
LAST_BLOCK = ["train.trainable=['blocks.1.*']"]
SOME_KEYS = ["train.trainable=['blocks.0.attn2.to_k.*', 'proj_out.*']"]
STAGE3_TWICE = ["zero.stage=3", "zero.reuse_distance=0", "zero.prefetch=0"]
CHUNKS = ["execution.chunk_tokens=3", "execution.loss_chunk_tokens=1"]
ONE_BLOCK = ["execution.recompute_blocks=1", "execution.offload=true"]
REAL = {  # ranks -> the meshes
    2: [
        [*mesh(1, 1, 1), "zero.stage=2"],
        [*mesh(1, 2, 1), "zero.stage=1", "execution.recompute=all"],
        [*mesh(2, 1, 1), *STAGE3_TWICE, "execution.recompute=all"],
        [*mesh(1, 1, 2), "zero.engine=fsdp2", "zero.stage=3"],
        [*mesh(1, 2, 1), *LORA, "zero.stage=1", "precision.parameters=bfloat16"],
        [*mesh(1, 1, 1), *WIDE, *STAGE3_TWICE, "execution.recompute=all"],
        [*mesh(2, 1, 1), *LAST_BLOCK, "zero.engine=fsdp2", "zero.stage=3", "execution.recompute=keep_attention"],
        [*mesh(1, 1, 1), *SOME_KEYS, *STAGE3_TWICE],
        [*mesh(1, 2, 1), *SOME_KEYS, "zero.engine=fsdp2", "zero.stage=2", "execution.recompute=all"],
        [*mesh(1, 1, 2), *WIDE, *CHUNKS, "zero.engine=fsdp2", "zero.stage=3"],
        [*mesh(1, 2, 1), "zero.stage=3", *CHUNKS, *ONE_BLOCK, "execution.recompute=all"],
    ],
    3: [
        [*mesh(3, 1, 1), "zero.engine=fsdp2", "zero.stage=3", "execution.recompute=keep_attention"],
        [*mesh(1, 1, 3), "zero.stage=2", "precision.parameters=bfloat16"],
    ],
    4: [
        [*mesh(2, 1, 2), "zero.stage=2", "execution.recompute=keep_attention"],
        [*mesh(1, 4, 1), "zero.engine=fsdp2", "zero.stage=2", "precision.parameters=bfloat16"],
        [*mesh(2, 1, 1), "zero.engine=fsdp2", "zero.stage=3", "zero.partition=2"],
        [*mesh(1, 2, 1), "zero.stage=3", TWO_BUCKETS],
        [*mesh(1, 1, 2), "zero.stage=1", "precision.parameters=bfloat16", "data.global_batch=5", "data.rounds=1"],
        [*mesh(1, 1, 2), *WIDE, "zero.stage=2", "execution.recompute=all"],
        [*mesh(2, 1, 2), *LAST_BLOCK, "zero.engine=fsdp2", "zero.stage=3"],
        [*mesh(1, 2, 2), *SOME_KEYS, "zero.stage=2", "execution.recompute=all"],
        [*mesh(1, 1, 2), *CHUNKS, *ONE_BLOCK, "zero.stage=2", "execution.recompute=keep_attention", TWO_BUCKETS],
        [*mesh(2, 1, 2), *CHUNKS, *ONE_BLOCK, "zero.engine=fsdp2", "zero.stage=3", "execution.recompute=all"],
    ],
    8: [[*mesh(2, 2, 2), *STAGE3_TWICE]],
}


@pytest.mark.parametrize("num_ranks", REAL)
def test_what_is_sent_is_what_the_formulas_say(recipe: Path, num_ranks: int) -> None:
    assert sum(len(cells) for cells in REAL.values()) == 24
    for rank, comparisons in enumerate(run_ranks(traffic_ranks.real, num_ranks, recipe, REAL[num_ranks])):
        for words, comparison in zip(REAL[num_ranks], comparisons, strict=True):
            assert comparison.mistakes() == {}, (rank, words)


ENGINES = {
    "stage 1": ["zero.stage=1"],
    "stage 2": ["zero.stage=2"],
    "stage 3": STAGE3_TWICE,
    "fsdp2 2": ["zero.engine=fsdp2", "zero.stage=2"],
    "fsdp2 3": ["zero.engine=fsdp2", "zero.stage=3"],
    "fsdp2 3 hybrid": ["zero.engine=fsdp2", "zero.stage=3", "zero.partition=16"],
}
FAKE = {64: mesh(2, 2, 2), 1024: mesh(1, 2, 2), 16384: mesh(4, 2, 2)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_ranks", FAKE)
def test_a_mesh_that_is_not_there_sends_it_too(recipe: Path, num_ranks: int, engine: str) -> None:
    words = [*FAKE[num_ranks], *ENGINES[engine], "data.global_batch=64", TWO_BUCKETS]
    if (num_ranks, engine) == (16384, "stage 3"):
        # A gather of 4,096 parts takes the fake group a while: one bucket, and nothing gathered a second time.
        words = [*words, "zero.reuse_distance=1000000000", "zero.prefetch=1000000", f"data.buckets=[{{{LONG}}}]"]
    (comparison,) = run_ranks(traffic_ranks.fake, 1, recipe, words, num_ranks, timeout=500)
    assert comparison.mistakes() == {}
    assert comparison.engine.total >= comparison.engine.minimum > 0
    assert {group for group, _ in comparison.counted.own} >= {"tp", "ulysses"}


def test_the_training_loop_adds_the_loss_and_the_flag(recipe: Path, tmp_path: Path) -> None:
    """Of a whole run: the metrics' bytes by group, of its last step."""
    words = [*mesh(1, 1, 2), "zero.engine=fsdp2", f"run={tmp_path / 'run'}", f"data.buckets=[{{{SHORT}}}]"]
    run_ranks(ranks.train, 4, recipe, words)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    sent = {group: total - lines[-2]["traffic"][group] for group, total in lines[-1]["traffic"].items()}
    loaded = load_recipe(recipe, words)
    micros = [MicroShape(0, samples=2, text=16)] * 2  # 8 samples over dp 2, two at a time
    said = own_ledger(loaded, resolve_mesh(loaded.mesh, num_ranks=4), 0, micros)
    by_group = {group: sum(b for (g, _), (_, b) in said.items() if g == group) for group, _ in said}
    assert sent == {name: by_group.get(name, 0) for name in sent} and by_group.keys() <= sent.keys()
    assert by_group["world"] == 2 * 3 / 4 * 4 and by_group["control"] == 2 * 3 / 4 * 24
