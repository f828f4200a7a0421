"""How long a part of an attempt may take before it counts as hung."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WatchConfig:
    """Seconds without an end, after which ranks are taken to hang: of everything up to the first step's end (start), of
    a step, validation and samples included (step), and of a save (save). After these a collective fails on the ranks
    that wait in it, and a supervisor ends the attempt. probe_every: steps between two measurements of each rank's own
    speed.
    """

    start: float = 1800.0
    step: float = 900.0
    save: float = 1800.0
    probe_every: int = 100

    def __post_init__(self) -> None:
        for name in ("start", "step", "save"):
            if not getattr(self, name) > 0:
                raise ValueError(f"watch.{name}={getattr(self, name)} must be above 0")
        if self.probe_every < 1:
            raise ValueError(f"watch.probe_every={self.probe_every} must be at least 1")
