"""job -> batch script, and the script of one task. Pure functions.

The batch script starts the supervisor on the allocation's first node; the supervisor starts the steps. submitit writes
the script (its own srun is off), so what it says is what is submitted:

    sbatch --dependency, --nodes, --signal=USR2@notice, ...
        python -u -m submitit.core._submit FOLDER           unpickles and calls supervise(job)
            srun ... bash rank.sh python -m framework.cli train ...        one task a rank

`rank.sh` translates Slurm's names into the contract of the ranks (environment.py), which never read SLURM_*.
"""

import shlex
import sys
from typing import Any

from framework.launch.config import ClusterConfig
from framework.launch.job import Job

RANK_SCRIPT = """\
#!/usr/bin/env bash
# One task of a step. What Slurm says becomes what a rank reads; it never reads SLURM_*.
#   CUBOID_HOSTS   the step's nodes, in the order in which they get their ranks
#   CUBOID_LOGS    a directory for what ranks print, and for the step's number
trap '' USR1 USR2  # until the rank listens itself: they would end it
index=0
for host in $CUBOID_HOSTS; do
    [ "$host" = "$SLURMD_NODENAME" ] && break
    index=$((index + 1))
done
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$CUBOID_RANKS_A_NODE WORLD_SIZE=$SLURM_NTASKS
export RANK=$((index * CUBOID_RANKS_A_NODE + SLURM_LOCALID))
export MASTER_ADDR=${CUBOID_HOSTS%% *}
export CUBOID_NODE=$SLURMD_NODENAME CUBOID_SWITCH=${SLURM_TOPOLOGY_ADDR:-}
[ "$SLURM_PROCID" = 0 ] && echo "$SLURM_STEP_ID" >"$CUBOID_LOGS/step"
exec "$@" >>"$(printf '%s/rank-%05d.log' "$CUBOID_LOGS" "$RANK")" 2>&1
"""


def sbatch_parameters(job: Job) -> dict[str, Any]:
    """The job in submitit's names; what it has no name for stands in `additional_parameters`, and so does a range of
    nodes.
    """
    cluster, (fewest, most) = job.cluster, job.wanted
    options: dict[str, Any] = {
        "nodes": str(most) if fewest == most else f"{fewest}-{most}",
        "time": cluster.time,
        "requeue": True,
        "open-mode": "append",
        "output": f"{job.folder}/%j.log",
        "error": f"{job.folder}/%j.log",
        "comment": job.run,
    }
    if job.survives:
        options["no-kill"] = True
    if job.dependency:
        options |= {"dependency": job.dependency, "kill-on-invalid-dep": "yes"}
    if job.exclude:
        options["exclude"] = ",".join(job.exclude)
    code = f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(job.code)}${{PYTHONPATH:+:$PYTHONPATH}}"
    return {
        "job_name": job.name,
        "nodes": most,
        "ntasks_per_node": cluster.ranks_per_node,
        "cpus_per_task": cluster.cpus_per_rank,
        "gpus_per_node": cluster.gpus_per_node,
        "signal_delay_s": cluster.notice,
        "setup": [
            "set -e",
            *cluster.setup,
            "set +e",
            code,
            "trap '' TERM  # the supervisor decides what follows a signal",
        ],
        "teardown": after_lines(job),
        "use_srun": False,
        "wckey": None,
        "additional_parameters": options | {name: value or True for name, value in cluster.sbatch.items()},
    }


def after_lines(job: Job) -> list[str]:
    """What the script does when the supervisor has ended: its status is the job's. One that was killed (by the kernel,
    for memory) could put nothing back into the queue, so the script does, as often as `requeues` says.
    """
    killed = shlex.quote(f"{job.folder}/killed")
    return [
        "status=$?",
        'if [ "$status" -eq 137 ] || [ "$status" -eq 139 ]; then',
        f'    echo "the supervisor was killed by signal $((status - 128))" | tee -a {killed}',
        f'    [ "$(wc -l <{killed})" -gt {job.cluster.requeues} ] || scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$status"',
    ]


def script_of(job: Job) -> str:
    """The batch script of a job, as submitit submits it."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{shlex.quote(python_of(job.cluster))} -u -m submitit.core._submit {shlex.quote(job.folder)}"
    text: str = _make_sbatch_string(command=command, folder=job.folder, **sbatch_parameters(job))
    return text


def python_of(cluster: ClusterConfig) -> str:
    """The interpreter on the nodes."""
    return cluster.python or sys.executable


def srun_words(
    job: Job, hosts: tuple[str, ...], command: tuple[str, ...], *, tasks_a_node: int, tolerant: bool
) -> list[str]:
    """`srun` of a command, `tasks_a_node` times on each of some hosts. tolerant: a task that fails, or a node that
    can't be reached, doesn't end the others.
    """
    return [
        "srun",
        f"--nodes={len(hosts)}",
        f"--ntasks={len(hosts) * tasks_a_node}",
        f"--ntasks-per-node={tasks_a_node}",
        f"--cpus-per-task={job.cluster.cpus_per_rank}",
        *([f"--gpus-per-node={gpus}"] if (gpus := job.cluster.gpus_per_node) else []),
        f"--nodelist={','.join(hosts)}",
        f"--kill-on-bad-exit={0 if tolerant else 1}",
        *(["--no-kill"] if tolerant else []),
        "--overlap",
        *job.cluster.srun,
        "bash",
        f"{job.folder}/rank.sh",
        *command,
    ]
