"""SIGKILL all or one of a run's ranks at random moments, during saves above all, and check what each leaves.

    python tools/soak/checkpoint.py [--store DIR|s3] [--cycles 100] [--ranks 3] [--seed N]

Each cycle runs the product's claim, resume, steps and background saves on a light model (light.py), on a mesh drawn at
random, kills, and checks (kills.py): the newest committed checkpoint is the one that a resume finds and no older than
what was committed before, all checksums verify, all values are bit by bit those of the run that nothing interrupted,
what older attempts left is gone, what retention says is kept. With s3 it starts a SeaweedFS (tools/object_store.sh)
which is killed and restarted, or frozen for 20 s, in the middle of some of the saves: none of them may fail. Exit
status 1 on any violation.
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kills


def context() -> Any:
    """A fork server that has imported the trainer."""
    server = multiprocessing.get_context("forkserver")
    # CPython 3.11's server doesn't inherit sys.path, only the environment.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.environ["OMP_NUM_THREADS"] = "1"
    server.set_forkserver_preload(["light", "boto3"])
    return server


def summary(soak: kills.Soak, seconds: float) -> str:
    """What happened."""
    tally = soak.tally
    hits = sum(count for moment, count in tally.moments.items() if moment != "no save")
    lines = [
        f"{tally.kills.total()} kills ({dict(tally.kills)}) in {seconds:.0f} s, {hits} during a save: "
        f"{dict(tally.moments.most_common())}",
        f"worst recovery, from the launch to the first step: {max(tally.recoveries, default=0.0):.2f} s; "
        f"{tally.stragglers} times a rank had to be killed after the grace period; {tally.retries} saves tried again",
    ]
    if tally.outages:
        lines.append(f"the store: {dict(tally.outages)}")
    return "\n".join(lines)


def run(soak: kills.Soak, cycles: int) -> int:
    """All cycles. Returns the exit status."""
    begin, status = time.monotonic(), 0
    try:
        for number in range(cycles):
            print(f"{number:4} {soak.cycle()}", flush=True)
        print(soak.finish())
    except Exception as error:
        print(f"violation: {type(error).__name__}: {error}", flush=True)
        status = 1
    print(summary(soak, time.monotonic() - begin))
    return status


def run_on_server(folder: Path, ranks: int, seed: int, cycles: int) -> int:
    """All cycles on a server of its own."""
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    from buckets import soak_bucket
    from object_store import ObjectStore

    server = ObjectStore(folder)
    try:
        return run(soak_bucket(context(), server, "vid/soak", ranks=ranks, seed=seed), cycles)
    finally:
        server.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="", help="an empty directory, or s3; else a temporary one")
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=3, help="of a cycle, give or take one")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    words = parser.parse_args()
    print(f"seed {words.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        if words.store == "s3":
            return run_on_server(Path(folder), words.ranks, words.seed, words.cycles)
        path = Path(words.store or folder)
        if path.is_dir() and any(path.iterdir()):
            parser.error(f"{path} isn't empty")
        return run(kills.soak_directory(context(), path, ranks=words.ranks, seed=words.seed), words.cycles)


if __name__ == "__main__":
    sys.exit(main())
