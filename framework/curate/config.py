"""How raw videos become shards."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrepareConfig:
    """min_frames: shorter videos are skipped and reported; 5 is the shortest clip with motion at a time stride of 4
    (1 + 4). part_size: samples of one part, which is what an interrupted run does again at most. shard_bytes: size
    limit of one shard file; a sample that is larger by itself gets a shard of its own."""

    min_frames: int = 5
    part_size: int = 256
    shard_bytes: int = 1 << 26

    def __post_init__(self) -> None:
        for name in ("min_frames", "part_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"prepare.{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.shard_bytes < 1 << 32:
            raise ValueError(f"prepare.shard_bytes={self.shard_bytes} must be 1 to {2**32 - 1}: MDS offsets are 32-bit")
