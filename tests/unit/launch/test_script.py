"""job -> script, as a pure function: against files that a person has read. UPDATE_GOLDEN=1 writes them anew."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from framework.launch.cluster import load_cluster
from framework.launch.job import Job
from framework.launch.script import RANK_SCRIPT, script_of, srun_words

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "slurm"


def job_on(name: str) -> Job:
    cluster = replace(load_cluster(ROOT / "slurm" / "clusters" / f"{name}.yaml"), python="/opt/python")
    return Job(
        name="cuboid-a",
        run="/shared/runs/a",
        folder="/shared/runs/a/jobs/0000",
        code="/shared/runs/a/jobs/code-0123456789ab",
        command=("/opt/python", "-m", "framework.cli", "train", "/shared/runs/a/jobs/0000/recipe.yaml"),
        cluster=cluster,
        nodes=(2, 2),
        store="/shared/runs/a/checkpoints",
    )


def elastic(job: Job) -> Job:
    cluster = replace(job.cluster, spare_nodes=1, gpu_type="h100", setup=["module load cuda"])
    return replace(job, cluster=cluster, nodes=(2, 4), dependency="afterok:17", exclude=("n7", "n9"))


@pytest.mark.parametrize("name", ["plain", "containers", "lab", "elastic"])
def test_scripts(name: str) -> None:
    job = elastic(job_on("plain")) if name == "elastic" else job_on(name)
    text, file = script_of(job) + "\n", GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()
    assert script_of(job) + "\n" == text  # and again


def test_steps() -> None:
    """Everything that shapes a step is said, as what the batch script has inherited would be taken otherwise."""
    job = elastic(job_on("containers"))
    words = srun_words(job, ("n3", "n1"), ("python", "-V"), tasks_a_node=8, tolerant=False)
    assert words[:9] == [
        *("srun", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=12", "--gpus-per-node=h100:8"),
        *("--nodelist=n3,n1", "--kill-on-bad-exit=1", "--overlap"),
    ]
    assert words[9:-4] == job.cluster.srun
    assert words[-4:] == ["bash", "/shared/runs/a/jobs/0000/rank.sh", "python", "-V"]
    check = srun_words(job, ("n3",), ("true",), tasks_a_node=1, tolerant=True)
    assert "--kill-on-bad-exit=0" in check and "--no-kill" in check


@pytest.mark.parametrize(("node", "local", "rank"), [("n3", 0, 0), ("n3", 1, 1), ("n1", 0, 2), ("n1", 1, 3)])
def test_the_contract_of_a_task(tmp_path: Path, node: str, local: int, rank: int) -> None:
    """Ranks are consecutive on a node, nodes in the order that they are given in, whatever Slurm's own is."""
    script = tmp_path / "rank.sh"
    script.write_text(RANK_SCRIPT)
    slurm = {
        "CUBOID_HOSTS": "n3 n1",
        "CUBOID_RANKS_A_NODE": "2",
        "CUBOID_LOGS": str(tmp_path),
        "SLURMD_NODENAME": node,
        "SLURM_LOCALID": str(local),
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "0",
        "SLURM_STEP_ID": "5",
        "SLURM_TOPOLOGY_ADDR": f"core.s0.{node}",
        "PATH": os.environ["PATH"],
    }
    subprocess.run(["bash", str(script), "env"], env=slurm, check=True)
    lines = (tmp_path / f"rank-{rank:05}.log").read_text().splitlines()
    told = dict(line.split("=", 1) for line in lines if not line.startswith("SLURM"))
    assert {name: told[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n3",
    }
    assert (told["CUBOID_NODE"], told["CUBOID_SWITCH"]) == (node, f"core.s0.{node}")
    assert (tmp_path / "step").read_text() == "5\n"
