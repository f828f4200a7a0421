"""Who puts a job back into the queue when the supervisor's own node is lost.

A job that survives the loss of a node (sbatch --no-kill) also survives the loss of its first node, on which its batch
script ran: Slurm keeps it running, headless, for ever. So a task on some other nodes watches: when the supervisor's
file no longer changes and the scheduler has no answer from its node, the job goes back into the queue. They have until
the scheduler declares the node down, and kills the tasks; the first in order that lives acts.
"""

import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from framework.environment import read_environment
from framework.history import Event, History, now
from framework.launch import slurm

ALIVE = "alive"
EVERY = 0.5
SILENT = 4.0  # seconds without a change before the scheduler is asked
TURN = 2.0  # seconds that each deputy leaves to the one before it


def stay_alive(folder: Path) -> None:
    """On a thread of the supervisor: change the file, again and again."""

    def beat() -> None:
        while True:
            with suppress(OSError):
                (folder / ALIVE).write_text(f"{time.time():.1f}\n")
            time.sleep(EVERY)

    threading.Thread(target=beat, name="alive", daemon=True).start()


def stand_by(folder: Path, run: Path, job: str, restart: int, *, node: str, turn: int) -> None:
    """Watch the supervisor on `node`; returns when the job is in the queue again, or when this process is ended. turn:
    this deputy's place among them.
    """
    text, changed = "", time.monotonic()
    while True:
        time.sleep(EVERY)
        with suppress(OSError):
            latest = (folder / ALIVE).read_text()
            if latest != text:
                text, changed = latest, time.monotonic()
        if time.monotonic() - changed > SILENT + turn * TURN and slurm.is_silent(node):
            if slurm.fate(job, restart) == "requeued":
                return
            with suppress(OSError):
                slurm.requeue(job, [])
                reason = f"lost {node}, where the supervisor ran"
                History(run).add(Event("excluded", now(), job=job, node=node, reason=reason))
                History(run).add(Event("requeued", now(), job=job, outcome="retry", reason=reason))
                return


if __name__ == "__main__":
    place = read_environment()
    stand_by(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        sys.argv[3],
        int(sys.argv[4]),
        node=sys.argv[5],
        turn=0 if place is None else place.rank,
    )
