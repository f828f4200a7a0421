"""How raw videos become shards, and shards of videos shards of latents."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PrepareConfig:
    """min_frames: shorter videos are skipped and reported; 5 is the shortest clip with motion at a time stride of 4
    (1 + 4). part_size: samples of one part, which is what an interrupted run does again at most. shard_bytes: size
    limit of one shard file; a sample that is larger by itself gets a shard of its own."""

    min_frames: int = 5
    part_size: int = 256
    shard_bytes: int = 1 << 26

    def __post_init__(self) -> None:
        if self.min_frames < 1:
            raise ValueError(f"prepare.min_frames={self.min_frames} must be at least 1")
        check_sizes("prepare", self.part_size, self.shard_bytes)


@dataclass(frozen=True)
class EncodeConfig:
    """dtype: of the stored latents and texts. batch: segments that the tokenizer takes at once; above 1 their latents
    may differ in their last bits by which they were together. part_size, shard_bytes: as in PrepareConfig.
    """

    dtype: Literal["float16", "float32"] = "float16"
    batch: int = 1
    part_size: int = 256
    shard_bytes: int = 1 << 26

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"encode.batch={self.batch} must be at least 1")
        check_sizes("encode", self.part_size, self.shard_bytes)


def check_sizes(name: str, part_size: int, shard_bytes: int) -> None:
    """Raises ValueError for sizes that no part or shard can have."""
    if part_size < 1:
        raise ValueError(f"{name}.part_size={part_size} must be at least 1")
    if not 1 <= shard_bytes < 1 << 32:
        raise ValueError(f"{name}.shard_bytes={shard_bytes} must be 1 to {2**32 - 1}: MDS offsets are 32-bit")
