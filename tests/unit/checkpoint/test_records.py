"""The records and `.metadata` against torch's own reading and writing."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_dcp import plain_load
from stores import TinyState, save_steps
from torch.distributed.checkpoint.metadata import Metadata

from framework.checkpoint.manifest import DamagedCheckpoint
from framework.checkpoint.records import (
    STORAGES,
    StoredBox,
    StoredTensor,
    check_cover,
    decode_metadata,
    encode_metadata,
    record_head,
)
from framework.parallel.fragments import range_boxes

SHAPES = [(), (1,), (7,), (3, 1, 4), (2, 3, 5, 1)]


@pytest.mark.parametrize("dtype", list(STORAGES), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_reads_a_record(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    data = record_head(shape, dtype) + tensor.view(-1).view(torch.uint8).numpy().tobytes()
    for weights_only in (True, False):
        read = torch.load(io.BytesIO(data), weights_only=weights_only)
        assert read.dtype == dtype and torch.equal(read, tensor)


def test_plain_dcp_reads_a_checkpoint(tmp_path: Path) -> None:
    save_steps(tmp_path, [3])
    read = plain_load(tmp_path / "step-00000003-0000")
    expected = TinyState().at(3).tensors
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], value) for key, value in expected.items())


def tensors() -> dict[str, StoredTensor]:
    boxes = tuple(StoredBox(b.offset, b.sizes, "f", 1000 * i + 400) for i, b in enumerate(range_boxes((4, 5), 0, 20)))
    return {"model.a": StoredTensor((4, 5), torch.float32, boxes), "ema.b": StoredTensor((2,), torch.bfloat16, ())}


def test_metadata_round_trip() -> None:
    data = encode_metadata(tensors())
    assert isinstance(pickle.loads(data), Metadata)
    assert decode_metadata(data, "x") == tensors()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "within metadata"])
def test_a_malicious_pickle_is_refused_by_name_and_runs_nothing(tmp_path: Path, wrapped: bool) -> None:
    trap = tmp_path / "ran"
    evil = Evil(trap)
    data = pickle.dumps(Metadata({}, planner_data=evil, storage_data={}) if wrapped else evil)
    with pytest.raises(DamagedCheckpoint, match=r"some/\.metadata names (posix|os)\.system, which no checkpoint needs"):
        decode_metadata(data, "some/.metadata")
    assert not trap.exists()
    pickle.loads(data)
    assert trap.exists(), "the trap works"


@pytest.mark.parametrize("data", [b"", b"\x80", b"garbage", pickle.dumps(7), pickle.dumps({})], ids=repr)
def test_what_is_no_metadata_is_refused(data: bytes) -> None:
    with pytest.raises(DamagedCheckpoint, match="the-file"):
        decode_metadata(data, "the-file")


def split(shape: tuple[int, ...], cuts: list[int]) -> list[StoredBox]:
    ranges = zip([0, *cuts], [*cuts, int(np.prod(shape))], strict=True)
    return [StoredBox(b.offset, b.sizes, "f", 0) for low, high in ranges for b in range_boxes(shape, low, high)]


def test_cover_is_checked_exactly() -> None:
    generator = np.random.default_rng(0)
    for shape in [(6,), (4, 5), (3, 4, 5), (2, 3, 2, 4)]:
        size = int(np.prod(shape))
        for _ in range(30):
            boxes = split(shape, sorted(generator.choice(size + 1, 3, replace=False).tolist()))
            generator.shuffle(boxes)  # type: ignore[arg-type]
            check_cover("t", StoredTensor(shape, torch.float32, tuple(boxes)))
            with pytest.raises(ValueError, match="its boxes hold"):
                check_cover("t", StoredTensor(shape, torch.float32, tuple(boxes[1:])))
            # The same number of elements, but one box there twice in the place of another of its size.
            twins = [i for i in range(1, len(boxes)) if boxes[i].num_elements == boxes[0].num_elements]
            if twins:
                wrong = [*boxes[: twins[0]], boxes[0], *boxes[twins[0] + 1 :]]
                with pytest.raises(ValueError, match=r"overlap|hold"):
                    check_cover("t", StoredTensor(shape, torch.float32, tuple(wrong)))
