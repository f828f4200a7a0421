"""Jobs of light ranks (tests/slurm/light_rank.py) on the lab, and what tests ask of them."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from slurm_lab import Lab

from framework.heartbeat import Heartbeat, read_heartbeat
from framework.history import JOBS, Event, History
from framework.launch.config import ClusterConfig, HealthConfig
from framework.launch.facts import read_facts
from framework.launch.job import Job
from framework.launch.page import page
from framework.launch.script import RANK_SCRIPT
from framework.launch.status import status_of
from framework.launch.submit import submit_all
from framework.parallel.config import MeshConfig
from framework.programs.config import WatchConfig
from framework.run import Run, Verdict, latest_attempt, read_verdict

REPOSITORY = Path(__file__).parent.parent
STATES = {"done": "DONE", "cancelled": "CANCELLED", "fatal": "FATAL"}
RANK = Path(__file__).parent / "slurm" / "light_rank.py"


@dataclass(frozen=True)
class Plan:
    """What a light rank does (light_rank.py)."""

    store: str
    steps: int = 200
    every: int = 5
    pause: float = 0.05
    save: float = 0.0
    start: float = 0.0
    error: str = ""
    crash: int = 0
    slow: int = -1


@dataclass
class LightRun:
    """A run of light ranks, and its job."""

    lab: Lab
    job: Job
    id: str = ""

    @property
    def path(self) -> Path:
        return Path(self.job.run)

    @property
    def run(self) -> Run:
        """The newest attempt."""
        return Run(self.path, latest_attempt(self.path))

    def submit(self) -> None:
        self.lab.enter()
        (self.id,) = submit_all([self.job])

    def events(self, name: str | None = None) -> list[Event]:
        events = History(self.path).events()
        return [event for event in events if name is None or event.event == name]

    def last(self, name: str) -> Event:
        return self.events(name)[-1]

    def beat(self) -> Heartbeat | None:
        return read_heartbeat(self.run)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The nodes of the newest attempt."""
        hosts = self.last("launched").nodes
        assert hosts is not None
        return hosts

    @property
    def resumed(self) -> int:
        """The step from which the newest attempt went on."""
        beat = self.beat()
        assert beat is not None
        return beat.resumed

    def step(self) -> int:
        """Steps that the newest attempt has done; -1 before its first."""
        beat = self.beat()
        return beat.step if beat is not None and beat.phase in ("step", "save") else -1

    def verdict(self, attempt: int | None = None) -> Verdict | None:
        return read_verdict(self.run if attempt is None else Run(self.path, attempt))

    def steps(self) -> list[int]:
        """What metrics.jsonl says was done."""
        return [json.loads(line)["step"] for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def totals(self) -> list[int]:
        return [json.loads(line)["total"] for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def rank(self, number: int, attempt: int | None = None) -> tuple[int, str]:
        """(process, node) of a rank."""
        run = self.run if attempt is None else Run(self.path, attempt)
        pid, node = (run.attempt_path / "pids" / str(number)).read_text().split()
        return int(pid), node

    def kill(self, number: int, name: int = signal.SIGKILL) -> str:
        """Send a rank a signal; its node."""
        pid, node = self.rank(number)
        os.kill(pid, name)
        return node

    def wait(self, what: Callable[[], bool], seconds: float = 40) -> float:
        """Until something holds; how long it took."""
        began = time.monotonic()
        while not what():
            if time.monotonic() - began > seconds:
                raise AssertionError(f"not within {seconds} s:\n{self.story()}")
            time.sleep(0.05)
        return time.monotonic() - began

    def wait_step(self, step: int, attempt: int | None = None) -> None:
        """Until the newest attempt (or that one) is at a step."""
        self.wait(lambda: self.step() >= step and (attempt is None or self.run.attempt == attempt))

    def wait_finished(self, seconds: float = 60) -> Event:
        """Until the job has ended; `cuboid status` says the same of it, with the reason."""
        self.wait(lambda: bool(self.events("finished")), seconds)
        finished = self.last("finished")
        text = "\n".join(page(status_of(read_facts(self.path, time.time()))))
        assert STATES[str(finished.outcome)] in text and str(finished.reason)[:60] in text, text
        return finished

    def story(self) -> str:
        """What happened, for a failing test."""
        lines = [str({k: v for k, v in asdict(event).items() if v is not None}) for event in self.events()]
        logs = [f"== {path}\n{path.read_text()[-1500:]}" for path in sorted((self.path / JOBS).rglob("*.log"))]
        logs += [f"== {path}\n{path.read_text()[-800:]}" for path in sorted(self.path.glob("attempts/*/logs/*"))]
        return "\n".join([*lines, *logs, self.lab.run("squeue"), self.lab.run("sinfo", "-N", "-o", "%N %T")])


def light_cluster(folder: Path, **changes: object) -> ClusterConfig:
    cluster = ClusterConfig(
        name="lab",
        ranks_per_node=2,
        gpus=False,
        cpus_per_rank=2,
        time="00:10:00",
        notice=60,
        restarts=1,
        requeues=1,
        scratch=str(folder),
        nodes_file=str(folder / "nodes.json"),
        sbatch={"partition": "low", "exclusive": ""},
        health=HealthConfig(level="off"),
    )
    return replace(cluster, **changes)  # type: ignore[arg-type]


def light_run(
    lab: Lab,
    folder: Path,
    plan: dict[str, object] | None = None,
    *,
    nodes: tuple[int, int] = (2, 2),
    watch: WatchConfig | None = None,
    **changes: object,
) -> LightRun:
    """A run of light ranks that isn't submitted yet. changes: of the cluster."""
    run = folder / "run"
    jobs = run / JOBS / "0000"
    jobs.mkdir(parents=True)
    store = run / "checkpoints"
    (jobs / "plan.json").write_text(json.dumps(asdict(replace(Plan(str(store)), **(plan or {})))))  # type: ignore[arg-type]
    (jobs / "rank.sh").write_text(RANK_SCRIPT)
    job = Job(
        name="cuboid-light",
        run=str(run),
        folder=str(jobs),
        code=f"{REPOSITORY}:{REPOSITORY / 'tests'}",
        command=(sys.executable, str(RANK), str(jobs / "plan.json")),
        cluster=light_cluster(folder, **changes),
        nodes=nodes,
        store=str(store),
        mesh=MeshConfig(),
        watch=watch or WatchConfig(),
    )
    return LightRun(lab, job)
