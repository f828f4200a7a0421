"""Keys against hashlib and against numbers that must never change; shapes against tables worked out by hand."""

import hashlib

import pytest
from scipy import stats

from framework.keys import key, uniform
from framework.shapes import ClipShape, LatentShape, Strides, TokenShape, latent_shape, token_shape, valid_frames

WAN = Strides(time=4, height=8, width=8, causal=True)
PLAIN = Strides(time=2, height=4, width=8, causal=False)


def test_a_key_is_the_hash_of_its_arguments() -> None:
    text = "7\x1fnoise\x1fclip#0.1\x1f12"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    assert key(7, "noise", uid="clip#0.1", step=12) == int.from_bytes(digest, "little")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (key(0, "init"), 4590957519125711307),
        (key(0, "init", uid="blocks.0.attn1.to_q.weight"), 13495911422410021582),
        (key(2**63, "noise", step=10**9), 7212304404128862772),
    ],
)
def test_keys_never_change(value: int, expected: int) -> None:
    """Another value here means that no stored run can be continued."""
    assert value == expected


def test_every_argument_counts() -> None:
    others = [key(1, "a"), key(0, "b"), key(0, "a", uid="u"), key(0, "a", step=1), key(0, "a", uid="u", step=1)]
    assert len({key(0, "a"), *others}) == 6
    assert all(0 <= value < 2**64 for value in others)


def test_uniform_is_uniform() -> None:
    values = [uniform(key(0, "timestep", uid=str(i))) for i in range(4000)]
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert uniform(0) == 0 and uniform(2**64 - 1) == 1 - 2**-53


@pytest.mark.parametrize(
    ("clip", "strides", "latent"),
    [
        ((81, 480, 832), WAN, (21, 60, 104)),  # Wan 2.1, 5 s at 480p
        ((81, 720, 1280), WAN, (21, 90, 160)),
        ((1, 8, 8), WAN, (1, 1, 1)),
        ((5, 16, 16), WAN, (2, 2, 2)),
        ((6, 8, 16), PLAIN, (3, 2, 2)),
    ],
)
def test_latents_by_hand(clip: tuple[int, int, int], strides: Strides, latent: tuple[int, int, int]) -> None:
    assert latent_shape(ClipShape(*clip), strides) == LatentShape(*latent)


def test_tokens_by_hand() -> None:
    assert token_shape(LatentShape(21, 60, 104), (1, 2, 2)) == TokenShape(21, 30, 52)
    assert TokenShape(21, 30, 52).num_tokens == 32_760
    assert TokenShape(21, 45, 80).num_tokens == 75_600
    assert (str(ClipShape(81, 480, 832)), str(LatentShape(21, 60, 104))) == ("81x480x832", "21x60x104")


@pytest.mark.parametrize(
    ("frames", "strides", "nearest"),
    [
        (1, WAN, (1, 1)),
        (2, WAN, (1, 5)),
        (81, WAN, (81, 81)),
        (80, WAN, (77, 81)),
        (0, WAN, (1, 1)),
        (5, PLAIN, (4, 6)),
        (1, PLAIN, (2, 2)),
    ],
)
def test_the_nearest_durations(frames: int, strides: Strides, nearest: tuple[int, int]) -> None:
    assert valid_frames(frames, strides) == nearest


@pytest.mark.parametrize(
    ("clip", "strides", "message"),
    [
        ((80, 480, 832), WAN, r"80 frames .* 1 \+ 4k; the nearest are 77 and 81"),
        ((5, 480, 832), PLAIN, r"5 frames .* 2k; the nearest are 4 and 6"),
        ((0, 8, 8), WAN, r"0 frames"),
        ((81, 484, 832), WAN, r"height 484 .* stride 8; the nearest are 480 and 488"),
        ((81, 480, 4), WAN, r"width 4 .* stride 8; the nearest are 8 and 16"),
        ((81, -8, 8), WAN, r"height -8"),
    ],
)
def test_clips_that_do_not_fit_are_refused(clip: tuple[int, int, int], strides: Strides, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latent_shape(ClipShape(*clip), strides)


def test_latents_that_do_not_fit_the_patch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latent width 105 isn't a multiple of the model's patch size 2"):
        token_shape(LatentShape(21, 60, 105), (1, 2, 2))
