"""A light trainer for soak tests: real ranks, groups, resume, fence and saves, and a model that costs nothing to train.

The model is a list of tensors. A step's update of an element is a function of (step, element) and of the element's own
state, of operations that round once each (IEEE 754), so that any cut of the tensors, and numpy (shadow.py), computes
the same bits. Importing this warms a rank up.
"""

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from math import prod
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from framework.checkpoint import fence as fences
from framework.checkpoint import writer
from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.fence import Fence, claim
from framework.checkpoint.manifest import Origin, Progress
from framework.checkpoint.resume import Resumed, resume
from framework.checkpoint.save import Saver
from framework.checkpoint.writer import Subject
from framework.parallel.collectives import all_reduce_sum, broadcast_object
from framework.parallel.config import MeshShape
from framework.parallel.fragments import Fragment, ParameterShard
from framework.parallel.mesh import Mesh, build_mesh
from framework.storage.storage import open_storage

torch.set_num_threads(1)

# 0.4 M elements, none of whose sizes is a multiple of a number of ranks: 6.5 MB in four states.
TENSORS: Final = MappingProxyType(
    {
        "patch.weight": (61, 3, 5, 7),
        "embed.weight": (97, 1021),
        "embed.bias": (97,),
        "scale": (),
        "blocks.0.weight": (513, 257),
        "blocks.0.bias": (513,),
        "blocks.1.weight": (257, 513),
        "table": (1, 6, 1021),
        "head.weight": (13, 1021),
    }
)
FROZEN: Final = MappingProxyType({"frozen.weight": (33, 1021), "frozen.bias": (1021,)})
STATES = ("model", "exp_avg", "exp_avg_sq", "ema")
PRIME = 65521
RATE, DECAY, SECOND, AVERAGE, EPSILON = 1e-3, 0.9, 0.99, 0.95, 0.1

Place = Literal["write", "commit", "begin"]


@dataclass(frozen=True)
class Plan:
    """What an attempt does.

    stage: 1, a rank holds a range of all tensors one behind the other; 3, a range of each. steps: to do, 0 for no end.
    pause: seconds between steps, at most. stop: rank 0 stops itself (SIGSTOP) at (step, place): before it writes its
    files, before it writes the manifest when it has looked at the fence, or before it puts down where it began.
    environment: variables of the ranks, besides their own.
    """

    store: str
    num_ranks: int
    stage: int = 1
    steps: int = 0
    pause: float = 0.0
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    stop: tuple[int, Place] | None = None
    environment: tuple[tuple[str, str], ...] = ()


def start_value(element: Tensor) -> Tensor:
    """The initial weight of each element, by its number."""
    return (element * 31337 % PRIME).float() / 65536 - 0.5


def frozen_value(name: str) -> Tensor:
    """A frozen tensor."""
    count = prod(FROZEN[name])
    return (torch.arange(count) * 7 % 251).to(torch.bfloat16).view(FROZEN[name])


def update(step: int, element: Tensor, state: dict[str, Tensor]) -> None:
    """Step number `step` on a range of elements, in place. No square root: torch's is off by one bit in a fifth of all
    numbers, and not in the same ones whatever the cut.
    """
    gradient = ((element * 7919 + step * 104729) % PRIME).float() / 65536 - 0.5
    weight, mean, square, average = (state[name] for name in STATES)
    mean.mul_(DECAY).add_(gradient * (1 - DECAY))
    square.mul_(SECOND).add_(gradient * gradient * (1 - SECOND))
    weight.sub_(mean * RATE / (square + EPSILON))
    average.mul_(AVERAGE).add_(weight * (1 - AVERAGE))


@dataclass
class LightState:
    """What a rank holds: its elements' numbers in the row of all tensors, a buffer of each state, and their views."""

    element: Tensor
    buffers: dict[str, Tensor]
    fragments: list[Fragment]


def build_state(plan: Plan, rank: int) -> tuple[LightState, list[ParameterShard]]:
    """This rank's part of the model, and the shards of the whole."""
    shards = [ParameterShard.whole(name, shape) for name, shape in TENSORS.items()]
    parts, first, total = [], 0, sum(prod(shape) for shape in TENSORS.values())
    for shard in shards:
        count = prod(shard.shape)
        if plan.stage == 1:
            share = -(-total // plan.num_ranks)
            low, high = rank * share - first, (rank + 1) * share - first
        else:
            share = -(-count // plan.num_ranks)
            low, high = rank * share, (rank + 1) * share
        low, high = min(max(low, 0), count), min(max(high, 0), count)
        if high > low:
            parts.append((shard, low, high, first))
        first += count
    element = torch.cat([torch.arange(first + low, first + high) for _, low, high, first in parts])
    buffers = {state: torch.zeros(len(element)) for state in STATES}
    fragments = []
    for state, buffer in buffers.items():
        position = 0
        for shard, low, high, _ in parts:
            fragments.append(Fragment(state, shard, low, buffer.narrow(0, position, high - low)))
            position += high - low
    for number, (name, shape) in enumerate(FROZEN.items()):
        shard = ParameterShard(name, shape, (0,) * len(shape), shape, trainable=False)
        shards.append(shard)
        if number % plan.num_ranks == rank:
            fragments.append(Fragment("model", shard, 0, torch.zeros(shape, dtype=torch.bfloat16).view(-1)))
    return LightState(element, buffers, fragments), shards


def initialise(state: LightState) -> None:
    """The state before step 0."""
    for name in ("model", "ema"):
        state.buffers[name].copy_(start_value(state.element))
    for fragment in state.fragments:
        if not fragment.shard.trainable:
            fragment.copy_from(frozen_value(fragment.shard.name))


def rank_main(plan: Plan, rank: int, port: int, pipe: Connection) -> None:
    """A rank's process. It tells what it does by (kind, value, time): claimed, resumed, step, save, report; at its end
    done or failed.
    """

    def tell(kind: str, value: Any) -> None:
        pipe.send((kind, value, time.monotonic()))

    os.environ |= dict(plan.environment)
    try:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=plan.num_ranks, timeout=timedelta(minutes=5)
        )
        mesh = build_mesh(MeshShape(plan.num_ranks, 1, 1, 1), rank)
        tell("done", train(plan, mesh, tell).step)
        status = 0
    except BaseException as error:
        tell("failed", (f"{type(error).__name__}: {error}", traceback.format_exc()))
        status = 1
    pipe.close()
    os._exit(status)


def train(plan: Plan, mesh: Mesh, tell: Callable[[str, Any], None]) -> Progress:
    """As programs/train.py: claim, resume, put down where it began, steps with saves in the background."""
    storage = open_storage(plan.store)
    attempt = broadcast_object(claim(storage, first=0).attempt if mesh.rank == 0 else None, mesh.control)
    fence = Fence(storage, attempt)
    tell("claimed", attempt)
    if plan.stop is not None and mesh.rank == 0:
        arrange_stop(*plan.stop, tell)
    state, shards = build_state(plan, mesh.rank)
    resumed = resume(storage, state.fragments, mesh.control, fall_back=False)
    if resumed is None:
        initialise(state)
    progress = Progress() if resumed is None else resumed.found.manifest.progress
    tell("resumed", None if resumed is None else (resumed.found.entry.step, resumed.found.entry.attempt))
    if mesh.rank == 0:
        fence.begin(progress.step)
    saver = Saver(
        storage,
        plan.checkpoint,
        mesh,
        fence=fence,
        subject=build_subject(plan, shards, attempt, resumed),
        fragments=state.fragments,
    )
    try:
        return loop(plan, mesh, saver, state, progress, tell=tell)
    finally:
        saver.close()


def build_subject(plan: Plan, shards: list[ParameterShard], attempt: int, resumed: Resumed | None) -> Subject:
    parents = () if resumed is None else (resumed.found.entry.folder,)
    origin = Origin(attempt, {"dp": plan.num_ranks}, "light", plan.stage, "float32", parents=parents)
    return Subject(origin, {}, shards, known=None if resumed is None else resumed.frozen)


def loop(
    plan: Plan,
    mesh: Mesh,
    saver: Saver,
    state: LightState,
    progress: Progress,
    *,
    tell: Callable[[str, Any], None],
) -> Progress:
    """The steps."""
    last = progress.step + plan.steps
    while not plan.steps or progress.step < last:
        asked = torch.tensor([0, saver.failed])
        agreement = all_reduce_sum(asked, mesh.control, "stop")
        update(progress.step, state.element, state.buffers)
        step = progress.step + 1
        progress = Progress(step, samples=4 * step, tokens=100 * step, updates=step)
        time.sleep(plan.pause * random.random())
        agreement.wait()
        if asked[1]:
            saver.wait()  # raises
        for text in saver.report():
            tell("report", text)
        tell("step", step)
        if step % plan.checkpoint.every == 0 or step == last:
            tell("save", step)
            saver.save(progress)
    saver.wait()
    for text in saver.report():
        tell("report", text)
    return progress


def arrange_stop(step: int, place: Place, tell: Callable[[str, Any], None]) -> None:
    """Put a SIGSTOP of this process in the way, once."""
    due = [True]

    def stop(condition: bool) -> None:
        if condition and due:
            due.clear()
            tell("stopping", place)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.05)  # another thread may have taken the signal: this one would go on for a moment

    def before(module: Any, name: str, condition: Callable[..., bool]) -> None:
        original = getattr(module, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            stop(condition(*args, **kwargs))
            return original(*args, **kwargs)

        setattr(module, name, replacement)

    match place:
        case "write":
            before(writer, "write_file", lambda store, name, *_: name.startswith(f"step-{step:08}"))
        case "commit":
            before(writer, "encode_manifest", lambda manifest: manifest.progress.step == step)
        case "begin":
            before(fences.Fence, "begin", lambda fence, number: number == step)


def launch(context: Any, plan: Plan, port: int) -> tuple[list[Any], list[Connection]]:
    """Start an attempt's ranks."""
    processes, pipes = [], []
    for rank in range(plan.num_ranks):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=rank_main, args=(plan, rank, port, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    return processes, pipes
