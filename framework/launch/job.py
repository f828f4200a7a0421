"""What is handed to the scheduler: everything that the supervisor in the batch script needs to know."""

from dataclasses import dataclass, field

from framework.launch.config import ClusterConfig
from framework.parallel.config import MeshConfig
from framework.programs.config import WatchConfig


@dataclass(frozen=True)
class Job:
    """One submission of a run.

    run: its directory, absolute. store: of its checkpoints ("" = RUN/checkpoints). folder: RUN/jobs/0000, this
    submission's own. code: the snapshot that ranks import. command: of a rank. nodes: fewest and most that ranks run on
    (spare ones not counted). mesh: which numbers of ranks it allows, with the buckets' own
    (ring, ulysses), splits. dependency, exclude: as sbatch takes them.
    """

    name: str
    run: str
    folder: str
    code: str
    command: tuple[str, ...]
    cluster: ClusterConfig
    nodes: tuple[int, int]
    store: str = ""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    splits: tuple[tuple[int, int], ...] = ()
    watch: WatchConfig = field(default_factory=WatchConfig)
    dependency: str = ""
    exclude: tuple[str, ...] = ()

    @property
    def wanted(self) -> tuple[int, int]:
        """Fewest and most nodes to ask for, spare ones included."""
        spare = self.cluster.spare_nodes
        return self.nodes[0] + spare, self.nodes[1] + spare

    @property
    def survives(self) -> bool:
        """Whether the job can go on in its allocation when a node is lost."""
        return self.cluster.spare_nodes > 0 or self.nodes[0] < self.nodes[1]
