"""The frozen records that pass between stages.

Shapes: B samples, T H W frames and pixels, c t h w latents, S tokens, P values a patch, L text tokens, D text width.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from framework.kernels.pattern import EVERY_TOKEN, TokenPattern
from framework.parallel.mesh import Mesh
from framework.shapes import ClipShape, LatentShape


@dataclass(frozen=True)
class Condition:
    """What the model is told beside the noised latents.

    text: `B L D`. text_mask: `B L` bool, True = attend; None attends to all. image: `B N Di` image tokens, or None.
    """

    text: Tensor
    text_mask: Tensor | None = None
    image: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    latents: `B c t h w` float32. weights: `B`, 0 for empty slots. draws and uids: B strings. positions: each sample's
    place among the step's `bucket_samples` samples of its bucket, -1 for empty slots. bucket: its place in the recipe.
    lost: samples whose data file is damaged, empty slots now, on the rank that read them.
    """

    latents: Tensor
    weights: Tensor
    condition: Condition
    uids: tuple[str, ...]
    draws: tuple[str, ...]
    positions: tuple[int, ...]
    bucket_samples: int
    bucket: int
    clip: ClipShape
    latent: LatentShape
    lost: int = 0


@dataclass(frozen=True)
class Noised:
    """A batch after noising: latents x_sigma and target `B c t h w`, timesteps `B t` (0..1000, one for all or one a
    frame of patches), weights `B`.
    """

    latents: Tensor
    target: Tensor
    timesteps: Tensor
    weights: Tensor


@dataclass(frozen=True)
class TokenLayout:
    """How the token axis lies on the ranks of a replica, which hold equal contiguous parts in rank order.

    valid: the number of real tokens of every rank, the rest of its part is padding. index: this rank's place. mesh:
    whose replica, ring, ulysses and tp these are. pattern: which of the tokens attend to each other.
    """

    valid: tuple[int, ...]
    index: int
    mesh: Mesh
    pattern: TokenPattern = EVERY_TOKEN

    @property
    def num_valid(self) -> int:
        return self.valid[self.index]

    @property
    def ring_valid(self) -> tuple[int, ...]:
        """Real tokens of every rank of the ring, after tp and Ulysses have gathered theirs."""
        size = len(self.valid) // self.mesh.ring.size
        return tuple(sum(self.valid[i : i + size]) for i in range(0, len(self.valid), size))


@dataclass(frozen=True)
class Tokens:
    """What the transformer eats: one rank's part of the tokens of a micro-batch.

    patches: `B S P`. target: `B S Q` in the order of the model's output, None when sampling. positions: `B S 3` int64
    (latent frame, row, column). frame_index: `B S` int64 into the frames of timesteps, without effect where t is 1.
    timesteps: `B t`. weights: `B`.
    """

    patches: Tensor
    target: Tensor | None
    positions: Tensor
    frame_index: Tensor
    timesteps: Tensor
    weights: Tensor
    layout: TokenLayout


class Score(Protocol):
    """What becomes of a prediction, such as its loss."""

    def __call__(self, prediction_bsq: Tensor, first: int, /) -> Tensor:
        """Of the tokens from this rank's `first` on: `B`; the whole's is the sum over its parts."""
        ...


class Predictor(Protocol):
    """Whatever holds the transformer's weights: an engine, or a model in one process."""

    def __call__(self, tokens: Tokens, condition: Condition) -> Tensor:
        """The velocity on patches, `B S Q` in the order of the model's output."""
        ...
