"""Where all randomness starts: key(seed, purpose, uid=, step=) -> a 64-bit integer.

A key is the first eight bytes of a BLAKE2b hash (RFC 7693) of its arguments, so it is the same on every rank, mesh,
machine and Python version, and two purposes never share a stream. No draw in the project depends on a rank.
"""

from hashlib import blake2b


def key(seed: int, purpose: str, *, uid: str = "", step: int = 0) -> int:
    """A 64-bit key for one draw.

    seed: the recipe's seed. purpose: what is drawn ("noise", "timestep", "init", ...). uid: which sample or tensor.
    step: which optimizer step.
    """
    text = "\x1f".join((str(seed), purpose, uid, str(step)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(key_: int) -> float:
    """The key as a number in [0, 1) with 53 bits."""
    return (key_ >> 11) * 2.0**-53
