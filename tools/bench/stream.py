"""How fast rows come out of an object store, beside the least that it could take and beside the peers.

    python tools/bench/stream.py [--rounds 7] [--shards 16] [--megabytes 16] [--threads 4] [--wait] [--folder DIR]

(Not streaming.py, which would hide the library of that name from all of this folder.)

A SeaweedFS on the loopback holds latents, 0.6 MB each. In every round, in an order that changes, each with an empty
cache:

    raw            boto3 alone: the same files, a ranged GET each, as many at a time, thrown away
    ours           ShardStore: hashes on, rows read in a keyed order; then with the rows decoded
    mosaicml       StreamingDataset of the same directory, in order, without hashes, in a process of its own
    webdataset     the same bytes in tar files, by curl, in as many DataLoader workers as there are threads
    litdata        the same bytes in its own format, StreamingDataLoader, as many workers

The last two where they can be imported. `--wait`: how long a training loop waits for its data where the store supplies
it 1.2 times as fast as the steps take it; what it can supply is measured first, with the same reader.
"""

import argparse
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from interleave import orders
from machine import ROOT, machine

from framework.data.cache import ShardCache
from framework.data.index import SampleInfo
from framework.data.order import Order, View
from framework.data.patience import BadShard
from framework.data.shard_writer import ShardWriter
from framework.data.shards import LATENT_SCHEMA, Caption, LatentSample, ShardDirectory, open_shards
from framework.data.stream import ShardStore, Visit
from framework.storage.s3 import S3

SHAPE = (16, 5, 60, 64)  # of a latent, float16: 0.6 MB
PEERS = ("webdataset", "litdata")
SUPPLY = 1.2
FROM = (5, 25)  # steps: soon after the first, and when three windows of shards have gone by
BATCH = 16


@dataclass(frozen=True)
class Bench:
    """What all contestants read. threads: requests at a time."""

    folder: Path
    url: str
    threads: int
    urls: dict[str, list[str]]

    def open(self) -> ShardDirectory:
        return open_shards(self.url)

    def cache(self) -> Path:
        """A new and empty folder."""
        return Path(tempfile.mkdtemp(prefix="cache-", dir=self.folder))


def start_server(folder: Path) -> None:
    """Its clients find it by this process's environment."""
    script, environment = ROOT / "tools" / "object_store.sh", os.environ | {"PYTHON": sys.executable}
    subprocess.run(["bash", script, "start", folder], check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = (folder / "env").read_text().replace("export ", "").split()
    os.environ.update(dict(line.split("=", 1) for line in lines))


def write_latents(folder: Path, num_shards: int, shard_bytes: int) -> None:
    """Shards of random latents."""
    rows = shard_bytes // (2 * int(np.prod(SHAPE)) + 1000)
    with ShardWriter(
        folder, schema=LATENT_SCHEMA, tokenizer_version="bench", part_size=4 * rows, shard_bytes=shard_bytes
    ) as writer:
        for number in range(num_shards * rows):
            latents = np.frombuffer(np.random.default_rng(number).bytes(2 * int(np.prod(SHAPE))), np.uint16)
            info = SampleInfo(f"clip{number}@0", 17, 480, 512, 24.0)
            sample = LatentSample(info, latents.view(np.float16).reshape(SHAPE), (Caption("made"),))
            writer.write(info.uid, "made", [sample])
        writer.finish()


def upload(folder: Path, url: str) -> None:
    store = S3(url)
    with ThreadPoolExecutor(4) as pool:
        files = [path for path in folder.rglob("*") if path.is_file()]
        list(pool.map(lambda path: store.put(path.relative_to(folder).as_posix(), path.read_bytes()), files))


def client(threads: int) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client("s3", config=Config(max_pool_connections=threads))


def keyed_visits(shards: ShardDirectory, seed: int) -> Iterator[Visit]:
    """One epoch in the order of training, a row at a time."""
    edges = np.cumsum([0, *shards.shard_sizes])
    order = Order(View("bench", None, edges), seed, window=4)
    for draw in range(len(shards)):
        shard, position = shards.locate(order.at(draw)[1])
        yield Visit(0, shard, (position,))


def raw(bench: Bench) -> int:
    files, s3 = bench.open().files, client(bench.threads)
    bucket, _, prefix = bench.url.removeprefix("s3://").partition("/")

    def get(place: int) -> int:
        file = files[place]
        span = f"bytes=0-{file.num_bytes - 1}"
        return len(s3.get_object(Bucket=bucket, Key=f"{prefix}/{file.name}", Range=span)["Body"].read())

    with ThreadPoolExecutor(bench.threads) as pool:
        return sum(pool.map(get, range(len(files))))


def ours(bench: Bench, *, decode: bool = False) -> int:
    shards, total = bench.open(), 0
    store = ShardStore([shards], ShardCache(bench.cache(), 10**12), threads=bench.threads)
    for _, rows in store.follow(keyed_visits(shards, 1)):
        if isinstance(rows, BadShard):
            raise rows
        total += sum(map(len, rows))
        if decode:
            for row in rows:
                shards.decode(row)
    store.close()
    return total


def peer(name: str, bench: Bench) -> tuple[float, int]:
    words = ["read", name, str(bench.cache()), str(bench.threads), *bench.urls[name]]
    program = str(Path(__file__).with_name("stream_peers.py"))
    done = subprocess.run([sys.executable, program, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {name}: {done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    return result["seconds"], result["bytes"]


def timed(action: Callable[[Bench], int], bench: Bench) -> tuple[float, int]:
    begin = time.perf_counter()
    num_bytes = action(bench)
    return time.perf_counter() - begin, num_bytes


def compare(bench: Bench, rounds: int) -> None:
    """Print megabytes a second and their ratios to raw."""
    contestants: dict[str, Callable[[Bench], tuple[float, int]]] = {
        "raw": lambda bench: timed(raw, bench),
        "ours": lambda bench: timed(ours, bench),
        "ours, decoded": lambda bench: timed(lambda b: ours(b, decode=True), bench),
    }
    for name in bench.urls:
        contestants[name] = lambda bench, name=name: peer(name, bench)  # type: ignore[misc]
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    contestants["raw"](bench)  # the server's own first time
    for _, order in zip(range(rounds), orders(list(contestants)), strict=False):
        for name in order:
            seconds, num_bytes = contestants[name](bench)
            rates[name].append(num_bytes / seconds / 1e6)
            for cache in bench.folder.glob("cache-*"):
                shutil.rmtree(cache)
    print(f"{'':16}{'MB/s median':>12}{'lowest':>9}{'highest':>9}{'of raw (paired median)':>26}")
    for name, values in rates.items():
        of_raw = statistics.median(a / b for a, b in zip(values, rates["raw"], strict=True))
        print(f"{name:16}{statistics.median(values):12.0f}{min(values):9.0f}{max(values):9.0f}{of_raw:26.2f}")


def batches(bench: Bench, epochs: int) -> "queue.Queue[list[bytes] | None]":
    """A thread that reads as the loader's does: two batches ahead."""
    ready: queue.Queue[list[bytes] | None] = queue.Queue(2)
    shards = bench.open()
    store = ShardStore([shards], ShardCache(bench.cache(), 10**12), threads=bench.threads)

    def read() -> None:
        batch: list[bytes] = []
        for _, rows in store.follow(keyed_visits(shards, epochs)):
            assert not isinstance(rows, BadShard), rows
            batch += rows
            if len(batch) == BATCH:
                ready.put(batch)
                batch = []
        ready.put(None)

    threading.Thread(target=read, daemon=True).start()
    return ready


def waits(bench: Bench, step: float, number: int) -> tuple[list[float], float]:
    """Seconds that each step waited; seconds a step from the first batch on."""
    ready, waited = batches(bench, number), []
    begin = time.perf_counter()
    while True:
        before = time.perf_counter()
        batch = ready.get()
        if batch is None:
            break
        waited.append(time.perf_counter() - before)
        if len(waited) == 1:
            begin = time.perf_counter()
        time.sleep(step)
    return waited, (time.perf_counter() - begin) / len(waited)


def measure_waits(bench: Bench, rounds: int) -> None:
    """Print the share of a step that waits for data."""
    shares: dict[int, list[float]] = {first: [] for first in FROM}
    steps = []
    for number in range(rounds):
        _, supply = waits(bench, 0.0, number)
        step = SUPPLY * supply
        waited, _ = waits(bench, step, number)
        for first in FROM:
            shares[first] += [wait / (wait + step) for wait in waited[first:]]
        steps.append(step)
        for cache in bench.folder.glob("cache-*"):
            shutil.rmtree(cache)
    print(f"data wait at {SUPPLY} x supply, steps of {1e3 * statistics.median(steps):.1f} ms, as a share of a step:")
    for first, values in shares.items():
        p50, p99 = np.percentile(values, [50, 99])
        print(
            f"from step {first:2} on ({len(values)} steps): p50 {p50:.2%}, p99 {p99:.2%}, mean "
            f"{statistics.mean(values):.2%}"
        )


def prepare(folder: Path, arguments: argparse.Namespace) -> Bench:
    """Write and upload what all read."""
    write_latents(folder / "latents", arguments.shards, arguments.megabytes * 10**6)
    upload(folder / "latents", "s3://vid/bench")
    shards = open_shards(folder / "latents")
    urls = {"mosaicml": ["s3://vid/bench"]}
    for name in PEERS:
        if find_spec(name) is None:
            print(f"{name} isn't installed and left out")
            continue
        rows, size = shards.shard_sizes[0], 2 * int(np.prod(SHAPE))
        words = ["write", name, str(folder / name), str(len(shards.files)), str(rows), str(size)]
        program = str(Path(__file__).with_name("stream_peers.py"))
        subprocess.run([sys.executable, program, *words], check=True, capture_output=True)
        upload(folder / name, f"s3://vid/{name}")
        urls[name] = [f"s3://vid/{name}"]
        if name == "webdataset":
            place = {"Bucket": "vid", "Key": ""}
            urls[name] = [
                client(1).generate_presigned_url("get_object", Params=place | {"Key": f"{name}/{path.name}"})
                for path in sorted((folder / name).glob("*.tar"))
            ]
    num_bytes = sum(file.num_bytes for file in shards.files)
    print(f"{len(shards)} rows in {len(shards.files)} files, {num_bytes / 1e6:.0f} MB; {arguments.threads} at a time")
    return Bench(folder, "s3://vid/bench", arguments.threads, urls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--megabytes", type=int, default=16, help="of a shard")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(machine("mosaicml-streaming", "boto3")))
    folder = Path(tempfile.mkdtemp(prefix="bench-streaming-", dir=arguments.folder))
    try:
        start_server(folder / "server")
        bench = prepare(folder, arguments)
        if arguments.wait:
            measure_waits(bench, arguments.rounds)
        else:
            compare(bench, arguments.rounds)
    finally:
        script = ROOT / "tools" / "object_store.sh"
        subprocess.run(["bash", script, "kill", folder / "server"], check=False)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
