"""Watching a step: how long it has been silent, and what its ranks were doing then.

A start, a step and a save each have a limit of their own (`watch` in the recipe). What counts is the heartbeat's own
`since`, of this attempt; before there is one, the moment of the launch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from framework.heartbeat import STARTING, Heartbeat, read_heartbeat
from framework.launch.step import Step
from framework.launch.stragglers import SlowNode, Stragglers
from framework.launch.verdict import Hang, slow_words
from framework.log import line
from framework.programs.config import WatchConfig
from framework.run import Run
from framework.stacks import stack_file

LOOK = 0.1  # seconds between two looks at the step's client
READ = 0.5  # seconds between two readings of the run directory
DUMP = 3.0  # seconds that ranks have to write their stacks
LINGER = 15.0  # seconds that a step may take to end once a rank has said why it failed


def limit_of(beat: Heartbeat | None, watch: WatchConfig) -> tuple[str, float]:
    """(phase, seconds that it may last)."""
    phase = "import" if beat is None else beat.phase
    if phase in STARTING:
        return phase, watch.start
    return phase, watch.step if phase in ("step", "observe") else watch.save


def position(beat: Heartbeat | None) -> tuple[object, ...]:
    """What moves as long as nothing hangs. A start is one piece, from the launch on; after a rollback it has phases."""
    if beat is None or (beat.phase in STARTING and "step" not in beat.seconds):
        return ("start",)
    return beat.phase, beat.since, beat.step


@dataclass
class Seen:
    """What was seen of a step. slow: nodes that were slow for long."""

    hang: Hang | None = None
    slow: SlowNode | None = None


def watch_step(
    step: Step, run: Run, watch: WatchConfig, stragglers: Stragglers, *, swap: bool, look: Callable[[], None]
) -> Seen:
    """Wait until a step has ended. One that hangs, or lingers after a failure, is ended. swap: whether ranks are to
    save and end for the sake of a slow node. look: called twice a second.
    """
    read, failed, moved = 0.0, 0.0, time.monotonic()
    beat: Heartbeat | None = None
    seen = Seen()
    while step.client.poll() is None:
        time.sleep(LOOK)
        now = time.monotonic()  # the clocks of nodes, and their jumps, don't count
        if now - read < READ:
            continue
        look()
        before, read, beat = position(beat), now, read_heartbeat(run) or beat
        moved = now if position(beat) != before else moved
        if beat is not None and (slow := stragglers.see(beat.compute)) is not None:
            seen.slow = slow
            line(slow_words(slow))
            if swap:
                step.signal("USR2")
        if not failed and any(run.failures.iterdir()):
            failed = now
        if failed and now - failed > LINGER:
            line(f"a rank failed {LINGER:g} s ago and others haven't ended: ending them")
            step.end()
            return seen
        phase, limit = limit_of(beat, watch)
        quiet = now - moved
        if quiet > limit:
            line(f"nothing heard for {quiet:.1f} s in phase {phase}, its limit is {limit:g}: asking for stacks")
            silent = dump(step, run)
            step.end()
            seen.hang = Hang(phase, quiet, limit, MappingProxyType({rank: step.node_of(rank) for rank in silent}))
            return seen
    return seen


def dump(step: Step, run: Run) -> list[int]:
    """Have every rank write its stacks; the ranks that didn't."""
    began = time.time()
    step.signal("USR1")
    files = {rank: stack_file(run, rank) for rank in range(step.num_tasks)}
    while (left := [rank for rank, file in files.items() if not written(file, began)]) and time.time() < began + DUMP:
        time.sleep(LOOK)
    return left


def written(file: Path, since: float) -> bool:
    """Whether a file holds something that was written after a moment (the file server's clock may be a second off)."""
    try:
        status = file.stat()
    except OSError:
        return False
    return status.st_size > 0 and status.st_mtime > since - 2.0
