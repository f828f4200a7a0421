"""What an attempt says of itself while it runs: RUN/attempts/0003/heartbeat.json, written by rank 0.

One file is enough to see a hang: ranks wait for each other in every step, so when one stops, rank 0 stops within one.
(A file a rank would be thousands of writes a second on a shared file system.) Which rank it is tell the stack dumps of
all (`stacks/rank-00007.txt`, written on SIGUSR1) and each rank's own compute time, which rank 0 gathers now and then.

The attempt's number is in the file: a heartbeat of an earlier attempt is never taken for this one's. Phases, in the
order in which an attempt goes through them, with the seconds spent in each so far:

    import      from the start of the process to the program's first line
    init        process groups, mesh, claim
    build       model and engine
    load        weights, or the newest checkpoint; data
    first_step  which compiles and warms up
    step        all others
    save        what training waited for its copies
    observe     validation and samples
    end         the last save, and the way out
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from framework.run import Run, write_atomically

Phase = Literal["import", "init", "build", "load", "first_step", "step", "save", "observe", "end"]
STARTING: Final = ("import", "init", "build", "load", "first_step")
FILE: Final = "heartbeat.json"
OLD = 3600.0  # seconds: no process takes so long to its first line
EVERY = 1.0  # seconds between two writes of the same phase, at least


@dataclass(frozen=True)
class Heartbeat:
    """time: when it was written; since: when this step or phase began (Unix seconds). step: optimizer steps done of
    `last`. seconds: phase -> seconds spent in it so far. saved: step of the newest checkpoint of this attempt, at
    saved_at; -1 before any. resumed: the step at which the attempt began. compute: each rank's own seconds for the same
    piece of work, when last measured; waited: each rank's seconds a step of waiting for data, since the measurement
    before. stage: of a run that has any.
    """

    attempt: int
    phase: Phase
    time: float
    since: float
    step: int = 0
    last: int = 0
    resumed: int = 0
    saved: int = -1
    saved_at: float = 0.0
    loss: float | None = None
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    compute: tuple[float, ...] = ()
    waited: tuple[float, ...] = ()
    stage: str = ""


def read_heartbeat(run: Run) -> Heartbeat | None:
    """What the attempt said last, None where it hasn't yet."""
    try:
        fields = json.loads((run.attempt_path / FILE).read_text())
        beat = Heartbeat(**fields | {name: tuple(fields[name]) for name in ("compute", "waited")})
    except (OSError, ValueError, TypeError, KeyError):  # not there yet, or not whole on a file system far away
        return None
    return beat if beat.attempt == run.attempt else None


def process_began() -> float:
    """When this process was started, Unix seconds; now where that can't be told."""
    now = time.time()
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf(
            "SC_CLK_TCK"
        )  # field 22 of proc(5)
    except (OSError, AttributeError, IndexError, ValueError):
        return now
    return now - age if 0 <= age < OLD else now  # in some containers the two clocks aren't the same


class Heart:
    """Beats for an attempt, on rank 0; on other ranks it only keeps the time. begin: of the process, Unix seconds."""

    def __init__(self, *, begin: float, writes: bool) -> None:
        self._writes, self._written = writes, 0.0
        self._run: Run | None = None
        self.state = Heartbeat(attempt=-1, phase="import", time=begin, since=begin)

    def attach(self, run: Run) -> None:
        """From now on write into this attempt."""
        self._run = run
        self.state = replace(self.state, attempt=run.attempt)
        self._write()

    def enter(self, phase: Phase) -> None:
        """Another phase begins."""
        self._pass_to(phase)
        self._write()

    def resumed(self, step: int, *, last: int, stage: str = "") -> None:
        """The attempt goes on from a step."""
        self.state = replace(self.state, resumed=step, step=step, last=last, stage=stage)

    def step(self, step: int, *, seconds: float, tokens_per_second: float, loss: float | None) -> None:
        """A step is done, and the next one begins. Written once a second."""
        self._pass_to("step")
        if loss is not None and not math.isfinite(loss):  # JSON has no such numbers
            loss = None
        self.state = replace(
            self.state, step=step, step_seconds=seconds, tokens_per_second=tokens_per_second, loss=loss
        )
        if time.time() - self._written >= EVERY:
            self._write()

    def saved(self, step: int, at: float) -> None:
        """The newest committed checkpoint."""
        self.state = replace(self.state, saved=step, saved_at=at)

    def measured(self, compute: tuple[float, ...], waited: tuple[float, ...]) -> None:
        """Each rank's own time."""
        self.state = replace(self.state, compute=compute, waited=waited)

    def _pass_to(self, phase: Phase) -> None:
        now, before = time.time(), self.state
        spent = before.seconds.get(before.phase, 0.0) + now - before.since
        self.state = replace(before, phase=phase, since=now, seconds=before.seconds | {before.phase: spent})

    def _write(self) -> None:
        if self._writes and self._run is not None:
            self._written = time.time()
            self.state = replace(self.state, time=self._written)
            write_atomically(
                self._run.attempt_path / FILE, json.dumps(asdict(self.state), allow_nan=False) + "\n", durable=False
            )
