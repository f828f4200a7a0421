"""The data report: numbers by hand on small indexes, the same cuts as the schedule's, and the command."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from masked import window
from tiny import write_latents, write_recipe

from framework.data.buckets import Stream
from framework.data.budget import plan_batches, sample_costs
from framework.data.config import BucketConfig, CacheConfig, DataConfig, StreamConfig
from framework.data.goodput import bucket_works
from framework.data.index import SampleIndex, SampleInfo, index_of
from framework.data.report import BucketReport, Report, report_of, to_json
from framework.data.report_text import report_lines
from framework.data.schedule import Place, Schedule
from framework.data.shards import VIDEO_SCHEMA, Schema, ShardFile
from framework.diffusion.config import FlowConfig, TimestepsConfig
from framework.kernels.config import AttentionConfig
from framework.models.config import ModelConfig, training_cost
from framework.parallel.config import MeshConfig, MeshShape
from framework.recipe import Recipe, TrainConfig
from framework.text.config import text_length
from framework.tokenizer.config import DctConfig, TokenizerConfig

ONE = MeshShape(1, 1, 1, 1)


@dataclass
class Shards:
    """What the report reads of a ShardDirectory: two samples a shard, 1,000 bytes each."""

    index: SampleIndex
    schema: Schema = VIDEO_SCHEMA
    url: str = field(default="d")

    @property
    def files(self) -> list[ShardFile]:
        return [ShardFile(f"{i}.mds", 2000, 2, {}) for i in range(len(self.index) // 2)]

    @property
    def shard_sizes(self) -> list[int]:
        return [file.num_samples for file in self.files]

    def __len__(self) -> int:
        return len(self.index)


def videos(
    path: str, rows: list[tuple[int, int, int]], *, weight: float = 1.0, score: float | None = None, fps: float = 24.0
) -> Stream:
    """rows: frames, height, width."""
    scores = {} if score is None else {"beauty": score}
    infos = [SampleInfo(f"{path}{i}", *row, fps, scores) for i, row in enumerate(rows)]
    return Stream(StreamConfig(path, weight), Shards(index_of(infos)))  # type: ignore[arg-type]


def recipe(buckets: list[BucketConfig], *, global_batch: int = 4, steps: int = 10, **data: Any) -> Recipe:
    return Recipe(
        mesh=MeshConfig(dp=1),
        model=ModelConfig(in_channels=8, out_channels=8, num_layers=1, num_attention_heads=4, attention_head_dim=8),
        tokenizer=TokenizerConfig("dct", DctConfig(8)),
        data=DataConfig([StreamConfig("v")], buckets, global_batch, **data),
        train=TrainConfig(steps=steps),
    )


SHORT = BucketConfig(5, 16, 16, fps=12.0)
# Six fit; too small, too short.
ROWS = [(48, 16, 16)] * 4 + [(18, 16, 32)] * 2 + [(48, 8, 8), (8, 16, 16)]


def only(report: Report) -> BucketReport:
    (bucket,) = report.buckets
    return bucket


def test_a_bucket_by_hand() -> None:
    """4 frames of 12 a second, and one: 9 of the source's. Of the fitting ones two are twice as wide as high."""
    report = report_of(recipe([SHORT]), [videos("v", ROWS)], ONE)
    bucket = only(report)
    assert (bucket.samples, bucket.tokens, bucket.batch) == (6, 2, 4)
    assert bucket.hours == pytest.approx((4 * 2 + 2 * 0.75) / 3600)
    assert bucket.cropped_pixels == pytest.approx((0 * 4 + 0.5 * 2) / 6)
    assert bucket.cropped_frames == pytest.approx((4 * (1 - 9 / 48) + 2 * (1 - 9 / 18)) / 6)
    assert (bucket.share_samples, bucket.share_flops, bucket.share_gradient) == (1, 1, 1)
    (stream,) = report.streams
    assert dict(stream.dropped) == {"too few pixels": 1, "too short": 1}
    assert dict(stream.epochs) == {SHORT.name: pytest.approx(40 / 6)}
    assert (report.step_bytes, report.run_bytes, stream.num_bytes) == (4000, 40000, 8000)
    assert (report.samples_a_step.mean, report.goodput, report.warnings) == (4, 1, ())


def test_a_mesh_by_hand() -> None:
    """4 samples on 3 ranks: two rows, a third of the slots empty, in two micro-batches of one or one of two. And each
    on 2 ranks of cp: 2 tokens need no padding; on 4 ranks, two are added to them.
    """
    bucket = only(report_of(recipe([SHORT]), [videos("v", ROWS)], MeshShape(3, 1, 1, 1)))
    assert (bucket.replicas, bucket.micro_batches) == (3, (1, 1))
    assert bucket.empty_slots == pytest.approx(1 / 3)
    assert only(
        report_of(recipe([SHORT], micro_batch=2), [videos("v", ROWS)], MeshShape(3, 1, 1, 1))
    ).micro_batches == (2,)
    for ulysses, padded in ((2, 0), (4, 0.5)):
        cut = replace(SHORT, ring=1, ulysses=ulysses)
        bucket = only(report_of(recipe([cut]), [videos("v", ROWS)], MeshShape(4, 1, 1, 1)))
        assert (bucket.replicas, bucket.ulysses, bucket.padded_tokens) == (4 // ulysses, ulysses, padded)


def test_streams_by_hand() -> None:
    """The second stream has three times the weight, and a third of what fits: nine times as often seen. Its draws count
    three times in what is cut off.
    """
    wide = videos("w", [(9, 16, 32)] * 2, weight=3.0)
    report = report_of(recipe([SHORT], steps=400), [videos("v", ROWS), wide], ONE)
    first, second = (stream.epochs[SHORT.name] for stream in report.streams)
    assert second / first == pytest.approx(9, rel=0.01)
    assert first * 6 + second * 2 == pytest.approx(1600)
    assert only(report).cropped_pixels == pytest.approx(1 / 4 * 1 / 6 + 3 / 4 * 1 / 2)


def test_what_is_dropped_is_counted_once() -> None:
    """The large bucket takes 41 of 24 frames a second at 48x48, the other 17 at 32x32 of a beautiful clip. Missing one
    as the other, the first one's reason counts.
    """
    large, fine = BucketConfig(21, 48, 48, fps=12.0), BucketConfig(17, 32, 32, scores={"beauty": 5.0})
    fits, long, small, short = (48, 48, 48), (20, 48, 48), (48, 16, 16), (10, 32, 32)
    rows = [fits, long, small, short]
    plain, scored = videos("v", rows), videos("s", rows, score=6.0)
    report = report_of(recipe([large, fine]), [plain, scored], ONE)
    # long: too short for the large one, without a score for the other. short: two reasons against one, with the score.
    assert [dict(stream.dropped) for stream in report.streams] == [
        {"too short": 1, "too few pixels": 2},
        {"too few pixels": 1, "too short": 1},
    ]


def test_shares_follow_the_weights() -> None:
    """Two buckets, 3 of 4 samples short ones; per token, the longer one's clips count for their tokens."""
    longer = BucketConfig(9, 16, 16, 1.0, fps=12.0)
    made = recipe([replace(SHORT, weight=3.0), longer], steps=4000, global_batch=8)
    report = report_of(made, [videos("v", ROWS)], ONE)
    short, long = report.buckets
    assert (short.share_samples, short.share_gradient) == (pytest.approx(0.75, abs=0.005),) * 2
    made = replace(made, loss=replace(made.loss, weight="per_token"))
    tokens = report_of(made, [videos("v", ROWS)], ONE).buckets
    assert tokens[1].share_gradient == pytest.approx(3 / (3 * 2 + 3), abs=0.005), "2 tokens against 3"
    made = replace(made, loss=replace(made.loss, weight="per_step"))
    steps = report_of(made, [videos("v", ROWS)], ONE).buckets
    assert steps[0].share_gradient == pytest.approx(3 / short.batch / (3 / short.batch + 1 / long.batch), abs=0.005)


def test_it_cuts_as_the_schedule_does() -> None:
    """Micro-batches and slots of every bucket on 6 ranks with two degrees, against `Schedule` itself."""
    buckets = [replace(SHORT, weight=3.0), BucketConfig(9, 16, 16, fps=12.0, ring=2, ulysses=1)]
    made, shape = recipe(buckets, global_batch=7, micro_batch=2), MeshShape(6, 1, 1, 1)
    streams = [videos("v", ROWS)]
    works = bucket_works(made, shape)
    schedule = Schedule(
        made.data,
        streams,
        seed=0,
        batches=plan_batches(made),
        places=[Place(0, shape.world_size // work.parts) for work in works],
        micro_sizes=[work.micro for work in works],
    )
    reported = report_of(made, streams, shape).buckets
    seen = set()
    for step in range(40):
        micros = schedule[step].micro_batches
        bucket = micros[0].bucket
        seen.add(bucket)
        assert tuple(len(micro.slots) for micro in micros) == reported[bucket].micro_batches
    assert seen == {0, 1}


def test_a_pattern_makes_long_clips_cheaper() -> None:
    """4 frames of 2 tokens that see their own frame alone: 16 pairs for 64. On a ring of 3 the first rank's 3 tokens
    see 2 each, as the second's do; the last has two tokens, and its padding isn't computed.
    """
    bucket = BucketConfig(13, 16, 32, fps=12.0)
    full = recipe([bucket])
    alone = replace(full, attention=AttentionConfig(pattern=window(0, 0)))
    a, b = training_cost(full.model, text=text_length(full.text))
    assert sample_costs(full)[0] - sample_costs(alone)[0] == pytest.approx(a * (64 - 16))
    ring = MeshShape(1, 3, 1, 1)
    works = [bucket_works(made, ring)[0] for made in (replace(made, mesh=MeshConfig(ring=3)) for made in (full, alone))]
    assert (works[0].cost, works[0].padded) == pytest.approx((a * 64 + b * 8, a * 81 + b * 9))
    assert (works[1].cost, works[1].padded) == pytest.approx((a * 16 + b * 8, a * 3 * 6 + b * 9))
    framed = replace(alone, flow=FlowConfig(timesteps=TimestepsConfig(per_frame=True)))
    more = 3 * 2 * 3 * full.model.width * (full.model.freq_dim + 7 * full.model.width)
    assert sample_costs(framed)[0] - sample_costs(alone)[0] == pytest.approx(more)


def test_warnings_name_what_to_change() -> None:
    """80 draws of 6: 13 times. A window of 3 shards of 2,000 bytes doesn't fit into 5,000."""
    stream = videos("s3://bucket/v", ROWS)
    made = recipe([SHORT], steps=20, window=3, cache=CacheConfig(gigabytes=5e-6))
    report = report_of(made, [stream], ONE)
    assert report.streams[0].cache_bytes == 6000
    repeated, cache = report.warnings
    assert "1 of its 1 buckets" in repeated and "13.3 times" in repeated
    assert "data.cache.gigabytes=5e-06" in cache and "6e-06 GB" in cache
    text = report_lines(report)
    assert [line for line in text if line.startswith("warning: ")] == [f"warning: {w}" for w in report.warnings]


def test_the_text_is_aligned_and_says_what_is_dropped() -> None:
    lines = report_lines(report_of(recipe([SHORT, BucketConfig(9, 16, 16)]), [videos("v", ROWS)], ONE))
    header = next(i for i, line in enumerate(lines) if line.startswith("bucket"))
    assert len({len(line) for line in lines[header : header + 3]}) == 1
    (dropped,) = [line for line in lines if "dropped" in line]
    assert "2 (25.0%): " in dropped and "too few pixels 1" in dropped and "too short 1" in dropped


def command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "framework.cli", "data", "report", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_recipe(folder, write_latents(folder / "latents"))


def test_the_command(tiny: Path) -> None:
    """8 latents, 4 samples a step, 4 steps: seen twice."""
    text, plain = command(str(tiny)), command(str(tiny), "--json", "mesh.dp=auto", "--ranks", "3")
    assert text.returncode == 0 and plain.returncode == 0, (text.stderr, plain.stderr)
    assert "8 latents" in text.stdout and "2.00 times by 5x16x16" in text.stdout
    found = json.loads(plain.stdout)
    (bucket,), (stream,) = found["buckets"], found["streams"]
    assert (found["ranks"], bucket["samples"], bucket["tokens"], bucket["batch"]) == (3, 8, 2, 4)
    assert (stream["epochs"], stream["dropped"], stream["cache_bytes"]) == ({"5x16x16": 2.0}, {}, 0)
    assert bucket["empty_slots"] == pytest.approx(1 / 3)
    assert found["goodput"] == pytest.approx(2 / 3 * found["factors"]["speed"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.global_bach=4"], "global_bach"),
        (["data.buckets.0.frames=9"], "no sample fits the bucket 9x16x16"),
        (["--ranks", "3"], "mesh.dp=3 uses 3 of the ranks"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["data.streams.0.path=nowhere"], "no shard directory nowhere"),
    ],
)
def test_the_command_refuses(tiny: Path, words: list[str], message: str) -> None:
    done = command(str(tiny), *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_command_imports_no_torch(tiny: Path) -> None:
    code = f"import sys; sys.argv = ['cuboid', 'data', 'report', {str(tiny)!r}]; from framework.cli import run; run()"
    code += "; assert not {'torch', 'deepspeed', 'streaming', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_json_is_the_report() -> None:
    report = report_of(recipe([SHORT]), [videos("v", ROWS)], ONE)
    told = json.loads(json.dumps(to_json(report)))
    assert told["buckets"][0]["samples"] == 6 and told["factors"]["slots"] == 1
    assert set(told) == set(Report.__dataclass_fields__)
