"""Many ranks and buckets on one machine: how many processes, how much memory and disk they take, and for how long.

    python tools/soak/crowd.py [--ranks 8] [--workers 2] [--buckets 30] [--samples 50000]

Reads latents of many shapes and videos from a SeaweedFS (tools/object_store.sh) through one cache with a small limit,
as training does but without a model, and looks at all processes and the cache every half second. Exit status 1 where a
rank has more decoding processes than it was given, where memory grows (the last quarter against the second one, by more
than 5 %), where the cache holds more than its limit and a shard, or where shared memory or temporary files are left.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import reading
import stream

from framework.data.shards import LATENT_SCHEMA, VIDEO_SCHEMA
from framework.launch.local import free_port
from framework.shapes import ClipShape

CACHE_BYTES = 400_000
LOOK = 0.5  # seconds
GROWTH = 1.05
PAGE = os.sysconf("SC_PAGE_SIZE")


class Look:
    """What was seen of the processes and the cache, over time. memory: bytes of all, by look."""

    def __init__(self, cache: Path, ranks: list[int]) -> None:
        self._cache, self._ranks = cache, ranks
        self.memory: list[int] = []
        self.most_workers, self.most_cached = 0, 0

    def take(self) -> None:
        """Look once."""
        children: dict[int, list[int]] = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(status.parent.name))
        workers = [pid for rank in self._ranks for pid in children.get(rank, [])]
        self.most_workers = max(self.most_workers, *(len(children.get(rank, [])) for rank in self._ranks))
        self.memory.append(sum(resident(pid) for pid in [*self._ranks, *workers]))
        cached = sum(size_of(path) for path in self._cache.rglob("*")) if self._cache.exists() else 0
        self.most_cached = max(self.most_cached, cached)

    def growth(self) -> float:
        """The median memory of the last quarter over that of the second."""
        quarter = len(self.memory) // 4
        middle, last = sorted(self.memory[quarter : 2 * quarter]), sorted(self.memory[-quarter:])
        return last[len(last) // 2] / middle[len(middle) // 2]


def resident(pid: int) -> int:
    """Bytes of a process in memory, 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where it is gone or none."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def make_crowd(folder: Path, num_buckets: int) -> tuple[dict[str, Path], list[tuple[ClipShape, float]]]:
    """Streams by name, and the shapes of the buckets: all but the last of latents."""
    grid = (ClipShape(*size) for size in itertools.product((5, 9, 13, 17), (16, 32, 48), (16, 32, 48)))
    shapes = [(clip, 1.0) for clip in itertools.islice((c for c in grid if c != reading.VIDEO), num_buckets - 1)]
    samples = [s for clip, _ in shapes for s in reading.make_latents(f"{clip}-", clip, 30)]
    reading.write(folder / "latents", LATENT_SCHEMA, samples)
    reading.write(folder / "videos", VIDEO_SCHEMA, reading.make_videos(folder, 20))
    return {name: folder / name for name in ("latents", "videos")}, [*shapes, (reading.VIDEO, 0.5)]


def crowd(
    context: Any, folder: Path, server: stream.Server, *, ranks: int, workers: int, buckets: int, samples: int
) -> str:
    """Read so many samples. Returns what was seen. Raises Violation."""
    places, shapes = make_crowd(folder, buckets)
    urls = [stream.upload(p, "vid", f"crowd-{os.getpid()}/{name}", server.environment) for name, p in places.items()]
    recipe, cache = reading.write_recipe(folder / "crowd.yaml", urls, shapes), folder / "cache"
    words = (f"data.workers={workers}", f"data.cache.path={cache}", f"data.cache.gigabytes={CACHE_BYTES / 1e9}")
    shared, temporary = set(Path("/dev/shm").iterdir()), set(Path(tempfile.gettempdir()).iterdir())
    plan, port = reading.Plan(recipe, (*words, "data.global_batch=64", "data.rounds=4"), 0, ranks), free_port()
    pipes, processes = [], []
    for rank in range(ranks):
        mine, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=reading.rank_main, args=(plan, rank, port, theirs)))
        processes[-1].start()
        theirs.close()
        pipes.append(mine)
    look, done, begin = Look(cache, [process.pid for process in processes]), 0, time.monotonic()
    due = time.monotonic()
    try:
        while done < samples:
            for pipe in wait(pipes, LOOK):
                assert isinstance(pipe, Connection)
                message = pipe.recv()
                if isinstance(message, str):
                    raise stream.Violation(message)
                done += len(message[1])
            if done and time.monotonic() > due:
                look.take()
                due = time.monotonic() + LOOK
    finally:
        for process in processes:
            process.kill()
            process.join()
    seconds = time.monotonic() - begin
    time.sleep(1)
    left = set(Path("/dev/shm").iterdir()) - shared
    left |= {path for path in set(Path(tempfile.gettempdir()).iterdir()) - temporary if path != folder}
    told = (
        f"{ranks} ranks, {len(shapes)} buckets, {done} samples in {seconds:.0f} s: {look.most_workers} decoding "
        f"processes a rank at most; memory of all {look.memory[-1] / 1e9:.2f} GB, {look.growth():.3f} times the "
        f"second quarter's; cache at most {look.most_cached} bytes of {CACHE_BYTES}; left behind: {sorted(left)}"
    )
    largest = 2 * reading.SHARD_BYTES + max(size_of(path) for path in folder.rglob("*.mds"))
    wrong = look.most_workers > workers or look.growth() > GROWTH or look.most_cached > CACHE_BYTES + largest
    if wrong or any("cuboid" in path.name or "stream" in path.name for path in left):
        raise stream.Violation(told)
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 8), ("workers", 2), ("buckets", 30), ("samples", 50_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from object_store import ObjectStore

    with tempfile.TemporaryDirectory(prefix="crowd-") as name:
        server = ObjectStore(Path(name) / "store")
        try:
            print(crowd(stream.build_context(), Path(name), server, **vars(given)))
        except stream.Violation as error:
            print(f"violation: {error}")
            return 1
        finally:
            server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
