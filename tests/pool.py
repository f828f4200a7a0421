"""Warm ranks: a fork server that has imported torch and DeepSpeed once, so that ranks start in no time.

`run_ranks(function, num_ranks, *args)` runs `function(env, *args)` on every rank and returns what the ranks returned.
Functions must live in an importable module (tests/ranks.py). A rank that raises fails the test with its traceback; a
rank that kills itself is reported by its exit code where the caller expects that.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from framework.environment import Environment
from framework.launch.local import free_port

HERE = Path(__file__).parent
Function = Callable[..., Any]


class RanksFailed(AssertionError):
    """Some rank raised, died or hung."""


def context() -> Any:
    """The fork server's context; the server starts with the first rank and lives as long as the test session."""
    ctx = multiprocessing.get_context("forkserver")
    # CPython 3.11's server doesn't inherit sys.path, only the environment.
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    ctx.set_forkserver_preload(["ranks", "engine_ranks"])
    return ctx


def rank_main(function: Function, env: Environment, port: int, pipe: Connection, args: tuple[Any, ...]) -> None:
    """A rank's process."""
    os.environ |= {
        "RANK": str(env.rank),
        "LOCAL_RANK": str(env.rank),
        "WORLD_SIZE": str(env.world_size),
        "LOCAL_WORLD_SIZE": str(env.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        pipe.send(("ok", function(env, *args)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
    pipe.close()
    os._exit(0)


def start(function: Function, num_ranks: int, args: tuple[Any, ...]) -> tuple[list[Any], list[Connection]]:
    ctx, port = context(), free_port()
    processes, pipes = [], []
    for rank in range(num_ranks):
        ours, theirs = ctx.Pipe(duplex=False)
        env = Environment(rank, num_ranks, rank, None)
        process = ctx.Process(target=rank_main, args=(function, env, port, theirs, args))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    return processes, pipes


def run_ranks(function: Function, num_ranks: int, *args: Any, timeout: float = 180) -> list[Any]:
    """What every rank returned, in rank order."""
    processes, pipes = start(function, num_ranks, args)
    results: dict[int, Any] = {}
    try:
        while len(results) < num_ranks:
            ready = wait([pipe for i, pipe in enumerate(pipes) if i not in results], timeout)
            if not ready:
                raise RanksFailed(f"no rank answered within {timeout} s; {sorted(results)} had")
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    kind, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    processes[rank].join(10)
                    kind, value = "failed", f"it died with exit code {processes[rank].exitcode}"
                if kind == "failed":
                    raise RanksFailed(f"rank {rank} of {num_ranks}: {value}")
                results[rank] = value
    finally:
        stop(processes)
    return [results[rank] for rank in range(num_ranks)]


def run_until_killed(function: Function, num_ranks: int, *args: Any, timeout: float = 180) -> list[int | None]:
    """Exit codes of ranks that are expected to die of SIGKILL."""
    processes, _ = start(function, num_ranks, args)
    try:
        for process in processes:
            process.join(timeout)
        return [process.exitcode for process in processes]
    finally:
        stop(processes)


def stop(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
        process.join()
