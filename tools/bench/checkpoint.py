"""What saving and loading cost, beside the least that they could cost and beside the peers.

    python tools/bench/checkpoint.py [--parameters 100_000_000] [--repeats 8] [--folder DIR]

One rank, a state of `parameters` x 16 bytes (weights, two moments, EMA) in the tensors of a transformer. In every
repeat, in an order that changes:

    stall     what training waits for: our save; one memcpy of the same bytes; dcp.async_save (its wait for the save
              before left out); DeepSpeed's save_checkpoint, which writes 12 bytes a parameter (it has no EMA)
    persist   from the copy to the commit, the deletion of older ones left out: ours; the same bytes written raw to new
              files and fsync'd; dcp.async_save with its copy
    steps     a step of matrix products: alone, while our save is being written, and while a thread writes the same
              bytes raw; what the writes take of the CPU is measured too, as with no core to spare it comes out of the
              steps
    load      ours, into memory that is there, every block checked; a raw read of the same bytes; dcp.load

Files are in the page cache when they are read; --drop-caches (root) empties it first. `--plan` measures planning alone:
14B parameters on 1,024 ranks.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from machine import machine
from plan_checkpoint import plan
from torch import Tensor

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.fence import claim
from framework.checkpoint.find import newest
from framework.checkpoint.manifest import Origin, Progress
from framework.checkpoint.read import CheckpointReader
from framework.checkpoint.save import Saver
from framework.checkpoint.write import as_bytes
from framework.checkpoint.writer import Subject
from framework.environment import be_first_rank
from framework.parallel.fragments import Fragment, ParameterShard
from framework.parallel.mesh import lone_mesh
from framework.storage.directory import Directory

STATES = ("model", "exp_avg", "exp_avg_sq", "ema")
WIDTH = 1024
BLOCK = (*[(WIDTH, WIDTH)] * 8, (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), *[(WIDTH,)] * 16, (1, 6, WIDTH))


@dataclass
class Samples:
    """Seconds by what was measured, one value a repeat."""

    seconds: dict[str, list[float]]

    def time(self, name: str, action: Callable[[], object]) -> float:
        begin = time.perf_counter()
        action()
        self.add(name, time.perf_counter() - begin)
        return self.seconds[name][-1]

    def add(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)


class State:
    """The live state in one flat buffer a kind, as ZeRO holds it."""

    def __init__(self, num_parameters: int) -> None:
        blocks = max(1, num_parameters // sum(prod(shape) for shape in BLOCK))
        named = [(f"blocks.{i}.{j}", shape) for i in range(blocks) for j, shape in enumerate(BLOCK)]
        self.shards = [ParameterShard.whole(name, shape) for name, shape in named]
        self.size = sum(prod(shape) for _, shape in named)
        self.flats = {state: torch.randn(self.size) for state in STATES}
        sizes = [prod(shape) for _, shape in named]
        parts = {state: flat.split(sizes) for state, flat in self.flats.items()}
        self.fragments = [
            Fragment(state, shard, 0, part)
            for state in STATES
            for shard, part in zip(self.shards, parts[state], strict=True)
        ]
        self.tensors = {f.key: f.flat.view(f.shard.shape) for f in self.fragments}

    @property
    def num_bytes(self) -> int:
        return 4 * self.size * len(STATES)


def write_raw(folder: Path, state: State) -> None:
    """The same bytes to new files, flushed to the disk."""
    folder.mkdir()
    for name, flat in state.flats.items():
        file, rest = os.open(folder / name, os.O_WRONLY | os.O_CREAT), as_bytes(flat)
        while rest:
            rest = rest[os.write(file, rest[: 1 << 30]) :]
        os.fsync(file)
        os.close(file)


def read_raw(folder: Path, into: State) -> None:
    for name, flat in into.flats.items():
        file, rest, place = os.open(folder / name, os.O_RDONLY), as_bytes(flat), 0
        while rest:
            count = os.preadv(file, [rest[: 1 << 30]], place)
            rest, place = rest[count:], place + count
        os.close(file)


def steps(a: Tensor, seconds: float) -> tuple[int, float]:
    """Matrix products for some time: how many, and the process's CPU seconds."""
    begin, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begin < seconds:
        a @ a
        count += 1
    return count, time.process_time() - cpu


def deepspeed_engine(state: State):  # type: ignore[no-untyped-def]
    """DeepSpeed with the same weights and moments, stage 2."""
    import deepspeed
    from torch import nn

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = nn.ParameterList([nn.Parameter(t.clone()) for key, t in state.tensors.items() if key.startswith("model.")])
    optimizer = torch.optim.AdamW(model.parameters())
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, "steps_per_print": 1 << 60}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config | {"zero_allow_untested_optimizer": True}
    )
    for parameter in model:
        parameter.grad = None
    engine.backward(sum((parameter * 1e-6).sum() for parameter in model))
    engine.step()
    return engine


def measure(state: State, folder: Path, *, repeats: int, drop: bool, with_deepspeed: bool) -> tuple[Samples, Samples]:
    """Times by name, and the slow-down of the steps."""
    times, shares = Samples({}), Samples({})
    storage, target = Directory(str(folder / "ours")), state.flats["model"].new_empty(4 * state.size)
    source = torch.cat(list(state.flats.values()))
    target.zero_()
    fence = claim(storage, first=0)
    fence.begin(0)
    subject = Subject(Origin(), {}, state.shards)
    saver = Saver(
        storage, CheckpointConfig(keep=1000), lone_mesh(), fence=fence, subject=subject, fragments=state.fragments
    )
    engine = deepspeed_engine(state) if with_deepspeed else None
    a = torch.randn(512, 512)

    def ours(number: int) -> None:
        for old in (folder / "ours").glob("step-*"):
            shutil.rmtree(old)
        os.sync()
        times.time("stall: ours", lambda: saver.save(Progress(step=number)))
        times.time("persist: ours", saver.wait)

    def raw(number: int) -> None:
        shutil.rmtree(folder / "raw", ignore_errors=True)
        os.sync()
        times.time("stall: memcpy", lambda: target.copy_(source))
        times.time("persist: raw", lambda: write_raw(folder / "raw", state))

    def peer(number: int) -> None:
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        futures: list[object] = []
        begin = time.perf_counter()
        futures.append(dcp.async_save(state.tensors, checkpoint_id=folder / "dcp"))
        times.add("stall: dcp.async_save", time.perf_counter() - begin)
        futures[0].result()  # type: ignore[attr-defined]
        times.add("persist: dcp.async_save", time.perf_counter() - begin)

    def zero(number: int) -> None:
        shutil.rmtree(folder / "deepspeed", ignore_errors=True)
        times.time("stall: deepspeed.save_checkpoint", lambda: engine.save_checkpoint(folder / "deepspeed"))

    def beside(name: str, busy: Callable[[], bool]) -> None:
        """How much fewer steps there are while something is written."""
        count, cpu, begin = 0, 0.0, time.perf_counter()
        while busy():
            done, used = steps(a, 0.1)
            count, cpu = count + done, cpu + used
        seconds = time.perf_counter() - begin
        alone, _ = steps(a, 2.0)
        shares.add(f"slow-down beside {name}", 1 - (count / seconds) / (alone / 2.0))
        shares.add(f"CPU of {name} / wall", max(0.0, (cpu - seconds) / seconds))

    def slow(number: int) -> None:
        for old in (folder / "ours").glob("step-*"):
            shutil.rmtree(old)
        os.sync()
        saver.save(Progress(step=number))
        beside("our save", lambda: not saver.idle)
        saver.wait()

    def slow_raw(number: int) -> None:
        shutil.rmtree(folder / "thread", ignore_errors=True)
        os.sync()
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write_raw, folder / "thread", state)
            beside("a raw write", lambda: not writing.done())

    contestants = [ours, raw, peer, slow, slow_raw, *([zero] if engine is not None else [])]
    for repeat in range(repeats):
        shift = repeat % len(contestants)
        for place, contestant in enumerate([*contestants[shift:], *contestants[:shift]]):
            contestant(repeat * len(contestants) + place + 1)
    saver.close()
    other = State(state.size)
    for repeat in range(repeats):
        loads: dict[str, Callable[[], object]] = {
            "load: ours": lambda: CheckpointReader(storage, newest(storage)).load(other.fragments),  # type: ignore[arg-type]
            "load: raw": lambda: read_raw(folder / "raw", other),
            "load: dcp.load": lambda: dcp.load(other.tensors, checkpoint_id=folder / "dcp"),
        }
        for name in sorted(loads, reverse=bool(repeat % 2)):
            if drop:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("1")
            times.time(name, loads[name])
    return times, shares


def report(times: Samples, shares: Samples, state: State) -> None:
    def median(name: str) -> float:
        return statistics.median(times.seconds[name])

    print(f"{state.size / 1e6:.0f}M parameters, {state.num_bytes / 1e9:.2f} GB")
    print("what                             median s   lowest s   of the least (paired median)")
    least = {"stall": "stall: memcpy", "persist": "persist: raw", "load": "load: raw"}
    for name, values in sorted(times.seconds.items()):
        base = times.seconds[least[name.partition(":")[0]]]
        paired = statistics.median(a / b for a, b in zip(values, base, strict=True))
        print(f"{name:32s} {median(name):9.3f} {min(values):10.3f}   {paired:8.2f}")
    for name, values in shares.seconds.items():
        print(f"{name}: median {statistics.median(values):.1%}, from {min(values):.1%} to {max(values):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--drop-caches", action="store_true")
    parser.add_argument("--no-deepspeed", action="store_true")
    parser.add_argument("--plan", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(machine("deepspeed")))
    if arguments.plan:
        plan()
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    be_first_rank()  # for DeepSpeed
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=arguments.folder))
    try:
        dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{folder}/rendezvous")
        state = State(arguments.parameters)
        times, shares = measure(
            state,
            folder,
            repeats=arguments.repeats,
            drop=arguments.drop_caches,
            with_deepspeed=not arguments.no_deepspeed,
        )
        report(times, shares, state)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
