"""Reading any box from any boxes, with exactly the bytes that it takes, and every block checked."""

from pathlib import Path

import numpy as np
import pytest
import torch
from stores import SHAPES, STATES, TinyState, save_steps

from framework.checkpoint import pieces
from framework.checkpoint.find import newest
from framework.checkpoint.manifest import DamagedCheckpoint, StoredFile, block_checksum
from framework.checkpoint.pieces import OpenFile, Piece, ReadStats, read_pieces
from framework.checkpoint.read import CheckpointReader, Place, common_runs
from framework.checkpoint.records import StoredBox
from framework.parallel.fragments import Fragment, ParameterShard
from framework.storage.directory import Directory


def reader_of(folder: Path, steps: list[int]) -> CheckpointReader:
    storage = save_steps(folder, steps)
    found = newest(storage)
    assert found is not None
    return CheckpointReader(storage, found)


def random_box(generator: np.random.Generator, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    edges = [sorted(generator.choice(n + 1, 2, replace=False).tolist()) for n in shape]
    return tuple(low for low, _ in edges), tuple(high - low for low, high in edges)


@pytest.mark.parametrize("shape", [(7,), (4, 6), (3, 4, 5), (2, 3, 4, 3)], ids=str)
def test_common_runs_against_numpy(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(1)
    numbers = np.arange(np.prod(shape)).reshape(shape)
    for _ in range(100):
        (low, sizes), (other, others) = random_box(generator, shape), random_box(generator, shape)
        source = numbers[tuple(slice(a, a + n) for a, n in zip(low, sizes, strict=True))].ravel()
        wanted = numbers[tuple(slice(a, a + n) for a, n in zip(other, others, strict=True))].ravel()
        if not set(source) & set(wanted):
            continue
        starts, places, run = common_runs(StoredBox(low, sizes, "f", 0), Place(other, others, 5))
        got = {}
        for start, place in zip(starts, places, strict=True):
            got |= dict(zip(range(place - 5, place - 5 + run), source[start : start + run], strict=True))
        assert got == {i: n for i, n in enumerate(wanted) if n in set(source)}


def test_fragments_of_any_cut_and_dtype(tmp_path: Path) -> None:
    """tp halves of columns, then uneven flat ranges of them, as bfloat16 or float64 too."""
    reader, expected = reader_of(tmp_path, [4]), TinyState().at(4).tensors
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for name, shape in SHAPES.items():
            last = shape[-1]
            for offset, size in ((0, last // 2), (last // 2, last - last // 2)):
                part = (*shape[:-1], size)
                shard = ParameterShard(name, shape, (*(0,) * (len(shape) - 1), offset), part)
                whole = expected[f"exp_avg.{name}"][..., offset : offset + size].reshape(-1).to(dtype)
                third = -(-whole.numel() // 3)
                for start in range(0, whole.numel(), third):
                    flat = torch.full((min(third, whole.numel() - start),), torch.nan, dtype=dtype)
                    reader.load([Fragment("exp_avg", shard, start, flat)])
                    assert torch.equal(flat, whole[start : start + third])
    assert reader.stats.amplification <= 1.05


def test_a_whole_load_reads_every_byte_once_and_checks_it(tmp_path: Path) -> None:
    reader, state = reader_of(tmp_path, [4]), TinyState()
    reader.load(state.fragments())
    assert all(torch.equal(state.tensors[key], value) for key, value in TinyState().at(4).tensors.items())
    assert reader.stats.needed == sum(4 * tensor.numel() for tensor in state.tensors.values())
    assert 1 <= reader.stats.amplification < 1.01
    blocks = sum(len(file.checksums) for file in reader.found.manifest.files.values())
    assert sum(np.unpackbits(np.frombuffer(bits, np.uint8)).sum() for bits in reader.checked().values()) == blocks
    reader.check_rest([reader.checked()], touched=reader.files_of(set(STATES)), index=0)
    assert reader.stats.checked == 0


@pytest.mark.parametrize("place", [0, 4_300_000, -1])
def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path, place: int) -> None:
    storage = save_steps(tmp_path, [4])
    file = tmp_path / "step-00000004-0000" / "model-00000.distcp"
    data = bytearray(file.read_bytes())
    data[place] ^= 0x10
    file.write_bytes(data)
    found = newest(storage)
    assert found is not None
    with pytest.raises(DamagedCheckpoint, match=f"{file} is damaged between the bytes"):
        CheckpointReader(storage, found).load(TinyState().fragments())
    with pytest.raises(DamagedCheckpoint, match=f"{file} is damaged"):
        CheckpointReader(storage, found).check()
    # Only a part is needed: the rest is checked afterwards, by whoever's turn it is.
    reader = CheckpointReader(storage, found)
    flat = torch.zeros(100)
    reader.load([Fragment("model", ParameterShard.whole("big.weight", SHAPES["big.weight"]), 500_000, flat)])
    by_rank: list[dict[str, bytes]] = [reader.checked(), {}, {}]
    turns = []
    for index in range(3):
        try:
            reader.check_rest(by_rank, touched={"model-00000.distcp"}, index=index)
        except DamagedCheckpoint as damage:
            turns.append(str(damage))
    assert len(turns) == 1 and f"{file} is damaged" in turns[0]


def test_absent_and_misshapen_tensors(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, [4])
    with pytest.raises(ValueError, match=r"has no tensor model\.c\.weight"):
        reader.load([Fragment("model", ParameterShard.whole("c.weight", (3,)), 0, torch.zeros(3))])
    with pytest.raises(ValueError, match=r"model\.a\.weight has the shape \(40, 30\) in .*, \(40, 31\) in the model"):
        reader.load([Fragment("model", ParameterShard.whole("a.weight", (40, 31)), 0, torch.zeros(1240))])


class Counting(Directory):
    """Counts reads. gap: as an object store's."""

    def __init__(self, path: Path, gap: int) -> None:
        super().__init__(str(path))
        self.gap, self.reads = gap, 0

    def read_into(self, name, offset, parts):  # type: ignore[no-untyped-def]
        self.reads += 1
        super().read_into(name, offset, parts)


@pytest.mark.parametrize("gap", [0, 10, 1000])
def test_random_pieces(tmp_path: Path, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "WINDOW", 3)
    generator, block = np.random.default_rng(2), 64
    data = generator.bytes(1000)
    (tmp_path / "f").write_bytes(data)
    sums = tuple(block_checksum(data[i : i + block]) for i in range(0, 1000, block))
    for _ in range(100):
        storage = Counting(tmp_path, gap)
        edges = sorted(generator.choice(1001, 2 * int(generator.integers(1, 12)), replace=False).tolist())
        wanted = [(low, high) for low, high in zip(edges[::2], edges[1::2], strict=True)]
        buffers = [bytearray(high - low) for low, high in wanted]
        stats, file = ReadStats(), OpenFile(storage, storage, "f", StoredFile(1000, sums), block)
        parts = [Piece(low, memoryview(buffer)) for (low, _), buffer in zip(wanted, buffers, strict=True)]
        generator.shuffle(parts)  # type: ignore[arg-type]
        read_pieces(file, parts, stats)
        assert [bytes(buffer) for buffer in buffers] == [data[low:high] for low, high in wanted]
        assert stats.needed == sum(high - low for low, high in wanted)
        if gap == 0:
            assert stats.amplification <= 1.05 + 1e-9
        assert storage.reads <= len(wanted) * (1 if gap == 1000 else 3) + 6
