"""The samples of coming micro-batches, begun: rows are read as the store has them, videos go to the decoding processes.

What can't be had is a damaged data file, a row that isn't the index's, or a video that doesn't decode: that ends the
run by its name, or, where the recipe says so, its sample is left out and counted. A server that stays away ends the run
in any case: what it holds isn't damaged.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from framework.batch import Batch
from framework.data.buckets import Stream
from framework.data.builder import BatchBuilder, Begun
from framework.data.patience import BadShard
from framework.data.schedule import MicroBatch, Schedule, Slot, Work
from framework.data.stream import ShardStore, Visit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pending:
    """A micro-batch whose samples are begun, None for what is empty or can't be had. begun: None where another rank
    reads it.
    """

    micro: MicroBatch
    begun: list[Begun | None] | None


@dataclass(frozen=True)
class Coming:
    """A micro-batch whose visits the store was told of. places: of each visit's rows among the slots."""

    step: int
    micro: MicroBatch
    places: list[list[int]] | None
    results: list[list[bytes] | BadShard] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return len(self.results) == max(1, len(self.places or []))


class Reader:
    """What one rank reads with. bad_shards: what becomes of a sample that can't be had."""

    def __init__(
        self,
        streams: Sequence[Stream],
        builder: BatchBuilder,
        store: ShardStore,
        *,
        bad_shards: Literal["stop", "skip"],
    ) -> None:
        self._streams, self._builder, self._store, self._bad_shards = streams, builder, store, bad_shards
        self._told: set[str] = set()

    def steps(
        self, schedule: Schedule, steps: Iterable[int], *, reads: Callable[[int], bool]
    ) -> Iterator[Work | Pending]:
        """Each step and then its micro-batches, as they can be begun. reads: whether this rank reads a bucket.

        Raises OSError naming what can't be had.
        """
        coming: deque[Work | Coming] = deque()

        def visits() -> Iterator[Visit]:
            for step in steps:
                work = schedule[step]
                coming.append(work)
                for micro in work.micro_batches:
                    found = self._visits(micro) if reads(micro.bucket) else None
                    coming.append(Coming(step, micro, None if found is None else [places for _, places in found]))
                    # A micro-batch without anything to read is told of too, so that the store's look ahead ends.
                    yield from [visit for visit, _ in found or []] or [Visit(0, 0, ())]

        for _, result in self._store.follow(visits()):
            while isinstance(work := coming[0], Work):
                coming.popleft()
                yield work
            work.results.append(result)
            if work.is_whole:
                coming.popleft()
                yield Pending(work.micro, None if work.places is None else self._begin(work))

    def finish(self, pending: Pending) -> Batch:
        """The batch of what was begun here."""
        assert pending.begun is not None
        begun = [each if each is None or self._is_decoded(each) else None for each in pending.begun]
        return self._builder.finish(pending.micro, begun)

    def close(self) -> None:
        """End what is under way."""
        self._store.close()
        self._builder.close()

    def _visits(self, micro: MicroBatch) -> list[tuple[Visit, list[int]]]:
        """One visit of each shard that has samples of a micro-batch, and the slots that they are for."""
        places: dict[tuple[int, int], list[int]] = {}
        positions: dict[tuple[int, int], list[int]] = {}
        for index, slot in enumerate(micro.slots):
            if slot is not None:
                shard, position = self._streams[slot.stream].shards.locate(slot.sample)
                places.setdefault((slot.stream, shard), []).append(index)
                positions.setdefault((slot.stream, shard), []).append(position)
        return [(Visit(*at, tuple(positions[at])), places[at]) for at in places]

    def _begin(self, coming: Coming) -> list[Begun | None]:
        begun: list[Begun | None] = [None] * len(coming.micro.slots)
        for places, result in zip(coming.places or [], coming.results, strict=False):
            if isinstance(result, BadShard):
                if not result.damaged:
                    raise result
                self._lose(str(result))
                continue
            for place, row in zip(places, result, strict=True):
                slot = coming.micro.slots[place]
                assert slot is not None
                begun[place] = self._begin_sample(slot, row, coming.step)
        return begun

    def _begin_sample(self, slot: Slot, row: bytes, step: int) -> Begun | None:
        shards = self._streams[slot.stream].shards
        name = f"{shards.url}/{shards.files[shards.locate(slot.sample)[0]].name}"
        try:
            sample = shards.decode(row)
        except Exception as error:  # whatever a row of other bytes makes of the format
            self._lose(f"{name} is damaged: its row of {slot.uid} can't be read ({type(error).__name__})")
            return None
        if sample.info.uid != slot.uid:
            self._lose(f"{name} is damaged: it holds {sample.info.uid} where its index says {slot.uid}")
            return None
        return self._builder.begin(slot, sample, step=step)

    def _is_decoded(self, begun: Begun) -> bool:
        """Whether a sample's video decodes."""
        if begun.frames is None:
            return True
        error = begun.frames.exception()
        if isinstance(error, ValueError):
            self._lose(f"the video {begun.slot.uid} can't be decoded: {error}")
        elif error is not None:
            raise error
        return error is None

    def _lose(self, why: str) -> None:
        """Raises OSError, or warns of what is left out, once."""
        if self._bad_shards == "stop":
            raise OSError(f"{why}; data.bad_shards=skip leaves such samples out")
        if why not in self._told:
            self._told.add(why)
            logger.warning("left out: %s", why)
