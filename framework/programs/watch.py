"""What watches the loop from inside: heartbeats, each rank's own speed, and how long a collective may take."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from framework.checkpoint.save import Saver
from framework.environment import StopFlag
from framework.heartbeat import Heart, Phase
from framework.metrics import StepRecord
from framework.parallel.collectives import all_reduce_sum
from framework.parallel.mesh import Mesh, set_patience
from framework.programs.config import WatchConfig
from framework.programs.probe import Probe


class Watch:
    """Of one attempt, from its first step on. `stepped` is a collective over the world, where it measures."""

    def __init__(self, heart: Heart, config: WatchConfig, mesh: Mesh, saver: Saver, device: torch.device) -> None:
        """device: of this rank."""
        self._heart, self._config, self._saver = heart, config, saver
        self._probe = Probe(device, mesh.control)
        self._steps, self._waited = 0, 0.0

    def stepped(self, record: StepRecord, *, loss: float | None) -> None:
        """A step is done. loss: the newest that is known."""
        if self._heart.state.phase == "first_step":
            set_patience(self._config.step)
        self._steps, self._waited = self._steps + 1, self._waited + record.data_wait
        if record.step % self._config.probe_every == 0:
            self._heart.measured(*self._probe.gather(self._waited / self._steps))
            self._steps, self._waited = 0, 0.0
        if self._saver.committed is not None:
            self._heart.saved(*self._saver.committed)
        rate = record.tokens / record.seconds
        self._heart.step(record.step, seconds=record.seconds, tokens_per_second=rate, loss=loss)

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """A part of the loop that is no step."""
        self._heart.enter(phase)
        yield
        self._heart.enter("step")

    def end(self) -> None:
        """The last step is done, perhaps the last save too."""
        if self._saver.committed is not None:
            self._heart.saved(*self._saver.committed)
        self._heart.enter("end")


def agreed_signal(stop: StopFlag, mesh: Mesh) -> int | None:
    """The signal that some rank was sent before the first step. A collective over the world."""
    asked = torch.tensor([stop.signal or 0])
    all_reduce_sum(asked, mesh.control, "stop").wait()
    return (stop.signal or signal.SIGTERM) if asked.item() else None
