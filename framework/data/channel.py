"""One rank of a replica reads and decodes; the others of the replica receive the batch from it.

In the background, on groups of its own (gloo), so that nothing of it waits for the model's collectives or is waited for
by them. All ranks of a replica take the same micro-batches in the same order, so nothing but tensors is sent.
"""

from collections.abc import Callable, Sequence

from framework.batch import Batch
from framework.data.builder import BatchBuilder, BatchTensors
from framework.data.schedule import MicroBatch
from framework.parallel.collectives import broadcast_tensor
from framework.parallel.mesh import Group


class Channel:
    """The way of batches to the ranks of a replica. groups: the replica of each bucket."""

    def __init__(self, builder: BatchBuilder, groups: Sequence[Group]) -> None:
        self._builder, self._groups = builder, groups

    def reads(self, bucket: int) -> bool:
        """Whether this rank is the one that reads a bucket's samples."""
        return self._groups[bucket].index == 0

    def share(self, micro: MicroBatch, read: Callable[[], Batch]) -> Batch:
        """The batch of a micro-batch on all ranks of its replica; one of them reads it."""
        if not self.reads(micro.bucket):
            tensors = self._builder.blank(micro)
            self._fill(tensors, self._groups[micro.bucket])
            return self._builder.assemble(micro, tensors)
        batch = read()
        condition = batch.condition
        tensors = BatchTensors(batch.latents, batch.weights, condition.text, condition.text_mask)
        self._fill(tensors, self._groups[micro.bucket])
        return batch

    def _fill(self, tensors: BatchTensors, group: Group) -> None:
        """Fill the tensors of all ranks with those of the first."""
        if group.size > 1:
            parts = [tensors.latents, tensors.weights, tensors.text]
            for part in parts if tensors.text_mask is None else [*parts, tensors.text_mask]:
                broadcast_tensor(part, group, "data")
