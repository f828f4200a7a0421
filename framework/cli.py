"""The `cuboid` command: one thin function for each verb.

Exit status: 0 done; 1 failed; 2 the user's mistake, with one message; 128 + n stopped by signal n, everything saved.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from framework import log
from framework.environment import Environment, read_environment, visible_gpus
from framework.launch.local import run_local, write_failure
from framework.parallel.config import resolve_mesh
from framework.recipe import load_recipe
from framework.run import Resolved, RunFailure, resolve_invocation

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to set.")]


@app.callback()
def cuboid() -> None:
    """Train video diffusion transformers with explicit parallelism."""


@app.command()
def prepare(
    videos: Annotated[Path, typer.Argument(help="Folder of videos.")],
    captions: Annotated[Path, typer.Option(help="JSONL: file, caption or captions, source, licence, scores.")],
    out: Annotated[Path, typer.Option(help="Directory of shards to write.")],
    recipe: Annotated[Path | None, typer.Option(help="Skip clips shorter than any bucket of this recipe.")] = None,
    min_frames: Annotated[int, typer.Option(help="Skip clips of fewer frames.")] = 5,
) -> None:
    """Videos and captions -> shards. Goes on where it was stopped."""
    from framework.curate.config import PrepareConfig
    from framework.curate.prepare import prepare as run_prepare
    from framework.curate.report import prepare_lines

    if recipe is not None:
        min_frames = min(bucket.frames for bucket in load_recipe(recipe, []).data.buckets)
    report = run_prepare(videos, captions, out, config=PrepareConfig(min_frames=min_frames))
    for text in prepare_lines(report):
        log.line(text)


@app.command()
def encode(
    recipe: Annotated[Path, typer.Argument(help="Recipe: its tokenizer and buckets are used.")],
    overrides: Overrides = None,
    videos: Annotated[Path, typer.Option(help="Directory of video shards.")] = Path("."),
    out: Annotated[Path, typer.Option(help="Directory of latent shards to write.")] = Path("latents"),
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
) -> None:
    """Video shards -> latent shards, so that training neither decodes nor encodes."""
    loaded = load_recipe(recipe, overrides or [])
    if dtype not in ("float16", "float32"):
        raise ValueError(f"--dtype {dtype} must be float16 or float32")
    from framework.programs.encode import encode as run_encode

    for text in run_encode(loaded, videos, out, dtype="float16" if dtype == "float16" else "float32"):
        log.line(text)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.")],
    overrides: Overrides = None,
) -> None:
    """Train, or resume what the run directory holds. Starts the local ranks itself unless RANK and WORLD_SIZE are
    set.
    """
    invocation = resolve_invocation(recipe, overrides or [])
    env = read_environment()
    if env is None:
        launch(invocation, ["train", str(recipe), *(overrides or [])])
    else:
        train_rank(invocation, env)


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    prompt: Annotated[str, typer.Option(help="Caption.")],
    out: Annotated[Path, typer.Option(help="The mp4 to write; a contact sheet lands beside it.")],
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
    steps: Annotated[int | None, typer.Option(help="Euler steps; the recipe's by default.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the recipe's by default.")] = None,
) -> None:
    """A video from a run's newest checkpoint."""
    from framework.run import recipe_of_run

    recipe_of_run(run)
    if weights not in ("ema", "raw"):
        raise ValueError(f"--weights {weights} must be ema or raw")
    from framework.programs.sample import SampleRequest
    from framework.programs.sample import sample as run_sample

    chosen: Literal["ema", "raw"] = "ema" if weights == "ema" else "raw"
    log.line(run_sample(run, SampleRequest(prompt, out, seed, chosen, steps, guidance)))


def launch(invocation: Resolved, arguments: list[str]) -> None:
    """Check what can be checked here, then start the local ranks."""
    from framework.data.buckets import bucket_views, open_streams
    from framework.tokenizer.config import tokenizer_version

    recipe = invocation.recipe
    shape = resolve_mesh(recipe.mesh, num_ranks=None, num_gpus=visible_gpus())
    streams = open_streams(recipe.data.streams, tokenizer_version=tokenizer_version(recipe.tokenizer))
    bucket_views(streams, recipe.data.buckets)
    raise typer.Exit(run_local(arguments, world_size=shape.world_size))


def train_rank(invocation: Resolved, env: Environment) -> None:
    """One rank's part."""
    from framework.programs.train import train as run_train

    verdict = run_train(invocation, env)
    if env.is_first and verdict.outcome == "stopped":
        log.line(f"stopped after step {verdict.step}, saved; the same command resumes")
    if verdict.signal is not None:
        raise typer.Exit(128 + verdict.signal)


def fail(message: str, status: int) -> None:
    """Say why once: to the launcher if there is one, else on standard error."""
    env = read_environment()
    if env is not None and env.failures is not None:
        write_failure(env.failures, env.rank, message, status)
    else:
        log.error(message)


def main() -> None:
    """The entry point: turns the user's mistakes into one message and exit status 2."""
    try:
        app(standalone_mode=False)
        status = 0
    except typer.Exit as exit_:
        status = exit_.exit_code
    except typer.Abort:
        status = 130
    except ValueError as error:
        fail(f"error: {error}", 2)
        status = 2
    except RunFailure as error:
        fail(f"error: {error}", 1)
        status = 1
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            fail(f"error: {error.format_message()}", 2)
            status = 2
        else:
            fail(traceback.format_exc(), 1)
            status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if read_environment() is not None:
        # Ranks leave without the interpreter's teardown: gloo's and the loader's threads may be waiting for a dead
        # peer.
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
