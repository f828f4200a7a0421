"""SIGKILL all ranks that read a data set, at random moments, and resume on another mesh: no sample lost or repeated.

    python tools/soak/stream.py [--store s3|DIR] [--kills 100] [--seed N] [--outages [--frozen SECONDS]]

Each cycle starts ranks (reading.py: the product's streams, schedule, cache, decoding processes and loader, no model) on
a mesh drawn at random, dp 4 and dp 3 after each other among them, with 0 to 2 decoding processes each, from the step
after the last one that counts; kills all of them at once; and compares every step that was read, its samples, their
order's places and the hash of their latents, with what one process gets from a directory, uninterrupted. What a kill
leaves behind is looked at too: shared memory, processes, and more than whole files or more bytes than allowed in the
cache. With s3 it starts a SeaweedFS (tools/object_store.sh) and reads as an identity that may only read; with --outages
that server is killed and restarted, or frozen, in some cycles. Exit status 1 on any violation.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import boto3
import reading
from buckets import Server

from framework.launch.local import free_port

STEPS_A_KILL = 15  # that are expected at most
SAVES = 2  # a step counts when the steps up to it are a multiple of this, as with checkpoint.every
CACHE_BYTES = 160_000
MESHES = ({"dp": 4}, {"dp": 3}, {"dp": 1}, {"dp": 2, "ring": 2}, {"dp": 1, "tp": 2}, {"dp": 1, "ulysses": 2, "tp": 2})
GONE = 6.0  # seconds within which a dead rank's processes have ended; a busy machine takes some
SHARED_MEMORY = Path("/dev/shm")


class Violation(AssertionError):
    """Something that must not be."""


@dataclass
class Tally:
    """What has happened."""

    kills: int = 0
    steps: int = 0
    again: int = 0
    meshes: Counter[str] = field(default_factory=Counter)
    outages: Counter[str] = field(default_factory=Counter)
    firsts: list[float] = field(default_factory=list)


@dataclass
class Soak:
    """A run that is killed over and over. expected: samples by step. frozen: seconds at most that the server is. done:
    steps that count.
    """

    context: Any
    recipe: Path
    cache: Path
    expected: list[list[reading.Seen]]
    rng: random.Random
    server: Server | None = None
    frozen: float = 4.0
    done: int = 0
    seen: dict[int, list[reading.Seen]] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)

    def cycle(self, mesh: dict[str, int] | None = None) -> str:
        """Start, kill, compare. Returns a line."""
        mesh = mesh or self.rng.choice(MESHES)
        workers, ranks = self.rng.randrange(3), 1
        for degree in mesh.values():
            ranks *= degree
        words = (
            *(f"mesh.{name}={degree}" for name, degree in mesh.items()),
            f"data.workers={workers}",
            f"data.cache.path={self.cache}",
            f"data.cache.gigabytes={CACHE_BYTES / 1e9}",
            f"data.degrees={self.rng.choice(('mesh', 'auto'))}",
        )
        before = set(SHARED_MEMORY.iterdir())
        plan = reading.Plan(self.recipe, words, self.done, ranks)
        first, told, pids = self._run(plan, seconds=self.rng.uniform(0.05, 2.0))
        self._compare(told, ranks)
        self._look_around(before, pids)
        self.tally.kills += 1
        self.tally.meshes[" ".join(words[: len(mesh)])] += 1
        self.tally.firsts.append(first)
        return f"{' '.join(words[:-3])}: from step {plan.start}, {len(told[0])} steps, {self.done} count"

    def _run(self, plan: reading.Plan, *, seconds: float) -> tuple[float, list[list[Any]], list[int]]:
        """An attempt that is killed some seconds after its first step; what each rank told, and their processes."""
        begin, port = time.monotonic(), free_port()
        pipes, processes = [], []
        for rank in range(plan.num_ranks):
            mine, theirs = self.context.Pipe(duplex=False)
            process = self.context.Process(target=reading.rank_main, args=(plan, rank, port, theirs))
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        told: list[list[Any]] = [[] for _ in pipes]
        first, deadline = 0.0, time.monotonic() + 120
        while time.monotonic() < deadline:
            for pipe in wait(pipes, 0.05):
                assert isinstance(pipe, Connection)
                message = pipe.recv()
                if isinstance(message, str):
                    self._kill(processes)
                    raise Violation(f"a rank failed: {message}")
                told[pipes.index(pipe)].append(message)
                if not first:
                    first = time.monotonic() - begin
                    self._outage()
                    deadline = time.monotonic() + seconds
            if max(len(each) for each in told) + plan.start >= len(self.expected) - 1:
                break
        self._kill(processes)
        for pipe, each in zip(pipes, told, strict=True):
            while pipe.poll():
                try:
                    each.append(pipe.recv())
                except (EOFError, OSError):  # killed in the middle of a word
                    break
        if not first:
            raise Violation("no step was read within 120 s")
        return first, told, [process.pid for process in processes]

    def _outage(self) -> None:
        """Now and then, trouble with the server, in the middle of reading."""
        if self.server is None or self.rng.random() > 0.25:
            return
        kind = self.rng.choice(("restart", "freeze"))
        self.tally.outages[kind] += 1
        if kind == "restart":
            self.server.kill()
            time.sleep(self.rng.uniform(0, 2))
            self.server.start()
            return
        self.server.freeze()
        time.sleep(self.rng.uniform(0.5, self.frozen))
        self.server.thaw()

    def _kill(self, processes: list[Any]) -> None:
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join(10)

    def _compare(self, told: list[list[Any]], ranks: int) -> None:
        """Every step that all ranks have told, with what is expected."""
        for number in range(min(len(each) for each in told)):
            steps = {each[number][0] for each in told}
            if len(steps) != 1 or (step := steps.pop()) != self.done + number:
                raise Violation(f"the ranks were at different steps: {steps}, {self.done + number} expected")
            own = sorted(seen for each in told for seen in each[number][1])
            if own != self.expected[step]:
                lost, extra = set(self.expected[step]) - set(own), set(own) - set(self.expected[step])
                raise Violation(f"step {step} on {ranks} ranks: lost {sorted(lost)}, instead {sorted(extra)}")
            strangers = {seen for each in told for seen in each[number][2]} - set(own)
            if strangers:
                raise Violation(f"step {step}: received but not read: {sorted(strangers)}")
            self.seen[step] = own
        complete = self.done + min(len(each) for each in told)
        self.tally.steps += complete - self.done
        self.tally.again += complete % SAVES
        self.done = complete - complete % SAVES

    def _look_around(self, before: set[Path], pids: list[int]) -> None:
        """What the killed ranks have left."""
        deadline = time.monotonic() + GONE
        while (left := decoders(self.recipe)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            raise Violation(f"decoding processes live on: {left}")
        new = set(SHARED_MEMORY.iterdir()) - before
        # joblib makes one of its own in each process that imports it: other programs' aren't ours.
        others = {
            path for path in new if path.name.startswith("sem.loky-") and int(path.name.split("-")[1]) not in pids
        }
        if new - others:
            raise Violation(f"shared memory is left behind: {new - others}")
        files = [path for path in self.cache.rglob("*") if path.is_file()] if self.cache.exists() else []
        total = sum(path.stat().st_size for path in files)
        if total > CACHE_BYTES + 2 * reading.SHARD_BYTES:
            raise Violation(f"the cache holds {total} bytes, over {CACHE_BYTES} and a shard")

    def finish(self) -> str:
        """Nothing lost, nothing twice, over all steps that were read."""
        taken = Counter(seen for step in self.seen.values() for seen in step)
        wanted = Counter(seen for step in sorted(self.seen) for seen in self.expected[step])
        if taken != wanted or sorted(self.seen) != list(range(len(self.seen))):
            raise Violation("samples were lost or repeated")
        tally = self.tally
        return (
            f"{tally.kills} kills, {len(self.seen)} steps and {taken.total()} samples as without any, 0 lost, 0 "
            f"repeated; {tally.again} steps read again; first step after {min(tally.firsts):.2f} to "
            f"{max(tally.firsts):.2f} s; meshes {dict(tally.meshes)}; server {dict(tally.outages)}"
        )


def decoders(recipe: Path) -> list[int]:
    """Decoding processes that ranks of this soak have started: the ranks' environment names its recipe."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if b"decode_worker" in (process / "cmdline").read_bytes():
                found += [int(process.name)] * (str(recipe).encode() in (process / "environ").read_bytes())
    return found


def upload(folder: Path, bucket: str, prefix: str, environment: dict[str, str]) -> str:
    """Copy a directory to the store; its URL."""
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}")
    return f"s3://{bucket}/{prefix}"


def build_soak(context: Any, folder: Path, server: Server | None, *, seed: int, outages: bool, kills: int) -> Soak:
    """Make the data, put them where they are read from, and find out what is expected."""
    places = reading.make_data(folder)
    local = reading.write_recipe(folder / "local.yaml", [str(place) for place in places.values()])
    recipe = local
    if server is not None:
        prefix = f"soak-{seed}-{os.getpid()}"
        urls = [upload(place, "vid", f"{prefix}/{name}", server.environment) for name, place in places.items()]
        recipe = reading.write_recipe(folder / "remote.yaml", urls)
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=reading.expected_main, args=(local, STEPS_A_KILL * kills, theirs))
    process.start()
    expected = mine.recv()
    process.join()
    if isinstance(expected, str):
        raise Violation(expected)
    return Soak(
        context,
        recipe,
        folder / "cache",
        expected,
        random.Random(seed),
        server=server if outages else None,
    )


def build_context() -> Any:
    """A fork server that has imported what ranks need."""
    server = multiprocessing.get_context("forkserver")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.environ["OMP_NUM_THREADS"] = "1"
    server.set_forkserver_preload(["reading", "boto3", "streaming.base.format"])
    return server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="s3", help="s3, or `local` to read from a directory")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outages", action="store_true")
    parser.add_argument("--frozen", type=float, default=4.0)
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder, server = Path(name), None
        if given.store == "s3":
            from object_store import ObjectStore

            server = ObjectStore(folder / "store")
            os.environ.update({"AWS_ACCESS_KEY_ID": "readerkey", "AWS_SECRET_ACCESS_KEY": "readersecret"})
        try:
            begin = time.monotonic()
            soak = build_soak(
                build_context(), folder, server, seed=given.seed, outages=given.outages, kills=given.kills
            )
            soak.frozen = given.frozen
            for number in range(given.kills):
                mesh = MESHES[number % 2] if number < 4 else None  # dp 4, 3, 4, 3, then as it comes
                print(f"{number:4} {soak.cycle(mesh)}", flush=True)
            print(f"{soak.finish()}; {time.monotonic() - begin:.0f} s", flush=True)
        except Violation as error:
            print(f"violation: {error}", flush=True)
            return 1
        finally:
            if server is not None:
                server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
