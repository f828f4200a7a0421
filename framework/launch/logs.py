"""The logs of a run, one after the other: those of a rank by attempt, or those of the supervisor by job."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from framework.history import JOBS

EVERY: Final = 0.5  # seconds between two looks for more
CHUNK: Final = 1 << 20


@dataclass(frozen=True)
class LogRequest:
    """rank: None for the supervisor's own log. attempt: this one alone; by default the newest, and those after it."""

    rank: int | None = 0
    attempt: int | None = None


def log_files(run: Path, request: LogRequest) -> list[Path]:
    """What is there, oldest first. The scheduler's step and the ranks themselves write rank-7.log, others
    rank-00007.log.
    """
    if request.rank is None:
        found = (run / JOBS).glob("*/*.log")  # jobs/0001/4242.log: the second submission, which is job 4242
        return sorted((path for path in found if path.is_file()), key=lambda path: (path.parent.name, path.name))
    folders = sorted(path for path in (run / "attempts").glob("*") if path.name.isdecimal())
    if request.attempt is not None:
        folders = [path for path in folders if int(path.name) == request.attempt]
    names = (f"rank-{request.rank}.log", f"rank-{request.rank:05}.log")
    return [path for folder in folders for name in names if (path := folder / "logs" / name).is_file()]


def check_request(run: Path, request: LogRequest) -> None:
    """Raises ValueError where nothing of that kind is there, and says what is."""
    if log_files(run, request):
        return
    if request.rank is None:
        raise ValueError(f"{run} has no supervisor's log: it was never started by a job script")
    attempts = sorted(int(path.name) for path in (run / "attempts").glob("*") if path.name.isdecimal())
    if request.attempt is not None and request.attempt not in attempts:
        there = f"it has {', '.join(map(str, attempts))}" if attempts else "it has none yet"
        raise ValueError(f"--attempt {request.attempt}: {run} has no such attempt; {there}")
    names = {path.stem.removeprefix("rank-") for path in (run / "attempts").glob("*/logs/rank-*.log")}
    ranks = sorted(int(name) for name in names if name.isdecimal())
    there = f"those of the ranks {ranks[0]} to {ranks[-1]} are there" if ranks else "no rank has written one"
    hint = "; rank 0 of a run that was started by hand writes to its terminal" if request.rank == 0 else ""
    raise ValueError(f"{run} has no log of rank {request.rank}: {there}{hint}")


def print_log(run: Path, request: LogRequest) -> Iterator[str]:
    """The lines of the newest log that a request means."""
    files = log_files(run, request)
    if files:
        yield from Tail(files[-1]).rest()


def follow_log(run: Path, request: LogRequest, *, is_over: Callable[[], bool], every: float = EVERY) -> Iterator[str]:
    """The same, then what is added, on into the next attempt or job, until the run is over. Where the file changes a
    line says so.
    """
    files = log_files(run, request)
    tail = Tail(files[-1]) if files else None
    if tail is not None:
        yield tail.title(run)
    while True:
        over = is_over()  # before the read, so that what came before the end is read
        if tail is not None:
            yield from tail.more()
        files = log_files(run, request)
        newer = files[files.index(tail.path) + 1 :] if tail is not None and tail.path in files else files
        if newer:
            if tail is not None:
                yield from tail.rest()
            tail = Tail(newer[0])
            yield tail.title(run)
            continue
        if over:
            if tail is not None:
                yield from tail.rest()
            return
        time.sleep(every)


class Tail:
    """Whole lines of a growing file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at, self._left = 0, b""

    def title(self, run: Path) -> str:
        """A line that says which file comes."""
        return f"==> {self.path.relative_to(run)} <=="

    def more(self) -> Iterator[str]:
        """The lines that have been finished since."""
        with self.path.open("rb") as file:
            file.seek(self._at)
            while chunk := file.read(CHUNK):
                self._at += len(chunk)
                *lines, self._left = (self._left + chunk).split(b"\n")
                for line in lines:
                    yield line.decode(errors="replace")

    def rest(self) -> Iterator[str]:
        """The same, and a last line without its end."""
        yield from self.more()
        if self._left:
            yield self._left.decode(errors="replace")
            self._left = b""
