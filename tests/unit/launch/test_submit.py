"""What `cuboid submit` refuses, and what it hands over; nothing here is submitted."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from histories import Board, write_run
from tiny import write_recipe

from framework.history import Event
from framework.launch import submit
from framework.launch.check import check_start
from framework.launch.cluster import load_cluster
from framework.launch.config import ClusterConfig
from framework.launch.nodes import remember
from framework.launch.queue import JobState
from framework.launch.submit import Request, build_job, check_free, dependency_of, node_range, summary
from framework.launch.sweep import read_sweep
from framework.recipe import load_recipe
from framework.run import resolve_invocation

LAB = Path(__file__).parents[3] / "slurm" / "clusters" / "lab.yaml"


@pytest.fixture
def cluster(tmp_path: Path) -> ClusterConfig:
    return replace(load_cluster(LAB), nodes_file=str(tmp_path / "nodes.json"))


def test_nodes_follow_from_the_mesh(tiny_recipe: Path, cluster: ClusterConfig) -> None:
    recipe = load_recipe(tiny_recipe, ["mesh.dp=4"])
    assert node_range(None, recipe, cluster) == (2, 2)
    assert node_range("2", recipe, cluster) == (2, 2)
    auto = load_recipe(tiny_recipe, ["mesh.dp=auto"])
    assert node_range("2-4", auto, cluster) == (2, 4)


@pytest.mark.parametrize(
    ("words", "nodes", "part"),
    [
        (["mesh.dp=auto"], None, "say how many nodes by --nodes"),
        (["mesh.dp=3"], None, "3 * 1 * 1 * 1 = 3 ranks, which aren't whole nodes of 2 (lab)"),
        (["mesh.dp=4"], "2-4", "mesh.dp=4 doesn't: set mesh.dp=auto"),
        (["mesh.dp=4"], "3", "dp * ring * ulysses * tp == world_size doesn't hold"),
        (["mesh.dp=auto"], "two", "must be a number, or a range like 2-4"),
        (["mesh.dp=auto"], "4-2", "the larger number last"),
        (["mesh.dp=auto"], "0", "from 1 on"),
        (["mesh.dp=auto", "mesh.ulysses=2", "mesh.ring=2"], "1", "one replica alone needs 4 ranks"),
    ],
)
def test_nodes_that_dont_fit(
    tiny_recipe: Path, cluster: ClusterConfig, words: list[str], nodes: str | None, part: str
) -> None:
    with pytest.raises(ValueError) as error:
        node_range(nodes, load_recipe(tiny_recipe, words), cluster)
    assert part in str(error.value)


def test_meshes_that_are_named_split_the_heads(tiny_recipe: Path, cluster: ClusterConfig) -> None:
    """The tiny model has 2 heads. By factors alone ulysses=4 on 8 ranks, and 3 and 6 on 6, are as near as others."""
    recipe = load_recipe(tiny_recipe, ["mesh.dp=3", "mesh.ulysses=2"])
    big = replace(cluster, ranks_per_node=8)
    with pytest.raises(ValueError, match=r"the nearest meshes that are: dp=4 ring=1 ulysses=2 tp=1; dp=2 ring=2 ul"):
        node_range(None, recipe, big)
    few = load_recipe(tiny_recipe, ["mesh.dp=1", "mesh.ulysses=2"])
    for refused in (lambda: node_range("3", few, cluster), lambda: check_start(few, num_ranks=6, num_gpus=0)):
        with pytest.raises(ValueError) as error:
            refused()
        named = str(error.value).partition("the nearest meshes of 6 ranks: ")[2].split("; ")
        assert {"dp=3 ring=1 ulysses=2 tp=1", "dp=1 ring=3 ulysses=2 tp=1"} < set(named)
        assert not any(word in mesh for mesh in named for word in ("ulysses=3", "ulysses=6"))


def test_a_job(tiny_recipe: Path, tmp_path: Path, cluster: ClusterConfig) -> None:
    remember(tmp_path / "nodes.json", "node3", "no GPU", time.time(), 72.0)
    words = ["mesh.dp=auto", "mesh.ulysses=2", f"run={tmp_path}/other", "train.steps=9"]
    invocation = resolve_invocation(tiny_recipe, words)
    job, notes = build_job(invocation, replace(cluster, spare_nodes=1), Request("1-2"))
    run = str(tmp_path / "other")
    assert (job.run, job.folder, job.store) == (run, f"{run}/jobs/0000", f"{run}/checkpoints")
    assert job.command[1:] == ("-m", "framework.cli", "train", f"{job.folder}/recipe.yaml", *words[:2], words[3])
    assert (job.nodes, job.wanted, job.survives, job.exclude, notes) == ((1, 2), (2, 3), True, ("node3",), [])
    assert not (tmp_path / "other").exists()
    text = "\n".join(summary(job, invocation.recipe))
    assert "1 to 2 of lab, 2 ranks each, and 1 spare" in text and "without  node3, found bad" in text
    assert "dp=1 ring=1 ulysses=2 tp=1 = 2 ranks or dp=2 ring=1 ulysses=2 tp=1 = 4 ranks" in text


def test_what_cant_work_is_refused(tiny_recipe: Path, tmp_path: Path, cluster: ClusterConfig) -> None:
    def refusal(*words: str, request: Request | None = None) -> str:
        with pytest.raises(ValueError) as error:
            build_job(resolve_invocation(tiny_recipe, ["mesh.dp=4", *words]), cluster, request or Request())
        return str(error.value)

    assert "tp=4" in refusal("mesh.dp=1", "mesh.tp=4")  # the model has two heads
    assert "no/such" in refusal("data.streams.0.path=no/such")
    assert "no/such" in refusal("init_from=no/such")


def test_a_run_waits_for_another(tiny_shards: Path, tmp_path: Path, cluster: ClusterConfig) -> None:
    before = write_run(tmp_path / "before", [Event("submitted", 0.0, job="17")])
    assert dependency_of(before) == "afterok:17"
    recipe = write_recipe(tmp_path, tiny_shards, ["mesh.dp=4", f"init_from={before}"])
    job, _ = build_job(resolve_invocation(recipe, []), cluster, Request(after=before))
    assert job.dependency == "afterok:17"  # its checkpoint isn't there yet, and isn't looked for
    done = [Event("submitted", 0.0, job="17"), Event("finished", 9.0, job="17", outcome="done")]
    assert dependency_of(write_run(tmp_path / "done", done)) == ""
    failed = [done[0], Event("finished", 9.0, job="17", outcome="fatal", reason="no such file")]
    with pytest.raises(ValueError, match="that run ended, fatal: no such file"):
        dependency_of(write_run(tmp_path / "failed", failed))
    with pytest.raises(ValueError, match="no job of that run was ever submitted"):
        dependency_of(tmp_path / "nowhere")


def test_one_job_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", [Event("submitted", 0.0, job="17")])
    monkeypatch.setattr(submit, "find_scheduler", lambda: Board(JobState("17", "PENDING")))
    with pytest.raises(ValueError, match="has a job already: 17, PENDING"):
        check_free(run)
    monkeypatch.setattr(submit, "find_scheduler", lambda: Board(JobState("17", "COMPLETED")))
    check_free(run)
    check_free(tmp_path / "new")


def test_sweeps(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("optimizer.lr: [1e-4, 2e-4]\noptimizer.betas: [[0.9, 0.95]]\nseed: [0, 1]\n")
    rows = [
        ["optimizer.lr=1e-4", "optimizer.betas=[0.9, 0.95]", "seed=0"],
        ["optimizer.lr=1e-4", "optimizer.betas=[0.9, 0.95]", "seed=1"],
        ["optimizer.lr=2e-4", "optimizer.betas=[0.9, 0.95]", "seed=0"],
        ["optimizer.lr=2e-4", "optimizer.betas=[0.9, 0.95]", "seed=1"],
    ]
    assert read_sweep(file) == rows
    file.write_text("- [seed=1, train.steps=5]\n- [seed=2]\n")
    assert read_sweep(file) == [["seed=1", "train.steps=5"], ["seed=2"]]
    for text in ("seed: 1", "[]", "- seed=1", "a: [1]\na: [2]"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"sweep\.yaml"):
            read_sweep(file)
