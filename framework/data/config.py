"""Which shards, which shapes, how many samples a step."""

from dataclasses import dataclass, field
from typing import Literal

from framework.shapes import ClipShape


@dataclass(frozen=True)
class StreamConfig:
    """path: shards of videos or of latents (`cuboid encode`): a directory, s3://, gs:// or az://. weight: its share of
    the samples.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(
                f"data.streams: weight {self.weight} of {self.path!r} must be above 0; leave the stream out instead"
            )


@dataclass(frozen=True)
class BucketConfig:
    """A shape that samples are brought to: frames, height and width in pixels. weight: its share of the samples.

    fps: frames a second after resampling in time; None keeps the native rate. ring, ulysses: the bucket's own degrees
    of context parallelism, within the same dp x cp ranks; None for both leaves them to data.degrees, for one of them 1.
    segment: where in a longer video the clip begins. crop: where the frame of the clip's aspect ratio lies. max_crop:
    the most of a picture that may be cropped away (0 to 1). scores: the least value of scores that a sample needs.
    """

    frames: int
    height: int
    width: int
    weight: float = 1.0
    fps: float | None = None
    ring: int | None = None
    ulysses: int | None = None
    segment: Literal["random", "first", "center"] = "random"
    crop: Literal["center", "random"] = "center"
    max_crop: float = 1.0
    scores: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(
                f"data.buckets: weight {self.weight} of {self.clip} must be above 0; leave the bucket out instead"
            )
        for name in ("ring", "ulysses"):
            degree = getattr(self, name)
            if degree is not None and degree < 1:
                raise ValueError(f"data.buckets: {name}={degree} of {self.clip} must be at least 1")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"data.buckets: fps {self.fps} of {self.clip} must be above 0")
        if not 0 <= self.max_crop <= 1:
            raise ValueError(f"data.buckets: max_crop {self.max_crop} of {self.clip} must lie in [0, 1]")

    @property
    def name(self) -> str:
        """The bucket in words: 17x256x256, or 17x256x256@12.0 with a rate."""
        return str(self.clip) + ("" if self.fps is None else f"@{self.fps}")

    @property
    def clip(self) -> ClipShape:
        return ClipShape(self.frames, self.height, self.width)

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height, width."""
        return self.frames, self.height, self.width


@dataclass(frozen=True)
class CacheConfig:
    """Where data files from an object store are kept on a node, for all its ranks and for later runs.

    path: a local directory; empty: `cuboid-cache-<user>` in the directory for temporary files. gigabytes: its limit
    (1e9 bytes). threads: downloads of one rank at a time. patience: seconds for which a server may be away.
    """

    path: str = ""
    gigabytes: float = 200.0
    threads: int = 4
    patience: float = 180.0

    def __post_init__(self) -> None:
        if self.gigabytes <= 0 or self.threads < 1 or self.patience < 0:
            raise ValueError(
                f"data.cache: gigabytes={self.gigabytes} must be above 0, threads={self.threads} at least 1, "
                f"patience={self.patience} at least 0"
            )


@dataclass(frozen=True)
class DataConfig:
    """streams and buckets: at least one each.

    global_batch: samples a step over all ranks, on average over the buckets (budget.py). rounds: of how many draws of
    a bucket a step consists; more mix the buckets within a step, global_batch is shared out to them. spread: a bucket's
    batch is at most this many times the average. micro_batch: samples of one forward of one rank, of the bucket with
    the most tokens a rank; the others take more, up to as many tokens.

    degrees: `mesh` gives every bucket the mesh's ring and ulysses, `auto` the fewest ranks a sample for which its batch
    deals out evenly. window: shards whose samples are shuffled together. prefetch: micro-batches prepared ahead.
    workers: processes that decode videos, for each rank; 0 decodes in the rank's own process. bad_shards: what a file
    that stays damaged does: `stop` ends the run, `skip` leaves its samples out of their steps and counts them.
    """

    streams: list[StreamConfig] = field(default_factory=list)
    buckets: list[BucketConfig] = field(default_factory=list)
    global_batch: int = 8
    rounds: int = 1
    spread: float = 8.0
    micro_batch: int = 1
    degrees: Literal["mesh", "auto"] = "mesh"
    window: int = 8
    prefetch: int = 2
    workers: int = 0
    bad_shards: Literal["stop", "skip"] = "stop"
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        for name in ("global_batch", "micro_batch", "window", "prefetch", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        if self.workers < 0 or self.spread < 1:
            raise ValueError(f"data.workers={self.workers} must be at least 0, data.spread={self.spread} at least 1")
        if self.global_batch % self.rounds:
            raise ValueError(f"data.rounds={self.rounds} must divide data.global_batch={self.global_batch}")
        names = [bucket.name for bucket in self.buckets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"data.buckets: {', '.join(twice)} stands twice; give one of them the sum of the weights")
