"""Kill a light run over and over, and look at its store each time.

A cycle: start the ranks of an attempt, on a mesh drawn at random; kill all of them or one, at a moment drawn at random;
compare what is in the store with what has to be there (shadow.py). What is wrong raises Violation.
"""

import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final, Literal

import light
from shadow import Entry, Files, Objects, Scan, Uninterrupted, Violation, check_values, load_by_dcp, scan

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.find import newest
from framework.checkpoint.read import CheckpointReader
from framework.launch.local import GRACE_SECONDS, free_port
from framework.storage.storage import open_storage

SAVED: Final = re.compile(r"saved step-(\d+)-(\d+)\b.* written in ([\d.]+) s")
PATIENCE = 60.0  # seconds until something must have happened
Moment = Literal["no save", "nothing", "some files", "all files, no manifest", "committed"]


class Attempt:
    """The running ranks of one attempt, and what they have told."""

    def __init__(self, context: Any, plan: light.Plan) -> None:
        self.plan, self.begun = plan, time.monotonic()
        self.processes, self._pipes = light.launch(context, plan, free_port())
        self.told: list[tuple[int, str, Any, float]] = []
        self._open = dict(zip(self._pipes, range(plan.num_ranks), strict=True))

    def listen(self, seconds: float) -> None:
        """Take in what the ranks tell for some time, or until all have ended."""
        deadline = time.monotonic() + seconds
        while self._open:
            ready = wait(list(self._open), max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    self.told.append((self._open[pipe], *pipe.recv()))
                except (EOFError, OSError):
                    del self._open[pipe]
            if not ready:
                return

    def listen_until(self, condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        """Take in what they tell until it fulfils a condition."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self._open or time.monotonic() > deadline:
                raise Violation(f"waited in vain for {what}; failures: {self.failures()}; last: {self.told[-3:]}")
            for pipe in wait(list(self._open), 0.2):
                assert isinstance(pipe, Connection)
                try:
                    self.told.append((self._open[pipe], *pipe.recv()))
                except (EOFError, OSError):
                    del self._open[pipe]

    def values(self, kind: str, rank: int = 0) -> list[Any]:
        """What a rank has told of one kind."""
        return [value for r, k, value, _ in self.told if (r, k) == (rank, kind)]

    def saved(self) -> list[tuple[Entry, float]]:
        """The checkpoints that rank 0 has reported as saved, and their seconds."""
        found = []
        for text in self.values("report"):
            if text.startswith("saved "):
                match = SAVED.fullmatch(text)
                assert match is not None, f"{text!r} isn't understood"
                found.append(((int(match[1]), int(match[2])), float(match[3])))
        return found

    def failures(self) -> list[str]:
        """Why ranks failed."""
        return [f"rank {rank}: {value[0]}" for rank, kind, value, _ in self.told if kind == "failed"]

    def seconds_to_first_step(self) -> float | None:
        """From the launch."""
        return next((at - self.begun for rank, kind, _, at in self.told if kind == "step" and rank == 0), None)

    def send(self, number: int, ranks: list[int]) -> None:
        """Send a signal."""
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def end(self, grace: float) -> bool:
        """Wait until all have ended; kill what hasn't by then. Returns whether all ended by themselves."""
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and any(process.is_alive() for process in self.processes):
            self.listen(0.05)
            time.sleep(0.005)
        alone = not any(process.is_alive() for process in self.processes)
        for process in self.processes:
            process.kill()
            process.join()
        self.listen(1.0)
        return alone


@contextmanager
def attempt(context: Any, plan: light.Plan) -> Iterator[Attempt]:
    """An attempt whose ranks are gone afterwards."""
    running = Attempt(context, plan)
    try:
        yield running
    finally:
        for process in running.processes:
            process.kill()
            process.join()


@dataclass
class Tally:
    """What has happened. moments: what a killed save had left. recoveries: seconds from a launch to its first step."""

    kills: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    recoveries: list[float] = field(default_factory=list)
    retries: int = 0
    stragglers: int = 0
    outages: Counter[str] = field(default_factory=Counter)


@dataclass
class Soak:
    """A run that is killed. outage: does something to the store in mid-save, and says what, or None. environment:
    variables of the ranks, besides their own.
    """

    context: Any
    store: str
    objects: Objects
    ranks: int
    random: random.Random
    tally: Tally = field(default_factory=Tally)
    outage: Callable[[], str | None] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    run: Uninterrupted = field(default_factory=Uninterrupted)
    floor: int = 0  # a step that was committed
    typical: float = 0.1  # seconds of a save

    def plan(self, *, steps: int = 0) -> light.Plan:
        """A mesh and a way of saving, at random."""
        config = CheckpointConfig(
            every=self.random.randint(1, 4),
            keep=self.random.randint(1, 3),
            layout=self.random.choice(["own", "even"]),
        )
        return light.Plan(
            self.store,
            num_ranks=self.random.randint(max(1, self.ranks - 1), self.ranks + 1),
            stage=self.random.choice([1, 3]),
            steps=steps,
            pause=self.random.choice([0.0, 0.02, 0.1]),
            checkpoint=config,
            environment=tuple(self.environment.items()),
        )

    def cycle(self) -> str:
        """One attempt, its death and the look at the store; a line of it."""
        plan, before = self.plan(), scan(self.objects)
        with attempt(self.context, plan) as running:
            words = self.wait_for_the_moment(running)
            victims = list(range(plan.num_ranks))
            if self.random.random() < 0.4:
                victims = [self.random.randrange(plan.num_ranks)]
            if running.failures():
                raise Violation(f"failed before the kill: {running.failures()}")
            running.send(signal.SIGKILL, victims)
            alone = running.end(GRACE_SECONDS)
        self.tally.stragglers += not alone
        who = "all" if len(victims) == plan.num_ranks else "one"
        self.tally.kills[who] += 1
        found = scan(self.objects)
        moment = self.moment(running, found)
        self.tally.moments[moment] += 1
        self.check(running, before, found)
        seconds = running.seconds_to_first_step()
        self.tally.recoveries += [] if seconds is None else [seconds]
        commits = len(running.saved())
        return (
            f"{plan.num_ranks} ranks, stage {plan.stage}, {plan.checkpoint.layout}, every {plan.checkpoint.every}, "
            f"keep {plan.checkpoint.keep}: {words}; killed {who}, {moment}; {commits} saves, newest {found.newest}"
            + ("" if alone else "; a rank had to be killed after the grace period")
        )

    def finish(self, steps: int = 7) -> str:
        """A last attempt that nobody kills."""
        plan, before = self.plan(steps=steps), scan(self.objects)
        start = 0 if before.newest is None else before.newest[0]
        with attempt(self.context, plan) as running:
            if not running.end(PATIENCE * 2) or running.failures():
                raise Violation(f"the last attempt failed: {running.failures()}")
        found = scan(self.objects)
        self.check(running, before, found)
        if found.newest is None or found.newest[0] != start + steps:
            raise Violation(f"the last attempt ended at {found.newest}, not at step {start + steps}")
        return f"the last attempt went from step {start} to {found.newest[0]}"

    def wait_for_the_moment(self, running: Attempt) -> str:
        """Until a random moment: of a save in two of three cases."""
        if self.random.random() < 1 / 3:
            seconds = self.random.uniform(0, 3)
            running.listen(seconds)
            return f"at {seconds:.2f} s"
        number, words = self.random.randint(1, 4), ""
        running.listen_until(lambda: len(running.values("save")) >= number, f"save {number}")
        if self.outage is not None and (what := self.outage()) is not None:
            # Nothing fails: the save that was on its way and the next one come to their end.
            self.tally.outages[what] += 1
            words = f"{what} in "
            number += 2
            running.listen_until(lambda: len(running.values("save")) >= number, f"save {number}", PATIENCE * 2)
        delay = self.random.uniform(0, 1.3 * self.typical)
        time.sleep(delay)
        return f"{words}save {number} + {delay:.3f} s"

    def moment(self, running: Attempt, found: Scan) -> Moment:
        """What the last save that had begun had left."""
        begun, attempts = running.values("save"), running.values("claimed")
        finished = {entry[0] for entry, _ in running.saved()}
        if not begun or begun[-1] in finished:
            return "no save"
        entry = (begun[-1], attempts[0])
        files = found.folders.get(entry, [])
        complete = [name for name in files if name.endswith(".distcp")]
        if entry in found.counted:
            return "committed"
        if len(complete) == len(light.STATES) * running.plan.num_ranks:
            return "all files, no manifest"
        return "some files" if files else "nothing"

    def check(self, running: Attempt, before: Scan, found: Scan) -> None:
        """Raises Violation unless this attempt began where it had to and left what it had to."""
        claimed, resumed = running.values("claimed"), running.values("resumed")
        if resumed and resumed[0] != before.newest:
            raise Violation(f"resumed from {resumed[0]}, the newest committed checkpoint was {before.newest}")
        step = 0 if found.newest is None else found.newest[0]
        saved = running.saved()
        if step < max([self.floor, *(entry[0] for entry, _ in saved)]):
            raise Violation(f"the newest is {found.newest}; {max(self.floor, *(e[0] for e, _ in saved))} was committed")
        self.floor = step
        self.typical = sorted([*(seconds for _, seconds in saved), self.typical])[len(saved) // 2]
        self.tally.retries += sum("trying again" in text for text in running.values("report"))
        if len(saved) >= 2:  # retention after the first is over
            self.check_retention(before, found, claimed[0], running.plan.checkpoint.keep)
        self.check_newest(found)

    def check_retention(self, before: Scan, found: Scan, number: int, keep: int) -> None:
        """What the attempt need not keep is gone: one may be on its way in. One that counted before may be on its way
        out, its manifest gone and files still there.
        """
        garbage = [entry for entry in found.folders if entry not in found.counted and entry[1] < number]
        going = [entry for entry in garbage if entry in before.counted]
        if len(going) > 1 or len(garbage) > len(going):
            raise Violation(f"attempt {number} has saved, and left what older ones had left: {garbage}")
        if not min(keep, 2) <= len(found.counted) <= keep + 1:
            raise Violation(f"attempt {number} keeps {keep}, there are {found.counted}")

    def check_newest(self, found: Scan) -> None:
        """The product finds the same newest one, it verifies, and it is the uninterrupted run's."""
        storage = open_storage(self.store)
        there = newest(storage)
        entry = None if there is None else (there.entry.step, there.entry.attempt)
        if entry != found.newest:
            raise Violation(f"the newest is {found.newest}, a resume would take {entry}")
        if there is None:
            return
        reader = CheckpointReader(storage, there)
        reader.check()
        check_values({key: reader.whole(key) for key in reader.tensors}, self.run, there.entry.step)
        if isinstance(self.objects, Files):
            check_values(load_by_dcp(self.objects.path / there.entry.folder), self.run, there.entry.step)


def soak_directory(context: Any, path: Path, *, ranks: int, seed: int) -> Soak:
    """A soak of a directory store."""
    return Soak(context, str(path), Files(path), ranks, random.Random(seed))
