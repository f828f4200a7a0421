"""A cluster, as its file in slurm/clusters/ describes it. It names no model; recipes name no cluster."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal


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
    """domain: GPUs that a fast link (NVLink) joins, 0 = those of a node; a domain of several nodes (NVL72: 72) is of
    neighbours in the order in which nodes are used. link, network: GB/s (10^9 bytes) a GPU, one way, within a domain
    and out of it. switch: nodes under one leaf switch, 0 = not known. spine: as network, between leaf switches; 0 = the
    same.
    """

    domain: int = 0
    link: float = 450.0
    network: float = 50.0
    switch: int = 0
    spine: float = 0.0

    def __post_init__(self) -> None:
        for name in ("domain", "switch", "spine"):
            if getattr(self, name) < 0:
                raise ValueError(f"links.{name}={getattr(self, name)} must be at least 0")
        for name in ("link", "network"):
            if not getattr(self, name) > 0:
                raise ValueError(f"links.{name}={getattr(self, name)} must be above 0")


# Options of sbatch that a job gets from elsewhere: option -> what sets it.
OWN_OPTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "nodes": "--nodes",
        "use-min-nodes": "--nodes",
        "ntasks": "ranks_per_node",
        "ntasks-per-node": "ranks_per_node",
        "gpus": "gpus, gpu_type and ranks_per_node",
        "gpus-per-node": "gpus, gpu_type and ranks_per_node",
        "gpus-per-task": "gpus, gpu_type and ranks_per_node",
        "cpus-per-task": "cpus_per_rank",
        "cpus-per-gpu": "cpus_per_rank",
        "time": "time",
        "time-min": "time",
        "signal": "notice",
        "requeue": "requeues",
        "no-requeue": "requeues",
        "job-name": "the run's name",
        "output": "the run directory",
        "error": "the run directory",
        "open-mode": "the run directory",
        "chdir": "the run directory",
        "comment": "the run directory",
        "dependency": "--after",
        "kill-on-invalid-dep": "--after",
        "array": "--array",
        "exclude": "health: a node that fails is left out",
        "no-kill": "spare_nodes",
        "wait": "how a job is submitted",
        "wrap": "how a job is submitted",
        "parsable": "how a job is submitted",
        "test-only": "how a job is submitted",
        "distribution": "the order of ranks: neighbours on neighbouring nodes",
        "export": "environment",
    }
)
TIME: Final = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")


def time_seconds(text: str) -> float:
    """Seconds of a limit as sbatch takes it: MINUTES, M:S, H:M:S, D-H, D-H:M, D-H:M:S, UNLIMITED. Raises ValueError."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    match = TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"time={text!r} is no limit that sbatch takes: write 24:00:00 or 1-12 (a day and 12 hours)")
    parts = [int(part) for part in match["rest"].split(":")]
    if match["days"] is None:
        hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    else:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def check_sbatch(options: Mapping[str, str]) -> None:
    """Raises ValueError for an option that isn't spelt as sbatch spells it, and for one that another key sets."""
    for option in options:
        name = option.lstrip("-").replace("_", "-")
        if name in OWN_OPTIONS:
            raise ValueError(f"sbatch.{option} is set by {OWN_OPTIONS[name]}: leave it out of sbatch")
        if option != name or len(name) < 2:
            spelt = name if len(name) > 1 else "its long name"
            raise ValueError(f"sbatch.{option}: write {spelt}, without dashes in front")


@dataclass(frozen=True)
class ClusterConfig:
    """name: of the cluster. ranks_per_node: one a GPU, or processes where there are none. gpus: whether a node has
    them, and sbatch is asked for them (unless its own `gres` asks). gpu_type: as sbatch calls it, where a partition
    has several. cpus_per_rank: cores of a rank. time: limit of a job, as sbatch takes it. notice: seconds before that
    limit, or before the end of a preempted job's grace, at which ranks are told to save; above the longest step and
    save together. sbatch: any other of its options by their long names, "" where one takes no value. srun: arguments
    of every step (containers, for one). setup: lines of shell before anything else. environment: variables of every
    process. python: interpreter on the nodes, by default the one that submits. scratch: directory on each node's own
    disk. spare_nodes: asked for and held idle, for one that fails. requeues: how often in a row a job may come back
    without a new checkpoint. restarts: likewise, within its allocation. nodes_file: where bad nodes are remembered, by
    default in the home directory.
    """

    name: str = ""
    ranks_per_node: int = 8
    gpus: bool = True
    gpu_type: str = ""
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
        if self.notice >= time_seconds(self.time):
            raise ValueError(f"notice={self.notice} s must be below time={self.time} ({time_seconds(self.time):g} s)")
        if not self.gpus and self.gpu_type:
            raise ValueError(f"gpu_type={self.gpu_type!r} with gpus=false: leave it out, or set gpus=true")
        if self.links.domain > self.ranks_per_node and self.links.domain % self.ranks_per_node:
            raise ValueError(
                f"links.domain={self.links.domain} joins no whole number of nodes of ranks_per_node="
                f"{self.ranks_per_node}: set it to a multiple of them, or to 0 for one node"
            )
        check_sbatch(self.sbatch)

    @property
    def gpus_per_node(self) -> str | None:
        """What sbatch's option of that name is given: 8, or h100:8; None where it isn't."""
        if not self.gpus or "gpu" in self.sbatch.get("gres", ""):
            return None
        return f"{self.gpu_type}:{self.ranks_per_node}".lstrip(":")
