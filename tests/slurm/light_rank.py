"""A rank that trains nothing and needs no torch: for tests of what is around it.

    python light_rank.py RECIPE.json

It keeps to the contract of the ranks (environment.py), beats, stops on signals, fences, saves and resumes as training
does, through the product's own modules. What stands for the collective of a step is an exchange with rank 0 over TCP,
so that a rank that stands still stops all, and one that dies is noticed. Its checkpoints hold the sum of the steps that
it has done, so that a step lost or done twice shows.
"""

import json
import os
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from framework.checkpoint.attempt import take_attempt
from framework.checkpoint.fence import Fence
from framework.checkpoint.find import newest
from framework.checkpoint.manifest import MANIFEST, Entry, Manifest, Origin, Progress, StoredFile, encode_manifest
from framework.environment import Environment, StopFlag, read_environment
from framework.failure import failure_of, write_failure
from framework.heartbeat import Heart
from framework.run import Run, Verdict
from framework.stacks import dump_on_signal
from framework.storage.storage import open_storage

PATIENCE = 60.0


@dataclass(frozen=True)
class Plan:
    """store: of the checkpoints. every: steps between saves. pause: seconds of a step, save: of a save, start: of the
    start. error: what the start fails with; crash: the step in which rank 1 fails. slow:
    number of the node that is slow in the first attempt.
    """

    store: str
    steps: int
    every: int = 5
    pause: float = 0.05
    save: float = 0.0
    start: float = 0.0
    error: str = ""
    crash: int = 0
    slow: int = -1


class Exchange:
    """Every rank tells a number, all learn the largest: a collective over TCP, by rank 0."""

    def __init__(self, env: Environment, address: str, port: int) -> None:
        self.env = env
        self.peers: list[socket.socket] = []
        if env.rank == 0:
            server = socket.create_server(("", port))
            server.settimeout(PATIENCE)
            for _ in range(env.world_size - 1):
                self.peers.append(server.accept()[0])
            return
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.peers = [socket.create_connection((address, port), timeout=PATIENCE)]
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self.peers[0].settimeout(None)

    def largest(self, value: int) -> int:
        if self.env.rank:
            self.peers[0].sendall(struct.pack("!q", value))
            return receive(self.peers[0])
        largest = max([value, *(receive(peer) for peer in self.peers)])
        for peer in self.peers:
            peer.sendall(struct.pack("!q", largest))
        return largest


def receive(peer: socket.socket) -> int:
    data = b""
    while len(data) < 8:
        part = peer.recv(8 - len(data))
        if not part:
            raise ConnectionError("Connection closed by peer")
        data += part
    return struct.unpack("!q", data)[0]


def save(plan: Plan, run: Run, fence: Fence, exchange: Exchange, *, step: int, total: int) -> None:
    """Every rank writes its part, rank 0 commits."""
    storage, entry = fence.storage, Entry(step, run.attempt)
    data = json.dumps({"step": step, "total": total}).encode()
    storage.put(f"{entry.folder}/rank-{exchange.env.rank}.json", data)
    time.sleep(plan.save)
    exchange.largest(0)
    if exchange.env.rank == 0:
        fence.check()
        files = {f"rank-{rank}.json": StoredFile(len(data), ()) for rank in range(exchange.env.world_size)}
        manifest = Manifest(Progress(step), Origin(run.attempt), files)
        storage.put(f"{entry.folder}/{MANIFEST}", encode_manifest(manifest))
    exchange.largest(0)


def train(plan: Plan, env: Environment, heart: Heart) -> Verdict:
    stop = StopFlag()
    assert env.run is not None and env.attempt is not None
    run, storage = Run(env.run, env.attempt), open_storage(plan.store)
    fence = take_attempt(run.path, storage, env.attempt) if env.rank == 0 else Fence(storage, env.attempt)
    heart.attach(run)
    (run.attempt_path / "pids").mkdir(exist_ok=True)
    (run.attempt_path / "pids" / f"{env.rank}").write_text(f"{os.getpid()} {os.environ['CUBOID_NODE']}")
    if plan.error:
        raise NameError(plan.error)
    time.sleep(plan.start)
    heart.enter("init")
    exchange = Exchange(env, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    heart.enter("load")
    found = newest(storage, fall_back=False)
    step, total = 0, 0
    if found is not None:
        step = found.entry.step
        total = json.loads(storage.read(f"{found.entry.folder}/rank-0.json"))["total"]
    exchange.largest(0)
    if env.rank == 0:
        fence.begin(step)
        (run.path / "metrics.jsonl").touch()
        lines = (run.path / "metrics.jsonl").read_text().splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        (run.path / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
    heart.resumed(step, last=plan.steps)
    heart.enter("first_step")
    stopped = 0
    while step < plan.steps and not stopped:
        time.sleep(plan.pause)
        if step + 1 == plan.crash and env.rank == 1:
            raise RuntimeError("a made-up failure")
        stopped = exchange.largest(stop.signal or 0)
        step, total = step + 1, total + (step + 1) ** 2
        if env.rank == 0:
            with (run.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": 1 / step, "total": total}) + "\n")
        heart.step(step, seconds=plan.pause, tokens_per_second=1000.0, loss=1 / step)
        if step % 10 == 0 and plan.slow >= 0 and run.attempt == 0:
            times = (2.0 if rank // 2 == plan.slow else 1.0 + step * 1e-6 for rank in range(env.world_size))
            heart.measured(tuple(times), (0.0,) * env.world_size)
        if step % plan.every == 0 or step == plan.steps or stopped:
            heart.enter("save")
            save(plan, run, fence, exchange, step=step, total=total)
            heart.saved(step, time.time())
            heart.enter("step")
    verdict = Verdict("stopped" if stopped and step < plan.steps else "done", step, stopped or None)
    heart.enter("end")
    if env.rank == 0:
        run.write_verdict(verdict)
    exchange.largest(0)
    return verdict


def main() -> int:
    env = read_environment()
    assert env is not None and env.failures is not None and env.launched is not None
    assert env.run is not None and env.attempt is not None
    dump_on_signal(Run(env.run, env.attempt), env.rank)
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text()))
    heart = Heart(begin=env.launched, writes=env.rank == 0)
    try:
        verdict = train(plan, env, heart)
    except Exception as error:
        failure = failure_of(error, rank=env.rank, phase=heart.state.phase, step=heart.state.step)
        write_failure(env.failures, failure)
        return failure.status
    return 128 + verdict.signal if verdict.outcome == "stopped" and verdict.signal else 0


if __name__ == "__main__":
    sys.exit(main())
