"""`cuboid submit`: recipe and cluster -> job -> the scheduler.

Everything that can be refused is refused here, in about a second, before anything waits in a queue. What is submitted
is kept: the recipe with its bases and words (RUN/jobs/0000/recipe.yaml) and the code (RUN/jobs/code-...), so that an
attempt in three days runs what was submitted, whatever has happened to the working tree.
"""

import dataclasses
import json
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from framework.history import FILE, JOBS, Event, History, now
from framework.launch.check import check_data, check_memory, check_start, check_store
from framework.launch.config import ClusterConfig
from framework.launch.facts import is_place, read_facts, waiting_jobs
from framework.launch.job import Job
from framework.launch.nodes import excluded, nodes_path
from framework.launch.placement import check_placement
from framework.launch.queue import OVER, find_scheduler
from framework.launch.script import RANK_SCRIPT, python_of, sbatch_parameters, script_of
from framework.launch.snapshot import take_snapshot
from framework.launch.supervisor import supervise
from framework.parallel.config import MeshShape, nearest_shapes, resolve_mesh
from framework.recipe import Recipe, bucket_degrees, to_yaml
from framework.run import CHECKPOINTS, Resolved, write_atomically
from framework.stages.merge import Stage
from framework.stages.recipes import recipe_at


@dataclass(frozen=True)
class Request:
    """What a person asks for beside recipe and cluster. nodes: "4", "2-4" or None for what the recipe's mesh needs.
    after: a run whose end this one waits for.
    """

    nodes: str | None = None
    after: Path | None = None


def node_range(nodes: str | None, recipe: Recipe, cluster: ClusterConfig) -> tuple[int, int]:
    """Fewest and most nodes. Raises ValueError where the mesh doesn't fit them, with what does."""
    mesh, ranks = recipe.mesh, cluster.ranks_per_node
    replica, heads = mesh.ring * mesh.ulysses * mesh.tp, recipe.model.num_attention_heads
    if nodes is None:
        if mesh.dp == "auto":
            raise ValueError("mesh.dp=auto takes the ranks that there are: say how many nodes by --nodes")
        world = mesh.dp * replica
        if world % ranks:
            near = "; ".join(str(m) for m in nearest_shapes(mesh, -(-world // ranks) * ranks, heads=heads))
            raise ValueError(
                f"the mesh has {mesh.dp} * {mesh.ring} * {mesh.ulysses} * {mesh.tp} = {world} ranks, which aren't "
                f"whole nodes of {ranks} ({cluster.name}); the nearest meshes that are: {near}"
            )
        return world // ranks, world // ranks
    low, dash, high = nodes.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()):
        raise ValueError(f"--nodes {nodes} must be a number, or a range like 2-4")
    fewest, most = int(low), int(high) if dash else int(low)
    if not 1 <= fewest <= most:
        raise ValueError(f"--nodes {nodes}: from 1 on, and the larger number last")
    if fewest < most and mesh.dp != "auto":
        raise ValueError(
            f"--nodes {nodes} lets the number of ranks change, mesh.dp={mesh.dp} doesn't: set mesh.dp=auto"
        )
    for count in (fewest, most):
        resolve_mesh(mesh, num_ranks=count * ranks, heads=heads)
    return fewest, most


def shapes_of(recipe: Recipe, cluster: ClusterConfig, nodes: tuple[int, int]) -> list[MeshShape]:
    """The meshes of the fewest and of the most nodes."""
    counts = dict.fromkeys(nodes)
    return [resolve_mesh(recipe.mesh, num_ranks=count * cluster.ranks_per_node) for count in counts]


def check_request(
    recipe: Recipe, cluster: ClusterConfig, nodes: tuple[int, int], request: Request, *, staged: bool
) -> list[str]:
    """Refuse what can't work. Returns what a person should know. Raises ValueError. staged: the recipe is a stage's."""
    notes: list[str] = []
    gpus = cluster.ranks_per_node if cluster.gpus else 0
    for shape in shapes_of(recipe, cluster, nodes):
        check_start(recipe, num_ranks=shape.world_size, num_gpus=gpus)
        if gpus:
            check_memory(recipe, shape, cluster.gpu_type)
        notes += check_placement(shape, cluster.ranks_per_node, cluster.links, recipe)
    check_data(recipe)
    waits = recipe.init_from if request.after and same_place(recipe.init_from, request.after) else ""
    done = check_store(replace(recipe, init_from="") if waits else recipe)
    if done >= recipe.train.steps and not staged:
        raise ValueError(f"the run {recipe.run} is finished: {done} of {recipe.train.steps} steps are done")
    return list(dict.fromkeys(notes))


def same_place(init_from: str, run: Path) -> bool:
    """Whether a run begins with the weights of another."""
    return bool(init_from) and Path(init_from).resolve() == run.resolve()


def build_job(
    invocation: Resolved, cluster: ClusterConfig, request: Request, *, stage: Stage | None = None, ahead: int = 0
) -> tuple[Job, list[str]]:
    """The job of a checked start, and what a person should know of it. Writes nothing. Raises ValueError.

    stage: that the job trains, of a recipe with stages. ahead: jobs of the same submission before this one.
    """
    recipe = recipe_at(invocation.recipe, None if stage is None else stage.index)
    nodes = node_range(request.nodes, recipe, cluster)
    notes = check_request(recipe, cluster, nodes, request, staged=stage is not None)
    run = Path(recipe.run).resolve()
    folder = run / JOBS / f"{number_of(run) + ahead:04}"
    words = [word for word in invocation.overrides if not word.startswith("run=")]
    words += [] if stage is None else ["--stage", str(stage.index)]
    job = Job(
        name=f"cuboid-{run.name}" + ("" if stage is None else f"-{stage.name}"),
        run=str(run),
        folder=str(folder),
        code="",
        command=(python_of(cluster), "-m", "framework.cli", "train", str(folder / "recipe.yaml"), *words),
        cluster=cluster,
        nodes=nodes,
        store=recipe.checkpoint.store or str(run / CHECKPOINTS),
        mesh=recipe.mesh,
        splits=tuple(bucket_degrees(recipe, index) for index in range(len(recipe.data.buckets))),
        watch=recipe.watch,
        dependency=dependency_of(request.after),
        exclude=tuple(excluded(nodes_path(cluster), time.time())),
    )
    return job, notes


def summary(job: Job, recipe: Recipe, *, estimated: bool = False) -> list[str]:
    """What a job starts, for a person. estimated: train.steps is, as samples end the stage."""
    cluster, watch = job.cluster, job.watch
    shapes = shapes_of(recipe, cluster, job.nodes)
    (fewest, most), spare = job.nodes, cluster.spare_nodes
    nodes = str(most) if fewest == most else f"{fewest} to {most}"
    meshes = " or ".join(f"{shape} = {shape.world_size} ranks" for shape in shapes)
    steps = f"about {recipe.train.steps}" if estimated else f"{recipe.train.steps}"
    return [
        f"run      {job.run}, {steps} steps, checkpoints in {job.store} every {recipe.checkpoint.every}",
        f"nodes    {nodes} of {cluster.name}, {cluster.ranks_per_node} ranks each"
        + (f", and {spare} spare" if spare else ""),
        f"mesh     {meshes}; ZeRO stage {recipe.zero.stage} ({recipe.zero.engine})",
        f"limits   {cluster.time} of time, told {cluster.notice} s ahead; without a sign of life: start "
        f"{watch.start:g} s, step {watch.step:g} s, save {watch.save:g} s",
        f"failures {cluster.restarts} restarts on its nodes, then {cluster.requeues} times through the queue, without "
        "a new checkpoint in between",
        *([f"waits    for job {job.dependency.removeprefix('afterok:')}"] if job.dependency else []),
        *([f"without  {', '.join(job.exclude)}, found bad"] if job.exclude else []),
    ]


def number_of(run: Path) -> int:
    """The next submission's number."""
    numbers = [int(p.name) for p in (run / JOBS).glob("*") if p.name.isdecimal()]
    return max(numbers, default=-1) + 1


def dependency_of(after: Path | None) -> str:
    """sbatch's --dependency of a run whose end is waited for; "" where it has ended well. Raises ValueError where it
    never will.
    """
    if after is None:
        return ""
    events = History(after).events()
    submitted = next((event for event in reversed(events) if event.event == "submitted"), None)
    if submitted is None:
        raise ValueError(f"--after {after}: no job of that run was ever submitted: cuboid submit it first")
    last = next((event for event in reversed(events) if event.event in ("finished", "cancelled")), None)
    if last is not None and submitted.job not in waiting_jobs(events):
        if last.outcome == "done":
            return ""
        raise ValueError(
            f"--after {after}: that run ended, {last.outcome or 'cancelled'}: {last.reason or 'by a person'}"
        )
    return f"afterok:{submitted.job}"


def check_free(run: Path) -> None:
    """Raises ValueError where a job of the run is queued or running, or ranks that were started by hand."""
    if run.is_dir() and is_place(run):
        facts = read_facts(run, now())
        if facts.local and facts.newest is not None and facts.newest.alive:
            raise ValueError(f"the run {run} is being trained, started by hand. `cuboid cancel {run}` ends it")
    events = History(run).events()
    submitted = [event.job for event in events if event.event == "submitted" and event.job is not None]
    for job in dict.fromkeys([*submitted[-1:], *waiting_jobs(events)]):
        state = find_scheduler().job(job)
        if state is None or state.state in OVER:
            continue
        raise ValueError(f"the run {run} has a job already: {state.job}, {state.state}. `cuboid cancel {run}` ends it")


def write_job(job: Job, recipe: Recipe) -> Job:
    """Make a job's folder: code, recipe, scripts. Returns the job with its code."""
    folder = Path(job.folder)
    folder.mkdir(parents=True)
    job = replace(job, code=str(take_snapshot(folder.parent)))
    write_atomically(folder / "recipe.yaml", to_yaml(replace(recipe, run=job.run)))
    write_atomically(folder / "rank.sh", RANK_SCRIPT)
    write_atomically(folder / "script.sh", script_of(job))
    write_atomically(folder / "job.json", json.dumps(dataclasses.asdict(job), indent=1) + "\n")
    return job


def discard(job: Job) -> None:
    """Take back what `write_job` has written of a job that isn't submitted."""
    folder = Path(job.folder)
    shutil.rmtree(folder, ignore_errors=True)
    if not any(path.name.isdecimal() or path.name == FILE for path in folder.parent.iterdir()):
        for path in folder.parent.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        shutil.rmtree(folder.parent, ignore_errors=True)
        with suppress(OSError):  # which holds more than that
            Path(job.run).rmdir()


def submit_all(jobs: Sequence[Job], *, after: str | None = None) -> list[str]:
    """Hand jobs to the scheduler: one, or several of the same shape as an array. Their numbers. Raises ValueError
    where there is no scheduler here, or it refuses them. after: the job of the run's stage before.
    """
    import submitit

    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ValueError("there is no sbatch on the PATH: submit from a machine of the cluster, or see --dry-run")
    first = jobs[0]
    folder = Path(first.folder)
    executor = submitit.SlurmExecutor(folder=folder, python=shlex.quote(python_of(first.cluster)))
    executor.update_parameters(**sbatch_parameters(first))
    try:
        made = executor.map_array(supervise, jobs) if len(jobs) > 1 else [executor.submit(supervise, first)]
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(f"sbatch refused the job: {str(error).strip()}") from None
    for job, handed in zip(jobs, made, strict=True):
        event = Event("submitted", now(), job=handed.job_id, cluster=job.cluster.name, nodes=None, after=after)
        History(Path(job.run)).add(event)
    return [handed.job_id for handed in made]
