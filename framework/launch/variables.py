"""The environment of a cluster's processes: what every rank gets, below what the cluster's file says."""

from pathlib import Path

from framework.environment import RANK_DEFAULTS
from framework.launch.config import ClusterConfig


def rank_environment(cluster: ClusterConfig, user: str, *, attempt: Path | None = None) -> dict[str, str]:
    """The variables of every rank on a cluster; RANK and its like come on top. Pure.

    user: whose caches they are, as a node's disk is shared. attempt: its directory, into which the last collectives are
    dumped when one times out: ATTEMPT/logs/collectives-7 of rank 7, for `torchfrtrace ATTEMPT/logs -p collectives-`.
    The directory must be there, torch makes none.
    """
    caches = Path(cluster.scratch) / f"cuboid-{user}"
    variables = {
        **RANK_DEFAULTS,
        "PYTHONSAFEPATH": "1",  # `python -m` would take a checkout in the working directory for the job's code
        "OMP_NUM_THREADS": str(cluster.cpus_per_rank),
        # Compiled kernels lie on the node's disk: thousands of small files, and locks that network disks don't keep.
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TORCH_EXTENSIONS_DIR": str(caches / "extensions"),
    }
    if not cluster.gpus:
        variables["DS_ACCELERATOR"] = "cpu"
    else:
        # 3 ends the process without waiting for communicators that may hang themselves (torch's own default).
        variables["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "3"
        if attempt is not None:
            variables |= {
                "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
                "TORCH_FR_DUMP_TEMP_FILE": str(attempt / "logs" / "collectives-"),
            }
    return variables | cluster.environment
