"""One command, once on each node of a cluster that has a core free, by srun from where a person sits."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from framework.launch import slurm
from framework.launch.config import ClusterConfig
from framework.launch.script import python_of

# Options of a job that decide where it may run, which srun takes too.
WHERE: Final = ("partition", "account", "qos", "constraint", "reservation")
SECONDS = 300.0


def free_nodes(cluster: ClusterConfig) -> list[str]:
    """The nodes that could run something now. Raises OSError where the scheduler doesn't say."""
    words = ["sinfo", "--noheader", "--Node", "--states=idle,mixed", "--format=%N"]
    if partition := cluster.sbatch.get("partition"):
        words.append(f"--partition={partition}")
    return sorted(set(slurm.call(words).split()))


def run_on_nodes(cluster: ClusterConfig, words: Sequence[str]) -> Mapping[str, str | None]:
    """`cuboid WORDS` on each free node: node -> what it printed, None where it said nothing. Raises ValueError where
    no node is free.
    """
    nodes = free_nodes(cluster)
    if not nodes:
        raise ValueError(f"no node of {cluster.name} is free: see `sinfo`, or leave --nodes out")
    home = Path.home() / ".cuboid"  # which the nodes see, as a rule
    home.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="visit-", dir=home))
    try:
        command = [
            *("srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--cpus-per-task=1"),
            *(f"--nodelist={','.join(nodes)}", "--kill-on-bad-exit=0", "--no-kill", f"--output={folder}/%N.out"),
            *(f"--{name}={cluster.sbatch[name]}" for name in WHERE if name in cluster.sbatch),
            *("--job-name=cuboid-doctor", "--time=10", *cluster.srun),
            *(python_of(cluster), "-m", "framework.cli", *words),
        ]
        slurm.call(command, seconds=SECONDS, status=None)
        answers = {node: folder / f"{node}.out" for node in nodes}
        return {node: path.read_text() if path.is_file() else None for node, path in answers.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
