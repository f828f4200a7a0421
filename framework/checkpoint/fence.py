"""The fence: of two attempts at one store, the older can't commit any more.

    STORE/run.json                whose store it is
          fence/0003.json         attempt 3 has claimed it: created by one client only
          fence/0003-start.json   {"step": 400, "skipped": [[200, 3]]}: where it began, or went back to, and the data
                                  that it leaves out (data/windows.py)

An attempt claims before it looks for the newest checkpoint, and looks for newer claims before it commits. Between that
look and the commit a newer attempt may claim, list the checkpoints and begin at an earlier one; the late commit is then
told by what the newer attempt has put down: a checkpoint of an older attempt at a step beyond the start of a newer
one doesn't count.
"""

import json
import re
import socket
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from framework.checkpoint.manifest import Entry
from framework.data.windows import Windows
from framework.storage.storage import Storage

FENCE: Final = re.compile(r"fence/(\d{4,})\.json")
OWNER: Final = "run.json"
START: Final = re.compile(r"fence/(\d{4,})-start\.json")


class TakenOver(OSError):
    """A newer attempt has claimed the store."""


@dataclass(frozen=True)
class Fence:
    """The claim of this attempt."""

    storage: Storage
    attempt: int

    def check(self) -> None:
        """Raises TakenOver when a newer attempt has claimed the store."""
        newest = latest_claim(self.storage.list("fence/"))
        if newest > self.attempt:
            raise TakenOver(
                f"attempt {newest} has taken over {self.storage.url}; this one, attempt {self.attempt}, saves nothing "
                "more and stops"
            )

    def begin(self, step: int, skipped: Windows = ()) -> None:
        """Put down that this attempt goes on from `step` and which data it leaves out. Raises TakenOver when a newer
        one has claimed the store.
        """
        self.check()
        start = json.dumps({"step": step, "skipped": skipped})
        self.storage.put(f"fence/{self.attempt:04}-start.json", start.encode())


def own(storage: Storage, identity: str, run: str) -> None:
    """Make a store this run's. Raises ValueError where it is another's. run: its directory, for a person."""
    storage.put_if_absent(OWNER, json.dumps({"id": identity, "run": run}).encode())
    check_owner(storage, identity)


def check_owner(storage: Storage, identity: str | None) -> None:
    """Raises ValueError where the store is another run's. identity: None for a run that there isn't yet."""
    if OWNER not in storage.list(OWNER):
        return
    owner = json.loads(storage.read(OWNER))
    if owner["id"] != identity:
        raise ValueError(
            f"{storage.url} holds the checkpoints of another run, {owner['run']}: give this one a place of its own "
            "(checkpoint.store=...); to begin with that one's weights say init_from"
        )


def latest_claim(names: dict[str, int]) -> int:
    """The newest attempt that has claimed a store, -1 when none has."""
    return max((int(match[1]) for name in names if (match := FENCE.fullmatch(name))), default=-1)


def claim(storage: Storage, *, first: int) -> Fence:
    """Claim the store for the next attempt, numbered `first` or above."""
    number = max(first, latest_claim(storage.list("fence/")) + 1)
    time = datetime.now(UTC).isoformat(timespec="seconds")
    # The id makes it this claim's alone: a store whose answer was lost looks at what is there.
    who = {"host": socket.gethostname(), "time": time, "id": uuid.uuid4().hex}
    while not storage.put_if_absent(f"fence/{number:04}.json", json.dumps(who).encode()):
        number += 1
    return Fence(storage, number)


def read_starts(storage: Storage, names: dict[str, int]) -> dict[int, int]:
    """Attempt -> step where it began, of the attempts that have put it down."""
    found = ((name, START.fullmatch(name)) for name in names)
    return {int(match[1]): int(json.loads(storage.read(name))["step"]) for name, match in found if match}


def read_skipped(storage: Storage) -> Windows | None:
    """The data that the newest attempt to begin leaves out: they may be more than its newest checkpoint knows. None
    where none has begun, or put it down.
    """
    starts = {int(match[1]): name for name in storage.list("fence/") if (match := START.fullmatch(name))}
    if not starts:
        return None
    found = json.loads(storage.read(starts[max(starts)])).get("skipped")
    return None if found is None else tuple((int(at), int(length)) for at, length in found)


def counts(entry: Entry, starts: dict[int, int]) -> bool:
    """Whether a checkpoint was committed before a newer attempt began below it."""
    return all(start >= entry.step for attempt, start in starts.items() if attempt > entry.attempt)
