"""The `cuboid` command: one thin function for each verb.

Exit status: 0 done; 1 failed; 2 the user's mistake, with one message; 128 + n stopped by signal n, everything saved.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from framework import (
    cli_bench,
    cli_checkpoint,
    cli_cluster,
    cli_data,
    cli_plan,
    cli_scale,
    cli_status,
    cli_submit,
    log,
)
from framework.checkpoint.find import open_checkpoint
from framework.environment import Environment, StopFlag, read_environment, visible_gpus
from framework.failure import failure_of, write_failure
from framework.heartbeat import Heart, process_began
from framework.launch.check import check_machine, check_start, check_store
from framework.launch.local import run_local
from framework.launch.stages import stages_of_rank, train_here
from framework.recipe import Recipe, load_recipe
from framework.run import Resolved, RunFailure, launched_run, recipe_of_run, resolve_invocation
from framework.shapes import ClipShape
from framework.stacks import dump_on_signal

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

app.add_typer(cli_checkpoint.app, name="checkpoint")
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_cluster.app)
app.add_typer(cli_submit.app)
app.add_typer(cli_plan.app)
app.add_typer(cli_status.app)
app.add_typer(cli_bench.app)
app.add_typer(cli_scale.app)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to set.")]


@app.callback()
def cuboid() -> None:
    """Train video diffusion transformers with explicit parallelism."""


@app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="Folder of videos, manifest (.jsonl, .parquet), or WebDataset .tar files.")
    ],
    *,
    captions: Annotated[Path | None, typer.Option(help="JSONL: file, caption(s), source, licence, scores.")] = None,
    out: Annotated[str, typer.Option(help="Shards to write: a directory or s3://bucket/prefix.")],
    recipe: Annotated[Path | None, typer.Option(help="Skip clips shorter than any bucket of this recipe.")] = None,
    min_frames: Annotated[int, typer.Option(help="Skip clips of fewer frames.")] = 5,
    part: Annotated[str | None, typer.Option(metavar="I/N", help="One of N jobs' parts of the inputs, from 0.")] = None,
) -> None:
    """Videos and captions -> shards. Goes on where it was stopped. With --part, `cuboid data merge` follows."""
    from framework.curate.config import PrepareConfig
    from framework.curate.prepare import prepare as run_prepare
    from framework.curate.report import prepare_lines
    from framework.curate.share import read_share

    share = None if part is None else read_share(part)
    if recipe is not None:
        min_frames = min(bucket.frames for bucket in load_recipe(recipe, []).data.buckets)
    report = run_prepare(source, captions, out, config=PrepareConfig(min_frames=min_frames), share=share)
    for text in prepare_lines(report):
        log.line(text)
    if report.num_unread:
        raise RunFailure(f"{report.num_unread} inputs can't be read; the others are written: run it again for these")


@app.command()
def encode(
    recipe: Annotated[Path, typer.Argument(help="Recipe: its tokenizer, text encoder and buckets are used.")],
    overrides: Overrides = None,
    *,
    videos: Annotated[str, typer.Option(help="Video shards: a directory or a URL.")] = ".",
    out: Annotated[str, typer.Option(help="Latent shards to write: a directory or a URL.")] = "latents",
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    text: Annotated[bool | None, typer.Option(help="Store the captions' embeddings; default: unless bytes.")] = None,
    batch: Annotated[int, typer.Option(help="Segments that the tokenizer takes at once.")] = 1,
    reuse: Annotated[list[str] | None, typer.Option(help="Latent shards to copy from what is there already.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Start so many processes here.")] = None,
    part: Annotated[str | None, typer.Option(metavar="I/N", help="One of N jobs' parts of the work, from 0.")] = None,
) -> None:
    """Video shards -> latent shards, so that training neither decodes nor encodes. Goes on where it was stopped."""
    loaded = load_recipe(recipe, overrides or [])
    if dtype not in ("float16", "float32"):
        raise ValueError(f"--dtype {dtype} must be float16 or float32")
    env = read_environment()
    if part is not None and (ranks is not None or env is not None):
        raise ValueError("--part says which part this job is of; with --ranks, or ranks of a launcher, these are")
    if ranks is not None and ranks < 1:
        raise ValueError(f"--ranks {ranks} must be at least 1")
    if ranks is not None and env is None:
        from framework.curate.encode import read_report
        from framework.curate.report import encode_lines

        words = ["--videos", videos, "--out", out, "--dtype", dtype, "--batch", str(batch)]
        words += [word for url in reuse or [] for word in ("--reuse", url)]
        words += [] if text is None else ["--text" if text else "--no-text"]
        if status := run_local(["encode", str(recipe), *(overrides or []), *words], world_size=ranks):
            raise typer.Exit(status)
        lines = encode_lines(read_report(out))
    else:
        from framework.curate.share import Share, read_share
        from framework.programs.encode import encode as run_encode

        share = Share(env.rank, env.world_size) if env else read_share(part) if part else Share()
        lines = run_encode(
            loaded,
            videos,
            out,
            dtype="float16" if dtype == "float16" else "float32",
            batch=batch,
            text=text,
            reuse=reuse or [],
            share=share,
            local_rank=env.local_rank if env else 0,
        )
    if env is None or env.failures is None:  # else the command that started this rank says it for all
        for line in lines:
            log.line(line)


@app.command()
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="Recipe file.")],
    overrides: Overrides = None,
    *,
    stage: Annotated[
        int | None, typer.Option(hidden=True, help="Of a rank: the stage that it was started for.")
    ] = None,
) -> None:
    """Train, or resume what the run directory holds. Starts the local ranks itself unless RANK and WORLD_SIZE are
    set.
    """
    invocation = resolve_invocation(recipe, overrides or [])
    env = read_environment()
    wanted, arguments = invocation.recipe.train.steps, ["train", str(recipe), *(overrides or [])]
    if env is not None:
        heart = context.find_object(Heart) or Heart(begin=process_began(), writes=env.is_first)
        train_rank(invocation, env, heart, stage)
    elif invocation.recipe.stages:
        raise typer.Exit(train_here(invocation, arguments))
    elif (done := check_store(invocation.recipe)) >= wanted:
        log.line(f"the run {invocation.recipe.run} is finished: {done} of {wanted} steps are done")
    else:
        launch(invocation.recipe, arguments)


@app.command()
def sample(
    place: Annotated[Path, typer.Argument(help="Run directory, or the directory of a diffusers pipeline of Wan.")],
    *,
    prompt: Annotated[str, typer.Option(help="Caption.")],
    out: Annotated[Path, typer.Option(help="The mp4 to write; a contact sheet lands beside it.")],
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
    steps: Annotated[int | None, typer.Option(help="Euler steps; the recipe's by default.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the recipe's, or 5 of a pipeline.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame, for a pipeline that takes one.")] = None,
    size: Annotated[str | None, typer.Option(help="Of a pipeline's clip, FRAMESxHEIGHTxWIDTH: 81x480x832.")] = None,
    negative: Annotated[str | None, typer.Option(help="Of a pipeline: what guidance leads away from.")] = None,
    low_guidance: Annotated[float | None, typer.Option(help="Of a pipeline's second expert.")] = None,
) -> None:
    """A video from a run's newest checkpoint, or from a diffusers pipeline of Wan."""
    if out.suffix != ".mp4":
        raise ValueError(f"--out {out}: the file is an mp4, name it {out.with_suffix('.mp4')}")
    if steps is not None and steps < 1:
        raise ValueError(f"--steps {steps} must be at least 1")
    if weights not in ("ema", "raw"):
        raise ValueError(f"--weights {weights} must be ema or raw")
    if (place / "model_index.json").is_file():
        clip = parse_clip(size or "81x480x832")
        from framework.programs import sample as program
        from framework.programs.pipeline import open_pipeline

        pipeline = open_pipeline(place)
        sampler = pipeline.sampler(
            steps=steps or 50, guidance=5.0 if guidance is None else guidance, negative=negative or ""
        )
        request = program.PipelineRequest(prompt, out, seed, clip, sampler, low_guidance, image)
        log.line(program.sample_pipeline(pipeline, request))
        return
    recipe_of_run(place)
    open_checkpoint(str(place))
    if any(value is not None for value in (image, size, negative, low_guidance)):
        raise ValueError(
            f"--image, --size, --negative and --low-guidance are for a diffusers pipeline; {place} is a run"
        )
    from framework.programs.sample import SampleRequest
    from framework.programs.sample import sample as run_sample

    chosen: Literal["ema", "raw"] = "ema" if weights == "ema" else "raw"
    log.line(run_sample(place, SampleRequest(prompt, out, seed, chosen, steps, guidance)))


@app.command()
def verify(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.")],
    overrides: Overrides = None,
    *,
    mesh: Annotated[list[str] | None, typer.Option(help="Mesh to run on, e.g. tp=2,ulysses=2,stage=3.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps; 0 compares the first gradient only.")] = 8,
    dtype: Annotated[str, typer.Option(help="float64, float32 or bfloat16.")] = "float32",
    stage: Annotated[str | None, typer.Option(help="Of a recipe with stages: its name; else the first.")] = None,
    shrink: Annotated[bool, typer.Option(help="The smallest model with the same heads and remainders.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run a recipe on several meshes and compare samples, losses, gradients and weights with the first one."""
    from framework.launch.verify import Dtype, build_variants, judge, report, run_here, stage_file

    dtypes: dict[str, Dtype] = {"float64": "float64", "float32": "float32", "bfloat16": "bfloat16"}
    if dtype not in dtypes:
        raise ValueError(f"--dtype {dtype} must be one of {', '.join(dtypes)}")
    if steps < 0:
        raise ValueError(f"--steps {steps} must be at least 0")
    meshes, steps = mesh or [], 0 if dtype == "float64" else steps
    with tempfile.TemporaryDirectory(prefix="cuboid-verify-") as name:
        folder = Path(name)
        recipe, words, notes = stage_file(recipe, overrides or [], stage, folder)
        if shrink:
            from framework.launch.shrink import shrink_recipe

            recipe, words = shrink_recipe(recipe, words, meshes, folder), []
        variants = build_variants(recipe, words, meshes, dtypes[dtype])
        env = read_environment()
        if env is None:
            found = run_here(variants, folder, steps=steps)
        else:
            from framework.programs.verify import observe_all

            found = observe_all([variant.recipe for variant in variants], env, steps=steps)
    if env is None or env.is_first:
        rows = judge(meshes, found, dtypes[dtype])
        notes = list(dict.fromkeys([*notes, *(note for variant in variants for note in variant.notes)]))
        report(rows, found[0], notes, dtype=dtypes[dtype], as_json=json)
        if not all(row.agrees for row in rows):
            raise typer.Exit(1)


@app.command(hidden=True)
def observe(
    recipe: Annotated[Path, typer.Argument()],
    out: Annotated[Path, typer.Option()],
    steps: Annotated[int, typer.Option()] = 8,
) -> None:
    """One mesh of `verify`, on one of its ranks."""
    env = read_environment()
    if env is None:
        raise ValueError("`cuboid observe` is started by `cuboid verify`")
    from framework.programs.verify import observe as run_observe

    observation = run_observe(load_recipe(recipe, []), env, steps=steps)
    if observation is not None:
        observation.save(out)


def parse_clip(size: str) -> ClipShape:
    """FRAMESxHEIGHTxWIDTH. Raises ValueError for anything else."""
    parts = size.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--size {size} must be FRAMESxHEIGHTxWIDTH, as in 81x480x832")
    return ClipShape(*map(int, parts))


def launch(recipe: Recipe, arguments: list[str]) -> None:
    """Check what can be checked here, then start the local ranks."""
    num_gpus = visible_gpus()
    shape = check_start(recipe, num_ranks=None, num_gpus=num_gpus)
    check_machine(shape, num_gpus=num_gpus)
    raise typer.Exit(run_local(arguments, world_size=shape.world_size))


def train_rank(invocation: Resolved, env: Environment, heart: Heart, stage: int | None) -> None:
    """One rank's part. What can come before torch is imported, which takes seconds, comes before."""
    stop, run = StopFlag(), launched_run(Path(invocation.recipe.run), env)
    dump_on_signal(run, env.rank)
    if run is not None:
        heart.attach(run)
    first, *others = stages_of_rank(invocation, env, stage)
    from framework.programs.train import train as run_train

    verdict = run_train(invocation, env, heart, stop, stage=first)
    for index in others:
        if verdict.outcome == "done":
            heart = Heart(begin=time.time(), writes=env.is_first)
            verdict = run_train(invocation, env, heart, stop, stage=index)
    if env.is_first and verdict.outcome == "stopped":
        saved = (
            "saved" if verdict.step > heart.state.resumed else "before another one, so that there is nothing to save"
        )
        log.line(f"stopped after step {verdict.step}, {saved}; the same command resumes")
    if verdict.signal is not None:
        raise typer.Exit(128 + verdict.signal)


def place() -> Environment | None:
    """This process's rank, None where there is none or its environment makes no sense."""
    try:
        return read_environment()
    except ValueError:
        return None


def fail(error: Exception, heart: Heart) -> int:
    """Say why once: to the launcher if there is one, else on standard error. The exit status."""
    env, beat = place(), heart.state
    failure = failure_of(error, rank=0 if env is None else env.rank, phase=beat.phase, step=beat.step)
    if env is not None and env.failures is not None:
        write_failure(env.failures, failure)
    if env is None or env.failures is None or env.attempt is not None:  # a launcher that claims keeps each rank's log
        log.error(failure.message)
    return failure.status


def run() -> int:
    """Run the command; the exit status. The user's mistakes become one message."""
    env = place()
    heart = Heart(begin=began(env), writes=env is not None and env.is_first)
    try:
        # Without standalone mode typer returns the status of typer.Exit, and None otherwise.
        return int(app(standalone_mode=False, obj=heart) or 0)
    except typer.Abort:
        return 130
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's UsageError, of the copy that typer carries inside
        return fail(error if usage is None else ValueError(usage()), heart)


def began(env: Environment | None) -> float:
    """When this process was started; by its launcher's clock, unless that is ahead."""
    here = process_began()
    return here if env is None or env.launched is None else min(env.launched, here)


def main() -> None:
    """The entry point."""
    status = run()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's teardown: gloo's and the loader's threads may be waiting for a dead peer, and threads of
    # the clouds' clients have ended a process with "terminate called without an active exception".
    os._exit(status)


if __name__ == "__main__":
    main()
