"""Flat ranges as boxes: every range of small tensors, against numpy's own indexing."""

from math import prod

import numpy as np
import pytest
import torch

from framework.parallel.fragments import Fragment, ParameterShard, range_boxes

SHAPES = [
    (), (1,), (7,), (1, 1), (3, 4), (4, 1), (1, 5), (2, 3, 4), (3, 1, 2), (1, 2, 1), (2, 2, 2, 2), (2, 1, 3, 2),
    (1, 3, 1, 2), (2, 2, 1, 2, 2), (1, 2, 3, 1, 2), (2, 1, 2, 3, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_range_is_at_most_2n_minus_1_boxes(shape: tuple[int, ...]) -> None:
    numbers = np.arange(prod(shape)).reshape(shape)
    for start in range(numbers.size + 1):
        for stop in range(start, numbers.size + 1):
            boxes = range_boxes(shape, start, stop)
            assert len(boxes) <= max(1, 2 * len(shape) - 1)
            covered: list[int] = []
            for box in boxes:
                inside = numbers[tuple(slice(o, o + s) for o, s in zip(box.offset, box.sizes, strict=True))]
                assert inside.shape == box.sizes and inside.size == box.num_elements > 0
                assert inside.flat[0] == box.start
                covered += inside.ravel().tolist()
            assert covered == list(range(start, stop)), "each element once, in order, each box contiguous"


def test_the_bound_is_reached() -> None:
    """All but the corners: tail, whole rows, whole planes, whole rows, head."""
    assert len(range_boxes((4, 4, 4), 1, 63)) == 5


@pytest.mark.parametrize(
    ("global_shape", "offset", "shape"),
    [((6, 5), (0, 0), (6, 5)), ((6, 5), (2, 0), (3, 5)), ((6, 5), (0, 2), (6, 2)), ((3, 4, 5), (1, 1, 1), (2, 2, 3))],
)
def test_a_fragment_is_a_range_of_its_shard(
    global_shape: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """Every range of a tensor-parallel rank's box, filled from the global tensor and read back by its boxes."""
    full = torch.arange(prod(global_shape), dtype=torch.float32).view(global_shape)
    flat_shard = full.numpy()[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))].ravel()
    shard = ParameterShard("w", global_shape, offset, shape)
    for start in range(prod(shape)):
        for stop in range(start + 1, prod(shape) + 1):
            # A view into a larger buffer, as an engine's are: nothing beside it may be touched.
            buffer = torch.full((stop - start + 4,), -1.0)
            fragment = Fragment("ema", shard, start, buffer[2:-2])
            fragment.copy_from(full)
            assert buffer[2:-2].numpy().tolist() == flat_shard[start:stop].tolist()
            assert (buffer[:2] == -1).all() and (buffer[-2:] == -1).all()
            for box_offset, view in fragment.global_boxes():
                index = tuple(slice(o, o + s) for o, s in zip(box_offset, view.shape, strict=True))
                assert torch.equal(view, full[index])


def test_boxes_are_live_views() -> None:
    flat = torch.zeros(10)
    fragment = Fragment("model", ParameterShard.whole("w", (4, 5)), 3, flat)
    for _, view in fragment.global_boxes():
        view.fill_(1.0)
    assert (flat == 1).all()
    assert fragment.key == "model.w"


def test_two_ranks_cover_a_tensor_once() -> None:
    """Uneven flat halves of two tp halves, as ZeRO over tp leaves them."""
    count = torch.zeros(3, 4)
    for column in (0, 2):
        shard = ParameterShard("w", (3, 4), (0, column), (3, 2))
        for start, stop in ((0, 5), (5, 6)):
            for offset, view in Fragment("model", shard, start, torch.zeros(stop - start)).global_boxes():
                count[tuple(slice(o, o + s) for o, s in zip(offset, view.shape, strict=True))] += 1
    assert (count == 1).all()


def test_a_scalar_is_one_box() -> None:
    (box,) = range_boxes((), 0, 1)
    assert (box.offset, box.sizes, box.num_elements) == ((), (), 1)
    fragment = Fragment("model", ParameterShard.whole("s", ()), 0, torch.zeros(1))
    fragment.copy_from(torch.tensor(3.0))
    assert fragment.flat.tolist() == [3.0]
