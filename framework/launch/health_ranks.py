"""Level full of a health check, on each rank: its device, its node's ranks, all nodes' ranks. See health.py.

A node's ranks talk over a store of their own, on the loopback; the network has no part in what is said of a node alone.
Bandwidth is that of the bus: an all-reduce of b bytes over n ranks in s seconds moves 2 (n - 1) / n b / s on each link.
"""

import json
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from framework.environment import keep_after_failure, visible_gpus
from framework.launch import device_checks
from framework.launch.health_draft import ACROSS, LOCAL, MEET, Draft, meet, open_meeting
from framework.launch.node_checks import GB, Checked, check_node
from framework.run import write_atomically

LOOPBACK: Final = "127.0.0.1"
GPU_BYTES = 1 << 28
CPU_BYTES = 1 << 22
TIMED = 5
PERIOD = 7  # of the summed values
GOODBYE = 5.0  # seconds for all to be done before the first of them ends
# What a broken device, network or store raises; torch's own errors are all RuntimeErrors.
BROKEN: Final = (RuntimeError, OSError)


@dataclass(frozen=True)
class Ranks:
    """Some ranks that all-reduce together; this one is `index` of `count`."""

    name: str
    store: Store
    index: int
    count: int


@dataclass(frozen=True)
class Member:
    """A node that takes part across: its first rank, and how many it has."""

    node: str
    first: int
    count: int


def check_ranks(folder: Path, draft: Draft) -> None:
    """One rank's part."""
    keep_after_failure()
    place, request = draft.place, draft.request
    draft.begin("its own checks", LOCAL, blames=True)
    world = open_store(LOOPBACK, 0, serves=True) if place.rank == 0 else None
    meeting = open_meeting(draft, store=world.port if world else 0)
    local = open_local_store(folder, draft)
    device = device_checks.this_device(place.local_rank)
    if place.leads:
        draft.add(check_node(request.health, Path(request.scratch)))
    try:
        found = check_device(draft, device)
    except BROKEN as error:
        found = Checked((first_line(error),))
    together = share(draft, local, "device", found)
    if together:
        draft.begin("the all-reduce within the node", LOCAL, blames=True)
        try:
            found = check_link(draft, local, device)
        except BROKEN as error:
            found = Checked((f"all-reduce within the node: {first_line(error)}",))
        share(draft, local, "link", found)
    draft.write("local")
    members, port = join(draft, local, world)
    if members and (world is not None or port):
        store = world or open_store(place.address[0], port, serves=False)
        go_across(draft, local, PeerNodes(store, members, device))
    else:
        draft.write("local", ended=True)
        if world is not None:  # the others still need it
            wait_for(world, "left", draft.until(ACROSS))
    draft.begin("", float("inf"), blames=False)
    if meeting is not None:
        meeting.close()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


# The stores, and what is said in them.


def open_store(host: str, port: int, *, serves: bool) -> TCPStore:
    """serves: this process holds it, at any free port."""
    return TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=timedelta(seconds=30))


def open_local_store(folder: Path, draft: Draft) -> TCPStore:
    """The node's own: its first process holds it, and tells the others the port through a file, which all of a node
    see at once on whatever file system.
    """
    path = folder / f"{draft.place.node}.port"
    if draft.place.leads:
        store = open_store(LOOPBACK, 0, serves=True)
        write_atomically(path, f"{draft.request.id} {store.port}")
        return store
    while True:  # the draft's thread limits it
        identity, _, port = (path.read_text() if path.is_file() else "").partition(" ")
        if identity == draft.request.id:
            return open_store(LOOPBACK, int(port), serves=False)
        time.sleep(0.05)


def wait_for(store: Store, key: str, until: float) -> bool:
    """Whether a key is there before time.monotonic is `until`."""
    try:
        store.wait([key], timedelta(seconds=max(0.05, until - time.monotonic())))
    except RuntimeError:
        return False
    return True


def share(draft: Draft, local: Store, what: str, found: Checked) -> bool:
    """Each rank of the node says what it found; the first one adds it up. Whether all came, to go on together."""
    place = draft.place
    local.set(f"{what}/{place.local_rank}", json.dumps(asdict(found)))
    if not place.leads:
        return wait_for(local, f"{what}/all", draft.until(ACROSS)) and local.get(f"{what}/all") == b"yes"
    problems, lowest, missing = [], dict[str, float](), []
    for rank in range(place.local_world):
        if not wait_for(local, f"{what}/{rank}", draft.until(LOCAL)):
            missing.append(str(rank))
            continue
        told = json.loads(local.get(f"{what}/{rank}"))
        problems += [f"local rank {rank}: {problem}" for problem in told["problems"]]
        for name, value in told["numbers"].items():
            lowest[name] = min(value, lowest.get(name, value))
    if missing:
        seconds = draft.request.health.timeout * LOCAL
        of = "its device's checks" if what == "device" else "the all-reduce within the node"
        problems.append(f"local rank {', '.join(missing)}: no word after {of} within {seconds:.0f} s")
    draft.add(Checked(tuple(problems), lowest))
    local.set(f"{what}/all", "no" if missing else "yes")
    return not missing


# A device by itself.


def check_device(draft: Draft, device: torch.device) -> Checked:
    """Its product, its speed and its free memory."""
    health, problems, numbers = draft.request.health, [], dict[str, float]()
    if device.type == "cpu" and (draft.request.gpus or visible_gpus()):
        return Checked((f"torch {torch.__version__} sees no GPU, of {visible_gpus()} that the driver shows",))
    free = device_checks.free_memory(device)
    if free is not None:
        numbers["gpu_free_gb"] = round(free, 1)
        if free < health.memory:
            problems.append(f"{free:.1f} GB of the GPU are free, below memory={health.memory:g}")
    product = device_checks.check_product(device)
    numbers["tflops"] = round(product.tflops, 4)
    if product.wrong:
        problems.append(f"its matrix products are wrong: {product.wrong} of {product.total} elements, limit 0")
    if product.tflops < health.tflops:
        problems.append(f"{product.tflops:.4g} TFLOP/s, below tflops={health.tflops:g}")
    return Checked(tuple(problems), numbers)


# Ranks together.


def enter(ranks: Ranks, device: torch.device, until: float) -> None:
    """Make the process group. gloo keeps the limit itself; NCCL's own end comes after ours, for it ends the process."""
    seconds = max(1.0, until - time.monotonic()) + (60.0 if device.type == "cuda" else 0.0)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(ranks.name, ranks.store),
        rank=ranks.index,
        world_size=ranks.count,
        timeout=timedelta(seconds=seconds),
    )


def finish(work: dist.Work | None, device: torch.device, until: float) -> None:
    """Wait, but not for ever."""
    assert work is not None
    while device.type == "cuda" and not work.is_completed():
        if time.monotonic() > until:
            raise TimeoutError("no end in time")
        time.sleep(1e-4)
    work.wait()


@dataclass(frozen=True)
class Reduced:
    """wrong: elements of this rank's sum that aren't the known ones. gbs: GB/s of the bus, None of one rank."""

    wrong: int
    gbs: float | None

    def problems(self, what: str) -> tuple[str, ...]:
        return (f"{what}: {self.wrong} elements of the sum are wrong, limit 0",) if self.wrong else ()


def values(device: torch.device) -> Tensor:
    """0, 1, ..., 6, 0, 1, ...: sums of them are small integers, exact in float32."""
    size = (GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4
    return torch.arange(size, device=device).remainder_(PERIOD).to(torch.float32)


def all_reduce(device: torch.device, until: float) -> Reduced:
    """One whose result is checked, then some for the speed."""
    index, count = dist.get_rank(), dist.get_world_size()
    first = values(device)
    total = first + index
    finish(dist.all_reduce(total, async_op=True), device, until)
    wrong = int((total != first * count + count * (count - 1) // 2).sum())
    total.zero_()
    device_checks.synchronize(device)
    begin = time.perf_counter()
    for work in [dist.all_reduce(total, async_op=True) for _ in range(TIMED)]:
        finish(work, device, until)
    device_checks.synchronize(device)
    seconds = (time.perf_counter() - begin) / TIMED
    moved = total.numel() * total.element_size() * 2 * (count - 1) / count
    return Reduced(wrong, moved / seconds / GB if count > 1 else None)


def check_link(draft: Draft, local: Store, device: torch.device) -> Checked:
    """The node's own ranks."""
    place, limit = draft.place, draft.request.health.link
    enter(Ranks("link", local, place.local_rank, place.local_world), device, draft.until(LOCAL))
    reduced = all_reduce(device, draft.until(LOCAL))
    dist.destroy_process_group()
    problems, numbers = reduced.problems("all-reduce within the node"), dict[str, float]()
    if reduced.gbs is not None:
        numbers["link_gbs"] = round(reduced.gbs, 4)
        if reduced.gbs < limit:
            problems = (*problems, f"all-reduce within the node: {reduced.gbs:.3g} GB/s, below link={limit:g}")
    return Checked(problems, numbers)


# All nodes.


def join(draft: Draft, local: Store, world: TCPStore | None) -> tuple[list[Member], int]:
    """Who takes part across, by rank, and the port of the store; nobody where this node can't. The first rank decides
    who, when all nodes have met or the time for it is over.
    """
    place = draft.place
    if not place.leads:
        draft.begin("meeting the others", ACROSS, blames=False)
        if not wait_for(local, "join", draft.until(ACROSS)):
            return [], 0
        told, port = json.loads(local.get("join"))
        return [Member(*each) for each in told], port
    members, port = list[Member](), 0
    try:
        answer = meet(draft)
        if answer is not None and answer.store:
            port, store = answer.store, open_store(place.address[0], answer.store, serves=False)
        elif world is not None:
            port, store = world.port, world
        else:
            raise OSError("the first rank holds no store")
        draft.begin("meeting the others", ACROSS, blames=False)
        me = Member(place.node, place.rank, place.local_world)
        store.set(f"node/{place.node}", json.dumps([asdict(me), not draft.problems]))
        if world is not None:
            publish(draft, world)
        if not draft.problems and wait_for(store, "members", draft.until(ACROSS)):
            members = [Member(*each) for each in json.loads(store.get("members"))]
            if me not in members:
                draft.note("it met the others too late for the all-reduce across nodes")
                members = []
    except BROKEN as error:
        draft.note(f"all-reduce across nodes: {first_line(error)}")
    local.set("join", json.dumps([[(each.node, each.first, each.count) for each in members], port]))
    return members, port


def publish(draft: Draft, world: TCPStore) -> None:
    """The first rank: wait for every node, then say who takes part."""
    keys = [f"node/{node}" for node in draft.request.nodes]
    while not world.check(keys) and time.monotonic() < draft.until(MEET):
        time.sleep(0.05)
    told = [json.loads(world.get(key)) for key in keys if world.check([key])]
    fit = sorted((Member(**member) for member, is_fit in told if is_fit), key=lambda member: member.first)
    world.set("members", json.dumps([(each.node, each.first, each.count) for each in fit]))
    if not fit:
        world.set("left", "nobody came")


@dataclass(frozen=True)
class PeerNodes:
    """What a rank needs to go across."""

    store: Store
    members: list[Member]
    device: torch.device

    @property
    def count(self) -> int:
        return sum(member.count for member in self.members)

    def index(self, position: int, local_rank: int) -> int:
        """A rank's place among those of all members. position: its node's."""
        return sum(member.count for member in self.members[:position]) + local_rank


def go_across(draft: Draft, local: Store, peers: PeerNodes) -> None:
    """All-reduce over all members, exchange with the neighbours, say so, and leave when all have."""
    place = draft.place
    position = [member.node for member in peers.members].index(place.node)
    draft.write("across")
    draft.begin("the all-reduce across nodes", ACROSS, blames=False)
    until = draft.until(ACROSS)
    try:
        index = peers.index(position, place.local_rank)
        enter(Ranks("across", peers.store, index, peers.count), peers.device, until)
        reduced = all_reduce(peers.device, until)
        for problem in reduced.problems("all-reduce across nodes"):
            draft.note(problem)
        if reduced.gbs is not None:
            draft.add(Checked(numbers={"network_gbs": round(reduced.gbs, 4)}))
        if len(peers.members) > 2:
            draft.add(Checked(numbers={"pair_gbs": round(exchange(draft, peers, position, until), 4)}))
        draft.write("done", ended=True)
    except BROKEN as error:
        draft.note(f"all-reduce across nodes: {first_line(error)}")
        draft.write("across", ended=True)
    draft.begin("leaving", 1.0, blames=False)
    goodbye = min(time.monotonic() + GOODBYE, draft.until(1.0))
    try:
        if peers.store.add("left/count", 1) == peers.count:
            peers.store.set("left", "all")
        wait_for(peers.store, "left", until if place.rank == 0 else goodbye)
    except RuntimeError:
        return  # the store is gone, as all had left


def exchange(draft: Draft, peers: PeerNodes, position: int, until: float) -> float:
    """GB/s each way of this node with the better of its neighbours in the ring of members, all its ranks at once, each
    with its counterpart. Links that share no node measure at the same time: every other one, an odd ring's last apart.
    """
    rates, num_nodes, own = [0.0], len(peers.members), peers.members[position].count
    for colour in range(3 if num_nodes % 2 else 2):
        for left in range(num_nodes):
            right = (left + 1) % num_nodes
            of_left = 2 if num_nodes % 2 and left == num_nodes - 1 else left % 2
            if of_left != colour or position not in (left, right):
                continue
            if peers.members[left].count != peers.members[right].count:
                continue
            other = peers.index(left + right - position, draft.place.local_rank)
            rates.append(swap(peers.device, other, until) * own)
    return max(rates)


def swap(device: torch.device, other: int, until: float) -> float:
    """GB/s each way with another rank."""
    ours = values(device)
    theirs = torch.empty_like(ours)
    begin = time.perf_counter()
    for attempt in range(1 + TIMED):
        if attempt == 1:  # the first one connects
            device_checks.synchronize(device)
            begin = time.perf_counter()
        both = [dist.P2POp(dist.isend, ours, other), dist.P2POp(dist.irecv, theirs, other)]
        for work in dist.batch_isend_irecv(both):
            finish(work, device, until)
    device_checks.synchronize(device)
    seconds = (time.perf_counter() - begin) / TIMED
    return ours.numel() * ours.element_size() / seconds / GB
