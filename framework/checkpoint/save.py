"""Saving while training goes on.

    save      wait for the save before, copy the live values (staging.py): all that training waits for
    then, on a thread and on process groups of its own, what writer.py does
    at every step   `report` tells what happened, `failed` that the run has to stop

A save that fails on any rank is tried again on all of them, from the copy.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from queue import SimpleQueue

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.fence import Fence
from framework.checkpoint.manifest import Entry, Progress
from framework.checkpoint.staging import Staging
from framework.checkpoint.writer import CheckpointWriter, Failure, Subject
from framework.parallel.collectives import gather_objects
from framework.parallel.fragments import Fragment
from framework.parallel.mesh import Mesh
from framework.run import RunFailure
from framework.storage.storage import Storage

FIRST_WAIT_SECONDS = 1.0  # before the second try; four times as long before each further one


class Saver:
    """Saves a run's checkpoints, one at a time. Making one is a collective over the world."""

    def __init__(
        self,
        storage: Storage,
        config: CheckpointConfig,
        mesh: Mesh,
        *,
        fence: Fence,
        subject: Subject,
        fragments: list[Fragment],
    ) -> None:
        """fragments: the live state of this rank."""
        owned = [fragment for fragment in fragments if fragment.shard.owner]
        self._config, self._attempt = config, fence.attempt
        trained = [f for f in owned if f.shard.trainable]
        everywhere = gather_objects({f.state: f.flat.dtype for f in trained}, mesh.control)
        states = {state: dtype for rank in everywhere for state, dtype in rank.items()}
        self._staging = Staging(trained, subject.shards, states)
        subject = replace(subject, frozen=[f for f in owned if not f.shard.trainable])
        self._writer = CheckpointWriter(storage, config, mesh, fence=fence, subject=subject, staging=self._staging)
        self._thread = ThreadPoolExecutor(1, "save")
        self._running: Future[None] | None = None
        self._events: SimpleQueue[str] = SimpleQueue()
        self._failure: Failure | None = None
        self.committed: tuple[int, float] | None = None  # step of the newest checkpoint of this attempt, Unix seconds

    @property
    def failed(self) -> bool:
        """Whether a save has failed for good."""
        return self._failure is not None

    @property
    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._running is None or self._running.done()

    def save(self, progress: Progress) -> None:
        """Copy the live state, and write it in the background. Waits for the save before. Raises RunFailure."""
        begin = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - begin
        self._staging.copy()
        stalled = time.perf_counter() - begin
        self._running = self._thread.submit(self._persist, progress, stalled, waited)

    def report(self) -> list[str]:
        """What happened since the last call, as lines for a person."""
        lines = []
        while not self._events.empty():
            lines.append(self._events.get())
        return lines

    def wait(self) -> None:
        """Until nothing is being written. Raises RunFailure when a save failed for good."""
        if self._running is not None:
            self._running.result()
            self._running = None
        if self._failure is not None:
            raise RunFailure(self._failure.message)

    def close(self, patience: float | None = None) -> None:
        """Let a save that is on its way end, whatever else has happened. patience: seconds to wait for it at most; it
        may never end where another rank hangs.
        """
        self._thread.shutdown(wait=False)
        if self._running is not None:
            wait([self._running], timeout=patience)

    def _persist(self, progress: Progress, stalled: float, waited: float) -> None:
        """On the thread: write, commit, try again."""
        begin, entry = time.perf_counter(), Entry(progress.step, self._attempt)
        for number in range(self._config.retries + 1):
            try:
                failure = self._writer.write(entry, progress)
            except Exception as error:  # another rank is gone: the loop will hear of it too
                failure = Failure(f"saving {entry.folder} broke off: {type(error).__name__}: {error}", final=True)
            if failure is None:
                self.committed = progress.step, time.time()
                before = f" ({waited:.3f} s of it for the save before)" if waited > 0.001 else ""
                seconds = time.perf_counter() - begin
                self._events.put(
                    f"saved {entry.folder}, {self._writer.num_bytes / 1e9:.3g} GB: training waited {stalled:.3f} s"
                    f"{before}, written in {seconds:.2f} s"
                )
                return
            if failure.final or number == self._config.retries:
                self._failure = Failure(f"{failure.message}; earlier checkpoints are untouched")
                return
            again = f"trying again, {number + 1} of {self._config.retries}"
            self._events.put(f"{failure.message}; {again}")
            time.sleep(FIRST_WAIT_SECONDS * 4**number)
