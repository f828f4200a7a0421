"""Which shards, which shapes, how many samples a step."""

from dataclasses import dataclass, field

from framework.shapes import ClipShape


@dataclass(frozen=True)
class StreamConfig:
    """path: a directory of shards, of videos or of latents (`cuboid encode`). weight: its share of the samples."""

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
    of context parallelism, within the same dp x cp ranks; None for both takes the mesh's, for one of them 1.
    """

    frames: int
    height: int
    width: int
    weight: float = 1.0
    fps: float | None = None
    ring: int | None = None
    ulysses: int | None = None

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

    @property
    def name(self) -> str:
        """The bucket in words: 17x256x256, or 17x256x256@12.0 with a rate."""
        return str(self.clip) + ("" if self.fps is None else f"@{self.fps}")

    @property
    def clip(self) -> ClipShape:
        return ClipShape(self.frames, self.height, self.width)


@dataclass(frozen=True)
class DataConfig:
    """streams and buckets: at least one each. global_batch: samples a step over all ranks. micro_batch: samples of one
    forward of one rank. window: shards whose samples are shuffled together. prefetch: micro-batches prepared ahead.
    """

    streams: list[StreamConfig] = field(default_factory=list)
    buckets: list[BucketConfig] = field(default_factory=list)
    global_batch: int = 8
    micro_batch: int = 1
    window: int = 8
    prefetch: int = 2

    def __post_init__(self) -> None:
        for name in ("global_batch", "micro_batch", "window", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        names = [bucket.name for bucket in self.buckets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"data.buckets: {', '.join(twice)} stands twice; give one of them the sum of the weights")
