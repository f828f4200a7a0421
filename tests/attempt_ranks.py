"""What the ranks of a supervised attempt do in tests. Imported where the fork server has imported `ranks`."""

import os
import signal
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from framework.checkpoint import writer
from framework.environment import Environment, StopFlag
from framework.failure import kind_of
from framework.heartbeat import Heart
from framework.programs import train as program
from framework.run import Run, Verdict, resolve_invocation


def supervised(env: Environment, recipe: Path, overrides: list[str], attempt: int) -> Verdict:
    """`cuboid train` of an attempt that is claimed already; then a request for stacks."""
    invocation = resolve_invocation(recipe, overrides)
    env = replace(env, run=Path(invocation.recipe.run), attempt=attempt)
    heart = Heart(begin=time.time() - 5, writes=env.is_first)
    heart.attach(Run(Path(invocation.recipe.run), attempt))
    verdict = program.train(invocation, env, heart)
    print("still where the launcher reads it", env.rank, flush=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    return verdict


def hang(env: Environment, recipe: Path, overrides: list[str], step: int) -> tuple[str, float, str]:
    """Rank 1 is stopped in a step, and in a save where one is under way, for its files take a second. What the others
    make of it, and after how many seconds.
    """
    write = writer.write_file

    def slow(*args: Any) -> Any:
        time.sleep(env.rank)
        return write(*args)

    writer.write_file = slow
    original, begun = program.optimizer_step, [0.0]

    def stops(parts: Any, work: Any, **words: Any) -> Any:
        begun[0] = time.monotonic()
        if work.step == step and env.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(parts, work, **words)

    program.optimizer_step = stops
    try:
        program.train(resolve_invocation(recipe, overrides), env)
    except Exception as error:
        return kind_of(error), time.monotonic() - begun[0], traceback.format_exc()
    raise AssertionError("the others went on")


def stopped_early(env: Environment, recipe: Path, overrides: list[str]) -> Verdict:
    """Rank 1 is told to stop before it has begun."""
    stop = StopFlag()
    if env.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR2)
    return program.train(resolve_invocation(recipe, overrides), env, None, stop)
