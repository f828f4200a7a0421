"""A cluster, as its file in slurm/clusters/ describes it. It names no model; recipes name no cluster."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class HealthConfig:
    """What a node must show before ranks start on it.

    level: off; basic, without torch (disk, clock, memory, `command`); full, also a matrix product on every GPU and
    all-reduces within and across nodes, with their bandwidths. disk: free gigabytes (10^9 bytes) in the cluster's
    scratch. shm: likewise in /dev/shm, which NCCL uses; a container's 64 MB aren't enough. host: available gigabytes of
    the node's memory. clock: seconds by which its clock may differ from the others'. memory: free gigabytes of a GPU.
    tflops: of a GPU's bfloat16 matrix product; link, network: GB/s of an all-reduce within a node, and across; 0 =
    anything. command: of the site, run by a shell on each node; a status other than 0 means that the node is bad.
    timeout: seconds for all of it. expiry: hours for which a node that failed is left out.
    """

    level: Literal["off", "basic", "full"] = "full"
    disk: float = 5.0
    shm: float = 0.25
    host: float = 2.0
    clock: float = 2.0
    memory: float = 0.0
    tflops: float = 0.0
    link: float = 0.0
    network: float = 0.0
    command: str = ""
    timeout: float = 120.0
    expiry: float = 72.0

    def __post_init__(self) -> None:
        for name in ("disk", "shm", "host", "clock", "memory", "tflops", "link", "network"):
            if getattr(self, name) < 0:
                raise ValueError(f"health.{name}={getattr(self, name)} must be at least 0")
        for name in ("timeout", "expiry"):
            if getattr(self, name) <= 0:
                raise ValueError(f"health.{name}={getattr(self, name)} must be above 0")


@dataclass(frozen=True)
class LinkConfig:
    """domain: GPUs that a fast link (NVLink) joins. link, network: GB/s (10^9 bytes) a GPU, one way, within a domain
    and out of it. switch: nodes under one leaf switch, 0 = not known.
    """

    domain: int = 8
    link: float = 450.0
    network: float = 50.0
    switch: int = 0


@dataclass(frozen=True)
class ClusterConfig:
    """name: of the cluster. ranks_per_node: one a GPU, or processes where there are none. gpus: whether sbatch is asked
    for them. cpus_per_rank: cores of a rank. time: limit of a job, as sbatch takes it. notice: seconds before that limit,
    or before the end of a preempted job's grace, at which ranks are told to save; above the longest step and save
    together. sbatch: any other of its options. srun: arguments of every step (containers, for one). setup: lines of shell
    before anything else. environment: variables of every process. python: interpreter on the nodes, by default the
    one that submits. scratch: directory on each node's own disk. spare_nodes: asked for and held idle, for one that
    fails. requeues: how often in a row a job may come back without a new checkpoint. restarts: likewise, within its
    allocation. nodes_file: where bad nodes are remembered, by default in the home directory.
    """

    name: str = ""
    ranks_per_node: int = 8
    gpus: bool = True
    cpus_per_rank: int = 8
    time: str = "24:00:00"
    notice: int = 180
    sbatch: dict[str, str] = field(default_factory=dict)
    srun: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    python: str = ""
    scratch: str = "/tmp"
    spare_nodes: int = 0
    requeues: int = 3
    restarts: int = 3
    nodes_file: str = ""
    health: HealthConfig = field(default_factory=HealthConfig)
    links: LinkConfig = field(default_factory=LinkConfig)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"name={self.name!r}: give the cluster a name, it goes into file names")
        for name in ("ranks_per_node", "cpus_per_rank", "notice"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("spare_nodes", "requeues", "restarts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
