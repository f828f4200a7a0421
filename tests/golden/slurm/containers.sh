#!/bin/bash

# Parameters
#SBATCH --comment=/shared/runs/a
#SBATCH --cpus-per-task=12
#SBATCH --error=/shared/runs/a/jobs/0000/%j.log
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=cuboid-a
#SBATCH --mem=0
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/a/jobs/0000/%j.log
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@180
#SBATCH --time=24:00:00

# setup
set -e
set +e
export PYTHONSAFEPATH=1 PYTHONPATH=/shared/runs/a/jobs/code-0123456789ab${PYTHONPATH:+:$PYTHONPATH}
trap '' TERM  # the supervisor decides what follows a signal

# command
export SUBMITIT_EXECUTOR=slurm
/opt/python -u -m submitit.core._submit /shared/runs/a/jobs/0000


# teardown
status=$?
if [ "$status" -eq 137 ] || [ "$status" -eq 139 ]; then
    echo "the supervisor was killed by signal $((status - 128))" | tee -a /shared/runs/a/jobs/0000/killed
    [ "$(wc -l </shared/runs/a/jobs/0000/killed)" -gt 3 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
