"""What keeps a bad step out of the weights, and how often a run may go back for it.

    limit of a step's gradient norm = guard.spike * median(norms of the last guard.window good updates)

Until so many were good there is no limit. The norms are saved with the progress, so that a resumed run judges as the
uninterrupted one.

`ReplicaCheck` compares what every tensor-parallel rank holds alike: after a bit that fell over, or a sum that one rank
left out, such weights go their own ways, and no loss says so.
"""

import math
from collections import Counter
from dataclasses import dataclass
from statistics import median

import torch
import xxhash
from torch import Tensor

from framework.checkpoint.manifest import Progress
from framework.config import GuardConfig, TrainConfig
from framework.parallel.collectives import gather_objects
from framework.parallel.fragments import Fragment
from framework.parallel.mesh import Mesh
from framework.parallel.zero.engine import StepStats
from framework.run import BadNumbers, RunFailure

Uids = tuple[str, ...]


def norm_limit(config: GuardConfig, norms: tuple[float, ...]) -> float:
    """The norm above which an update is skipped. norms: of the last good updates."""
    if not config.spike or len(norms) < config.window:
        return math.inf
    return config.spike * median(norms[-config.window :]) or math.inf


def with_norm(config: GuardConfig, norms: tuple[float, ...], stats: StepStats) -> tuple[float, ...]:
    """The norms to judge the next step by."""
    if not config.spike:
        return ()
    return norms if stats.skipped else (*norms, stats.grad_norm)[-config.window :]


def suspects_of(losses: list[tuple[Tensor, Uids]], mesh: Mesh) -> Uids:
    """The samples of all ranks whose loss isn't finite; every sample of the step where all losses are, as after a
    spike: a large loss may be one of much noise. A collective: the gradient's norm is global, so all ranks skip
    together.
    """
    here = [(bool(torch.isfinite(loss)), [uid for uid in uids if uid]) for loss, uids in losses]
    everywhere = [item for rank in gather_objects(here, mesh.control) for item in rank]
    bad = [uid for finite, uids in everywhere if not finite for uid in uids]
    return tuple(sorted(bad or [uid for _, uids in everywhere for uid in uids]))


@dataclass(frozen=True)
class Ended:
    """How the steps ended. signal: that stopped them. saved: the step of the newest checkpoint, 0 without one. bad: too
    many updates in a row were skipped.
    """

    progress: Progress
    signal: int | None
    saved: int
    bad: bool = False


def check_rollbacks(ended: Ended, guard: GuardConfig, config: TrainConfig) -> None:
    """Raises BadNumbers where a run has gone back to its newest checkpoint often enough."""
    used = sum(at == ended.saved for at, _ in ended.progress.skipped)
    if used >= guard.rollbacks:
        place = f"the checkpoint of step {ended.saved}" if ended.saved else "the initial weights"
        raise BadNumbers(
            f"up to step {ended.progress.step}, {ended.progress.bad_steps} updates in a row were skipped "
            f"(train.max_bad_steps={config.max_bad_steps}), and the run has gone back to {place} {used} times "
            f"(guard.rollbacks={guard.rollbacks}): metrics.jsonl names the samples; lower optimizer.lr, raise "
            "guard.spike where that skipped them, or raise guard.rollbacks to pass over more data"
        )


class ReplicaCheck:
    """Hashes of the master weights that tp doesn't split. Making one is a collective where tp has more than one rank.

    Partitions of ranks with uneven shards begin at different places; what all ranks of a tp group hold is compared.
    """

    def __init__(self, fragments: list[Fragment], mesh: Mesh, *, every: int) -> None:
        """fragments: of the engine. every: steps between comparisons, 0 = none."""
        self._mesh, self._every = mesh, every if mesh.tp.size > 1 else 0
        self._parts: dict[str, Tensor] = {}
        if not self._every:
            return
        whole = [f for f in fragments if f.state == "model" and f.shard.trainable]
        held = {f.shard.name: f for f in whole if f.shard.shape == f.shard.global_shape}
        ranges = {name: (f.start, f.start + f.flat.numel()) for name, f in held.items()}
        everywhere = gather_objects(ranges, mesh.control)
        group = [everywhere[rank] for rank in mesh.tp.ranks]
        for name, fragment in held.items():
            if all(name in each for each in group):
                first, last = max(each[name][0] for each in group), min(each[name][1] for each in group)
                if last > first:
                    self._parts[name] = fragment.flat.narrow(0, first - fragment.start, last - first)

    def is_due(self, step: int) -> bool:
        """Whether they are compared after this step."""
        return self._every > 0 and step % self._every == 0

    def check(self, step: int) -> None:
        """Compare them, where it is due. A collective; raises RunFailure, the same on every rank."""
        if not self.is_due(step):
            return
        hashes = {name: hash_of(part) for name, part in self._parts.items()}
        together = xxhash.xxh3_64_hexdigest("".join(hashes.values()))
        seen = gather_objects((self._mesh.tp.ranks, together), self._mesh.control)
        if len(set(seen)) == len({ranks for ranks, _ in seen}):
            return
        everywhere = gather_objects(hashes, self._mesh.control)
        found = [text for group in dict.fromkeys(ranks for ranks, _ in seen) for text in differing(everywhere, group)]
        raise RunFailure(
            f"after step {step}, weights that tensor parallelism doesn't split aren't the same on all its ranks: "
            f"{'; '.join(found[:8])}{f'; and {len(found) - 8} more' if len(found) > 8 else ''}. Resume from the "
            "checkpoint before, without the node of that rank if it happens again; guard.hash_every=0 doesn't look"
        )


def differing(hashes: list[dict[str, str]], group: tuple[int, ...]) -> list[str]:
    """The tensors that aren't the same in a group of ranks, and who differs from most; all where there is no most.

    hashes: of every rank.
    """
    found = []
    for name in hashes[group[0]]:
        (most, count), *others = Counter(hashes[rank][name] for rank in group).most_common()
        if others:
            tied = others[0][1] == count
            ranks = [str(rank) for rank in group if tied or hashes[rank][name] != most]
            found.append(f"{name} on {'ranks' if len(ranks) > 1 else 'rank'} {', '.join(ranks)}")
    return found


def hash_of(tensor: Tensor) -> str:
    """XXH3 (64 bits, hexadecimal) of a flat tensor's bytes."""
    return xxhash.xxh3_64_hexdigest(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
