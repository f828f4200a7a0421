"""The stages of a run as a chain of jobs: what is handed over, what the history says of it, and its end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from histories import DIED, Board, write_run
from tiny import recipe_tree

from framework.checkpoint.manifest import Progress
from framework.history import Event, History
from framework.launch import chain, stages, submit
from framework.launch.account import outside
from framework.launch.cancel import cancel
from framework.launch.chain import build_chain, submit_chain
from framework.launch.cluster import load_cluster
from framework.launch.config import ClusterConfig
from framework.launch.facts import open_job, read_facts, waiting_jobs
from framework.launch.job import Job
from framework.launch.page import page
from framework.launch.queue import JobState
from framework.launch.script import script_of
from framework.launch.status import state_of, status_of
from framework.launch.submit import Request, check_free, dependency_of
from framework.run import Resolved, Verdict, resolve_invocation

LAB = Path(__file__).parents[3] / "slurm" / "clusters" / "lab.yaml"


@pytest.fixture
def cluster(tmp_path: Path) -> ClusterConfig:
    return replace(load_cluster(LAB), nodes_file=str(tmp_path / "nodes.json"))


@pytest.fixture
def invocation(tiny_shards: Path, tmp_path: Path) -> Resolved:
    """Two nodes of two ranks, then one."""
    tree: dict[str, Any] = recipe_tree(tiny_shards, tmp_path / "run") | {"train": {}}
    tree["stages"] = [
        {"name": "wide", "exit": {"steps": 3}, "mesh": {"dp": 4}},
        {"name": "ring", "exit": {"samples": 8}, "mesh": {"dp": 1, "ring": 2}, "watch": {"step": 7.0}},
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return resolve_invocation(path, ["log.every=1"])


def test_a_job_for_each_stage(invocation: Resolved, cluster: ClusterConfig, tmp_path: Path) -> None:
    links, notes = build_chain(invocation, cluster, Request())
    assert [(link.job.nodes, link.job.name, link.job.dependency) for link in links] == [
        ((2, 2), "cuboid-run-wide", ""),
        ((1, 1), "cuboid-run-ring", "afterok:<wide>"),
    ]
    for number, link in enumerate(links):
        folder = str(tmp_path / "run" / "jobs" / f"{number:04}")
        assert link.job.folder == folder
        assert link.job.command[3:] == ("train", f"{folder}/recipe.yaml", "log.every=1", "--stage", str(number))
    assert links[1].job.watch.step == 7.0 and links[1].job.mesh.ring == 2
    assert "#SBATCH --dependency='afterok:<wide>'" in script_of(links[1].job)
    assert "#SBATCH --dependency" not in script_of(links[0].job)
    assert links[1].lines()[0] == "stage    ring, 8 samples" and "waits    for job <wide>" in links[1].lines()
    # 8 samples, 4 a step on average; the other stage's steps are what it says.
    assert links[0].lines()[1].startswith(f"run      {tmp_path / 'run'}, 3 steps, ")
    assert links[1].lines()[1].startswith(f"run      {tmp_path / 'run'}, about 2 steps, ")
    assert notes == [] and not (tmp_path / "run").exists()


def test_a_finished_run_says_what_is_ignored(
    invocation: Resolved, cluster: ClusterConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe file with more stages than the run has: its diff, and how they are added."""
    over = Progress(step=9, stage=len(invocation.recipe.stages), stage_step=9)
    noted = replace(invocation, notes=("+- name: third",))
    for module in (stages, chain):
        monkeypatch.setattr(module, "read_progress", lambda recipe: over)
    assert stages.train_here(noted, []) == 0
    said = capsys.readouterr().out
    assert said.startswith("+- name: third\n") and "stages are done, 9 steps" in said and "as stages=[{name:" in said
    with pytest.raises(ValueError, match=r"^\+- name: third\n.* is finished"):
        build_chain(noted, cluster, Request())


def test_what_a_stage_cant_is_refused_by_its_name(invocation: Resolved, cluster: ClusterConfig) -> None:
    stages = [dict(stage) for stage in invocation.recipe.stages]
    stages[1]["mesh"] = {"dp": 3}
    with pytest.raises(
        ValueError, match=r"stages\[1\] \(ring\): the mesh has 3 \* 1 \* 1 \* 1 = 3 ranks, which aren't"
    ):
        build_chain(replace(invocation, recipe=replace(invocation.recipe, stages=stages)), cluster, Request())


def test_they_are_submitted_one_after_another(
    invocation: Resolved, cluster: ClusterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the one before; where one is refused, none stays."""
    run, board, handed = tmp_path / "run", Board(), []

    def take(jobs: list[Job], *, after: str | None) -> list[str]:
        if refuse and handed:
            raise ValueError("sbatch refused the job")
        handed.append((jobs[0].dependency, after))
        job = str(70 + len(handed))
        History(run).add(Event("submitted", float(len(handed)), job=job, after=after))
        return [job]

    monkeypatch.setattr(chain, "submit_all", take)
    monkeypatch.setattr(chain, "find_scheduler", lambda: board)
    refuse = True
    with pytest.raises(ValueError, match="sbatch refused"):
        submit_chain(build_chain(invocation, cluster, Request())[0], invocation.recipe)
    assert board.cancelled == ["71"] and waiting_jobs(History(run).events()) == []
    assert not (run / "jobs" / "0001").exists()
    refuse = False
    handed.clear()
    links, _ = build_chain(invocation, cluster, Request())
    assert submit_chain(links, invocation.recipe) == ["71", "72"]
    assert handed == [("", None), ("afterok:71", "71")]
    assert [Path(link.job.folder).name for link in links] == ["0001", "0002"]
    assert "afterok:71" in (run / "jobs" / "0002" / "script.sh").read_text()
    assert "name: ring" in (run / "jobs" / "0002" / "recipe.yaml").read_text()


CHAIN = [
    Event("submitted", 1.0, job="7"),
    Event("submitted", 2.0, job="8", after="7"),
    Event("submitted", 3.0, job="9", after="8"),
    Event("started", 4.0, job="7", nodes=("n0",)),
    Event("launched", 5.0, job="7", attempt=0, nodes=("n0",), ranks=2),
]
DONE = Event("finished", 9.0, job="7", outcome="done", reason="stage wide is done, at step 3")
FATAL = Event("finished", 9.0, job="7", outcome="fatal", reason="no such file")


@pytest.mark.parametrize(
    ("events", "job", "waiting", "state"),
    [
        (CHAIN, "7", ["7", "8", "9"], "STARTING"),
        ([*CHAIN, DONE], "8", ["8", "9"], "QUEUED"),
        ([*CHAIN, FATAL], None, [], "FATAL"),
        ([CHAIN[0], replace(FATAL, time=1.5), CHAIN[1], CHAIN[2]], None, [], "FATAL"),
        ([*CHAIN, FATAL, Event("submitted", 10.0, job="12"), Event("submitted", 11.0, job="13", after="12")], "12",
         ["12", "13"], "QUEUED"),
    ],
)  # fmt: skip
def test_which_job_is_open(
    tmp_path: Path, events: list[Event], job: str | None, waiting: list[str], state: str
) -> None:
    run = write_run(tmp_path / "run", events)
    assert (open_job(events), waiting_jobs(events)) == (job, waiting)
    assert state_of(read_facts(run, 20.0))[0] == state
    assert outside(events, 20.0) == {"7": "between", "8": "queue", "12": "queue", None: "idle"}[job]


def test_a_chain_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is submitted while a job of it is left, another run waits for its last, and it is cancelled whole."""
    run = write_run(tmp_path / "run", CHAIN)
    monkeypatch.setattr(submit, "find_scheduler", lambda: Board(JobState("7", "RUNNING"), JobState("9", "CANCELLED")))
    with pytest.raises(ValueError, match="has a job already: 7, RUNNING"):
        check_free(run)
    assert dependency_of(run) == "afterok:9"
    assert dependency_of(write_run(tmp_path / "ahead", [*CHAIN, DONE])) == "afterok:9"
    with pytest.raises(ValueError, match="that run ended, fatal: no such file"):
        dependency_of(write_run(tmp_path / "failed", [*CHAIN, FATAL]))
    board = Board(JobState("7", "RUNNING"), JobState("8", "PENDING"), JobState("9", "PENDING"))
    lines = list(cancel(read_facts(run, 20.0, board), board))
    assert board.cancelled == ["8", "9", "7"] and len(lines) == 3
    assert waiting_jobs(History(run).events()) == []


def test_the_page_says_which_stage(tmp_path: Path) -> None:
    beat = replace(DIED, stage="half-rate")
    run = write_run(tmp_path / "run", [], [beat])
    assert "  stage         half-rate, to step 1,000 at the latest" in list(page(status_of(read_facts(run, 1500.0))))
    plain = write_run(tmp_path / "plain", [], [DIED])
    assert not any(line.startswith("  stage") for line in page(status_of(read_facts(plain, 1500.0))))
    verdicts = {0: (Verdict("done", 130, stage="half-rate", follow=2), 1466.0)}
    ended = status_of(read_facts(write_run(tmp_path / "ended", [], [beat], verdicts), 1500.0))
    assert (ended.state, ended.detail) == (
        "STOPPED",
        "stage half-rate is done; the same command goes on with the next",
    )
