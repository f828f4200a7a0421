"""The Slurm that the other tests run on: its nodes are told apart, come and go, and leave nothing."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_lab import SCRIPT, Lab, NoLabError

SLEEP = f"sleep 99.{os.getpid()}"  # told apart from those of another run of the tests


def processes() -> dict[str, str]:
    """Process id -> command line, of all that live."""
    done = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if "<defunct>" not in line)


def sleepers() -> list[str]:
    """Process ids of all `SLEEP`s."""
    return [pid for pid, command in processes().items() if command.removeprefix("/usr/bin/") == SLEEP]


def submit_sleepers(lab: Lab, num_nodes: int) -> str:
    """A job of one sleeper a node that outlives a lost node, running."""
    command = f"srun --no-kill --kill-on-bad-exit=0 {SLEEP}"
    words = f"--parsable --nodes={num_nodes} --ntasks-per-node=1 --no-kill --output={lab.folder}/%j.out".split()
    job_id = lab.run("sbatch", *words, "--wrap", command)
    wait_until(lambda: len(sleepers()) == num_nodes)
    return job_id


def wait_until(condition: Callable[[], bool], timeout: float = 10) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_each_node_has_a_name_an_address_and_gpus_of_its_own(lab: Lab) -> None:
    show = 'echo $(hostname) $SLURMD_NODENAME $(getent hosts $(hostname) | cut -d" " -f1) $CUDA_VISIBLE_DEVICES'
    rows = [row.split() for row in lab.run("srun", "--nodes=4", "--gpus-per-node=2", "sh", "-c", show).splitlines()]
    assert sorted(row[0] for row in rows) == ["node0", "node1", "node2", "node3"]
    assert all(row[0] == row[1] and row[3] == "0,1" for row in rows)
    assert len({row[2] for row in rows}) == 4 and all(row[2].startswith("127.") for row in rows)


def test_a_killed_slurmd_leaves_its_ranks_and_a_lost_node_does_not(lab: Lab) -> None:
    job_id = submit_sleepers(lab, 4)
    lab.kill_node("node3")
    time.sleep(0.5)
    assert len(sleepers()) == 4
    lab.start_node("node3")
    assert lab.node_state("node3") == "allocated"
    lab.lose_node("node3")
    assert len(sleepers()) == 3
    lab.run("scancel", "--signal=KILL", "--full", job_id)
    lab.start_node("node3")
    assert lab.run("srun", "--nodes=4", "hostname").count("node") == 4
    wait_until(lambda: not sleepers())


def test_a_frozen_node_goes_on_where_it_was(lab: Lab) -> None:
    job_id = submit_sleepers(lab, 1)
    (pid,) = sleepers()
    lab.freeze_node("node0")
    stat = Path(f"/proc/{pid}/stat")
    assert stat.read_text().split()[2] == "T"
    lab.start_node("node0")
    assert stat.read_text().split()[2] == "S"
    lab.run("scancel", job_id)
    lab.wait_state(job_id, "CANCELLED")


def test_two_labs_run_at_once_and_down_leaves_nothing(lab: Lab, tmp_path: Path) -> None:
    second = Lab(tmp_path / "second", num_nodes=2)
    try:
        submit_sleepers(second, 2)
        assert lab.run("squeue", "--noheader") == ""
        words = ["srun", "--jobid=1", "--nodes=1", "--ntasks=1", "--overlap", *SLEEP.split()]
        client = subprocess.Popen(words, env=second.environment, stderr=subprocess.DEVNULL)
        wait_until(lambda: len(sleepers()) == 3)
    finally:
        second.close()
    assert client.wait(5) != 0 and not sleepers()
    assert not second.folder.exists() and str(second.folder) not in Path("/proc/self/mountinfo").read_text()
    assert not [command for command in processes().values() if str(second.folder) in command]
    second.close()
    assert lab.run("srun", "hostname") == "node0"


def test_a_mistake_is_one_line(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(NoLabError, match=r"^error: no node 'node9'; there are node0 node1 node2 node3$"):
        lab.lose_node("node9")
    (tmp_path / "precious").touch()
    for verb, message in (("down", "is not a lab's directory"), ("status", "no lab in"), ("fly", "usage")):
        done = subprocess.run(["bash", str(SCRIPT), verb, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "precious").exists()
    unprivileged = ["setpriv", "--reuid=65534", "bash", str(SCRIPT), "up", str(tmp_path / "mine")]
    done = subprocess.run(unprivileged, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and done.stderr == "error: lab.sh up needs root\n"
