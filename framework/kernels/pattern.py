"""Which tokens attend to which, as data: plain integers, no tensor and no group.

A clip's tokens run frame by frame, so a frame is a contiguous range of them, and what a token attends to follows from
its frame f alone:

    full           every frame
    block_causal   frames [0, b (f // b + 1)):  those of its own block of b frames and of earlier ones
    window         frames with |f - g| <= w, and the first m frames, the sinks

A sink is a frame that all others attend to; its own queries see their window and the other sinks, like everybody's
(StreamingLLM, arXiv 2309.17453: sinks are keys), so that the cost grows with the clip's length and not with its square.
`frame` is a frame of tokens: a latent frame where the patch size in time is 1.

Spans are (first, one past the last).
"""

from dataclasses import dataclass
from typing import Final

from framework.kernels.config import PatternConfig

Span = tuple[int, int]


@dataclass(frozen=True)
class TokenPattern:
    """A pattern on the tokens of a clip. frame_tokens: tokens of a frame; without effect on `full`."""

    config: PatternConfig
    frame_tokens: int


@dataclass(frozen=True)
class Reach:
    """Queries that attend to the same keys: spans of tokens, those of the keys in order and apart."""

    queries: Span
    keys: tuple[Span, ...]

    @property
    def num_pairs(self) -> int:
        """Of a query with a key."""
        return (self.queries[1] - self.queries[0]) * sum(stop - start for start, stop in self.keys)


EVERY_TOKEN: Final = TokenPattern(PatternConfig(), frame_tokens=1)


def frame_keys(pattern: PatternConfig, frame: int, num_frames: int) -> tuple[Span, ...]:
    """The frames that a frame of a clip attends to, in as few spans as there can be."""
    match pattern.name:
        case "full":
            return ((0, num_frames),)
        case "block_causal":
            assert pattern.block_causal is not None
            block = pattern.block_causal.frames
            return ((0, min(num_frames, (frame // block + 1) * block)),)
        case "window":
            assert pattern.window is not None
            reach, sinks = pattern.window.frames, min(num_frames, pattern.window.sinks)
            first, last = max(0, frame - reach), min(num_frames, frame + reach + 1)
            return ((0, max(sinks, last)),) if first <= sinks else joined((0, sinks), (first, last))


def joined(*spans: Span) -> tuple[Span, ...]:
    """Those that aren't empty."""
    return tuple(span for span in spans if span[0] < span[1])


def reaches(pattern: TokenPattern, num_tokens: int, queries: Span) -> list[Reach]:
    """What the tokens of a span attend to, neighbours with the same keys together. num_tokens: of the clip."""
    first, last = queries
    if first >= last:
        return []
    config, size = pattern.config, pattern.frame_tokens
    if config.name == "full":
        return [Reach(queries, ((0, num_tokens),))]
    assert num_tokens % size == 0, f"{num_tokens} tokens aren't whole frames of {size}"
    found: list[Reach] = []
    for frame in range(first // size, (last - 1) // size + 1):
        keys = tuple((start * size, stop * size) for start, stop in frame_keys(config, frame, num_tokens // size))
        span = max(first, frame * size), min(last, (frame + 1) * size)
        if found and found[-1].keys == keys:
            span = found.pop().queries[0], span[1]
        found.append(Reach(span, keys))
    return found


def attended_pairs(pattern: TokenPattern, num_tokens: int, queries: Span | None = None) -> int:
    """Pairs of a query and a key that attend, of a clip or of some of its queries."""
    return sum(reach.num_pairs for reach in reaches(pattern, num_tokens, queries or (0, num_tokens)))
